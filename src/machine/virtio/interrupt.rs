//! A slot's interrupt line and InterruptStatus register (virtio 1.2 section 4.2.2).
//!
//! Shared by the device loop, which raises, and the vCPU threads, which read and acknowledge without any lock. The
//! register is set before the line is raised: the guest's handler reads it first.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::spec::interrupt as bit;

/// The line and the register.
#[derive(Debug)]
pub(crate) struct Interrupt {
    event: EventFd,
    status: AtomicU32,
}

impl Interrupt {
    /// An interrupt that is not raised.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK)?, status: AtomicU32::new(0) })
    }

    /// The event behind the line.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells the guest that a used ring has new entries.
    pub(crate) fn raise_used(&self) {
        self.raise(bit::USED_RING);
    }

    /// Tells the guest that the status or configuration has changed.
    pub(crate) fn raise_config(&self) {
        self.raise(bit::CONFIG);
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // It can only fail when 2^64 - 2 interrupts are pending already.
        let _ = self.event.write(1);
    }

    /// InterruptStatus.
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The guest has handled these reasons.
    pub(crate) fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// InterruptStatus after a reset or a restore.
    pub(crate) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}
