//! A machine whose memory image is only partly on this host: it runs while the rest of it comes.

use serde::{Deserialize, Serialize};

use super::RestoreSpec;

/// A machine to build from saved state, of whose memory image every chunk counts as missing until it is said to be there
/// ([`crate::wire::filling`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreFillingSpec {
    /// What is restored.
    pub restore: RestoreSpec,
    /// Bytes of a chunk: a power of two, from a page on. An image of more than 30,000 chunks is refused.
    pub chunk_bytes: u32,
}
