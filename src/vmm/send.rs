//! Sends the machine to another VMM while its guest runs: pre-copy in rounds, then the rest while it stands still.
//!
//! One thread of its own, which waits from the first day: when it is needed, threads can no longer be started. It is
//! told what to do by the first thread, which owns the machine, and tells it what it has come to:
//!
//! ```text
//!  first thread                          this thread
//!  Send ───────────────────────────────▶ rounds, until little is left (machine/pre_copy)
//!  pause, Held ◀──────────── Converged ─ waits
//!  collect, State ─────────────────────▶ last pages; then the state, End
//!  answer the agent ◀───────────── Sent ─ Ready came: both ends stand still
//!  Packets ────────────────────────────▶ what waits in the taps ─ Forwarded
//!  Forget ─────────────────────────────▶
//!  resume, refuse ◀─────────────Failed ─ at any point before Sent
//! ```
//! A page is under way at most once: a round ends when the target has acknowledged all of it, so no page of a later
//! round can be overtaken by an older copy on another connection. On each connection no more than [`lane::WINDOW_BYTES`] wait
//! for their acknowledgement, which bounds what the target has to hold, and the acknowledgements that wait to be read are
//! few enough for any socket's buffer: neither end can wait for the other to read.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tls::TlsError;
use crate::clock::{Clock, SystemClock};
use crate::machine::image::WriteImageError;
use crate::machine::pages::ReachPagesError;
use crate::machine::pre_copy;
use crate::machine::{GuestRam, Harvester, PacketDoor, PageRun, Presence};
use crate::report;
use crate::sys::kvm::CallError;
use crate::sys::thread::{self, ThreadClass};
use crate::units::{Bytes, PAGE_BYTES, PageCount, PageIndex};
use crate::wire::control::{
    CopyPhases, PackedPhases, Packing, PrefaultSpec, SendPhase, SendPhases, SendProgress, SendSpec, StreamForm,
};
use crate::wire::link::LinkError;
use crate::wire::packed::Packer;
use crate::wire::stream::{CONNECTIONS_MAX, Kind, PAGES_MAX, VERSION, VERSION_MIN};

pub(super) mod checkpoint;
mod copy;
mod lane;
mod prefault;

use checkpoint::{Checkpoint, CheckpointError};
use copy::Copy;
use lane::Lane;

/// Pages that are re-protected at once. Each time all vCPUs have to notice; the smaller this is, the fewer pages are
/// written again between their protection and their sending.
const PROTECTED_AT_ONCE: PageCount = PageCount(4096);

/// How long the other end may keep still while the guest runs, and while it does not.
const SILENCE_MAX: Duration = Duration::from_secs(10);
const SILENCE_MAX_HELD: Duration = Duration::from_secs(2);

/// How long the guest may stand still, as a multiple of the pause that is aimed at, and at least: then it goes on where
/// it is. One that is moved by force has no such bound.
const HELD_TIMES_MAX: u32 = 10;
const HELD_MIN: Duration = Duration::from_secs(2);

/// The part of the pause that does not depend on how many pages are left: vCPUs out, state, the target's building.
const PAUSE_FIXED: Duration = Duration::from_millis(4);

/// A machine to send.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// One connected stream socket for each connection, of whatever family.
    pub(super) sockets: Vec<OwnedFd>,
    /// How.
    pub(super) spec: SendSpec,
    /// In frames of which form.
    pub(super) form: StreamForm,
    /// This process's page map.
    pub(super) pagemap: File,
    /// Guest memory.
    pub(super) ram: GuestRam,
    /// Which of its pages are written.
    pub(super) dirty: Harvester,
    /// Whether the guest runs. One that stands still is sent in one go.
    pub(super) runs: bool,
}

impl Outgoing {
    /// Whether descriptors and bounds fit together.
    pub(super) fn check(spec: &SendSpec, form: StreamForm, descriptors: usize) -> Result<(), String> {
        let wanted = 1 + usize::from(spec.connections);
        if !(1..=CONNECTIONS_MAX).contains(&spec.connections) {
            return Err(format!("{} connections: 1 to {CONNECTIONS_MAX} are possible", spec.connections));
        }
        if descriptors != wanted {
            return Err(format!("{descriptors} descriptors came with the request, it names {wanted}"));
        }
        if spec.rate_bytes_max == Some(0) {
            return Err("a rate of 0 bytes a second sends nothing".to_owned());
        }
        let StreamForm { version, packing } = form;
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(format!("stream version {version}: {VERSION_MIN} to {VERSION} are possible"));
        }
        if packing != Packing::None && version < Kind::PackedPages.since_version() {
            return Err(format!("stream version {version} has no packed pages"));
        }
        Ok(())
    }
}

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Job {
    /// Send this.
    Send(Box<Outgoing>),
    /// Write its memory to a file.
    Checkpoint(Box<Checkpoint>),
    /// Write what is left of it, and list all of it here if that is asked for.
    Rest {
        /// Where.
        list: Option<File>,
    },
    /// Map these pages of its memory ahead, as far as they are there.
    Prefault(GuestRam, PrefaultSpec, Option<Arc<Presence>>),
    /// The guest stands still.
    Held,
    /// Its state.
    State(Vec<u8>),
    /// Give up.
    Cancel,
    /// Send the packets that wait for the machine; with `last`, none will follow.
    Packets {
        /// Where they are.
        door: PacketDoor,
        /// Whether these are the last.
        last: bool,
    },
    /// The send is over, whatever became of it.
    Forget,
}

/// What the thread has come to.
#[derive(Debug)]
pub(super) enum News {
    /// It writes too fast: let its vCPUs run this share of the time, in percent.
    Throttle(u8),
    /// Little is left: hold the guest.
    Converged,
    /// The machine stands ready at the other end.
    Sent(SendPhases, PackedPhases),
    /// This many packets went over.
    Forwarded(Result<u64, SendError>),
    /// It will not come about.
    Failed(SendError),
    /// Its memory is written, but for little.
    Copied(Result<CopyPhases, CheckpointError>),
    /// All of it is; so many bytes were left.
    Rested(Result<Bytes, CheckpointError>),
}

/// Why a machine was not sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// A connection failed, or the other end did.
    #[error("connection {connection}")]
    Link {
        /// Which.
        connection: usize,
        /// How.
        #[source]
        source: LinkError,
    },
    /// A connection could not be prepared.
    #[error("prepare a connection")]
    Prepare(#[source] io::Error),
    /// What was given for TLS is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// KVM did not tell what was written.
    #[error("follow what the guest writes")]
    Log(#[from] CallError),
    /// Guest memory could not be read.
    #[error(transparent)]
    Read(ReachPagesError),
    /// Guest memory could not be looked through.
    #[error("find the pages to send")]
    Find(#[source] WriteImageError),
    /// Pre-copy gave up.
    #[error(transparent)]
    Unfinished(#[from] pre_copy::Abort),
    /// The other end has another state than was sent.
    #[error("the other end has another state than was sent")]
    OtherState,
    /// Packets that waited could not be taken.
    #[error("take the packets that wait for the guest")]
    Packets(#[source] io::Error),
    /// The state is too big.
    #[error("{0} bytes of state are more than a stream carries")]
    StateBytes(usize),
    /// By request, or because nobody waits for it any more.
    #[error("the send was cancelled")]
    Cancelled,
}

/// The thread, as the first thread has it. Dropping it ends it, as soon as it looks: nobody waits for that, since it may
/// be waiting for another host, and a VMM that ends ends its threads.
#[derive(Debug)]
pub(super) struct SendThread {
    jobs: SyncSender<Job>,
    news: Receiver<News>,
    bell: Arc<EventFd>,
    progress: Arc<Mutex<SendProgress>>,
}

/// Jobs that may wait: a send takes Held, State, Cancel and Forget in a row at most.
const JOBS_MAX: usize = 8;

impl SendThread {
    /// Starts the thread, which waits.
    pub(super) fn start(clock: SystemClock) -> io::Result<Self> {
        let (jobs, inbox) = sync_channel(JOBS_MAX);
        let (teller, news) = sync_channel(JOBS_MAX);
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let progress = Arc::new(Mutex::new(SendProgress::default()));
        let mut sender =
            Sender { jobs: inbox, news: teller, bell: Arc::clone(&bell), progress: Arc::clone(&progress), clock };
        drop(thread::start(ThreadClass::Stream, "stream".to_owned(), move || sender.run())?);
        Ok(Self { jobs, news, bell, progress })
    }

    /// Readable when there is news.
    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// What it has come to, if anything.
    pub(super) fn news(&self) -> Option<News> {
        let _ = self.bell.read();
        self.news.try_recv().ok()
    }

    /// Tells it what to do. Jobs beyond what it can hold are none that it still has to hear of.
    pub(super) fn tell(&self, job: Job) {
        if matches!(job, Job::Send(_)) {
            // It has begun for whoever asks, also before the thread gets to it.
            let begun = SendProgress { phase: SendPhase::Copying, vcpu_share: 100, ..SendProgress::default() };
            *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = begun;
        }
        let _ = self.jobs.try_send(job);
    }

    /// How far it is.
    pub(super) fn progress(&self) -> SendProgress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's own side.
struct Sender {
    jobs: Receiver<Job>,
    news: SyncSender<News>,
    bell: Arc<EventFd>,
    progress: Arc<Mutex<SendProgress>>,
    clock: SystemClock,
}

impl Sender {
    fn run(&mut self) {
        while let Ok(job) = self.jobs.recv() {
            let outgoing = match job {
                Job::Send(outgoing) => outgoing,
                Job::Checkpoint(checkpoint) => {
                    checkpoint::serve(self, *checkpoint);
                    continue;
                }
                Job::Prefault(ram, spec, presence) => {
                    prefault::serve(&ram, &spec, presence.as_deref());
                    continue;
                }
                // What belongs to something that is over means nothing any more.
                Job::Rest { .. } | Job::Held | Job::State(_) | Job::Cancel | Job::Packets { .. } | Job::Forget => {
                    continue;
                }
            };
            match self.send(*outgoing) {
                Ok((phases, packed, links)) => {
                    self.progress(|progress| progress.phase = SendPhase::Ready);
                    self.tell(News::Sent(phases, packed));
                    self.stand_by(links);
                    self.progress(|progress| progress.phase = SendPhase::None);
                }
                Err(error) => {
                    self.progress(|progress| progress.phase = SendPhase::None);
                    self.tell(News::Failed(error));
                }
            }
        }
    }

    /// Keeps the connections until the first thread knows what becomes of the machine.
    fn stand_by(&mut self, lanes: Vec<Lane>) {
        // Packets go where the state went.
        let Some(mut lane) = lanes.into_iter().next() else { return };
        let mut packets = 0;
        while let Ok(job) = self.jobs.recv() {
            match job {
                Job::Forget => return,
                Job::Packets { door, last } => {
                    let before = packets;
                    let result = lane.forward(&door, last, &mut packets);
                    self.tell(News::Forwarded(result.map(|()| packets - before)));
                }
                Job::Send(_)
                | Job::Checkpoint(_)
                | Job::Prefault(..)
                | Job::Rest { .. }
                | Job::Held
                | Job::State(_)
                | Job::Cancel => {}
            }
        }
    }

    fn tell(&self, news: News) {
        // The first thread reads each before it tells the next job.
        let _ = self.news.try_send(news);
        let _ = self.bell.write(1);
    }

    fn progress(&self, change: impl FnOnce(&mut SendProgress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn send(&mut self, outgoing: Outgoing) -> Result<(SendPhases, PackedPhases, Vec<Lane>), SendError> {
        let Outgoing { sockets, spec, form, pagemap, ram, dirty, runs } = outgoing;
        let begun = self.clock.monotonic();
        let mut lanes = Vec::with_capacity(sockets.len());
        for (socket, number) in sockets.into_iter().zip(0..) {
            lanes.push(Lane::open(socket, self.clock, (&spec, form.version), number)?);
        }
        let packer = (form.packing == Packing::Lz4).then(Packer::default);
        let (counts, packed) = (SendPhases::default(), PackedPhases::default());
        let mut copy =
            Copy { sender: self, ram, lanes, spec, packer, counts, packed, held: false, state: None, round: 0 };
        let result = copy.all(&dirty, &pagemap, runs, begun);
        let Copy { mut lanes, counts, packed, .. } = copy;
        match result {
            Ok(()) => {
                let wire_bytes = lanes.iter().map(|lane| lane.link.wire_bytes()).sum();
                Ok((SendPhases { wire_bytes, ..counts }, packed, lanes))
            }
            Err(error) => {
                let reason = report::chain(&error);
                lanes.iter_mut().for_each(|lane| lane.link.give_up(&reason));
                Err(error)
            }
        }
    }
}

/// A run in pieces that fit a frame.
fn pieces(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.first.0 + run.count.0;
    (run.first.0..end).step_by(PAGES_MAX as usize).map(move |first| {
        let count = (end - first).min(PAGES_MAX.into());
        PageRun { first: PageIndex(first), count: PageCount(count) }
    })
}

const fn bytes(pages: PageCount) -> Bytes {
    Bytes(pages.0 * PAGE_BYTES)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn per_second(bytes: Bytes, time: Duration) -> u64 {
    let rate = (u128::from(bytes.0) * 1_000_000_000).checked_div(time.as_nanos());
    rate.map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
}
