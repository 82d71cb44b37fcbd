//! Volumes, their snapshots and their leases.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::agent::{VolumeOrigin, VolumeRequest};
use crate::api::body::{JsonBody, OptionalBody, Params};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{
    ErrorBody, Lease, LeaseConvertRequest, LeaseList, LeaseRequest, LeaseValidateRequest, Vm, VmVolumes, Volume,
    VolumeChanges, VolumeChangesQuery, VolumeCreateRequest, VolumeDetachQuery, VolumeDigest, VolumeList,
    VolumeResizeRequest, VolumeSnapshot, VolumeSnapshotList, VolumeSnapshotRequest, VolumeWish,
};
use crate::ids::LeaseId;
use crate::units::MIB;

fn bytes(size_mib: u64) -> Result<u64, ApiError> {
    let too_large = || ApiError::bad_request("invalid_volume", format!("size_mib: {size_mib} MiB are too many"));
    match size_mib {
        0 => Err(ApiError::bad_request("invalid_volume", "size_mib: a volume has at least 1 MiB")),
        _ => size_mib.checked_mul(MIB).ok_or_else(too_large),
    }
}

fn request(value: VolumeCreateRequest) -> Result<VolumeRequest, ApiError> {
    let VolumeCreateRequest { name, size_mib, from_file, from_volume, from_snapshot } = value;
    let origin = match (from_file, from_volume, from_snapshot) {
        (None, None, None) if size_mib.is_none() => {
            let text = "size_mib is missing, and there is nothing that the volume begins with";
            return Err(ApiError::bad_request("invalid_volume", text));
        }
        (None, None, None) => VolumeOrigin::Empty,
        (Some(path), None, None) if path.starts_with('/') => VolumeOrigin::File(path),
        (Some(path), None, None) => {
            return Err(ApiError::bad_request("relative_path", format!("from_file: {path:?} is not an absolute path")));
        }
        (None, Some(word), None) => VolumeOrigin::Volume(word),
        (None, None, Some(word)) => VolumeOrigin::Snapshot(word),
        (_, _, _) => {
            let text = "a volume begins with one thing: give one of from_file, from_volume and from_snapshot";
            return Err(ApiError::bad_request("invalid_volume", text));
        }
    };
    Ok(VolumeRequest { name, bytes: size_mib.map(bytes).transpose()?, origin })
}

/// Make a volume. Answers when all that it begins with is there.
#[utoipa::path(
    post, path = "/v1/volumes", tag = "volumes", request_body = VolumeCreateRequest,
    responses(
        (status = 201, body = Volume), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn create_volume(
    State(served): State<Served>,
    body: JsonBody<VolumeCreateRequest>,
) -> Result<(StatusCode, Json<Volume>), ApiError> {
    let volume = served.door.create_volume(request(body.value)?).await?;
    Ok((StatusCode::CREATED, Json(convert::volume(volume))))
}

/// List the volumes of this host.
#[utoipa::path(
    get, path = "/v1/volumes", tag = "volumes",
    responses((status = 200, body = VolumeList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_volumes(State(served): State<Served>) -> Result<Json<VolumeList>, ApiError> {
    let volumes = served.door.volumes().await?;
    Ok(Json(VolumeList { volumes: volumes.into_iter().map(convert::volume).collect() }))
}

/// Show a volume.
#[utoipa::path(
    get, path = "/v1/volumes/{id}", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Volume), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Volume>, ApiError> {
    Ok(Json(convert::volume(served.door.volume(&id).await?)))
}

/// Remove a volume that nobody has a lease of. Its snapshots stay.
#[utoipa::path(
    delete, path = "/v1/volumes/{id}", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    served.door.remove_volume(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a volume larger. A guest that uses it is told.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/resize", tag = "volumes", request_body = VolumeResizeRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Volume), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn resize_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<VolumeResizeRequest>,
) -> Result<Json<Volume>, ApiError> {
    let bytes = bytes(body.value.size_mib)?;
    Ok(Json(convert::volume(served.door.resize_volume(&id, bytes).await?)))
}

/// Compute the digest of all bytes of a volume.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/digest", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = VolumeDigest), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn digest_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<VolumeDigest>, ApiError> {
    Ok(Json(convert::digest(served.door.digest_volume(&id).await?)))
}

/// List what changed of a volume after a generation.
#[utoipa::path(
    get, path = "/v1/volumes/{id}/changes", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name"), VolumeChangesQuery),
    responses(
        (status = 200, body = VolumeChanges), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn volume_changes(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(VolumeChangesQuery { since }): Params<VolumeChangesQuery>,
) -> Result<Json<VolumeChanges>, ApiError> {
    Ok(Json(convert::changes(served.door.volume_changes(&id, since).await?)))
}

/// Keep the content of a volume as of now. A guest that uses it goes on; what it has not flushed may be missing.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/snapshots", tag = "volumes", request_body = VolumeSnapshotRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 201, body = VolumeSnapshot), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn snapshot_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(VolumeSnapshotRequest { name }): OptionalBody<VolumeSnapshotRequest>,
) -> Result<(StatusCode, Json<VolumeSnapshot>), ApiError> {
    let snapshot = served.door.snapshot_volume(&id, name).await?;
    Ok((StatusCode::CREATED, Json(convert::volume_snapshot(snapshot))))
}

/// List the snapshots of volumes.
#[utoipa::path(
    get, path = "/v1/volume-snapshots", tag = "volumes",
    responses((status = 200, body = VolumeSnapshotList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_volume_snapshots(
    State(served): State<Served>,
) -> Result<Json<VolumeSnapshotList>, ApiError> {
    let snapshots = served.door.volume_snapshots().await?;
    Ok(Json(VolumeSnapshotList { snapshots: snapshots.into_iter().map(convert::volume_snapshot).collect() }))
}

/// Remove a snapshot. Volumes that began with it stay.
#[utoipa::path(
    delete, path = "/v1/volume-snapshots/{id}", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_volume_snapshot(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    served.door.remove_volume_snapshot(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List the leases of a volume, and what happened to them.
#[utoipa::path(
    get, path = "/v1/volumes/{id}/leases", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = LeaseList), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_leases(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<LeaseList>, ApiError> {
    Ok(Json(convert::leases(served.door.volume_leases(&id).await?)))
}

/// Take a lease of a volume, to use it by NBD. VMs take theirs by themselves.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/leases", tag = "volumes", request_body = LeaseRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 201, body = Lease), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn acquire_lease(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<LeaseRequest>,
) -> Result<(StatusCode, Json<Lease>), ApiError> {
    let LeaseRequest { mode, holder, ttl_s, break_others } = body.value;
    let request = crate::agent::LeaseRequest { mode: convert::lease_mode(mode), holder, ttl_s, break_others };
    Ok((StatusCode::CREATED, Json(convert::lease(served.door.acquire_lease(&id, request).await?))))
}

/// Ask whether a lease is in force in an epoch, and let it live on.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/leases/{lease}/validate", tag = "volumes", request_body = LeaseValidateRequest,
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name of the volume"),
        ("lease" = String, Path, description = "Id of the lease"),
    ),
    responses((status = 200, body = Lease), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn validate_lease(
    State(served): State<Served>,
    Path((id, lease)): Path<(String, String)>,
    body: JsonBody<LeaseValidateRequest>,
) -> Result<Json<Lease>, ApiError> {
    let lease = lease_id(&lease)?;
    Ok(Json(convert::lease(served.door.validate_lease(&id, &lease, body.value.epoch).await?)))
}

/// End the active lease of a volume and make its standby lease the active one, both at once. The same question has the
/// same answer however often it is asked.
#[utoipa::path(
    post, path = "/v1/volumes/{id}/leases/convert", tag = "volumes", request_body = LeaseConvertRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name of the volume")),
    responses((status = 200, body = Lease), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn convert_lease(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<LeaseConvertRequest>,
) -> Result<Json<Lease>, ApiError> {
    let LeaseConvertRequest { from, to, epoch } = body.value;
    Ok(Json(convert::lease(served.door.convert_lease(&id, &from, &to, epoch).await?)))
}

/// End a lease. Whoever is connected with it is refused from then on.
#[utoipa::path(
    delete, path = "/v1/volumes/{id}/leases/{lease}", tag = "volumes",
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name of the volume"),
        ("lease" = String, Path, description = "Id of the lease"),
    ),
    responses(
        (status = 204, description = "It is not in force"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn release_lease(
    State(served): State<Served>,
    Path((id, lease)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    served.door.release_lease(&id, &lease_id(&lease)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Give a volume to a VM that has a slot for it.
#[utoipa::path(
    post, path = "/v1/vms/{id}/volumes", tag = "volumes", request_body = VolumeWish,
    params(("id" = String, Path, description = "Id, unique start of an id, or name of the VM")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn attach_volume(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<VolumeWish>,
) -> Result<Json<Vm>, ApiError> {
    let vm = served.door.attach_volume(&id, convert::wish(body.value)?).await?;
    Ok(Json(convert::vm(&vm, &served.host)))
}

/// Take a volume from a VM.
#[utoipa::path(
    delete, path = "/v1/vms/{id}/volumes/{volume}", tag = "volumes",
    params(
        ("id" = String, Path, description = "Id, unique start of an id, or name of the VM"),
        ("volume" = String, Path, description = "Id, unique start of an id, or name of the volume"),
        VolumeDetachQuery,
    ),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn detach_volume(
    State(served): State<Served>,
    Path((id, volume)): Path<(String, String)>,
    Params(VolumeDetachQuery { force }): Params<VolumeDetachQuery>,
) -> Result<Json<Vm>, ApiError> {
    let vm = served.door.detach_volume(&id, &volume, force).await?;
    Ok(Json(convert::vm(&vm, &served.host)))
}

/// Show the volumes of a VM, and what passed them.
#[utoipa::path(
    get, path = "/v1/vms/{id}/volumes", tag = "volumes",
    params(("id" = String, Path, description = "Id, unique start of an id, or name of the VM")),
    responses((status = 200, body = VmVolumes), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn vm_volumes(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<VmVolumes>, ApiError> {
    Ok(Json(convert::vm_volumes(served.door.vm_volumes(&id).await?)))
}

fn lease_id(text: &str) -> Result<LeaseId, ApiError> {
    text.parse().map_err(|error| ApiError::bad_request("invalid_lease", format!("{error}")))
}
