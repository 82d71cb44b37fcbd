//! What a machine tells its owner: a bounded queue beside an event descriptor that polls readable while it holds
//! something.
//!
//! Written by vCPU threads and devices, read by the owner's loop. An event after which the guest must not go on
//! ([`MachineEvent`]: all of them) also closes the machine for its vCPUs: each parks at its next exit. At the bound
//! further events are dropped and counted; the first one, which is the cause, is never dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::exit::{InternalError, VcpuFailure};
use super::layout::VCPUS_MAX;

/// Most events kept: each vCPU can fail once, and a guest can ask for its end once per vCPU.
pub const EVENTS_MAX: usize = 2 * VCPUS_MAX as usize;

/// Where a reboot request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebootRequest {
    /// The reset line of the keyboard controller.
    KeyboardController,
    /// The event port.
    EventPort,
}

/// Something after which the guest does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest's kernel says it panicked.
    GuestPanic,
    /// The guest asks to be powered off.
    PowerOff,
    /// The guest asks for a reboot.
    Reboot(RebootRequest),
    /// A vCPU ended in a triple fault: a crash before the guest could say more, or a guest's last way to reboot.
    TripleFault {
        /// Which one.
        vcpu: u8,
    },
    /// KVM could not go on with a vCPU.
    InternalError {
        /// Which one.
        vcpu: u8,
        /// What KVM said.
        error: InternalError,
    },
    /// A vCPU stopped for another reason.
    VcpuFailed {
        /// Which one.
        vcpu: u8,
        /// The reason.
        failure: VcpuFailure,
    },
}

#[derive(Debug)]
struct Queue {
    ended: AtomicBool,
    dropped: AtomicU64,
    waiting: Mutex<VecDeque<MachineEvent>>,
    signal: EventFd,
}

/// The side that tells.
#[derive(Debug, Clone)]
pub struct EventSender {
    queue: Arc<Queue>,
}

/// The side that is told. One owner takes events; the descriptor can be polled by any loop.
#[derive(Debug)]
pub struct MachineEvents {
    queue: Arc<Queue>,
}

/// A queue's two sides.
pub fn channel() -> io::Result<(EventSender, MachineEvents)> {
    let queue = Arc::new(Queue {
        ended: AtomicBool::new(false),
        dropped: AtomicU64::new(0),
        waiting: Mutex::new(VecDeque::new()),
        signal: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
    });
    Ok((EventSender { queue: Arc::clone(&queue) }, MachineEvents { queue }))
}

impl EventSender {
    /// Tells `event` and ends the guest's run.
    pub fn send(&self, event: MachineEvent) {
        let mut waiting = self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < EVENTS_MAX {
            waiting.push_back(event);
        } else {
            self.queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.queue.ended.store(true, Ordering::Release);
        // A full counter is readable already.
        let _ = self.queue.signal.write(1);
    }

    /// Whether an event was sent: the guest must not go on.
    pub fn ended(&self) -> bool {
        self.queue.ended.load(Ordering::Acquire)
    }
}

impl MachineEvents {
    /// The next event, if there is one.
    pub fn take(&self) -> Option<MachineEvent> {
        let mut waiting = self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let event = waiting.pop_front();
        if waiting.is_empty() {
            // Empty counter: nothing to reset.
            let _ = self.queue.signal.read();
        }
        event
    }

    /// Events dropped at the bound.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped.load(Ordering::Relaxed)
    }
}

impl AsFd for MachineEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.signal.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn readable(events: &MachineEvents) -> bool {
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_first_events_are_kept_and_the_rest_counted() {
        let (sender, events) = channel().unwrap();
        assert!(!readable(&events) && !sender.ended());
        sender.send(MachineEvent::GuestPanic);
        for _ in 0..EVENTS_MAX {
            sender.send(MachineEvent::PowerOff);
        }
        assert!(readable(&events) && sender.ended());
        assert_eq!(events.take(), Some(MachineEvent::GuestPanic));
        assert_eq!(events.dropped(), 1);
        assert_eq!(std::iter::from_fn(|| events.take()).count(), EVENTS_MAX - 1);
        assert!(!readable(&events));
    }
}
