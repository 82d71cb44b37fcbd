//! Programs in guests, and consoles: by upgrade to a stream of frames, or for small answers by plain HTTP.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::OnUpgrade;

use crate::agent::{ExecExit, ExecInput, ExecOutput, ExecSession, ExecSpec, VmError};
use crate::api::body::{JsonBody, Params};
use crate::api::bridge;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{Captured, ConsoleQuery, ErrorBody, ExecRequest, ExecResult, UPGRADE_PROTOCOL};
use crate::report::Retry;

/// Most bytes of each stream in an answer by plain HTTP. More is for a stream of frames.
const CAPTURE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of console history that are kept at most.
const HISTORY_BYTES_MAX: usize = 64 * 1024;

/// Run a program in a guest.
#[utoipa::path(
    post, path = "/v1/vms/{id}/exec", tag = "vms", request_body = ExecRequest,
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name"),
        ("Upgrade" = Option<String>, Header, description = "`hearth-stream/1` for streams both ways"),
    ),
    responses(
        (status = 101, description = "The program runs; frames of hearth-stream/1 follow"),
        (status = 200, body = ExecResult, description = "Without an upgrade: the program has ended"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn exec(
    State(served): State<Served>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let upgrade = upgrade(&mut request)?;
    let body = JsonBody::<ExecRequest>::from_request(request, &()).await?;
    let ExecRequest { argv, env, cwd, timeout_ms, terminal } = body.value;
    if terminal.is_some() && upgrade.is_none() {
        return Err(ApiError::bad_request("upgrade_required", "a terminal needs an upgrade to hearth-stream/1"));
    }
    let spec = ExecSpec {
        argv,
        env,
        cwd: cwd.unwrap_or_default(),
        timeout_ms: timeout_ms.unwrap_or(0),
        terminal: terminal.map(|size| (size.rows, size.columns)),
    };
    let session = served.door.exec(&id, spec).await?;
    match upgrade {
        Some(upgrade) => {
            tokio::spawn(async move {
                match upgrade.await {
                    Ok(stream) => bridge::exec(stream, session).await,
                    // Dropping the session ends the program.
                    Err(error) => tracing::debug!(%error, "the client left before the upgrade"),
                }
            });
            Ok(switching())
        }
        None => Ok(Json(capture(session).await?).into_response()),
    }
}

/// Read a console's history.
#[utoipa::path(
    get, path = "/v1/vms/{id}/console", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name"), ConsoleQuery),
    responses(
        (status = 200, body = Vec<u8>, content_type = "application/octet-stream", description = "What the guest wrote"),
        (status = "4XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn console_history(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(query): Params<ConsoleQuery>,
) -> Result<Response, ApiError> {
    let bytes_max = query.history_bytes.map_or(HISTORY_BYTES_MAX, |bytes| bytes as usize);
    let history = served.door.console_history(&id, bytes_max).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], history).into_response())
}

/// Attach to a console.
#[utoipa::path(
    post, path = "/v1/vms/{id}/console", tag = "vms",
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name"), ConsoleQuery,
        ("Upgrade" = String, Header, description = "`hearth-stream/1`"),
    ),
    responses(
        (status = 101, description = "Attached; frames of hearth-stream/1 follow"),
        (status = 426, body = ErrorBody, description = "Without an upgrade"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn console(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(query): Params<ConsoleQuery>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let Some(upgrade) = upgrade(&mut request)? else {
        let message = "a console is attached to by an upgrade to hearth-stream/1";
        let error = ApiError::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message, Retry::WithChange);
        return Ok(([(header::UPGRADE, UPGRADE_PROTOCOL)], error).into_response());
    };
    let history = query.history_bytes.map_or(0, |bytes| bytes as usize);
    let console = served.door.console(&id, history).await?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(stream) => bridge::console(stream, console).await,
            Err(error) => tracing::debug!(%error, "the client left before the upgrade"),
        }
    });
    Ok(switching())
}

/// The stream this connection becomes, when the client asks for it.
fn upgrade(request: &mut Request) -> Result<Option<OnUpgrade>, ApiError> {
    if !request.headers().contains_key(header::UPGRADE) {
        return Ok(None);
    }
    let wanted = |headers: &HeaderMap, name, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(word))
    };
    let asked = wanted(request.headers(), header::UPGRADE, UPGRADE_PROTOCOL)
        && wanted(request.headers(), header::CONNECTION, "upgrade");
    match request.extensions_mut().remove::<OnUpgrade>() {
        Some(upgrade) if asked => Ok(Some(upgrade)),
        Some(_) | None => {
            let message = format!("an upgrade is possible to {UPGRADE_PROTOCOL} only, with `Connection: upgrade`");
            Err(ApiError::bad_request("unknown_upgrade", message))
        }
    }
}

fn switching() -> Response {
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, UPGRADE_PROTOCOL)];
    (StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response()
}

/// Waits for a program's end, keeping the first of what it writes. Dropped when the client hangs up, which ends the
/// program.
async fn capture(session: ExecSession) -> Result<ExecResult, ApiError> {
    let ExecSession { mut output, mut input } = session;
    // A program that ended already does not take this: its end is what counts.
    let _ = input.send(ExecInput::StdinClosed).await;
    let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
    let exit = loop {
        match output.next().await.map_err(VmError::from)? {
            ExecOutput::Stdout(bytes) => stdout.add(&bytes),
            ExecOutput::Stderr(bytes) => stderr.add(&bytes),
            ExecOutput::Exited(exit) => break exit,
        }
    };
    let (exit_code, signal, timed_out) = match exit {
        ExecExit::Code(code) => (Some(code), None, false),
        ExecExit::Signal(signal) => (None, Some(signal), false),
        ExecExit::TimedOut => (None, None, true),
    };
    Ok(ExecResult { exit_code, signal, timed_out, stdout: stdout.captured(), stderr: stderr.captured() })
}

/// The first bytes of a stream.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    fn add(&mut self, bytes: &[u8]) {
        let room = CAPTURE_BYTES_MAX - self.bytes.len();
        self.truncated |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn captured(self) -> Captured {
        Captured::new(self.bytes, self.truncated)
    }
}
