//! One call: connect to the agent's socket, send one request, read one bounded answer. A connection is used once, so
//! that no state of an earlier call can spoil a later one; connecting costs microseconds.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use crate::api::types::{ErrorBody, ErrorDetail, IDEMPOTENCY_KEY_HEADER, RetryHint, UPGRADE_PROTOCOL};

/// How long a call may take that only reads or records something.
pub(super) const PROMPT: Duration = Duration::from_secs(30);

/// How long an agent that is started again may take until it listens, and how often it is looked.
const RESTART: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

/// Longest answer in bytes: lists of thousands of VMs fit.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Most bytes of an answer that is not ours shown in an error.
const EXCERPT_CHARS_MAX: usize = 200;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say what the fields are")]
pub enum CallError {
    /// Nothing listens at the socket.
    #[error("no agent answers at {path}: start it with `hearth agent`, or name its socket with --socket")]
    NoAgent { path: PathBuf, source: io::Error },
    /// The socket may not be opened.
    #[error("the agent's socket {path} may not be opened by this user")]
    Forbidden { path: PathBuf, source: io::Error },
    /// The connection broke.
    #[error("{call}: the agent hung up")]
    HungUp { call: String, source: hyper::Error },
    /// No answer in time.
    #[error("{call}: the agent did not answer within {seconds} s")]
    Silent { call: String, seconds: u64 },
    /// The agent said no, and why.
    #[error("{}", .error.message)]
    Refused { error: ErrorDetail },
    /// The answer is not one of this API.
    #[error("{call}: unexpected answer with status {status}: {excerpt:?}")]
    Unexpected { call: String, status: u16, excerpt: String },
    /// The answer is not the JSON it has to be.
    #[error("{call}: the answer cannot be read")]
    Malformed { call: String, source: serde_json::Error },
    /// The answer has no end in sight.
    #[error("{call}: the answer is longer than {ANSWER_BYTES_MAX} bytes")]
    TooLong { call: String },
}

impl CallError {
    /// What to do about it, for people.
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::NoAgent { .. } | Self::TooLong { .. } => None,
            Self::Forbidden { .. } => Some("run this as root or as a member of the socket's group".to_owned()),
            Self::HungUp { .. } | Self::Silent { .. } => {
                Some("look at the agent's log; `hearth host show` tells whether it answers".to_owned())
            }
            Self::Refused { error } => advice_of(error),
            Self::Unexpected { .. } | Self::Malformed { .. } => {
                Some("is this socket Hearth's, and is the agent of the same version as this client?".to_owned())
            }
        }
    }

    /// The agent's own word for the error.
    pub(super) fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { error } => Some(&error.code),
            Self::NoAgent { .. }
            | Self::Forbidden { .. }
            | Self::HungUp { .. }
            | Self::Silent { .. }
            | Self::Unexpected { .. }
            | Self::Malformed { .. }
            | Self::TooLong { .. } => None,
        }
    }
}

/// What an error of the agent tells people to do.
pub(super) fn advice_of(error: &ErrorDetail) -> Option<String> {
    match (&error.detail, error.retry) {
        (Some(detail), _) => Some(detail.clone()),
        (None, RetryHint::Later) => Some("the same command may succeed later".to_owned()),
        (None, RetryHint::Never | RetryHint::WithChange) => None,
    }
}

/// The agent at a socket.
#[derive(Debug)]
pub(super) struct Agent {
    socket: PathBuf,
}

/// What goes out.
struct Call {
    text: String,
    request: Request<CallBody>,
}

/// What a request's body is: a few bytes, or what comes of a file.
pub(super) type CallBody = UnsyncBoxBody<Bytes, io::Error>;

impl Agent {
    pub(super) const fn at(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// `GET`, for JSON.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.json(call(Method::GET, path, None, &[]), PROMPT).await
    }

    /// `POST` of JSON, for JSON, within `limit`.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, CallError> {
        self.json(call(Method::POST, path, Some(encode(path, body)?), &[]), limit).await
    }

    /// `POST` of a new thing; repeated with the same key it answers what the first one answered.
    pub(super) async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        key: Option<&str>,
        limit: Duration,
    ) -> Result<T, CallError> {
        let key = key.map(|key| (IDEMPOTENCY_KEY_HEADER, key));
        self.json(call(Method::POST, path, Some(encode(path, body)?), key.as_slice()), limit).await
    }

    /// `POST` of bytes as they come, for JSON, within `limit`.
    pub(super) async fn post_bytes<T: DeserializeOwned>(
        &self,
        path: &str,
        body: CallBody,
        limit: Duration,
    ) -> Result<T, CallError> {
        let mut call = call(Method::POST, path, None, &[(CONTENT_TYPE.as_str(), "application/octet-stream")]);
        *call.request.body_mut() = body;
        self.json(call, limit).await
    }

    /// `PUT` of JSON, for JSON, within `limit`.
    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, CallError> {
        self.json(call(Method::PUT, path, Some(encode(path, body)?), &[]), limit).await
    }

    /// `DELETE`; the answer's body does not matter.
    pub(super) async fn delete(&self, path: &str, limit: Duration) -> Result<(), CallError> {
        self.bytes(call(Method::DELETE, path, None, &[]), limit).await.map(drop)
    }

    /// The same, where it does.
    pub(super) async fn delete_for<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, CallError> {
        self.json(call(Method::DELETE, path, None, &[]), limit).await
    }

    /// A call with JSON to a server that is no agent: whatever it answers.
    pub(super) async fn foreign(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), CallError> {
        let call = call(method, path, Some(encode(path, body)?), &[]);
        let text = call.text.clone();
        within(limit, &text, async { read(&text, self.send(call).await?).await }).await
    }

    /// `GET`, for bytes.
    pub(super) async fn get_bytes(&self, path: &str) -> Result<Bytes, CallError> {
        Ok(self.bytes(call(Method::GET, path, None, &[]), PROMPT).await?.1)
    }

    /// `GET`, for a body that is read as it comes. Only the head of the answer has to come in time.
    pub(super) async fn get_stream(&self, path: &str) -> Result<Incoming, CallError> {
        self.stream(call(Method::GET, path, None, &[])).await
    }

    /// `POST` of JSON, for a body that is read as it comes. Only the head of the answer has to come in time.
    pub(super) async fn post_stream(&self, path: &str, body: &impl Serialize) -> Result<Incoming, CallError> {
        self.stream(call(Method::POST, path, Some(encode(path, body)?), &[])).await
    }

    async fn stream(&self, call: Call) -> Result<Incoming, CallError> {
        let text = call.text.clone();
        let response = within(PROMPT, &text, self.send(call)).await?;
        if response.status() == StatusCode::OK {
            return Ok(response.into_body());
        }
        Err(refusal(&text, within(PROMPT, &text, read(&text, response)).await?))
    }

    /// `POST` of JSON with `Upgrade: hearth-stream/1`: the connection itself.
    pub(super) async fn upgrade(&self, path: &str, body: Option<&impl Serialize>) -> Result<Upgraded, CallError> {
        let body = body.map(|body| encode(path, body)).transpose()?;
        let headers = [(CONNECTION.as_str(), "upgrade"), (UPGRADE.as_str(), UPGRADE_PROTOCOL)];
        let call = call(Method::POST, path, body, &headers);
        let text = call.text.clone();
        let response = within(PROMPT, &text, self.send(call)).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return hyper::upgrade::on(response).await.map_err(|source| CallError::HungUp { call: text, source });
        }
        Err(refusal(&text, within(PROMPT, &text, read(&text, response)).await?))
    }

    async fn json<T: DeserializeOwned>(&self, call: Call, limit: Duration) -> Result<T, CallError> {
        let text = call.text.clone();
        let (_, body) = self.bytes(call, limit).await?;
        serde_json::from_slice(&body).map_err(|source| CallError::Malformed { call: text, source })
    }

    async fn bytes(&self, call: Call, limit: Duration) -> Result<(StatusCode, Bytes), CallError> {
        let text = call.text.clone();
        let answer = within(limit, &text, async { read(&text, self.send(call).await?).await }).await?;
        if answer.0.is_success() { Ok(answer) } else { Err(refusal(&text, answer)) }
    }

    async fn send(&self, call: Call) -> Result<Response<Incoming>, CallError> {
        let hung_up = |source| CallError::HungUp { call: call.text.clone(), source };
        let mut connection = self.connect(&call.text).await?;
        connection.ready().await.map_err(hung_up)?;
        connection.send_request(call.request).await.map_err(hung_up)
    }

    async fn connect(&self, text: &str) -> Result<SendRequest<CallBody>, CallError> {
        let stream = self.reach().await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| CallError::HungUp { call: text.to_owned(), source })?;
        // Ends with the answer, or goes on as the upgraded connection; its error reaches the sender as well.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    /// A connection to whoever listens. A socket at which nobody does is one of an agent that was killed: the next one may
    /// be on its way, and puts its own in the place.
    async fn reach(&self) -> Result<UnixStream, CallError> {
        let deadline = Instant::now() + RESTART;
        let mut was_refused = false;
        loop {
            let source = match UnixStream::connect(&self.socket).await {
                Ok(stream) => return Ok(stream),
                Err(source) => source,
            };
            was_refused |= source.kind() == io::ErrorKind::ConnectionRefused;
            let path = self.socket.clone();
            if source.kind() == io::ErrorKind::PermissionDenied {
                return Err(CallError::Forbidden { path, source });
            }
            if !was_refused || Instant::now() >= deadline {
                return Err(CallError::NoAgent { path, source });
            }
            sleep(AGAIN).await;
        }
    }
}

fn call(method: Method, path: &str, body: Option<Bytes>, headers: &[(&str, &str)]) -> Call {
    let text = format!("{method} {path}");
    let mut builder = Request::builder().method(method).uri(path).header(HOST, "hearth");
    if body.is_some() {
        builder = builder.header(CONTENT_TYPE, "application/json");
    }
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    let request = builder.body(Full::new(body.unwrap_or_default()).map_err(|never| match never {}).boxed_unsync());
    Call { text, request: request.expect("paths and header values are checked words") }
}

fn encode(path: &str, body: &impl Serialize) -> Result<Bytes, CallError> {
    let json = serde_json::to_vec(body).map_err(|source| CallError::Malformed { call: path.to_owned(), source })?;
    Ok(Bytes::from(json))
}

async fn within<T>(
    limit: Duration,
    call: &str,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(CallError::Silent { call: call.to_owned(), seconds: limit.as_secs() }),
    }
}

async fn read(call: &str, response: Response<Incoming>) -> Result<(StatusCode, Bytes), CallError> {
    let status = response.status();
    match Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await {
        Ok(body) => Ok((status, body.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Err(CallError::TooLong { call: call.to_owned() }),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(source) => Err(CallError::HungUp { call: call.to_owned(), source: *source }),
            Err(_) => Err(CallError::TooLong { call: call.to_owned() }),
        },
    }
}

fn refusal(call: &str, (status, body): (StatusCode, Bytes)) -> CallError {
    match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(ErrorBody { error }) => CallError::Refused { error },
        Err(_) => {
            let excerpt = String::from_utf8_lossy(&body).chars().take(EXCERPT_CHARS_MAX).collect();
            CallError::Unexpected { call: call.to_owned(), status: status.as_u16(), excerpt }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_is_started_again_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let agent = Agent::at(dir.path().join("api.sock"));
        let begun = Instant::now();
        assert!(matches!(agent.reach().await, Err(CallError::NoAgent { .. })), "there was never one");
        assert_eq!(begun.elapsed(), Duration::ZERO);

        drop(UnixListener::bind(&agent.socket).unwrap());
        assert!(matches!(agent.reach().await, Err(CallError::NoAgent { .. })), "none comes");
        assert!(begun.elapsed() >= RESTART);

        let again = async {
            sleep(RESTART / 4).await;
            std::fs::remove_file(&agent.socket).unwrap();
            sleep(RESTART / 4).await;
            UnixListener::bind(&agent.socket).unwrap()
        };
        let (reached, listener) = tokio::join!(agent.reach(), again);
        reached.unwrap();
        drop(listener);
    }
}
