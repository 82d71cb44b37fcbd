//! Last words: why a VMM ended, written by it to a file that the agent made and passed, so that whoever looks later
//! (the agent that started it, or one that adopted it) can tell. A process that is pid 1 of its namespace ignores its
//! own SIGABRT, so its exit status alone does not tell.

use serde::{Deserialize, Serialize};

/// Longest file in bytes; more is cut off when reading.
pub const BYTES_MAX: usize = 16 * 1024;

/// Longest detail text in bytes.
pub const DETAIL_BYTES_MAX: usize = 4096;

/// Why a VMM ended on its own account. JSON in the file: people read it too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum LastWords {
    /// The agent said Stop.
    Stopped,
    /// The guest powered itself off.
    GuestPoweredOff,
    /// The guest rebooted; a reboot ends a VM.
    GuestRebooted,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest cannot go on: triple fault, or an instruction this host's KVM cannot carry out.
    GuestFault {
        /// What KVM said.
        detail: String,
    },
    /// The VMM cannot go on.
    VmmError {
        /// The chain of errors, or the panic's message.
        detail: String,
    },
}

impl LastWords {
    /// The words as one line of JSON.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }

    /// Reads what a VMM wrote; `None` if it is not last words. The bytes are untrusted.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..bytes.len().min(BYTES_MAX))?;
        let line = bytes.split(|byte| *byte == b'\n').next()?;
        serde_json::from_slice(line).ok()
    }
}
