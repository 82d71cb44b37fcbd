//! What survives of a block device.

use serde::{Deserialize, Serialize};

use crate::saved::{Saved, SectionKind};

/// The block device on a file. Requests under way are finished before it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlockV1 {
    /// Size of the disk.
    pub(crate) sectors: u64,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
}

impl Saved for BlockV1 {
    const KIND: SectionKind = SectionKind::Block;
    const VERSION: u16 = 1;
}

/// The block device on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlockV2 {
    /// Size of the volume; 0: none is attached.
    pub(crate) sectors: u64,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Whether the guest was told so when it found the device.
    pub(crate) told_read_only: bool,
    /// Whether the size is another, and the guest has not been told yet.
    pub(crate) resized: bool,
    /// First descriptors of the requests that are not answered, in the order they came. They may have been carried out.
    pub(crate) under_way: Vec<u16>,
}

impl Saved for BlockV2 {
    const KIND: SectionKind = SectionKind::Block;
    const VERSION: u16 = 2;
}

impl From<BlockV1> for BlockV2 {
    fn from(BlockV1 { sectors, read_only }: BlockV1) -> Self {
        Self { sectors, read_only, told_read_only: read_only, resized: false, under_way: Vec::new() }
    }
}
