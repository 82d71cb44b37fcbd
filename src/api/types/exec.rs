//! Commands run inside a guest.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::encode_base64 as encode;

/// `POST /v1/vms/{id}/exec`. With `Upgrade: hearth-stream/1` the answer is 101 and the command's streams follow as
/// frames; without, standard input is empty and the answer is an [`ExecResult`] once the command has ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments. A program without a slash is searched in the `PATH` of its environment.
    #[schema(min_items = 1, example = json!(["uname", "-a"]))]
    pub argv: Vec<String>,
    /// `NAME=value` words added to the environment of the guest's agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Working directory; `/` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Milliseconds until the command and its children are killed; never when left out or 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
    /// Give it a terminal of this size: its streams are then one, `stdout`. Only with an upgrade.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Rows of text.
    pub rows: u16,
    /// Columns of text.
    pub columns: u16,
}

/// How a command ended: exactly one of `exit_code`, `signal` and `timed_out` says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// Its exit code, if it exited.
    pub exit_code: Option<u8>,
    /// The signal that ended it, if one did.
    pub signal: Option<u8>,
    /// Whether it ran past its time-out and was killed.
    pub timed_out: bool,
    /// What it wrote to standard output.
    pub stdout: Captured,
    /// What it wrote to standard error.
    pub stderr: Captured,
}

/// Bytes a command wrote.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Captured {
    /// The bytes as text; what is not UTF-8 is replaced by U+FFFD.
    pub text: String,
    /// The exact bytes in base64 (RFC 4648 section 4), when they are not UTF-8; else null.
    pub base64: Option<String>,
    /// Whether more was written than is kept.
    pub truncated: bool,
}

impl Captured {
    /// The bytes as they go into JSON.
    pub fn new(bytes: Vec<u8>, truncated: bool) -> Self {
        match String::from_utf8(bytes) {
            Ok(text) => Self { text, base64: None, truncated },
            Err(error) => Self {
                text: String::from_utf8_lossy(error.as_bytes()).into_owned(),
                base64: Some(encode(error.as_bytes())),
                truncated,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_text_is_given_twice() {
        assert_eq!(
            Captured::new(b"ok".to_vec(), false),
            Captured { text: "ok".into(), base64: None, truncated: false }
        );
        let raw = Captured::new(vec![b'a', 0xff], true);
        assert_eq!(raw, Captured { text: "a\u{fffd}".into(), base64: Some("Yf8=".into()), truncated: true });
    }
}
