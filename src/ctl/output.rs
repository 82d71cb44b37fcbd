//! Standard output: a table for people, or exactly one JSON value for programs.

use std::io::{self, Write};

use serde::Serialize;

/// The result could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Standard output refuses it.
    #[error("write to standard output")]
    Write(#[source] io::Error),
    /// It is not JSON.
    #[error("write the result as JSON")]
    Json(#[source] serde_json::Error),
}

impl OutputError {
    /// Whether nobody reads the output any more.
    pub(super) fn is_unread(&self) -> bool {
        match self {
            Self::Write(error) => matches!(error.kind(), io::ErrorKind::BrokenPipe),
            Self::Json(_) => false,
        }
    }
}

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether programs read it.
    pub(super) const fn is_json(self) -> bool {
        self.json
    }

    /// Prints a value, or what `people` makes of it.
    pub(super) fn value<T: Serialize>(self, value: &T, people: impl FnOnce(&T) -> String) -> Result<(), OutputError> {
        let text = if self.json { serde_json::to_string(value).map_err(OutputError::Json)? } else { people(value) };
        self.line(&text)
    }

    /// Prints a line at once.
    pub(super) fn line(self, text: &str) -> Result<(), OutputError> {
        let newline = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
        self.bytes(format!("{text}{newline}").as_bytes())
    }

    /// Prints bytes as they are.
    pub(super) fn bytes(self, bytes: &[u8]) -> Result<(), OutputError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(OutputError::Write)
    }
}

/// A note on standard error, for people. If it cannot be written, nobody misses it.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
