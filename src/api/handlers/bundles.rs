//! Bundles.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::vms::{Nothing, again, as_json, remember, to_json};
use crate::agent::{self, BuildRequest, BuildSpec, BundleWork, StoredAnswer};
use crate::api::body::{JsonBody, OptionalBody};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{
    Bundle, BundleBuildRequest, BundleList, BundleVerified, CompactRequest, ErrorBody, Operation, SnapshotRequest,
};

/// Build a bundle of an image.
#[utoipa::path(
    post, path = "/v1/bundles", tag = "bundles", request_body = BundleBuildRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known")),
    responses(
        (status = 202, body = Operation, description = "It is being built"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn build_bundle(
    State(served): State<Served>,
    body: JsonBody<BundleBuildRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    let BundleBuildRequest {
        image,
        name,
        vcpus,
        memory_mib,
        interfaces,
        spare_disks,
        with_secrets,
        warmup,
        ready_marker,
        timeout_s,
    } = value;
    let build = BuildSpec { warmup, ready_marker, timeout_s };
    let request = BuildRequest {
        name,
        image,
        vcpus,
        memory_mib,
        interfaces,
        spare_disks: spare_disks.unwrap_or(0),
        with_secrets,
        build,
        key: key.clone(),
    };
    let operation = match served.door.build_bundle(request).await? {
        BundleWork::Answered(answer) => return Ok(again(&answer)),
        BundleWork::Operation(operation) => operation,
    };
    let body = to_json(&convert::operation(&operation));
    let answer = StoredAnswer { status: StatusCode::ACCEPTED.as_u16(), body };
    remember(&served, key, operation.vm.to_string(), &answer).await;
    Ok(as_json(&answer))
}

/// Make a bundle of a VM, which goes on as before.
#[utoipa::path(
    post, path = "/v1/vms/{id}/snapshot", tag = "bundles", request_body = Option<SnapshotRequest>,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = Operation, description = "Its `bundle_id` is the bundle"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn snapshot_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(request): OptionalBody<SnapshotRequest>,
) -> Result<Json<Operation>, ApiError> {
    let request = agent::SnapshotRequest {
        name: request.bundle_name,
        diff: request.diff,
        live: request.live,
        with_secrets: request.with_secrets,
    };
    Ok(Json(convert::operation(&served.door.snapshot(&id, request).await?)))
}

/// List the bundles of this host.
#[utoipa::path(
    get, path = "/v1/bundles", tag = "bundles",
    responses((status = 200, body = BundleList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_bundles(State(served): State<Served>) -> Result<Json<BundleList>, ApiError> {
    let listed = served.door.bundles().await?;
    Ok(Json(convert::bundles(&listed, served.door.as_ref())))
}

/// Show a bundle.
#[utoipa::path(
    get, path = "/v1/bundles/{id}", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Bundle), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Bundle>, ApiError> {
    let view = served.door.any_bundle(&id).await?;
    Ok(Json(convert::bundle(&view, served.door.as_ref())))
}

/// Read all of a bundle and compare it with its digests.
#[utoipa::path(
    post, path = "/v1/bundles/{id}/verify", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = BundleVerified), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn verify_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<BundleVerified>, ApiError> {
    let (view, verified) = served.door.verify_bundle(&id).await?;
    let sections = verified.sections as u64;
    Ok(Json(BundleVerified { id: view.id, chunks: verified.chunks, sections }))
}

/// Make a bundle with the same content that builds on no other.
#[utoipa::path(
    post, path = "/v1/bundles/{id}/compact", tag = "bundles", request_body = Option<CompactRequest>,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 201, body = Bundle),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn compact_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(request): OptionalBody<CompactRequest>,
) -> Result<(StatusCode, Json<Bundle>), ApiError> {
    let view = served.door.compact_bundle(&id, request.bundle_name).await?;
    Ok((StatusCode::CREATED, Json(convert::bundle(&view, served.door.as_ref()))))
}

/// Remove a bundle that no VM runs from and no other bundle builds on.
#[utoipa::path(
    delete, path = "/v1/bundles/{id}", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 204, description = "It is gone"), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn remove_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    served.door.remove_bundle(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
