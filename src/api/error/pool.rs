//! Machines that are kept ready.

use axum::http::StatusCode;

use super::ApiError;
use crate::agent::PoolError;
use crate::report::chain;

impl From<PoolError> for ApiError {
    fn from(error: PoolError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code, todo) = match error {
            PoolError::Bundle(error) => return error.into(),
            PoolError::Size { .. } => (StatusCode::BAD_REQUEST, "invalid_pool_size", None),
            PoolError::Memory { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "pool_too_large",
                Some("ask for fewer: `hearth pool ls` shows the others"),
            ),
            PoolError::Disks { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bundle_has_disks", None),
            PoolError::Unknown { .. } => {
                (StatusCode::NOT_FOUND, "unknown_pool", Some("`hearth pool ls` lists the pools of this host"))
            }
            PoolError::Host(_) => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None),
            PoolError::Ledger(_) => (StatusCode::SERVICE_UNAVAILABLE, "ledger_failure", None),
        };
        let answer = Self::new(status, code, message, retry);
        match todo {
            Some(todo) => answer.with_detail(todo),
            None => answer,
        }
    }
}
