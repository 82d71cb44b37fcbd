//! The way to other agents: HTTP inside of TLS, one request per connection. What is said is the agent's business.
//! Whoever calls bounds the time; size is bounded here.
//!
//! Without a fabric's key there is no TLS. With one, a host that speaks without is not spoken with, but for the time of
//! an upgrade (`fabric.plain_peers`): each call tries TLS first, so that an upgraded host is met with it at once.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::peer_tls::{PeerTls, of_tls};
use crate::agent::peers::{
    ANSWER_BYTES_MAX, Callee, HEAD_HEADER, LinkError, PeerAnswer, PeerCall, PeerLine, PeerLink, SEAL_HEADER, TlsError,
};

/// Longest head of an answer in bytes: hyper's smallest.
const HEAD_BYTES_MAX: usize = 8192;

/// Longest time for the other end to see that a connection is over, which has delivered its answer.
const CLOSE_LIMIT: Duration = Duration::from_millis(200);

/// The link of a real host.
#[derive(Debug, Default)]
pub(super) struct HttpLink {
    /// This host's certificate, if there is a key.
    tls: Option<PeerTls>,
    /// Whether hosts are spoken with that speak without TLS.
    plain_peers: bool,
    /// Those that are at the moment: it is said once.
    plain: Mutex<BTreeSet<String>>,
}

impl PeerLink for HttpLink {
    fn open(&self, to: Callee) -> BoxFuture<'_, Result<Box<dyn PeerLine>, LinkError>> {
        self.connect(to).boxed()
    }
}

/// A connection that nothing was said on yet.
struct HttpLine<S> {
    to: SocketAddr,
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + Sync + 'static> PeerLine for HttpLine<S> {
    fn call(self: Box<Self>, call: PeerCall) -> BoxFuture<'static, Result<PeerAnswer, LinkError>> {
        exchange(self.to, self.stream, call).boxed()
    }
}

impl HttpLink {
    /// The way by TLS, or as things are without a key.
    pub(super) fn new(tls: Option<PeerTls>, plain_peers: bool) -> Self {
        Self { tls, plain_peers, plain: Mutex::default() }
    }

    async fn connect(&self, to: Callee) -> Result<Box<dyn PeerLine>, LinkError> {
        let stream = connected(to.at).await?;
        let Some(tls) = &self.tls else { return Ok(Box::new(HttpLine { to: to.at, stream })) };
        // Something is left of the caller's time to say what it was that took too long.
        match tls.connect(stream, to.number, to.limit / 4 * 3).await {
            Ok(stream) => {
                self.note(&to, false);
                Ok(Box::new(HttpLine { to: to.at, stream }))
            }
            Err(TlsError::Plain) if self.plain_peers => {
                self.note(&to, true);
                Ok(Box::new(HttpLine { to: to.at, stream: connected(to.at).await? }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Notes how a peer speaks, and says it when it is without TLS, or with it again.
    fn note(&self, to: &Callee, is_plain: bool) {
        let mut plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        if is_plain && plain.insert(to.name.clone()) {
            tracing::warn!(
                peer = to.name, address = %to.at,
                "this peer speaks without TLS, and fabric.plain_peers lets it: what is said can be read on the way; \
                 upgrade its agent, then remove fabric.plain_peers"
            );
        } else if !is_plain && plain.remove(&to.name) {
            tracing::info!(peer = to.name, address = %to.at, "this peer speaks TLS now");
        }
    }
}

async fn connected(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request and its answer.
async fn exchange(
    to: SocketAddr,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    call: PeerCall,
) -> Result<PeerAnswer, LinkError> {
    let PeerCall { method, path, body, head } = call;
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, to.to_string())
        .header(CONNECTION, "close")
        .header(CONTENT_TYPE, "application/json");
    if let Some(head) = head {
        request = request.header(HEAD_HEADER, head);
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(io::Error::other)?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(HEAD_BYTES_MAX).handshake(TokioIo::new(stream)).await.map_err(other)?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(other)?;
        let status = answer.status().as_u16();
        let seal = answer.headers().get(SEAL_HEADER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(io::Error::other)?;
        Ok(PeerAnswer { status, body: body.to_bytes().to_vec(), seal })
    };
    // Both here, so that the connection ends when this is dropped.
    let mut exchange = std::pin::pin!(exchange);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased;
        done = exchange.as_mut() => {
            if done.is_ok() {
                // So that the other end is told that this was all, and not cut off. It has answered: nothing is wrong
                // if it cannot be told.
                let _ = timeout(CLOSE_LIMIT, connection).await;
            }
            return done;
        }
        ended = connection.as_mut() => ended.map_err(other)?,
    }
    // The connection has ended after it delivered the answer, or without one: the exchange knows.
    exchange.await
}

fn other(error: hyper::Error) -> LinkError {
    // An end that does not take a certificate says so after the handshake is over for this one.
    match error.source().and_then(of_tls) {
        Some(error) => error.into(),
        // The cause is what people understand: "connection reset", not "error reading a body".
        None => io::Error::other(crate::report::chain(&error)).into(),
    }
}
