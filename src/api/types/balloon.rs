//! The memory balloons of VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/vms/{id}/balloon`: answered once the guest is told. How far it is then shows in the answer, and later in
/// the VM's statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// MiB of its memory that the guest is to give back; 0: none. At most its memory less 32 MiB.
    pub target_mib: u64,
}

/// A VM's balloon: memory its guest gave back. A guest that runs out of memory takes some of it again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStats {
    /// Bytes the guest is asked to give.
    pub target_bytes: u64,
    /// Bytes it says it has given.
    pub actual_bytes: u64,
    /// Bytes that were given back because the guest reported them free, in all since it was booted: it may have used
    /// them again, and reported them again.
    pub reported_bytes: u64,
    /// What the guest's kernel said of its memory last; null before it did.
    pub guest: Option<BalloonGuestStats>,
}

/// A guest's memory as its kernel sees it; null for what it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BalloonGuestStats {
    /// How long ago it said so. Reading it has the guest asked again, at most once a second.
    pub age_ms: f64,
    /// Bytes read from its swap.
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to its swap.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes it uses for nothing.
    pub free_bytes: Option<u64>,
    /// Bytes it has.
    pub total_bytes: Option<u64>,
    /// Bytes programs could get without swapping.
    pub available_bytes: Option<u64>,
    /// Bytes of files it could drop.
    pub disk_caches_bytes: Option<u64>,
}
