//! A connection whose client has to read: when it takes nothing for a while, writing fails and the connection ends. What
//! is buffered for it meanwhile is bounded by hyper and the socket. A stream that a program is joined to (exec, console)
//! is taken out of this: there, a client that does not read stops the program that writes, and that is what it is for.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::agent::Connections;

/// A stream that does not wait for ever until it may be written to.
#[derive(Debug)]
pub(super) struct Reading<S> {
    stream: S,
    limit: Duration,
    /// Ends when the client has taken nothing for too long; set while something waits to be written.
    patience: Option<Pin<Box<Sleep>>>,
    connections: Arc<Connections>,
}

impl<S> Reading<S> {
    pub(super) fn new(stream: S, limit: Duration, connections: Arc<Connections>) -> Self {
        Self { stream, limit, patience: None, connections }
    }

    /// The stream itself, for a program.
    pub(super) fn into_inner(self) -> S {
        self.stream
    }

    /// What a write comes to, given what the stream says.
    fn bounded<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.patience = None;
            return polled;
        }
        let limit = self.limit;
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(patience.as_mut().poll(context));
        // Whoever asks again gets the same answer.
        patience.as_mut().reset(Instant::now());
        self.connections.count_stalled();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Reading<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Reading<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.bounded(context, polled)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
