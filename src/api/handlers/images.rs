//! Images.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::vms::{again, as_json, remember, to_json};
use crate::agent::{LaunchError, StoredAnswer};
use crate::api::body::JsonBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, Image, ImageImportRequest, ImageList};

/// List the images of this host.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = ImageList)))]
pub(in crate::api) async fn list_images(State(served): State<Served>) -> Result<Json<ImageList>, ApiError> {
    let images = served.door.images().await?;
    Ok(Json(ImageList { images: images.into_iter().map(convert::image).collect() }))
}

/// Show an image.
#[utoipa::path(
    get, path = "/v1/images/{name}", tag = "images", params(("name" = String, Path)),
    responses((status = 200, body = Image), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_image(
    State(served): State<Served>,
    Path(name): Path<String>,
) -> Result<Json<Image>, ApiError> {
    Ok(Json(convert::image(served.door.image(&name).await?)))
}

/// Make an image of files of this host: a kernel and an initrd, or a container.
#[utoipa::path(
    post, path = "/v1/images", tag = "images", request_body = ImageImportRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition of this request known")),
    responses((status = 201, body = Image), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn import_image(
    State(served): State<Served>,
    body: JsonBody<ImageImportRequest>,
) -> Result<Response, ApiError> {
    let JsonBody { value, key } = body;
    if let Some(key) = &key
        && let Some(known) = served.door.key(key.clone()).await?
    {
        if known.body_hash != key.body_hash {
            return Err(LaunchError::KeyMismatch.into());
        }
        if let Some(answer) = &known.answer {
            return Ok(again(answer));
        }
    }
    let image = convert::image(served.door.import_image(convert::import(value)?).await?);
    let answer = StoredAnswer { status: StatusCode::CREATED.as_u16(), body: to_json(&image) };
    remember(&served, key, image.name, &answer).await;
    Ok(as_json(&answer))
}

/// Remove an image that no VM uses.
#[utoipa::path(
    delete, path = "/v1/images/{name}", tag = "images", params(("name" = String, Path)),
    responses((status = 204, description = "It is gone"), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn remove_image(
    State(served): State<Served>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    served.door.remove_image(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
