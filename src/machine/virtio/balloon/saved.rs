//! What survives of a balloon. What the guest said does not: it says it again.

use serde::{Deserialize, Serialize};

use crate::saved::{Saved, SectionKind};

/// The memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BalloonV1 {
    /// Pages the guest is asked to give.
    pub(crate) target_pages: u32,
    /// Pages it says it has given.
    pub(crate) actual_pages: u32,
    /// Bytes that were given back because they were reported free, since the guest was booted.
    pub(crate) reported_bytes: u64,
}

impl Saved for BalloonV1 {
    const KIND: SectionKind = SectionKind::Balloon;
    const VERSION: u16 = 1;
}
