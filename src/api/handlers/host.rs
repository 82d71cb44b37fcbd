//! This host and its agent: facts, metrics, the API's own description.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, Host};
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

/// Metrics in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "host",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"))
)]
pub(in crate::api) async fn metrics(State(served): State<Served>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], served.door.metrics()).into_response()
}

/// This document.
#[utoipa::path(
    get, path = "/v1/openapi.json", tag = "host",
    responses((status = 200, body = Object, description = "OpenAPI 3.1"))
)]
pub(in crate::api) async fn openapi(State(served): State<Served>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], served.document.as_bytes().to_vec()).into_response()
}
