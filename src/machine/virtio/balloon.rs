//! The memory balloon (virtio 1.2 section 5.5): guest memory that goes back to the host, for a while or until it is
//! used again, and what the guest says of its memory.
//!
//! ```text
//! target ─▶ num_pages ─▶ driver takes pages from its guest ─▶ inflate ─▶ discard (sys)    actual ◀─ driver
//!                        driver gives some of them back    ─▶ deflate    (touching a page is enough)
//!                        pages that happen to be free      ─▶ reporting ─▶ discard, until the guest uses them
//! ```
//! **What a page holds afterwards.** Zero on shared memory; on a machine from a bundle the bundle's content again, as
//! its pages come from a private file. Both are allowed: an inflated page's content is lost (5.5.6.1), and a driver may
//! count on what a reported page holds only where it negotiated `PAGE_POISON` (5.5.6.7), which is not offered; one that
//! needs it, as under `init_on_free`, then does without reporting. A dropped private page counts as unchanged for
//! [`crate::machine::image`], which is what it is: the file's.
//!
//! **Which queue is which.** Section 5.5.2 numbers the queues as if every feature were there; drivers, Linux among them,
//! number the queues they use one after the other. The numbers in between would be queues that no feature here has, so
//! a queue serves under either number.
//!
//! **What a guest can do with it.** Addresses that are no guest memory are passed over and counted. A turn handles a
//! bounded number of pages; a chain that holds more stays available, and the next turn goes on within it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

use self::saved::BalloonV1;
use self::statistics::Statistics;
use super::model::{Counters, Face, Io, Model, Turn};
use super::queue::{RingError, Waiting};
use super::spec::balloon as numbers;
use super::spec::device_id;
use crate::clock::{Clock, Monotonic};
use crate::saved::{SaveSectionError, Section};
use crate::sys::discard::discard;
use crate::units::{Bytes, GuestPhys, PAGE_BYTES, PageCount};

pub(super) mod saved;
mod statistics;

pub use self::statistics::GuestMemoryStats;

/// Inflate, deflate, statistics, and two numbers for reporting. Linux wants 32 entries for reporting at least.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 64, 64];

/// Most pages of one queue in one turn: 32 MiB, whose freeing takes a few milliseconds.
const TURN_PAGES_MAX: u64 = 8192;

/// What a buffer costs of those at least, as a system call for one page costs more than the page.
const BUFFER_PAGES_MIN: u64 = 16;

/// Page numbers looked at together. Linux sends 256 at a time.
const NUMBERS_AT_ONCE: usize = 1024;

/// Shortest time between two questions for statistics: the guest works for each.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// What the balloon holds and what the guest said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonCounts {
    /// What the guest is asked to give.
    pub target: Bytes,
    /// What it says it has given, at most its memory.
    pub actual: Bytes,
    /// What was given back because the guest reported it free, in all; what it took again meanwhile is in it.
    pub reported: Bytes,
    /// The guest's statistics and how old they are; `None` before it gave any.
    pub guest: Option<(GuestMemoryStats, Duration)>,
}

/// What a queue is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
    Nothing,
}

/// The balloon.
pub(crate) struct Balloon {
    face: Face,
    clock: Arc<dyn Clock>,
    memory: PageCount,
    target_changed: bool,
    reported: u64,
    /// How many bytes are done of the chain that is next in each queue: page numbers, or memory.
    done: [u64; QUEUE_SIZES.len()],
    statistics: Statistics,
}

impl fmt::Debug for Balloon {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { face, clock: _, memory, target_changed, reported, done, statistics } = self;
        let mut out = out.debug_struct("Balloon");
        out.field("config", &face.config).field("memory", memory).field("target_changed", target_changed);
        out.field("reported", reported).field("done", done).field("statistics", statistics).finish_non_exhaustive()
    }
}

impl Balloon {
    /// A balloon for a guest with this much memory, empty or as it was saved; `None` if it was saved with a target above
    /// that.
    pub(crate) fn new(memory: PageCount, clock: Arc<dyn Clock>, saved: Option<&BalloonV1>) -> Option<Self> {
        let face = Face {
            device_id: device_id::BALLOON,
            features: numbers::F_STATS_VQ | numbers::F_DEFLATE_ON_OOM | numbers::F_PAGE_REPORTING,
            queue_sizes: &QUEUE_SIZES,
            config: vec![0; numbers::CONFIG_BYTES],
        };
        let (done, statistics) = ([0; QUEUE_SIZES.len()], Statistics::default());
        let mut balloon = Self { face, clock, memory, target_changed: false, reported: 0, done, statistics };
        if let Some(&BalloonV1 { target_pages, actual_pages, reported_bytes }) = saved {
            if u64::from(target_pages) > memory.0 {
                return None;
            }
            balloon.set_config(numbers::CONFIG_NUM_PAGES, target_pages);
            balloon.set_config(numbers::CONFIG_ACTUAL, actual_pages);
            balloon.reported = reported_bytes;
        }
        Some(balloon)
    }

    fn config(&self, at: usize) -> u32 {
        let field = self.face.config.get(at..).and_then(|rest| rest.first_chunk());
        field.map_or(0, |field| u32::from_le_bytes(*field))
    }

    fn set_config(&mut self, at: usize, value: u32) {
        if let Some(field) = self.face.config.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            *field = value.to_le_bytes();
        }
    }

    /// How many pages the guest is to give; no more than it has. The guest learns of it in the next turn.
    pub(crate) fn set_target(&mut self, target: PageCount) {
        let target = u32::try_from(target.0.min(self.memory.0)).unwrap_or(u32::MAX);
        if target != self.config(numbers::CONFIG_NUM_PAGES) {
            self.set_config(numbers::CONFIG_NUM_PAGES, target);
            self.target_changed = true;
        }
    }

    /// Has the guest asked for new statistics in the next turn, if that is not too soon after the last time.
    pub(crate) fn want_statistics(&mut self) {
        self.statistics.want(self.clock.monotonic());
    }

    /// What there is to say of it.
    pub(crate) fn counts(&self) -> BalloonCounts {
        let bytes = |pages: u64| Bytes(pages.min(self.memory.0) * PAGE_BYTES);
        let now: Monotonic = self.clock.monotonic();
        BalloonCounts {
            target: bytes(self.config(numbers::CONFIG_NUM_PAGES).into()),
            actual: bytes(self.config(numbers::CONFIG_ACTUAL).into()),
            reported: Bytes(self.reported),
            guest: self.statistics.last().map(|(stats, at)| (stats, now.since(at))),
        }
    }

    fn inflate(&mut self, io: &mut Io<'_>, queue: usize) -> Result<Turn, RingError> {
        let mut left = TURN_PAGES_MAX;
        while left > 0 {
            let Some(chain) = io.queues[queue].pop()? else {
                match io.queues[queue].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            let mut buffer = [0; NUMBERS_AT_ONCE * numbers::PAGE_NUMBER_BYTES];
            let at = usize::try_from(self.done[queue]).unwrap_or(usize::MAX);
            let read = chain.read(io.ram, at, &mut buffer)?;
            let mut pages: Vec<u32> =
                buffer[..read].as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).collect();
            left = left.saturating_sub((pages.len() as u64).max(BUFFER_PAGES_MIN));
            pages.sort_unstable();
            for run in pages.chunk_by(|one, next| next - one <= 1) {
                give_back_run(io, run);
            }
            if read > 0 && at + read < chain.readable_bytes() {
                self.done[queue] += read as u64;
                io.queues[queue].undo_pop(chain);
            } else {
                self.done[queue] = 0;
                io.queues[queue].add_used(chain, 0)?;
            }
        }
        Ok(Turn::More)
    }

    fn report(&mut self, io: &mut Io<'_>, queue: usize) -> Result<Turn, RingError> {
        let mut left = TURN_PAGES_MAX;
        while left > 0 {
            let Some(chain) = io.queues[queue].pop()? else {
                match io.queues[queue].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            left = left.saturating_sub(BUFFER_PAGES_MIN);
            let (mut skip, mut is_whole) = (self.done[queue], true);
            for (start, bytes) in chain.writable_ranges() {
                if skip >= bytes.0 && bytes.0 > 0 {
                    skip -= bytes.0;
                    continue;
                }
                if left == 0 {
                    is_whole = false;
                    break;
                }
                let part = (bytes.0 - skip).min(left * PAGE_BYTES);
                self.reported += give_back(io, GuestPhys(start.0 + skip), Bytes(part));
                left = left.saturating_sub((part / PAGE_BYTES).max(BUFFER_PAGES_MIN));
                self.done[queue] += part;
                if skip + part < bytes.0 {
                    is_whole = false;
                    break;
                }
                skip = 0;
            }
            if is_whole {
                self.done[queue] = 0;
                io.queues[queue].add_used(chain, 0)?;
            } else {
                io.queues[queue].undo_pop(chain);
            }
        }
        Ok(Turn::More)
    }
}

/// Deflated pages are the guest's again from the moment it touches them: there is nothing to do but to say so.
fn deflate(io: &mut Io<'_>, queue: usize) -> Result<Turn, RingError> {
    for _ in 0..TURN_PAGES_MAX / BUFFER_PAGES_MIN {
        let Some(chain) = io.queues[queue].pop()? else {
            match io.queues[queue].wait_for_buffers()? {
                Waiting::Told => return Ok(Turn::Idle),
                Waiting::MoreThere => continue,
            }
        };
        Counters::count(&io.counters.done);
        io.queues[queue].add_used(chain, 0)?;
    }
    Ok(Turn::More)
}

/// Ascending numbers of pages without a gap, some of them more than once.
fn give_back_run(io: &Io<'_>, run: &[u32]) {
    let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
    let count = u64::from(last - first) + 1;
    let start = GuestPhys(u64::from(*first) * numbers::PAGE_BYTES);
    give_back(io, start, Bytes(count * numbers::PAGE_BYTES));
}

/// Gives back the whole pages in a range, as far as it is memory; says how many bytes that were.
fn give_back(io: &Io<'_>, start: GuestPhys, bytes: Bytes) -> u64 {
    let given = discard(io.ram, start, bytes).unwrap_or_default();
    // A refusal of the host leaves the memory where it is: the guest has given it, and loses nothing.
    Counters::count(if given == bytes { &io.counters.done } else { &io.counters.failed });
    given.0
}

/// What the queue of this number is there for, with these features accepted.
fn role(queue: usize, features: u64) -> Role {
    let reporting = if features & numbers::F_PAGE_REPORTING != 0 { Role::Reporting } else { Role::Nothing };
    match queue {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if features & numbers::F_STATS_VQ != 0 => Role::Statistics,
        _ => reporting,
    }
}

impl Model for Balloon {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, _token: u64, _ready: EventSet) {}

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        if !io.live {
            return Ok(Turn::Idle);
        }
        let mut turn = Turn::Idle;
        for queue in 0..QUEUE_SIZES.len() {
            let served = match role(queue, io.features) {
                Role::Inflate => self.inflate(io, queue)?,
                Role::Deflate => deflate(io, queue)?,
                Role::Statistics => self.statistics.serve(io, queue, self.clock.monotonic())?,
                Role::Reporting => self.report(io, queue)?,
                Role::Nothing => Turn::Idle,
            };
            if served == Turn::More {
                turn = Turn::More;
            }
        }
        Ok(turn)
    }

    /// A chain that was begun is still available: it is begun again, which does no harm.
    fn drain(&mut self, _io: &mut Io<'_>) -> Result<(), RingError> {
        self.done = [0; QUEUE_SIZES.len()];
        Ok(())
    }

    fn reset(&mut self) {
        self.done = [0; QUEUE_SIZES.len()];
        self.statistics = Statistics::default();
        // 5.5.5: a driver begins with an empty balloon. The target stays: it is the host's.
        self.set_config(numbers::CONFIG_ACTUAL, 0);
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        let (target_pages, actual_pages) =
            (self.config(numbers::CONFIG_NUM_PAGES), self.config(numbers::CONFIG_ACTUAL));
        Section::new(instance, &BalloonV1 { target_pages, actual_pages, reported_bytes: self.reported })
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.target_changed)
    }

    /// `actual` is the one field a driver writes (5.5.4).
    fn write_config(&mut self, at: usize, data: &[u8]) -> bool {
        let Ok(value) = <[u8; 4]>::try_from(data) else { return false };
        let is_actual = at == numbers::CONFIG_ACTUAL;
        if is_actual {
            self.set_config(at, u32::from_le_bytes(value));
        }
        is_actual
    }

    fn balloon(&mut self) -> Option<&mut Balloon> {
        Some(self)
    }
}
