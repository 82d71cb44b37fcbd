//! Bundles as files, and their signatures.

use std::io;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::agent::{BundleSignature, PIECES_MAX, Piece};
use crate::api::body::JsonBody;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{Bundle, BundleImported, BundleSignRequest, ErrorBody};

/// How long a client may send nothing of a file: somebody may be pressing Ctrl-S at the other end of its pipe.
const SEND_LIMIT: Duration = Duration::from_secs(300);

/// How long what a client still sends is thrown away after it was refused. Without that, its connection would break
/// before it reads why.
const THROW_AWAY_LIMIT: Duration = Duration::from_secs(30);

/// Write a bundle, with what it builds on, as one file: `src/bundle/FORMAT.md` describes it. A file without its end is
/// none.
#[utoipa::path(
    get, path = "/v1/bundles/{id}/export", tag = "bundles",
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = String, content_type = "application/octet-stream", description = "The file"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn export_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let (_, pieces) = served.door.export_bundle(&id).await?;
    let pieces = stream::unfold(pieces, |mut pieces| async { pieces.recv().await.map(|piece| (piece, pieces)) });
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(pieces)).into_response())
}

/// Have the bundle that a file holds. It is there when all of it has come and is what it has to be, and not before.
#[utoipa::path(
    post, path = "/v1/bundle-imports", tag = "bundles",
    request_body(content = String, content_type = "application/octet-stream", description = "What was exported"),
    responses(
        (status = 200, body = BundleImported, description = "It was here before"),
        (status = 201, body = BundleImported),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn import_bundle(
    State(served): State<Served>,
    body: Body,
) -> Result<(StatusCode, Json<BundleImported>), ApiError> {
    let (to, pieces) = mpsc::channel(PIECES_MAX);
    let (rest, imported) = tokio::join!(take(body, to), served.door.import_bundle(pieces));
    let mut imported = match imported {
        Ok(imported) => imported,
        Err(error) => {
            if let Some(rest) = rest {
                tokio::spawn(timeout(THROW_AWAY_LIMIT, throw_away(rest)));
            }
            return Err(error.into());
        }
    };
    let Some(last) = imported.pop() else {
        return Err(ApiError::bad_request("import_truncated", "there is no bundle in it"));
    };
    let status = if last.existed { StatusCode::OK } else { StatusCode::CREATED };
    let bundle = convert::bundle(&last.view, served.door.as_ref());
    let parents = imported.into_iter().map(|parent| parent.view.id).collect();
    Ok((status, Json(BundleImported { bundle, existed: last.existed, parents })))
}

/// Hands a body on, piece by piece; what nobody wants any more is given back.
async fn take(mut body: Body, to: mpsc::Sender<Piece>) -> Option<Body> {
    loop {
        let piece = tokio::select! {
            biased;
            // Refused, while the client may send nothing more before it is told.
            () = to.closed() => return Some(body),
            piece = timeout(SEND_LIMIT, body.frame()) => piece,
        };
        let piece = match piece {
            Ok(None) => return None,
            // Frames that are not data are trailers, and mean nothing here.
            Ok(Some(Ok(frame))) => frame.into_data().map(Ok).unwrap_or_else(|_| Ok(bytes::Bytes::new())),
            Ok(Some(Err(error))) => Err(io::Error::other(error)),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client sends nothing")),
        };
        let is_broken = piece.is_err();
        if to.send(piece).await.is_err() {
            return Some(body);
        }
        if is_broken {
            return None;
        }
    }
}

async fn throw_away(mut body: Body) {
    while let Some(Ok(_)) = body.frame().await {}
}

/// Keep a signature of a bundle. What is signed is its `manifest_digest`; the private key stays with whoever has it.
#[utoipa::path(
    post, path = "/v1/bundles/{id}/signatures", tag = "bundles", request_body = BundleSignRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 201, body = Bundle),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn sign_bundle(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<BundleSignRequest>,
) -> Result<(StatusCode, Json<Bundle>), ApiError> {
    let BundleSignRequest { key, signature } = body.value;
    let view = served.door.sign_bundle(&id, BundleSignature { key, signature }).await?;
    Ok((StatusCode::CREATED, Json(convert::bundle(&view, served.door.as_ref()))))
}
