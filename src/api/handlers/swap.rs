//! VMs whose memory is out.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};

use super::vms::{Nothing, ask};
use crate::agent::{SwapOrder, Verb, WakeCause};
use crate::api::body::{JsonBody, OptionalBody};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, SwapDecisionList, SwapOutRequest, SwapPolicy, Vm};

/// Move a VM's memory out.
#[utoipa::path(
    post, path = "/v1/vms/{id}/swap-out", tag = "vms", request_body = SwapOutRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = Vm, description = "Its memory is out"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn swap_out_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<SwapOutRequest>,
) -> Result<Json<Vm>, ApiError> {
    let SwapOutRequest { mode, wake_after_s } = body.value;
    let order = SwapOrder {
        mode: convert::swap_mode(mode),
        wake_after: wake_after_s.map(|seconds| Duration::from_secs(seconds.into())),
        because: "somebody asked for it".to_owned(),
    };
    ask(&served, &id, Verb::SwapOut(order)).await
}

/// Bring a VM's memory back.
#[utoipa::path(
    post, path = "/v1/vms/{id}/wake", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn wake_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::Wake(WakeCause::Api)).await
}

/// Say when a VM's memory is moved out.
#[utoipa::path(
    put, path = "/v1/vms/{id}/swap-policy", tag = "vms", request_body = SwapPolicy,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn set_swap_policy(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<SwapPolicy>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::SetSwapPolicy(convert::swap_policy(body.value))).await
}

/// List what was decided about idle VMs.
#[utoipa::path(
    get, path = "/v1/swap-decisions", tag = "host",
    responses((status = 200, body = SwapDecisionList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_swap_decisions(
    State(served): State<Served>,
) -> Result<Json<SwapDecisionList>, ApiError> {
    let decisions = served.door.swap_decisions().await?;
    Ok(Json(SwapDecisionList { decisions: decisions.into_iter().map(convert::swap_decision).collect() }))
}
