//! What passed an interface, as numbers anybody may read at any time. They only grow, for as long as the device lives.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One direction, counted by the device.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    throttled: AtomicU64,
}

/// Both directions.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// To the guest.
    pub(super) rx: Flow,
    /// From the guest.
    pub(super) tx: Flow,
    link_up: AtomicBool,
}

/// What passed in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowCounts {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, from the destination address on.
    pub bytes: u64,
    /// Frames that were thrown away: no room at the guest, or the interface took them not.
    pub dropped: u64,
    /// Times a frame had to wait for a limit.
    pub throttled: u64,
}

/// What passed an interface, and whether it is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetCounts {
    /// Whether the tap is there.
    pub link_up: bool,
    /// To the guest.
    pub rx: FlowCounts,
    /// From the guest.
    pub tx: FlowCounts,
}

impl Flow {
    pub(super) fn passed(&self, bytes: usize) {
        add(&self.frames, 1);
        add(&self.bytes, bytes as u64);
    }

    pub(super) fn dropped(&self) {
        add(&self.dropped, 1);
    }

    pub(super) fn throttled(&self) {
        add(&self.throttled, 1);
    }

    fn counts(&self) -> FlowCounts {
        let [frames, bytes, dropped, throttled] =
            [&self.frames, &self.bytes, &self.dropped, &self.throttled].map(|counter| counter.load(Ordering::Relaxed));
        FlowCounts { frames, bytes, dropped, throttled }
    }
}

/// Only the device writes, under its slot's lock: nobody else's addition can be lost, and no locked instruction is paid
/// for with each frame.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

impl Traffic {
    pub(super) fn set_link(&self, up: bool) {
        self.link_up.store(up, Ordering::Relaxed);
    }

    /// The numbers now.
    pub(crate) fn counts(&self) -> NetCounts {
        let link_up = self.link_up.load(Ordering::Relaxed);
        NetCounts { link_up, rx: self.rx.counts(), tx: self.tx.counts() }
    }
}
