//! What a guest did that nobody asked for, as numbers: this floor does not log, so a guest cannot fill a log.
//!
//! Counted by vCPU threads and devices, read by the owner. Counters wrap after 2^64.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one machine.
#[derive(Debug, Default)]
pub struct Counters {
    /// Exits from guest mode.
    pub(super) exits: Counter,
    /// Port accesses no device took.
    pub(super) unknown_ports: Counter,
    /// Memory-mapped accesses no device took.
    pub(super) unknown_mmio: Counter,
    /// Bytes the guest wrote to its console.
    pub(super) console_bytes: Counter,
    /// Console bytes the sink did not take.
    pub(super) console_lost: Counter,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CountersSnapshot {
    /// Exits from guest mode.
    pub exits: u64,
    /// Port accesses no device took.
    pub unknown_ports: u64,
    /// Memory-mapped accesses no device took.
    pub unknown_mmio: u64,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
    /// Console bytes the sink did not take.
    pub console_lost: u64,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// The counters now.
    pub fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            exits: self.exits.get(),
            unknown_ports: self.unknown_ports.get(),
            unknown_mmio: self.unknown_mmio.get(),
            console_bytes: self.console_bytes.get(),
            console_lost: self.console_lost.get(),
        }
    }
}
