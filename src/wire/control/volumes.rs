//! Volumes on the slots of block devices: what the agent says of them while the machine is there, and what it is told.

use serde::{Deserialize, Serialize};

/// Most volume slots of one machine: they are the slots of block devices.
pub const VOLUME_SLOTS_MAX: usize = 6;

/// What a volume's size is a multiple of, in bytes.
pub const VOLUME_BLOCK_BYTES: u64 = 4096;

/// Buckets of [`VolumeFlow::latency_us`].
pub const LATENCY_BUCKETS: usize = 28;

/// A volume for a slot where nothing is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachVolumeSpec {
    /// Which slot, 0 to 5.
    pub index: u8,
    /// The volume's size in bytes, a multiple of [`VOLUME_BLOCK_BYTES`] above 0.
    pub bytes: u64,
    /// Refuse writes. The guest is told only if the slot was made so; otherwise its writes fail.
    pub read_only: bool,
    /// How long requests wait for a connection, in milliseconds, before they fail.
    pub reconnect_ms: u32,
}

/// A volume slot, and what passed since its volume was attached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Which slot, 0 to 5.
    pub index: u8,
    /// The volume's size in bytes; 0: nothing is attached.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Connections to the server that carry requests.
    pub connections: u8,
    /// Requests of the guest that are not finished.
    pub waiting: u32,
    /// Connections that were made and broke: each had to be made again.
    pub reconnects: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Whether the server's last word was that this machine may not use the volume (NBD_EPERM).
    pub fenced: bool,
    /// What came from the volume.
    pub read: VolumeFlow,
    /// What went to it, without discards and zeroes.
    pub write: VolumeFlow,
    /// Flushes; they have no bytes.
    pub flush: VolumeFlow,
    /// Why the last connection was refused or given up, if none was taken since.
    pub trouble: Option<String>,
}

/// Requests of one kind that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeFlow {
    /// How many.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long they took, all together, in microseconds.
    pub took_us: u64,
    /// How many took how long, waiting included: bucket 0 counts those below 1 µs, bucket n those from 2^(n-1) µs to below
    /// 2^n µs, the last one all that took longer.
    pub latency_us: [u64; LATENCY_BUCKETS],
}
