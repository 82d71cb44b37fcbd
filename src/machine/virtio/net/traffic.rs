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
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> FlowCounts {
        let [frames, bytes, dropped, throttled] =
            [&self.frames, &self.bytes, &self.dropped, &self.throttled].map(|counter| counter.load(Ordering::Relaxed));
        FlowCounts { frames, bytes, dropped, throttled }
    }
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
