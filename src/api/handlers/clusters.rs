//! Clusters and their members.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::vms::{GRACE_DEFAULT, again, as_json, remember, to_json};
use crate::agent::{ClusterCreated, ClusterRequest, StoredAnswer};
use crate::api::body::{JsonBody, Params};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{Cluster, ClusterCreateRequest, ClusterList, ClusterMemberList, ClusterRemoveQuery, ErrorBody};

/// Make a cluster.
#[utoipa::path(
    post, path = "/v1/clusters", tag = "clusters", request_body = ClusterCreateRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known")),
    responses(
        (status = 201, body = Cluster, description = "It is made; this answer alone has its token"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn create_cluster(
    State(served): State<Served>,
    body: JsonBody<ClusterCreateRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    let ClusterCreateRequest { name, token, endpoint, registration_deadline_s } = value;
    let endpoint = endpoint.map(|text| {
        text.parse().map_err(|_| {
            let message = format!("endpoint {text:?}: an address and a port are needed");
            ApiError::bad_request("invalid_endpoint", message).with_detail("write 192.0.2.7:7070 or [2001:db8::7]:7070")
        })
    });
    let endpoint = endpoint.transpose()?;
    let request = ClusterRequest { name, token, endpoint, registration_deadline_s, key: key.clone() };
    let view = match served.door.create_cluster(request).await? {
        ClusterCreated::Answered(answer) => return Ok(again(&answer)),
        ClusterCreated::Cluster(view) => view,
    };
    let token = Some(view.record.token.secret().to_owned());
    let body = to_json(&Cluster { token, ..convert::cluster(&view) });
    let answer = StoredAnswer { status: StatusCode::CREATED.as_u16(), body };
    remember(&served, key, view.record.id.to_string(), &answer).await;
    Ok(as_json(&answer))
}

/// List the clusters of this host.
#[utoipa::path(
    get, path = "/v1/clusters", tag = "clusters",
    responses((status = 200, body = ClusterList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_clusters(State(served): State<Served>) -> Result<Json<ClusterList>, ApiError> {
    let clusters = served.door.clusters().await?;
    Ok(Json(ClusterList { clusters: clusters.iter().map(convert::cluster).collect() }))
}

/// Show a cluster.
#[utoipa::path(
    get, path = "/v1/clusters/{id}", tag = "clusters",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = Cluster), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_cluster(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Cluster>, ApiError> {
    Ok(Json(convert::cluster(&served.door.cluster(&id).await?)))
}

/// Remove a cluster and its calculations.
#[utoipa::path(
    delete, path = "/v1/clusters/{id}", tag = "clusters",
    params(("id" = String, Path, description = "Id, unique start of an id, or name"), ClusterRemoveQuery),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_cluster(
    State(served): State<Served>,
    Path(id): Path<String>,
    Params(query): Params<ClusterRemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let grace = query.timeout_ms.map_or(GRACE_DEFAULT, |ms| Duration::from_millis(ms.into()));
    served.door.remove_cluster(&id, query.drain, grace).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List the members of a cluster.
#[utoipa::path(
    get, path = "/v1/clusters/{id}/members", tag = "clusters",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses((status = 200, body = ClusterMemberList), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_members(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<ClusterMemberList>, ApiError> {
    let view = served.door.cluster(&id).await?;
    Ok(Json(ClusterMemberList { members: view.members.iter().map(|vm| convert::member(vm, &view)).collect() }))
}
