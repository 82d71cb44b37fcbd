//! The way to HTTP stores of bundles: one GET per connection, bounded in size and time. Whatever answers is a stranger: its
//! head, its length and its pace are bounded, redirects are not followed, and what comes is compared with the bundle's id by
//! who asked.

use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HOST, HeaderMap, HeaderName,
    LOCATION, RANGE, USER_AGENT,
};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::agent::{StoreLink, StoreLinkError};

/// Most that is read ahead, and with that the longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// The port of a store that is named without one.
const PORT_DEFAULT: u16 = 80;

/// Longest wait for a store to do anything: to take the connection, to answer, to go on.
const PROGRESS_LIMIT: Duration = Duration::from_secs(10);

/// Longest time for a range: a MiB at 140 kbit/s.
const RANGE_LIMIT: Duration = Duration::from_secs(60);

/// Longest time for a whole file: the largest state at 450 kbit/s.
const FILE_LIMIT: Duration = Duration::from_secs(600);

/// Most characters of a store's words that are repeated.
const WORDS_MAX: usize = 200;

/// The way of a real host.
#[derive(Debug, Clone, Copy)]
pub(super) struct HttpStores {
    progress: Duration,
    range: Duration,
    file: Duration,
}

impl Default for HttpStores {
    fn default() -> Self {
        Self { progress: PROGRESS_LIMIT, range: RANGE_LIMIT, file: FILE_LIMIT }
    }
}

impl StoreLink for HttpStores {
    fn get<'a>(
        &'a self,
        authority: &'a str,
        path: &'a str,
        range: Option<Range<u64>>,
        bytes_max: u64,
    ) -> BoxFuture<'a, Result<Bytes, StoreLinkError>> {
        let limit = if range.is_some() { self.range } else { self.file };
        let asked = Asked { authority, path, range, bytes_max, progress: self.progress };
        async move { timeout(limit, asked.get()).await.unwrap_or(Err(StoreLinkError::TimedOut { limit })) }.boxed()
    }
}

/// A request to a store.
struct Asked<'a> {
    authority: &'a str,
    path: &'a str,
    range: Option<Range<u64>>,
    bytes_max: u64,
    progress: Duration,
}

impl Asked<'_> {
    async fn get(&self) -> Result<Bytes, StoreLinkError> {
        let stream = self.within(TcpStream::connect(socket(self.authority))).await??;
        stream.set_nodelay(true)?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (mut sender, connection) = self.within(builder.handshake(TokioIo::new(stream))).await?.map_err(other)?;
        let mut request = Request::get(self.path)
            .header(HOST, self.authority)
            .header(CONNECTION, "close")
            .header(ACCEPT_ENCODING, "identity")
            .header(USER_AGENT, concat!("hearth/", env!("CARGO_PKG_VERSION")));
        if let Some(range) = &self.range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
        let exchange = async {
            let answer = self.within(sender.send_request(request)).await?.map_err(other)?;
            self.check(&answer)?;
            self.body(answer.into_body()).await
        };
        // Both here, so that the connection ends when this is dropped.
        let mut exchange = std::pin::pin!(exchange);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            biased;
            done = exchange.as_mut() => return done,
            _ = connection.as_mut() => {}
        }
        // The connection has ended after it delivered the answer, or without one: the exchange knows, and knows why.
        exchange.await
    }

    /// Waits for the store to do something.
    async fn within<T>(&self, doing: impl Future<Output = T>) -> Result<T, StoreLinkError> {
        timeout(self.progress, doing).await.map_err(|_| StoreLinkError::Stalled { limit: self.progress })
    }

    /// Whether the answer is what was asked for.
    fn check(&self, answer: &Response<Incoming>) -> Result<(), StoreLinkError> {
        let (status, headers) = (answer.status(), answer.headers());
        let (path, code) = (self.path.to_owned(), status.as_u16());
        match (status, &self.range) {
            (StatusCode::OK, None) | (StatusCode::PARTIAL_CONTENT, Some(_)) => {}
            (StatusCode::OK, Some(_)) => return Err(StoreLinkError::NoRanges { status: code }),
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(range)) => {
                return Err(StoreLinkError::Short { path, found: 0, wanted: range.end - range.start });
            }
            (StatusCode::NOT_FOUND | StatusCode::GONE, _) => {
                return Err(StoreLinkError::NotThere { path, status: code });
            }
            _ if status.is_redirection() && headers.contains_key(LOCATION) => {
                return Err(StoreLinkError::Redirected { path, to: word(headers, &LOCATION), status: code });
            }
            _ => return Err(StoreLinkError::Status { path, status: code }),
        }
        let encoding = word(headers, &CONTENT_ENCODING);
        if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
            return Err(StoreLinkError::Encoded { encoding });
        }
        if let Some(range) = &self.range {
            let found = word(headers, &CONTENT_RANGE);
            if content_range(&found).as_ref() != Some(range) {
                let (first, last) = (range.start, range.end.saturating_sub(1));
                return Err(StoreLinkError::OtherRange { first, last, found });
            }
        }
        let length = word(headers, &CONTENT_LENGTH).parse::<u64>().ok();
        match length.filter(|length| *length > self.bytes_max) {
            Some(_) => Err(self.long()),
            None => Ok(()),
        }
    }

    /// The body, as long as it may be.
    async fn body(&self, mut body: Incoming) -> Result<Bytes, StoreLinkError> {
        let mut content = BytesMut::new();
        loop {
            let frame = match self.within(body.frame()).await? {
                None => break,
                Some(Ok(frame)) => frame,
                // It ended before its length.
                Some(Err(error)) if is_cut(&error) => return Err(self.short(content.len() as u64)),
                Some(Err(error)) => return Err(other(error)),
            };
            // What is no data is trailers, in which there is nothing.
            let Ok(data) = frame.into_data() else { continue };
            if content.len() as u64 + data.len() as u64 > self.bytes_max {
                return Err(self.long());
            }
            content.extend_from_slice(&data);
        }
        match &self.range {
            Some(range) if content.len() as u64 != range.end - range.start => Err(self.short(content.len() as u64)),
            Some(_) | None => Ok(content.freeze()),
        }
    }

    fn long(&self) -> StoreLinkError {
        StoreLinkError::Long { path: self.path.to_owned(), most: self.bytes_max }
    }

    fn short(&self, found: u64) -> StoreLinkError {
        let wanted = self.range.as_ref().map_or(self.bytes_max, |range| range.end - range.start);
        StoreLinkError::Short { path: self.path.to_owned(), found, wanted }
    }
}

/// Where to connect to: an authority is written with its port or without.
fn socket(authority: &str) -> String {
    let after_host = authority.rfind(']').map_or(authority, |at| &authority[at..]);
    if after_host.contains(':') { authority.to_owned() } else { format!("{authority}:{PORT_DEFAULT}") }
}

/// A header's value as far as it can be shown; empty without one.
fn word(headers: &HeaderMap, name: &HeaderName) -> String {
    let value = headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    value.unwrap_or_default().chars().filter(|character| !character.is_control()).take(WORDS_MAX).collect()
}

/// `bytes FIRST-LAST/TOTAL`, where the total may be a star (RFC 9110 section 14.4).
fn content_range(value: &str) -> Option<Range<u64>> {
    let (unit, rest) = value.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, end) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?.checked_add(1)?);
    let is_within = total == "*" || total.parse::<u64>().is_ok_and(|total| end <= total);
    (unit.eq_ignore_ascii_case("bytes") && first < end && is_within).then_some(first..end)
}

/// Whether a body ended before its length.
fn is_cut(error: &hyper::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof) {
            return true;
        }
        source = cause.source();
    }
    error.is_incomplete_message()
}

fn other(error: hyper::Error) -> StoreLinkError {
    // The cause is what people understand: "connection reset", not "error reading a body".
    io::Error::other(crate::report::chain(&error)).into()
}

#[cfg(test)]
mod tests;
