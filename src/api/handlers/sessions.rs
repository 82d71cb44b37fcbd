//! Sessions and the fabric.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::vms::{GRACE_DEFAULT, again, as_json, remember, to_json};
use crate::agent::{SessionCreated, SessionError, SessionRequest, StoredAnswer};
use crate::api::body::{JsonBody, Params};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, Fabric, Session, SessionCreateRequest, SessionList, SessionRemoveQuery};

/// Make a session.
#[utoipa::path(
    post, path = "/v1/sessions", tag = "sessions", request_body = SessionCreateRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known")),
    responses(
        (status = 201, body = Session, description = "It is made"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn create_session(
    State(served): State<Served>,
    body: JsonBody<SessionCreateRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    let SessionCreateRequest { name, session_network_id, ipv4, egress, ttl_s, user_data } = value;
    let egress = convert::egress(egress.unwrap_or_default()).map_err(SessionError::from)?;
    let request = SessionRequest { name, session_network_id, ipv4, egress, ttl_s, user_data, key: key.clone() };
    let session = match served.door.create_session(request).await? {
        SessionCreated::Answered(answer) => return Ok(again(&answer)),
        SessionCreated::Session(session) => session,
    };
    let body = to_json(&convert::session(&session));
    let answer = StoredAnswer { status: StatusCode::CREATED.as_u16(), body };
    remember(&served, key, session.record.id.to_string(), &answer).await;
    Ok(as_json(&answer))
}

/// List the sessions of this host.
#[utoipa::path(
    get, path = "/v1/sessions", tag = "sessions",
    responses((status = 200, body = SessionList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_sessions(State(served): State<Served>) -> Result<Json<SessionList>, ApiError> {
    let sessions = served.door.sessions().await?;
    Ok(Json(SessionList { sessions: sessions.iter().map(convert::session).collect() }))
}

/// Show a session: its members with addresses, and what was dropped.
#[utoipa::path(
    get, path = "/v1/sessions/{id}", tag = "sessions",
    params(("id" = String, Path, description = "Id, unique start of an id, name, or session network id")),
    responses((status = 200, body = Session), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_session(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Session>, ApiError> {
    Ok(Json(convert::session(&served.door.session(&id).await?)))
}

/// Remove a session; its network id rests before it is used again.
#[utoipa::path(
    delete, path = "/v1/sessions/{id}", tag = "sessions",
    params(
        ("id" = String, Path, description = "Id, unique start of an id, name, or session network id"),
        SessionRemoveQuery,
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_session(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(query): Params<SessionRemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let grace = query.timeout_ms.map_or(GRACE_DEFAULT, |ms| Duration::from_millis(ms.into()));
    served.door.remove_session(&id, query.drain, grace).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Show the fabric: what VMs' addresses are made of, and the other hosts.
#[utoipa::path(
    get, path = "/v1/fabric", tag = "host",
    responses((status = 200, body = Fabric), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_fabric(State(served): State<Served>) -> Result<Json<Fabric>, ApiError> {
    let fabric = served.door.fabric().ok_or(SessionError::NoFabric)?;
    Ok(Json(convert::fabric(&fabric)))
}
