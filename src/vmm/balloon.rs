//! What the agent asks of the balloon, and what it is told.

use std::time::Duration;

use crate::machine::Machine;
use crate::machine::virtio::{BalloonCounts, GuestMemoryStats};
use crate::units::{Bytes, PAGE_BYTES, PageCount};
use crate::wire::control::{BalloonStatus, GuestMemoryStatus};
use crate::wire::refusal::Refusal;

/// Sets the target if there is one, and says how things are.
pub(super) fn answer(machine: &Machine, target_bytes: Option<u64>) -> Result<BalloonStatus, Refusal> {
    let refused = |reason: String| Refusal::BadRequest { reason };
    let memory: u64 = machine.guest_regions().iter().map(|region| region.bytes.0).sum();
    if let Some(found) = target_bytes.filter(|target| *target > memory) {
        return Err(refused(format!("a balloon of {} in a machine of {}", Bytes(found), Bytes(memory))));
    }
    let target = target_bytes.map(|bytes| PageCount(bytes / PAGE_BYTES));
    let counts = machine.balloon(target).ok_or_else(|| refused("the machine has no balloon".to_owned()))?;
    let BalloonCounts { target, actual, reported, guest } = counts;
    let guest = guest.map(|(stats, age)| status(stats, age));
    Ok(BalloonStatus { target_bytes: target.0, actual_bytes: actual.0, reported_bytes: reported.0, guest })
}

fn status(stats: GuestMemoryStats, age: Duration) -> GuestMemoryStatus {
    let GuestMemoryStats {
        swap_in_bytes,
        swap_out_bytes,
        major_faults,
        minor_faults,
        free_bytes,
        total_bytes,
        available_bytes,
        disk_caches_bytes,
    } = stats;
    GuestMemoryStatus {
        age_ns: u64::try_from(age.as_nanos()).unwrap_or(u64::MAX),
        swap_in_bytes,
        swap_out_bytes,
        major_faults,
        minor_faults,
        free_bytes,
        total_bytes,
        available_bytes,
        disk_caches_bytes,
    }
}
