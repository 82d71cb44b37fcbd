//! Calculations of clusters' members.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::vms::{again, as_json, remember, to_json};
use crate::agent::{CalculationRequest, CalculationTaken, StoredAnswer};
use crate::api::body::{JsonBody, Params};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{
    Calculation, CalculationCreateRequest, CalculationList, CalculationQuery, ErrorBody, decode_base64,
};

/// Longest wait for the end of a calculation in one request.
const WAIT_MS_MAX: u32 = 60_000;

/// Have a program run in a member of a cluster.
#[utoipa::path(
    post, path = "/v1/clusters/{id}/calculations", tag = "clusters", request_body = CalculationCreateRequest,
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known"),
    ),
    responses(
        (status = 202, body = Calculation, description = "It is recorded; it runs once a member is registered and free"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn create_calculation(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<CalculationCreateRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    let CalculationCreateRequest { argv, env, stdin_base64, timeout_s, executor_id, member } = value;
    let stdin = match &stdin_base64 {
        Some(text) => decode_base64(text)
            .ok_or_else(|| ApiError::bad_request("invalid_value", "stdin_base64 is not base64 with padding"))?,
        None => Vec::new(),
    };
    let request = CalculationRequest { argv, env, stdin, timeout_s, member, executor_id, key: key.clone() };
    let record = match served.door.take_calculation(&id, request).await? {
        CalculationTaken::Answered(answer) => return Ok(again(&answer)),
        CalculationTaken::Calculation(record) => record,
    };
    let body = to_json(&convert::calculation(&record, None));
    let answer = StoredAnswer { status: StatusCode::ACCEPTED.as_u16(), body };
    remember(&served, key, record.id.to_string(), &answer).await;
    Ok(as_json(&answer))
}

/// List the calculations of a cluster.
#[utoipa::path(
    get, path = "/v1/clusters/{id}/calculations", tag = "clusters",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = CalculationList), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_calculations(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<CalculationList>, ApiError> {
    let all = served.door.calculations(&id).await?;
    Ok(Json(CalculationList { calculations: all.iter().map(|one| convert::calculation(one, None)).collect() }))
}

/// Show a calculation and what it wrote, or wait for its end.
#[utoipa::path(
    get, path = "/v1/clusters/{id}/calculations/{calculation}", tag = "clusters",
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name"),
        ("calculation" = String, Path, description = "Id of the calculation, or unique start of it"),
        CalculationQuery,
    ),
    responses((status = 200, body = Calculation), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_calculation(
    State(served): State<Served>,
    Path((id, calculation)): Path<(String, String)>,
    Params(query): Params<CalculationQuery>,
) -> Result<Json<Calculation>, ApiError> {
    if query.wait_ms > WAIT_MS_MAX {
        let message = format!("wait_ms {}: at most {WAIT_MS_MAX} are possible", query.wait_ms);
        return Err(ApiError::bad_request("invalid_value", message));
    }
    let wait = Duration::from_millis(query.wait_ms.into());
    let (record, output) = served.door.calculation(&id, &calculation, wait).await?;
    Ok(Json(convert::calculation(&record, Some(output))))
}
