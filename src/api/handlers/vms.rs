//! Virtual machines.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::agent::{DiskSpec, Key, LaunchRequest, Launched, StoredAnswer, Verb, VmRecord};
use crate::api::body::{JsonBody, OptionalBody, Params};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{
    Disk, ErrorBody, IMAGE_DEFAULT, LaunchMode, RemoveQuery, Stats, StopRequest, UsageList, Vm, VmLaunchRequest,
    VmList, Wait,
};
use crate::units::NetLimits;

/// How long a guest may take to power off when the request does not say.
pub(super) const GRACE_DEFAULT: Duration = Duration::from_secs(10);

/// Launch a VM.
#[utoipa::path(
    post, path = "/v1/vms", tag = "vms", request_body = VmLaunchRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known")),
    responses(
        (status = 201, body = Vm, description = "It is as far as was waited for"),
        (status = 202, body = Vm, description = "It is recorded; its launch goes on"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn launch_vm(
    State(served): State<Served>,
    body: JsonBody<VmLaunchRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    if value.image.is_some() && value.bundle.is_some() {
        let text = "image and bundle together: a VM is made of one of them";
        return Err(ApiError::bad_request("image_and_bundle", text));
    }
    let VmLaunchRequest { name, image, bundle, vcpus, memory_mib, disks, network_limits, session, .. } = value;
    let image = image.unwrap_or_else(|| IMAGE_DEFAULT.to_owned());
    let (wait, interfaces, role) = (value.wait, value.interfaces, value.role);
    let swap = value.swap.map(convert::swap_policy).unwrap_or_default();
    let (cluster, executor_id) = (value.cluster, value.executor_id);
    let published = value.publish.iter().map(convert::published_port).collect();
    let network_limits = network_limits.map_or(Ok(NetLimits::default()), convert::network_limits)?;
    let disk = |Disk { path, read_only, shared }| DiskSpec { path, read_only, shared };
    let disks = disks.into_iter().map(disk).collect();
    let addressing = value.addressing.map(convert::addressing);
    let request = LaunchRequest {
        name,
        image,
        bundle,
        lazy: value.mode == Some(LaunchMode::Lazy),
        build: None,
        vcpus,
        memory_mib,
        disks,
        volumes: value.volumes.into_iter().map(convert::wish).collect::<Result<_, _>>()?,
        spare_disks: value.spare_disks.unwrap_or(0),
        network_limits,
        session,
        addressing,
        published,
        interfaces,
        role,
        cluster,
        swap,
        executor_id,
        replaces: None,
        key: key.clone(),
    };
    let vm = match served.door.launch(request).await? {
        Launched::Answered(answer) => return Ok(again(&answer)),
        Launched::Vm(vm) => vm,
    };
    let id = vm.id.to_string();
    let (status, body) = match wait {
        Wait::None => (StatusCode::ACCEPTED, to_json(&convert::vm(&vm, &served.host))),
        Wait::Registered | Wait::Running => match served.door.launched(vm).await {
            Ok(vm) => (StatusCode::CREATED, to_json(&convert::vm(&vm, &served.host))),
            Err(error) => {
                let error = ApiError::from(error);
                (error.status, to_json(&error.body()))
            }
        },
    };
    let answer = StoredAnswer { status: status.as_u16(), body };
    remember(&served, key, id, &answer).await;
    Ok(as_json(&answer))
}

/// Keeps the answer for repetitions. Without it a repetition is answered from the VM as it then is.
pub(super) async fn remember(served: &Served, key: Option<Key>, object: String, answer: &StoredAnswer) {
    let Some(key) = key else { return };
    if let Err(error) = served.door.remember(key, object, answer.clone()).await {
        tracing::warn!(error = %crate::report::chain(&error), "cannot keep an answer for repetitions");
    }
}

/// An answer that was given before.
pub(super) fn again(answer: &StoredAnswer) -> Response {
    let mut response = as_json(answer);
    response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
    response
}

pub(super) fn as_json(answer: &StoredAnswer) -> Response {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    (status, [(header::CONTENT_TYPE, "application/json")], answer.body.clone()).into_response()
}

pub(in crate::api) fn to_json<T: serde::Serialize>(value: &T) -> String {
    // These types hold nothing that JSON cannot say.
    serde_json::to_string(value).unwrap_or_default()
}

/// List the VMs of this host.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", responses((status = 200, body = VmList)))]
pub(in crate::api) async fn list_vms(State(served): State<Served>) -> Json<VmList> {
    let vms = served.door.vms();
    Json(VmList { vms: vms.iter().map(|vm| convert::vm(vm, &served.host)).collect() })
}

/// Show a VM.
#[utoipa::path(
    get, path = "/v1/vms/{id}", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Vm>, ApiError> {
    let vm = served.door.vm(&id)?;
    let jail = served.door.jail(&vm).await.map(convert::vm_jail);
    Ok(Json(Vm { jail, ..convert::vm(&vm, &served.host) }))
}

/// Stop a VM and forget it.
#[utoipa::path(
    delete, path = "/v1/vms/{id}", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name"), RemoveQuery),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(query): Params<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    served.door.ask(&id, Verb::Remove { grace: grace(query.timeout_ms) }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Stop a VM: its guest powers off, or its VMM is killed when the guest takes too long.
#[utoipa::path(
    post, path = "/v1/vms/{id}/stop", tag = "vms", request_body = Option<StopRequest>,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = Vm, description = "It is stopped"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn stop_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(request): OptionalBody<StopRequest>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::Stop { grace: grace(request.timeout_ms) }).await
}

/// Hold a VM's vCPUs.
#[utoipa::path(
    post, path = "/v1/vms/{id}/pause", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn pause_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::Pause).await
}

/// Let a paused VM go on; its guest's clock is set.
#[utoipa::path(
    post, path = "/v1/vms/{id}/resume", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn resume_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::Resume).await
}

/// Have another VMM process, of the agent's version, take a VM over. Its guest stands still for milliseconds; programs
/// that were run in it and consoles are cut off.
#[utoipa::path(
    post, path = "/v1/vms/{id}/hand-over", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Vm), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn hand_over_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    ask(&served, &id, Verb::HandOver).await
}

/// What a VM uses and says of itself.
#[utoipa::path(
    get, path = "/v1/vms/{id}/stats", tag = "vms",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Stats), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn vm_stats(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Stats>, ApiError> {
    let (vm, stats) = served.door.stats(&id).await?;
    Ok(Json(convert::stats(&vm, &stats)))
}

/// What all VMs use, as the host and the VMMs see it: no guest is asked.
#[utoipa::path(get, path = "/v1/usage", tag = "vms", responses((status = 200, body = UsageList)))]
pub(in crate::api) async fn list_usage(State(served): State<Served>) -> Json<UsageList> {
    Json(convert::usage(&served.door.usage().await))
}

/// A body without fields: `{}` or nothing.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::api) struct Nothing {}

pub(super) async fn ask(served: &Served, id: &str, verb: Verb) -> Result<Json<Vm>, ApiError> {
    let vm: Arc<VmRecord> = served.door.ask(id, verb).await?;
    Ok(Json(convert::vm(&vm, &served.host)))
}

fn grace(timeout_ms: Option<u32>) -> Duration {
    timeout_ms.map_or(GRACE_DEFAULT, |ms| Duration::from_millis(ms.into()))
}
