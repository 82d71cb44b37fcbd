//! What a kind of device adds to the transport, and what the transport lends it.
//!
//! A model runs under its slot's lock: on the device loop when it serves, on a vCPU thread when the guest resets it.
//! It never blocks on anything but its own worker, and it bounds what it does in one turn, so that the other devices
//! of the loop and the guest's register accesses get theirs.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::balloon::Balloon;
use super::block::Block;
use super::net::traffic::Traffic;
use super::queue::{Queue, RingError};
use crate::machine::ram::GuestRam;
use crate::saved::{SaveSectionError, Section};

/// What the guest sees of a device before it talks to it.
#[derive(Debug, Clone)]
pub(crate) struct Face {
    /// Kind (virtio 1.2 section 5).
    pub(crate) device_id: u32,
    /// Offered features of the kind; the transport adds its own.
    pub(crate) features: u64,
    /// Largest size of each queue.
    pub(crate) queue_sizes: &'static [u16],
    /// The configuration space.
    pub(crate) config: Vec<u8>,
}

/// Whether a device has work left that no event will announce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It waits for events.
    Idle,
    /// Its share of this turn is used up; it wants another.
    More,
}

/// What a model may use while it serves.
#[derive(Debug)]
pub(crate) struct Io<'a> {
    /// The device's queues; those not ready yield nothing.
    pub(crate) queues: &'a mut [Queue],
    /// Guest memory.
    pub(crate) ram: &'a GuestRam,
    /// Whether the driver is up. While it is not, queues and guest memory are left alone.
    pub(crate) live: bool,
    /// The accepted features.
    pub(crate) features: u64,
    /// What to count.
    pub(crate) counters: &'a Counters,
}

/// A kind of device.
pub(crate) trait Model: Send + fmt::Debug {
    /// What the guest sees of it.
    fn face(&self) -> &Face;
    /// Something happened on a descriptor the model watches. Only notes it; `serve` follows.
    fn event(&mut self, token: u64, ready: EventSet);
    /// Does a bounded part of what there is to do, on every queue and descriptor.
    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError>;
    /// Finishes every request that was begun, so that nothing is written to guest memory afterwards.
    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), RingError>;
    /// Writes nothing to guest memory from here on, until it serves again. What it cannot finish soon it keeps.
    fn pause(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        self.drain(io)
    }
    /// The guest reset the device, or its rings are broken: forget the driver. Waits for requests that were begun.
    fn reset(&mut self);
    /// What must survive, as the section of this slot. Only after `pause`.
    fn save(&self, instance: u16) -> Result<Section, SaveSectionError>;
    /// Whether the configuration space changed since the last call: the guest is then told.
    fn take_config_change(&mut self) -> bool {
        false
    }
    /// Where a network device counts.
    fn traffic(&self) -> Option<Arc<Traffic>> {
        None
    }
    /// The driver writes this to the configuration space; false if there is nothing to write there.
    fn write_config(&mut self, _at: usize, _data: &[u8]) -> bool {
        false
    }
    /// The balloon, if it is one.
    fn balloon(&mut self) -> Option<&mut Balloon> {
        None
    }
    /// The block device, if it is one.
    fn block(&mut self) -> Option<&mut Block> {
        None
    }
    /// Takes the next packet that waits for the guest out of a paused network device.
    fn take_packet(&mut self) -> io::Result<Option<Box<[u8]>>> {
        Ok(None)
    }
    /// Gives a network device a packet that goes before those of its tap; false if it cannot have it.
    fn add_packet(&mut self, _packet: &[u8]) -> bool {
        false
    }
    /// Whether the tap of a network device has to wait for such packets.
    fn expect_packets(&mut self, _more: bool) {}
    /// Gives a network device another tap; the driver goes on as it is.
    fn replace_tap(&mut self, _tap: File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Descriptors a model wants to hear about, edge-triggered: an event says that something changed, and the model
/// remembers what it has not used up. A descriptor leaves when it is closed.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    epoll: Arc<Epoll>,
}

impl Watch {
    /// Watches through this epoll instance.
    pub(crate) fn new(epoll: Arc<Epoll>) -> Self {
        Self { epoll }
    }

    /// Events of `source` arrive at [`Model::event`] with `token`.
    pub(crate) fn add(&self, source: &impl AsRawFd, token: u64, what: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(what | EventSet::EDGE_TRIGGERED, token);
        self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event)
    }

    /// Events of `source` arrive no more.
    pub(crate) fn remove(&self, source: &impl AsRawFd) {
        // It was added and is open: the kernel has nothing to refuse.
        let _ = self.epoll.ctl(ControlOperation::Delete, source.as_raw_fd(), EpollEvent::default());
    }
}

/// Token of queue 0's event; queue i has this plus i. Models use tokens below.
pub(crate) const QUEUE_TOKENS: u64 = 1 << 63;

/// What a device counts instead of writing log lines a guest could cause without end.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Requests, packets and frames that were carried out.
    pub(crate) done: AtomicU64,
    /// Requests that were answered with an error.
    pub(crate) failed: AtomicU64,
    /// Packets and frames that were thrown away.
    pub(crate) dropped: AtomicU64,
    /// Times a driver broke its rings and had to reset the device.
    pub(crate) broken: AtomicU64,
    /// Register accesses that have no meaning, or not in this state.
    pub(crate) refused: AtomicU64,
}

impl Counters {
    /// Adds one.
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
