//! Network interfaces of virtual machines: what may pass them and what passed.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What may pass a VM's network interface. What is left out is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkLimits {
    /// To the guest.
    pub rx: FlowLimits,
    /// From the guest.
    pub tx: FlowLimits,
}

/// What may pass in one direction. What is over it waits; it is not dropped here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FlowLimits {
    /// Bytes of Ethernet frames per second: 1000 to 10^12.
    pub bytes_per_s: Option<u64>,
    /// Bytes that pass at once after a rest, at least 1514; without it a tenth of a second's worth, at least 66000.
    pub burst_bytes: Option<u64>,
    /// Packets per second: 1 to 10^9. A segment that the host cuts is one.
    pub packets_per_s: Option<u64>,
    /// Packets that pass at once after a rest; without it a tenth of a second's worth, at least 32.
    pub burst_packets: Option<u64>,
}

/// What passed a network interface since the VM's machine was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InterfaceStats {
    /// Which interface, from 0.
    pub slot: u8,
    /// Whether it is connected.
    pub link_up: bool,
    /// To the guest.
    pub rx: FlowStats,
    /// From the guest.
    pub tx: FlowStats,
}

/// What passed in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowStats {
    /// Packets; a segment that the host cuts is one.
    pub packets: u64,
    /// Bytes of their Ethernet frames.
    pub bytes: u64,
    /// Packets the device threw away: no room at the guest, or the host did not take them.
    pub dropped: u64,
    /// Times a packet had to wait for a limit.
    pub throttled: u64,
}
