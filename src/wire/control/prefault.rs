//! Pages of a memory image that are mapped before a guest reaches them.

use serde::{Deserialize, Serialize};

/// Most runs of pages in one request: so many fit a frame, however large their numbers are.
pub const PREFAULT_RUNS_MAX: usize = 4096;

/// Which pages, as runs of first page and count, by their place in the image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PrefaultSpec {
    /// Those to be read.
    pub read: Vec<(u32, u32)>,
    /// Those to be written: each becomes the machine's own.
    pub written: Vec<(u32, u32)>,
}
