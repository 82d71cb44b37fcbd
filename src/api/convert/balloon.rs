//! Balloons between the agent's words and the API's.

use std::time::Duration;

use crate::agent;
use crate::api::types::{BalloonGuestStats, BalloonStats};

/// What a balloon holds.
pub(in crate::api) fn balloon(status: &agent::BalloonStatus) -> BalloonStats {
    let &agent::BalloonStatus { target_bytes, actual_bytes, reported_bytes, guest } = status;
    BalloonStats { target_bytes, actual_bytes, reported_bytes, guest: guest.map(guest_stats) }
}

fn guest_stats(guest: agent::GuestMemoryStatus) -> BalloonGuestStats {
    let agent::GuestMemoryStatus {
        age_ns,
        swap_in_bytes,
        swap_out_bytes,
        major_faults,
        minor_faults,
        free_bytes,
        total_bytes,
        available_bytes,
        disk_caches_bytes,
    } = guest;
    BalloonGuestStats {
        age_ms: Duration::from_nanos(age_ns).as_secs_f64() * 1000.0,
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
