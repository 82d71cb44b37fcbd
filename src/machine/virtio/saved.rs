//! Saved state of the transport, one section per slot. What a device adds to it stands in the device's own file.

use serde::{Deserialize, Serialize};

use crate::saved::{Saved, SectionKind};

/// Registers and queues of one virtio-mmio slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportV1 {
    /// Kind of the device: a slot of another kind refuses the section.
    pub device_id: u32,
    /// Features the guest was offered. The restoring device must have all of them.
    pub offered: u64,
    /// Features the guest accepted.
    pub accepted: u64,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// QueueSel.
    pub queue_sel: u32,
    /// The device status field.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The queues.
    pub queues: Vec<QueueV1>,
}

impl Saved for TransportV1 {
    const KIND: SectionKind = SectionKind::VirtioTransport;
    const VERSION: u16 = 1;
}

/// One virtqueue; mirrors `virtio_queue::QueueState`, except that EVENT_IDX follows from the accepted features.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueV1 {
    /// Largest size that was offered.
    pub size_max: u16,
    /// Size the driver chose.
    pub size: u16,
    /// Whether the driver had handed it over.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Next entry of the available ring to look at.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
}
