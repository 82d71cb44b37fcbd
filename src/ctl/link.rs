//! An upgraded connection: frames in, frames out. The two directions never wait for each other: outgoing frames have a
//! short queue and a task of their own, so that a guest that reads nothing cannot keep its output from being read.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::stream::{Frame, StreamError};
use crate::api::types::ErrorDetail;

/// Frames waiting to go out: enough to keep the socket busy, few enough to stop reading early.
const QUEUE_FRAMES: usize = 4;

/// Room for one read of the connection.
const READ_BYTES: usize = 64 * 1024;

/// How long a client that leaves waits for its last input to be taken.
const FINISH_LIMIT: Duration = Duration::from_secs(1);

/// Bytes read from standard input at a time: what one frame to the guest carries.
pub(super) const CHUNK_BYTES: usize = 32 * 1024;

/// The connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Reading failed.
    #[error("read from the agent")]
    Read(#[source] io::Error),
    /// What came is not a frame.
    #[error("read from the agent")]
    Frame(#[source] StreamError),
    /// A frame came that only clients send.
    #[error("the agent sent a frame that only clients send")]
    Direction,
    /// It ended before its last frame.
    #[error("the agent hung up")]
    HungUp,
    /// The agent says why it cannot go on.
    #[error("{}", .0.message)]
    Refused(ErrorDetail),
}

/// The incoming direction.
pub(super) struct Incoming {
    from: ReadHalf<TokioIo<Upgraded>>,
    buffer: BytesMut,
}

impl Incoming {
    /// The next frame; `None` at the end of the connection. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.buffer).map_err(LinkError::Frame)? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(READ_BYTES);
            if self.from.read_buf(&mut self.buffer).await.map_err(LinkError::Read)? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(LinkError::HungUp) };
            }
        }
    }
}

/// The outgoing direction.
pub(super) type Outgoing = mpsc::Sender<Frame>;

/// The task behind [`Outgoing`].
#[derive(Debug)]
pub(super) struct Writer(JoinHandle<()>);

impl Writer {
    /// Waits, but not for long, until the frames that were queued are written. The senders have to be gone.
    pub(super) async fn finish(self) {
        let _ = tokio::time::timeout(FINISH_LIMIT, self.0).await;
    }
}

/// Both directions of a connection.
pub(super) fn split(connection: Upgraded) -> (Incoming, Outgoing, Writer) {
    let (from, to) = tokio::io::split(TokioIo::new(connection));
    let (sender, frames) = mpsc::channel(QUEUE_FRAMES);
    let writer = Writer(tokio::spawn(write(to, frames)));
    (Incoming { from, buffer: BytesMut::new() }, sender, writer)
}

/// Ends when the senders are gone or the agent hung up; the reading side notices the latter as well.
async fn write(mut to: WriteHalf<TokioIo<Upgraded>>, mut frames: mpsc::Receiver<Frame>) {
    let mut bytes = BytesMut::new();
    while let Some(frame) = frames.recv().await {
        bytes.clear();
        frame.encode(&mut bytes);
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// How a feed of standard input ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FeedEnd {
    /// Standard input ended.
    Ended,
    /// The detach key was in it.
    Detached,
    /// The agent hung up.
    HungUp,
}

/// Sends standard input until it ends, or until `detach` is in it.
pub(super) async fn feed(outgoing: &Outgoing, detach: Option<u8>) -> FeedEnd {
    let mut stdin = tokio::io::stdin();
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        // A standard input that cannot be read is taken for one that ended.
        if stdin.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
            return FeedEnd::Ended;
        }
        let key = detach.and_then(|key| buffer.iter().position(|byte| *byte == key));
        let bytes = buffer.split_to(key.unwrap_or(buffer.len())).freeze();
        if outgoing.send(Frame::Stdin(bytes)).await.is_err() {
            return FeedEnd::HungUp;
        }
        if key.is_some() {
            return FeedEnd::Detached;
        }
    }
}
