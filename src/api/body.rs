//! Reading requests: JSON bodies, queries, keys. Everything is bounded in size and time, and what is wrong is told by
//! a code of its own.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::types::IDEMPOTENCY_KEY_HEADER;
use crate::agent::Key;
use crate::report::Retry;

/// Longest JSON body. The largest request is an exec with its words, 960 KiB at most.
pub(super) const BODY_BYTES_MAX: usize = 1024 * 1024;

/// Longest time for a body to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(30);

/// Longest idempotency key.
pub(super) const KEY_BYTES_MAX: usize = 128;

/// A JSON body, checked, with what an idempotency key needs.
#[derive(Debug)]
pub(super) struct JsonBody<T> {
    pub(super) value: T,
    pub(super) key: Option<Key>,
}

/// A JSON body that may be left out.
#[derive(Debug)]
pub(super) struct OptionalBody<T>(pub(super) T);

/// A query, checked.
#[derive(Debug)]
pub(super) struct Params<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        is_json(&parts.headers)?;
        let bytes = read(body).await?;
        let key = key(&parts, &bytes)?;
        Ok(Self { value: parse(&bytes)?, key })
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for OptionalBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read(body).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        is_json(&parts.headers)?;
        parse(&bytes).map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::<T>::try_from_uri(&parts.uri) {
            Ok(query) => Ok(Self(query.0)),
            Err(error) => {
                // The innermost error says which parameter and what is wrong with it; each around it repeats that.
                let mut innermost: &(dyn std::error::Error + 'static) = &error;
                while let Some(source) = innermost.source() {
                    innermost = source;
                }
                let text = innermost.to_string();
                let code = if text.contains("unknown field") { "unknown_field" } else { "invalid_query" };
                Err(ApiError::bad_request(code, format!("understand the query: {text}")))
            }
        }
    }
}

/// Whether the body is said to be JSON.
pub(super) fn is_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let said = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = said.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("the content type is {said:?}: application/json is understood");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message, Retry::WithChange))
}

/// The whole body, up to the limit in size and time.
pub(super) async fn read(body: Body) -> Result<Bytes, ApiError> {
    read_within(body, BODY_BYTES_MAX, BODY_LIMIT).await
}

/// The whole body, up to these limits.
pub(super) async fn read_within(body: Body, bytes_max: usize, limit: Duration) -> Result<Bytes, ApiError> {
    let whole = Limited::new(body, bytes_max).collect();
    match tokio::time::timeout(limit, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let message = format!("the body is longer than {bytes_max} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message, Retry::WithChange))
        }
        Ok(Err(error)) => Err(ApiError::bad_request("broken_body", format!("read the body: {error}"))),
        Err(_) => {
            let message = format!("the body did not arrive within {} s", limit.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message, Retry::Later))
        }
    }
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let text = error.to_string();
        let code = match error.classify() {
            serde_json::error::Category::Data if text.starts_with("unknown field") => "unknown_field",
            serde_json::error::Category::Data => "invalid_value",
            serde_json::error::Category::Syntax
            | serde_json::error::Category::Eof
            | serde_json::error::Category::Io => "bad_json",
        };
        ApiError::bad_request(code, format!("understand the body: {text}"))
    })
}

fn key(parts: &Parts, body: &[u8]) -> Result<Option<Key>, ApiError> {
    let Some(value) = parts.headers.get(IDEMPOTENCY_KEY_HEADER) else { return Ok(None) };
    let word = value.to_str().unwrap_or_default();
    if word.is_empty() || word.len() > KEY_BYTES_MAX {
        let message = format!("an idempotency key is 1 to {KEY_BYTES_MAX} printable ASCII characters");
        return Err(ApiError::bad_request("invalid_key", message));
    }
    Ok(Some(Key {
        key: word.to_owned(),
        route: format!("{} {}", parts.method, parts.uri.path()),
        body_hash: *blake3::hash(body).as_bytes(),
    }))
}
