//! How errors are told: as one chain "a: b: c", and with an answer to "may I try again?".
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Whether the same request may succeed later. Every error of an operation answers this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// The same request will fail again.
    Never,
    /// The same request may succeed later.
    Later,
    /// It can succeed once something else was changed.
    WithChange,
}

/// The error and its causes, outermost first, joined by ": ".
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
