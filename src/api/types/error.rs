//! Why a request was not carried out.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::report::Retry;

/// The body of every answer with a status of 400 or more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// One error, for programs (`code`, `retry`) and for people (`message`, `detail`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable snake_case word for programs.
    #[schema(example = "unknown_image")]
    pub code: String,
    /// What was not done and why, as one chain "a: b: c".
    pub message: String,
    /// What to do about it; null when there is nothing to say.
    #[serde(default)]
    pub detail: Option<String>,
    /// Whether the same request may succeed later.
    pub retry: RetryHint,
}

/// Whether the same request may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RetryHint {
    /// The same request will fail again.
    Never,
    /// The same request may succeed later.
    Later,
    /// It can succeed once something else was changed.
    WithChange,
}

impl From<Retry> for RetryHint {
    fn from(retry: Retry) -> Self {
        match retry {
            Retry::Never => Self::Never,
            Retry::Later => Self::Later,
            Retry::WithChange => Self::WithChange,
        }
    }
}
