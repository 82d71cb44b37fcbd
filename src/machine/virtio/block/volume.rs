//! A disk on a volume: its server connects to the listening socket this device was given, and one thread is its NBD client.
//!
//! ```text
//!  device loop, control thread        │ Desk                    │ thread "volume-N"        (body)
//!  submit(job) ──────────────────────▶│ todo, orders ── bell ──▶│ tasks: parts ⇄ lines ⇄ the server's connections
//!  take_done ◀── finished (eventfd) ──│ done, counts            │        (tasks)  (line, nbd)
//! ```
//! One thread for each slot, as for each disk on a file: a slow server holds up no other volume. It only ever waits in
//! poll(2), so an order is obeyed at once. A connection that breaks costs nothing but time: what it did not answer is asked
//! again on another one, or on the next. Without any for longer than the attachment says, what waits fails, and so does
//! what comes, until there is one again.
//!
//! A pause sends nothing more and waits a moment for what was sent; what is then still unanswered stays under way. The
//! thread is parked: it touches no buffer, and answers stay in the sockets. Asking again is harmless: until the guest is
//! told, a write may have happened or not, and may happen twice.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use self::body::Body;
use super::worker::{Done, Job};
use crate::clock::Clock;
use crate::machine::ram::GuestRam;
use crate::sys::thread::{self, ThreadClass};
use crate::units::{FlowLimits, Rate};

mod body;
mod counts;
mod line;
mod tasks;

pub use self::counts::{LATENCY_BUCKETS, VolumeCounts, VolumeFlowCounts};

/// How long a pause and a reset wait for answers to what was sent.
const ANSWERS_MAX: Duration = Duration::from_secs(1);

/// Where a volume's trouble is told. The machine itself writes no log.
pub type Tell = fn(std::fmt::Arguments<'_>);

/// A volume on a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How long requests wait for a connection.
    pub reconnect: Duration,
}

/// What a guest may do with a volume; `None` is without a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VolumeLimits {
    /// Requests per second, above 0.
    pub iops: Option<u32>,
    /// Bytes read and written per second, above 0.
    pub bytes_per_s: Option<u64>,
}

impl VolumeLimits {
    /// As the buckets have it: a tenth of a second's worth at once after a rest.
    fn flow(self) -> FlowLimits {
        let rate = |per_s: u64| Rate { per_s, burst: (per_s / 10).max(1) };
        FlowLimits { frames: self.iops.map(|iops| rate(iops.into())), bytes: self.bytes_per_s.map(rate) }
    }
}

/// Whether the thread may send, and touch buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Works,
    /// Nothing new is sent; what was sent may be answered.
    Holds,
    /// No buffer is touched.
    Parked,
}

#[derive(Debug)]
struct State {
    // What the thread is to do.
    todo: VecDeque<Job>,
    mode: Mode,
    attached: Option<Attachment>,
    limits: VolumeLimits,
    /// The limits are others.
    limits_changed: bool,
    /// Everything under way fails, and connections that had some of it are closed.
    fail_all: bool,
    /// Connections belong to a volume that is not attached any more.
    close_all: bool,
    stopping: bool,
    /// Counts orders; the thread says up to which it has obeyed.
    ordered: u64,
    // What it says.
    obeyed: u64,
    done: Vec<Done>,
    /// Requests at the server.
    sent: usize,
    counts: VolumeCounts,
}

/// What both sides share.
#[derive(Debug)]
struct Desk {
    state: Mutex<State>,
    /// The thread has obeyed, or an answer came.
    news: Condvar,
    /// There is something to do.
    bell: EventFd,
    finished: EventFd,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It can only fail when 2^64 - 2 rings are pending already.
        let _ = self.bell.write(1);
    }

    /// Has an order obeyed before it returns.
    fn order(&self, order: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        order(&mut state);
        state.ordered += 1;
        let number = state.ordered;
        self.ring();
        let waited = self.news.wait_while(state, |state| state.obeyed < number && !state.stopping);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// What a volume slot is made with.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Which of the block devices.
    pub(crate) index: u8,
    /// Where its server connects.
    pub(crate) listener: UnixListener,
    /// What is attached from the beginning.
    pub(crate) attached: Option<Attachment>,
    /// Where trouble is told.
    pub(crate) tell: Tell,
}

/// The thread of one volume slot. Begins parked.
#[derive(Debug)]
pub(crate) struct Volume {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Volume {
    /// Starts the thread.
    pub(crate) fn start(setup: Setup, ram: GuestRam, clock: Arc<dyn Clock>) -> io::Result<Self> {
        setup.listener.set_nonblocking(true)?;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let (bell, finished) = (EventFd::from_flags(flags)?, EventFd::from_flags(flags)?);
        let state = State {
            todo: VecDeque::new(),
            mode: Mode::Parked,
            attached: setup.attached,
            limits: VolumeLimits::default(),
            limits_changed: false,
            fail_all: false,
            close_all: false,
            stopping: false,
            ordered: 0,
            obeyed: 0,
            done: Vec::new(),
            sent: 0,
            counts: VolumeCounts::default(),
        };
        let desk = Arc::new(Desk { state: Mutex::new(state), news: Condvar::new(), bell, finished });
        let name = format!("volume-{}", setup.index);
        let body = Body::new(setup, ram, clock, Arc::clone(&desk));
        let thread = thread::start(ThreadClass::Volume, name, move || body.run())?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Signalled when requests are finished.
    pub(crate) fn finished(&self) -> &impl AsRawFd {
        &self.desk.finished
    }

    /// Hands a request over.
    pub(crate) fn submit(&self, job: Job) {
        let mut state = self.desk.lock();
        state.todo.push_back(job);
        if state.todo.len() == 1 {
            self.desk.ring();
        }
    }

    /// The requests finished since the last call.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut self.desk.lock().done)
    }

    /// Sends nothing more, and waits for answers to what was sent, for a bounded time.
    fn settle(&self) {
        self.desk.order(|state| state.mode = Mode::Holds);
        let waited = self.desk.news.wait_timeout_while(self.desk.lock(), ANSWERS_MAX, |state| state.sent > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Touches no buffer from here on, until it works again. What is unanswered stays under way.
    pub(crate) fn park(&self) {
        self.settle();
        self.desk.order(|state| state.mode = Mode::Parked);
    }

    /// Goes on.
    pub(crate) fn work(&self) {
        let mut state = self.desk.lock();
        if state.mode != Mode::Works {
            state.mode = Mode::Works;
            self.desk.ring();
        }
    }

    /// Ends what is under way: what is not answered soon fails. No buffer of it is touched afterwards.
    pub(crate) fn end_all(&self) {
        let before = self.desk.lock().mode;
        if before != Mode::Parked {
            self.settle();
        }
        self.desk.order(|state| {
            state.mode = before;
            state.fail_all = true;
        });
    }

    /// Attaches a volume where there is none.
    pub(crate) fn attach(&self, attachment: Attachment) {
        self.desk.order(|state| {
            state.attached = Some(attachment);
            state.counts = VolumeCounts::default();
        });
    }

    /// Leaves the slot without a volume; what is under way fails.
    pub(crate) fn detach(&self) {
        self.desk.order(|state| {
            state.attached = None;
            (state.fail_all, state.close_all) = (true, true);
            (state.limits, state.limits_changed) = (VolumeLimits::default(), true);
        });
    }

    /// The volume has another size.
    pub(crate) fn resize(&self, bytes: u64) {
        self.desk.order(|state| {
            if let Some(attachment) = &mut state.attached {
                attachment.bytes = bytes;
            }
        });
    }

    /// Bounds what the guest may do.
    pub(crate) fn limit(&self, limits: VolumeLimits) {
        self.desk.order(|state| (state.limits, state.limits_changed) = (limits, true));
    }

    /// How things are.
    pub(crate) fn counts(&self) -> VolumeCounts {
        self.desk.lock().counts.clone()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.desk.lock().stopping = true;
        self.desk.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
