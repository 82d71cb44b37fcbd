//! This host and its agent: facts, metrics, the API's own description.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, stream};

use crate::agent::DRAIN_GRACE;
use crate::api::body::OptionalBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{DrainRequest, ErrorBody, Host, LedgerBackup, LedgerBackupRequest};
use crate::report::Retry;

/// Show this host.
#[utoipa::path(
    get, path = "/v1/host", tag = "host",
    responses((status = 200, body = Host), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_host(State(served): State<Served>) -> Result<Json<Host>, ApiError> {
    let view = served.door.host().await.map_err(|error| {
        let message = format!("ask the host: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "host_failure", message, Retry::Later)
    })?;
    Ok(Json(convert::host(view, &served.door.vms(), served.door.fabric().as_ref())))
}

/// Stop all VMs and end the agent: no new work is taken from now on. Goes on when nobody reads the answer.
#[utoipa::path(
    post, path = "/v1/drain", tag = "host", request_body = Option<DrainRequest>,
    responses(
        (status = 200, body = String, content_type = "application/x-ndjson", description = "Lines of Drain, as it goes on"),
        (status = "4XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn drain(
    State(served): State<Served>,
    OptionalBody(request): OptionalBody<DrainRequest>,
) -> Response {
    let grace = request.timeout_ms.map_or(DRAIN_GRACE, |ms| Duration::from_millis(ms.into()));
    let draining = served.door.drain(grace);
    let lines = stream::unfold(Some(draining), |draining| async move {
        let mut draining = draining?;
        let now = draining.borrow_and_update().clone();
        let line = convert::drain(&now);
        if now.is_over {
            return Some((line, None));
        }
        // An error means that the agent is ending: there is no more to say.
        let next = draining.changed().await.is_ok().then_some(draining);
        Some((line, next))
    });
    let lines = lines.map(|drain| {
        let mut line = serde_json::to_vec(&drain).unwrap_or_default();
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// Copy the ledger, as it is now, into a new file of this host.
#[utoipa::path(
    post, path = "/v1/ledger/backup", tag = "host", request_body = Option<LedgerBackupRequest>,
    responses(
        (status = 201, body = LedgerBackup),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn back_up_ledger(
    State(served): State<Served>,
    OptionalBody(request): OptionalBody<LedgerBackupRequest>,
) -> Result<(StatusCode, Json<LedgerBackup>), ApiError> {
    let made = served.door.back_up_ledger(request.path.map(PathBuf::from)).await?;
    let path = made.path.display().to_string();
    Ok((StatusCode::CREATED, Json(LedgerBackup { path, bytes: made.bytes })))
}

/// Metrics in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "host",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"))
)]
pub(in crate::api) async fn metrics(State(served): State<Served>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], served.door.metrics().await).into_response()
}

/// This document.
#[utoipa::path(
    get, path = "/v1/openapi.json", tag = "host",
    responses((status = 200, body = Object, description = "OpenAPI 3.1"))
)]
pub(in crate::api) async fn openapi(State(served): State<Served>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], served.document.as_bytes().to_vec()).into_response()
}
