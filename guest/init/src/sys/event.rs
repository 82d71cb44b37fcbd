//! What the loop waits for: epoll, signals and the one timer, as descriptors.
#![expect(unsafe_code, reason = "system calls with pointers")]

use core::ptr;

use super::file::{Fd, O_CLOEXEC, O_NONBLOCK};
use super::raw::{Errno, count, syscall};

const RT_SIGPROCMASK: u64 = 14;
const EPOLL_WAIT: u64 = 232;
const EPOLL_CTL: u64 = 233;
const TIMERFD_CREATE: u64 = 283;
const TIMERFD_SETTIME: u64 = 286;
const SIGNALFD4: u64 = 289;
const EPOLL_CREATE1: u64 = 291;

const EPOLLIN: u32 = 0x1;
const EPOLLOUT: u32 = 0x4;
const EPOLLERR: u32 = 0x8;
const EPOLLHUP: u32 = 0x10;
const EPOLLRDHUP: u32 = 0x2000;
const EPOLLET: u32 = 1 << 31;

/// Bytes of the kernel's `struct signalfd_siginfo`.
const SIGNAL_INFO_BYTES: usize = 128;

/// One event: the kernel's `struct epoll_event`, packed on this architecture.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct Event {
    flags: u32,
    token: u64,
}

impl Event {
    /// No event, to fill a buffer with.
    pub(crate) const EMPTY: Self = Self { flags: 0, token: 0 };

    /// The number the descriptor was added with.
    pub(crate) const fn token(self) -> u64 {
        self.token
    }

    /// What happened.
    pub(crate) const fn happened(self) -> Happened {
        let flags = self.flags;
        Happened {
            readable: flags & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP) != 0,
            writable: flags & (EPOLLOUT | EPOLLHUP | EPOLLERR) != 0,
            peer_gone: flags & (EPOLLHUP | EPOLLERR | EPOLLRDHUP) != 0,
        }
    }
}

/// What happened to a descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Happened {
    /// A read will not block: bytes, the end, or an error.
    pub(crate) readable: bool,
    /// A write will not block: space, or an error.
    pub(crate) writable: bool,
    /// The other side closed, or closed its sending half.
    pub(crate) peer_gone: bool,
}

/// What to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Interest {
    /// Readable, told again until it is read.
    Level,
    /// Any change, told once: whoever waits remembers it.
    Edges,
}

/// An epoll instance.
pub(crate) struct Epoll(Fd);

impl Epoll {
    /// A new instance.
    pub(crate) fn new() -> Result<Self, Errno> {
        // SAFETY: takes a number.
        unsafe { syscall!(EPOLL_CREATE1, O_CLOEXEC) }.map(|fd| Self(Fd::from_result(fd)))
    }

    /// Waits for `fd` too. It leaves by being closed.
    pub(crate) fn add(&self, fd: &Fd, token: u64, interest: Interest) -> Result<(), Errno> {
        const ADD: u32 = 1;
        let flags = match interest {
            Interest::Level => EPOLLIN,
            Interest::Edges => EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
        };
        let event = Event { flags, token };
        // SAFETY: the kernel reads one struct epoll_event.
        unsafe { syscall!(EPOLL_CTL, self.0.number(), ADD, fd.number(), &raw const event) }.map(drop)
    }

    /// Stops waiting for `fd`, which stays open.
    pub(crate) fn remove(&self, fd: &Fd) {
        const DELETE: u32 = 2;
        // It may not have been added.
        // SAFETY: takes numbers; no event is looked at.
        let _ = unsafe { syscall!(EPOLL_CTL, self.0.number(), DELETE, fd.number(), 0_u64) };
    }

    /// The events that are there, after waiting for at least one unless `at_once`.
    pub(crate) fn wait<'a>(&self, events: &'a mut [Event], at_once: bool) -> Result<&'a [Event], Errno> {
        let timeout = if at_once { 0_i32 } else { -1 };
        // SAFETY: the kernel writes at most `events.len()` events to `events`.
        match unsafe { syscall!(EPOLL_WAIT, self.0.number(), events.as_mut_ptr(), events.len(), timeout) } {
            Ok(found) => Ok(events.get(..count(found)).unwrap_or_default()),
            Err(Errno::INTR) => Ok(&[]),
            Err(error) => Err(error),
        }
    }
}

/// Signals, read as data: they are blocked in this program and never interrupt it.
pub(crate) struct Signals(Fd);

impl Signals {
    /// Blocks every signal that can be and listens for those in `wanted`.
    pub(crate) fn new(wanted: &[u8]) -> Result<Self, Errno> {
        const SIG_SETMASK: u32 = 2;
        let every = u64::MAX;
        // SAFETY: the kernel reads eight bytes of mask and writes none back.
        unsafe { syscall!(RT_SIGPROCMASK, SIG_SETMASK, &raw const every, ptr::null_mut::<u64>(), 8_u32) }?;
        let mask = wanted.iter().fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
        // SAFETY: the kernel reads eight bytes of mask.
        let fd = unsafe { syscall!(SIGNALFD4, -1_i32, &raw const mask, 8_u32, O_CLOEXEC | O_NONBLOCK) }?;
        Ok(Self(Fd::from_result(fd)))
    }

    /// The descriptor to wait for.
    pub(crate) const fn fd(&self) -> &Fd {
        &self.0
    }

    /// Takes the signals that came, as a set: bit n is signal n.
    pub(crate) fn take(&self) -> u64 {
        let mut infos = [0_u8; 8 * SIGNAL_INFO_BYTES];
        let read = self.0.read(&mut infos).unwrap_or(0);
        let infos = infos.get(..read).unwrap_or_default().chunks_exact(SIGNAL_INFO_BYTES);
        // The first word of each is the signal's number.
        infos.fold(0, |set, info| set | info.first().map_or(0, |number| 1_u64.wrapping_shl(u32::from(*number))))
    }
}

/// One timer on the monotonic clock.
pub(crate) struct Timer(Fd);

impl Timer {
    /// A timer that is not set.
    pub(crate) fn new() -> Result<Self, Errno> {
        const CLOCK_MONOTONIC: u32 = 1;
        // SAFETY: takes numbers.
        let fd = unsafe { syscall!(TIMERFD_CREATE, CLOCK_MONOTONIC, O_CLOEXEC | O_NONBLOCK) }?;
        Ok(Self(Fd::from_result(fd)))
    }

    /// The descriptor to wait for.
    pub(crate) const fn fd(&self) -> &Fd {
        &self.0
    }

    /// Sets it to go off once, at `at_ns`.
    pub(crate) fn set(&self, at_ns: u64) -> Result<(), Errno> {
        const ABSOLUTE: u32 = 1;
        // A time of zero would switch the timer off; in the past it goes off at once.
        let at_ns = at_ns.max(1);
        let setting: [u64; 4] = [0, 0, at_ns / 1_000_000_000, at_ns % 1_000_000_000];
        // SAFETY: the kernel reads one struct itimerspec, which is these four words, and writes none back.
        unsafe { syscall!(TIMERFD_SETTIME, self.0.number(), ABSOLUTE, setting.as_ptr(), ptr::null_mut::<u64>()) }
            .map(drop)
    }

    /// Takes note that it went off.
    pub(crate) fn take(&self) {
        let mut times = [0_u8; 8];
        let _ = self.0.read(&mut times);
    }
}
