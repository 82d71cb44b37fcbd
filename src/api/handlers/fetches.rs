//! Bundles from elsewhere, and memory that is on its way.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::agent::SourceSpec;
use crate::api::body::JsonBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{Bundle, BundleFetchRequest, ErrorBody, VmMemory};
use crate::report::chain;

/// Begin to have a bundle that is elsewhere. Its manifest and state are here when this answers; its memory comes behind
/// it, and VMs may be launched from it in mode `lazy` meanwhile.
#[utoipa::path(
    post, path = "/v1/bundle-fetches", tag = "bundles", request_body = BundleFetchRequest,
    responses(
        (status = 200, body = Bundle, description = "It is here, or on its way already"),
        (status = 202, body = Bundle, description = "It is on its way"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn fetch_bundle(
    State(served): State<Served>,
    body: JsonBody<BundleFetchRequest>,
) -> Result<(StatusCode, Json<Bundle>), ApiError> {
    let BundleFetchRequest { bundle_id, from } = body.value;
    let from: SourceSpec =
        from.parse().map_err(|error| ApiError::bad_request("invalid_source", format!("from: {}", chain(&error))))?;
    let (view, is_new) = served.door.fetch_bundle(&bundle_id, from).await?;
    let status = if is_new { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, Json(convert::bundle(&view, served.door.as_ref()))))
}

/// Keep a bundle from elsewhere, however long it is not used.
#[utoipa::path(
    put, path = "/v1/bundles/{id}/pin", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Bundle), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn pin_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Bundle>, ApiError> {
    let view = served.door.pin_bundle(&id, true).await?;
    Ok(Json(convert::bundle(&view, served.door.as_ref())))
}

/// Let a bundle from elsewhere go when others need its room.
#[utoipa::path(
    delete, path = "/v1/bundles/{id}/pin", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Bundle), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn unpin_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Bundle>, ApiError> {
    let view = served.door.pin_bundle(&id, false).await?;
    Ok(Json(convert::bundle(&view, served.door.as_ref())))
}

/// Show what a VM has of its memory.
#[utoipa::path(
    get, path = "/v1/vms/{id}/memory", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = VmMemory), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn vm_memory(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<VmMemory>, ApiError> {
    Ok(Json(convert::memory(served.door.memory(&id)?)))
}
