//! The memory balloons of VMs.

use axum::Json;
use axum::extract::{Path, State};

use crate::api::body::JsonBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{BalloonRequest, BalloonStats, ErrorBody};

/// Ask a guest to give some of its memory back, or to take it again.
#[utoipa::path(
    post, path = "/v1/vms/{id}/balloon", tag = "vms", request_body = BalloonRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = BalloonStats, description = "The guest is told; it may still be at it"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn set_balloon(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<BalloonRequest>,
) -> Result<Json<BalloonStats>, ApiError> {
    let BalloonRequest { target_mib } = body.value;
    let status = served.door.set_balloon(&id, target_mib).await?;
    Ok(Json(convert::balloon(&status)))
}
