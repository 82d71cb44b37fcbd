//! The way to other agents: HTTP over TCP, one request per connection. What is said is the agent's business. Whoever
//! calls bounds the time; size is bounded here.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::agent::peers::{ANSWER_BYTES_MAX, HEAD_HEADER, PeerAnswer, PeerCall, PeerLink, SEAL_HEADER};

/// Longest head of an answer in bytes: hyper's smallest.
const HEAD_BYTES_MAX: usize = 8192;

/// The link of a real host.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HttpLink;

impl PeerLink for HttpLink {
    fn call(&self, to: SocketAddr, call: PeerCall) -> BoxFuture<'_, io::Result<PeerAnswer>> {
        exchange(to, call).boxed()
    }
}

async fn exchange(to: SocketAddr, call: PeerCall) -> io::Result<PeerAnswer> {
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
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
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
        done = exchange.as_mut() => return done,
        ended = connection.as_mut() => ended.map_err(other)?,
    }
    // The connection has ended after it delivered the answer, or without one: the exchange knows.
    exchange.await
}

fn other(error: hyper::Error) -> io::Error {
    // The cause is what people understand: "connection reset", not "error reading a body".
    io::Error::other(crate::report::chain(&error))
}
