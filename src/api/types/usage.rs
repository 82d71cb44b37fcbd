//! What virtual machines use at the moment, to be looked at again and again.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmState;
use crate::ids::VmId;

/// `GET /v1/usage`: what all VMs use, as the host and the VMMs see it. No guest is asked, so looking does not disturb any.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UsageList {
    /// When this was, by a clock that nobody sets. It tells how long two looks are apart, and nothing else.
    pub at_ms: f64,
    /// All VMs of this host, oldest first.
    pub vms: Vec<VmUsage>,
}

/// What a VM uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmUsage {
    /// The VM.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name.
    pub name: Option<String>,
    /// What it does.
    pub state: VmState,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Its VMM's process; null while there is none.
    pub process: Option<ProcessUsage>,
    /// What passed its network interfaces, all together; null while no VMM says.
    pub network: Option<NetworkUsage>,
}

/// What a VMM's process uses. Counters begin anew with another process.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessUsage {
    /// Process id on the host.
    pub pid: u32,
    /// Processor time used so far, user and system.
    pub cpu_ms: Option<f64>,
    /// Resident memory of the process, guest memory included.
    pub resident_bytes: Option<u64>,
    /// Memory of the process's own in the host's swap.
    pub swapped_bytes: Option<u64>,
    /// Page faults so far, of the VMM and of guest memory that was touched.
    pub faults: Option<u64>,
    /// Of them, those that waited for a disk.
    pub major_faults: Option<u64>,
}

/// What passed a VM's network interfaces since its machine was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct NetworkUsage {
    /// Bytes to the guest.
    pub rx_bytes: u64,
    /// Bytes from the guest.
    pub tx_bytes: u64,
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
}
