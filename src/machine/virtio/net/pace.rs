//! The limits of one interface in both directions, and the timer that wakes the device when one of them ends.
//!
//! Nobody sleeps: a frame that may not pass yet stays where it is, and the timer's expiry is an event like any other.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;

use crate::clock::{Clock, Monotonic};
use crate::machine::virtio::bucket::Limiter;
use crate::machine::virtio::model::Watch;
use crate::units::NetLimits;

/// Longest time the timer is set to. A longer wait is looked at again on the way.
const TIMER_MAX: Duration = Duration::from_secs(3600);

/// Shortest: setting a timer to zero turns it off.
const TIMER_MIN: Duration = Duration::from_nanos(1);

/// One direction.
#[derive(Debug)]
pub(super) struct Flow {
    limiter: Limiter,
    /// When the frame that waits may pass.
    waits_until: Option<Monotonic>,
}

/// Whether a frame may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Now.
    Now,
    /// Not yet, and it is the first that is told so since one passed.
    NotYet,
    /// Still not yet.
    StillNot,
}

/// Both directions and their timer.
pub(super) struct Pace {
    /// To the guest.
    pub(super) rx: Flow,
    /// From the guest.
    pub(super) tx: Flow,
    clock: Arc<dyn Clock>,
    /// Only where there are limits.
    timer: Option<TimerFd>,
    /// What the timer is set to.
    set_to: Option<Monotonic>,
}

impl Flow {
    /// Whether a frame of this many bytes may pass now. It is not counted by asking.
    pub(super) fn admits(&mut self, bytes: usize, clock: &dyn Clock) -> Admission {
        if !self.limiter.is_limiting() {
            return Admission::Now;
        }
        let now = clock.monotonic();
        let wait = self.limiter.wait(bytes as u64, now);
        if wait.is_zero() {
            self.waits_until = None;
            return Admission::Now;
        }
        match self.waits_until.replace(now.after(wait)) {
            None => Admission::NotYet,
            Some(_) => Admission::StillNot,
        }
    }

    /// A frame of this many bytes has passed.
    pub(super) fn passed(&mut self, bytes: usize) {
        self.limiter.passed(bytes as u64);
    }
}

impl Pace {
    /// Full buckets; the timer's expiry arrives as an event with `token`.
    pub(super) fn new(limits: NetLimits, clock: Arc<dyn Clock>, watch: &Watch, token: u64) -> io::Result<Self> {
        let now = clock.monotonic();
        let flow = |limits| Flow { limiter: Limiter::new(limits, now), waits_until: None };
        let (rx, tx) = (flow(limits.rx), flow(limits.tx));
        let timer = if rx.limiter.is_limiting() || tx.limiter.is_limiting() {
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
            watch.add(&timer.as_fd(), token, EventSet::IN)?;
            Some(timer)
        } else {
            None
        };
        Ok(Self { rx, tx, clock, timer, set_to: None })
    }

    /// Whether a frame to the guest may pass.
    pub(super) fn admits_rx(&mut self, bytes: usize) -> Admission {
        self.rx.admits(bytes, &*self.clock)
    }

    /// Whether a frame from the guest may pass.
    pub(super) fn admits_tx(&mut self, bytes: usize) -> Admission {
        self.tx.admits(bytes, &*self.clock)
    }

    /// The timer expired. It is not read: its events are edges, and setting it anew forgets the expiry.
    pub(super) fn expired(&mut self) {
        self.set_to = None;
    }

    /// Nothing waits any more.
    pub(super) fn forget(&mut self) {
        (self.rx.waits_until, self.tx.waits_until) = (None, None);
    }

    /// At the end of a turn: has the timer wake the device for whatever may pass first.
    pub(super) fn rest(&mut self) {
        let Some(timer) = &self.timer else { return };
        let next = match (self.rx.waits_until, self.tx.waits_until) {
            (Some(rx), Some(tx)) => Some(rx.min(tx)),
            (one, other) => one.or(other),
        };
        // One that is set too early only costs a turn.
        let Some(next) = next.filter(|next| self.set_to.is_none_or(|set_to| *next < set_to)) else { return };
        let wait = next.since(self.clock.monotonic()).clamp(TIMER_MIN, TIMER_MAX);
        let once = Expiration::OneShot(TimeSpec::from_duration(wait));
        // The kernel refuses only times that are none.
        let _ = timer.set(once, TimerSetTimeFlags::empty());
        self.set_to = Some(next);
    }
}

impl std::fmt::Debug for Pace {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rx, tx, clock: _, timer, set_to } = self;
        let mut shown = out.debug_struct("Pace");
        shown.field("rx", rx).field("tx", tx).field("timer", timer).field("set_to", set_to).finish_non_exhaustive()
    }
}
