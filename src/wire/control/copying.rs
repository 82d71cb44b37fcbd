//! A machine's memory written while it runs: what is asked, and what was done.

use serde::{Deserialize, Serialize};

use super::SavedPages;

/// How to copy memory while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopySpec {
    /// Which pages.
    pub pages: SavedPages,
    /// Longest pause that is aimed at, in milliseconds.
    pub pause_ms_max: u32,
    /// Rounds after which no other begins: what is left is left then.
    pub rounds_max: u32,
    /// Time after which no other round begins, in milliseconds.
    pub deadline_ms: u64,
}

/// What a copy did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CopyPhases {
    /// Rounds.
    pub rounds: u32,
    /// Bytes of guest memory that were written, each as often as it was.
    pub memory_bytes: u64,
    /// Bytes of guest memory that were left when it ended.
    pub left_bytes: u64,
    /// How long it took, in nanoseconds.
    pub running_ns: u64,
}
