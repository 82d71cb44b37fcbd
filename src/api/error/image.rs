//! Images, and containers that are to become some.

use axum::http::StatusCode;

use super::ApiError;
use crate::agent::{ContainerError, ImageError};
use crate::report::chain;

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code) = match error {
            ImageError::NoRoom(error) => return error.into(),
            ImageError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name"),
            ImageError::Unknown { .. } => (StatusCode::NOT_FOUND, "unknown_image"),
            ImageError::Exists { .. } => (StatusCode::CONFLICT, "name_taken"),
            ImageError::InUse { .. } => (StatusCode::CONFLICT, "image_in_use"),
            ImageError::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "busy"),
            ImageError::Malformed { .. } | ImageError::Syntax { .. } | ImageError::File { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "bad_image")
            }
            ImageError::Container { source, .. } => container(&source),
        };
        Self::new(status, code, message, retry)
    }
}

const fn container(error: &ContainerError) -> (StatusCode, &'static str) {
    match error {
        ContainerError::NoSpace { .. } => (StatusCode::INSUFFICIENT_STORAGE, "no_space"),
        ContainerError::Write { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure"),
        ContainerError::Read { .. }
        | ContainerError::NotAFile { .. }
        | ContainerError::Layout { .. }
        | ContainerError::Reference { .. }
        | ContainerError::Packed { .. }
        | ContainerError::Damaged { .. }
        | ContainerError::Entry { .. }
        | ContainerError::TooLarge { .. }
        | ContainerError::DoesNotFit
        | ContainerError::Agent { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bad_container"),
    }
}
