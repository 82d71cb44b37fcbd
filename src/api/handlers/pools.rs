//! Machines that are kept ready.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::api::body::JsonBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, Pool, PoolList, PoolRequest};

/// List the pools of this host.
#[utoipa::path(
    get, path = "/v1/pools", tag = "bundles",
    responses((status = 200, body = PoolList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_pools(State(served): State<Served>) -> Result<Json<PoolList>, ApiError> {
    let pools = served.door.pools().await?;
    Ok(Json(PoolList { pools: pools.into_iter().map(convert::pool).collect() }))
}

/// Show the pool of a bundle.
#[utoipa::path(
    get, path = "/v1/pools/{bundle}", tag = "bundles",
    params(("bundle" = String, Path, description = "Id, unique start of an id, or name of a bundle")),
    responses((status = 200, body = Pool), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_pool(
    State(served): State<Served>,
    Path(bundle): Path<String>,
) -> Result<Json<Pool>, ApiError> {
    Ok(Json(convert::pool(served.door.pool(&bundle).await?)))
}

/// Keep so many machines of a bundle ready. They are made behind the answer.
#[utoipa::path(
    put, path = "/v1/pools/{bundle}", tag = "bundles", request_body = PoolRequest,
    params(("bundle" = String, Path, description = "Id, unique start of an id, or name of a bundle")),
    responses((status = 200, body = Pool), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn set_pool(
    State(served): State<Served>,
    Path(bundle): Path<String>,
    body: JsonBody<PoolRequest>,
) -> Result<Json<Pool>, ApiError> {
    Ok(Json(convert::pool(served.door.set_pool(&bundle, body.value.size).await?)))
}

/// Keep no machines of a bundle ready any more.
#[utoipa::path(
    delete, path = "/v1/pools/{bundle}", tag = "bundles",
    params(("bundle" = String, Path, description = "Id, unique start of an id, or name of a bundle")),
    responses(
        (status = 204, description = "They are gone"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn remove_pool(
    State(served): State<Served>,
    Path(bundle): Path<String>,
) -> Result<StatusCode, ApiError> {
    served.door.remove_pool(&bundle).await?;
    Ok(StatusCode::NO_CONTENT)
}
