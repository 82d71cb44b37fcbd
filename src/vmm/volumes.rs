//! What the agent asks of the volume slots, and what it is told.

use std::time::Duration;

use super::bounded;
use crate::machine::virtio::block::VolumeError;
use crate::machine::virtio::block::volume::{self, Attachment, VolumeCounts, VolumeFlowCounts, VolumeLimits};
use crate::machine::{Machine, VolumeChange};
use crate::wire::control::{AttachVolumeSpec, LATENCY_BUCKETS, VOLUME_BLOCK_BYTES, VolumeFlow, VolumeStatus};
use crate::wire::refusal::Refusal;

/// Both sides of the control socket mean the same.
const _: () = assert!(LATENCY_BUCKETS == volume::LATENCY_BUCKETS);
const _: () = assert!(VOLUME_BLOCK_BYTES == crate::machine::virtio::block::VOLUME_BLOCK_BYTES);

/// The change that an attachment is.
pub(super) fn attach(spec: AttachVolumeSpec) -> (u8, VolumeChange) {
    let AttachVolumeSpec { index, bytes, read_only, reconnect_ms } = spec;
    let reconnect = Duration::from_millis(reconnect_ms.into());
    (index, VolumeChange::Attach(Attachment { bytes, read_only, reconnect }))
}

/// The change that limits are.
pub(super) fn limit(iops: Option<u32>, bytes_per_s: Option<u64>) -> VolumeChange {
    VolumeChange::Limit(VolumeLimits { iops, bytes_per_s })
}

/// Changes a volume slot.
pub(super) fn change(machine: &Machine, index: u8, change: VolumeChange) -> Result<(), Refusal> {
    machine.change_volume(index, change).map_err(|error| match error {
        VolumeError::InUse { .. } => Refusal::VolumeInUse { index },
        VolumeError::NoSlot { .. }
        | VolumeError::Attached
        | VolumeError::NotAttached
        | VolumeError::Bytes { .. }
        | VolumeError::Shrinks { .. }
        | VolumeError::ReadOnlySlot
        | VolumeError::Limit => Refusal::BadRequest { reason: format!("volume slot {index}: {error}") },
    })
}

/// How the volume slots are.
pub(super) fn status(machine: &Machine) -> Vec<VolumeStatus> {
    machine.volumes().into_iter().map(|(index, counts)| status_of(index, counts)).collect()
}

fn status_of(index: u8, counts: VolumeCounts) -> VolumeStatus {
    let VolumeCounts {
        bytes,
        read_only,
        connections,
        waiting,
        reconnects,
        errors,
        fenced,
        read,
        write,
        flush,
        trouble,
    } = counts;
    let [read, write, flush] = [read, write, flush].map(|counts| {
        let VolumeFlowCounts { requests, bytes, took_us, latency_us } = counts;
        VolumeFlow { requests, bytes, took_us, latency_us }
    });
    let trouble = trouble.map(bounded);
    VolumeStatus {
        index,
        bytes,
        read_only,
        connections,
        waiting,
        reconnects,
        errors,
        fenced,
        read,
        write,
        flush,
        trouble,
    }
}
