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
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tls::TlsError;
use crate::clock::{Clock, Monotonic, SystemClock};
use crate::machine::image::{self, WriteImageError};
use crate::machine::pages::{self, ReachPagesError};
use crate::machine::pre_copy::{self, Decision, Policy, PreCopy, Round, Unconverged};
use crate::machine::{DirtyConsumer, GuestRam, Harvester, PacketDoor, PageRun, Presence};
use crate::report;
use crate::sys::kvm::CallError;
use crate::sys::thread::{self, ThreadClass};
use crate::units::{Bytes, PAGE_BYTES, PageCount, PageIndex};
use crate::wire::control::{
    CopyPhases, PackedPhases, Packing, PrefaultSpec, SendPhase, SendPhases, SendProgress, SendSpec, SentPages,
    StreamForm,
};
use crate::wire::link::LinkError;
use crate::wire::packed::Packer;
use crate::wire::stream::{
    BODY_BYTES_MAX, CONNECTIONS_MAX, Kind, PAGES_MAX, Pages, STATE_BYTES_MAX, VERSION, VERSION_MIN, state_digest,
};

pub(super) mod checkpoint;
mod lane;
mod prefault;

use checkpoint::{Checkpoint, CheckpointError};
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

/// A send under way.
struct Copy<'a> {
    sender: &'a mut Sender,
    ram: GuestRam,
    lanes: Vec<Lane>,
    spec: SendSpec,
    /// What packs pages, if they are packed.
    packer: Option<Packer>,
    counts: SendPhases,
    packed: PackedPhases,
    /// Whether the guest stands still.
    held: bool,
    /// Its state, if it came before it was needed.
    state: Option<Vec<u8>>,
    round: u32,
}

impl Copy<'_> {
    fn all(&mut self, dirty: &Harvester, pagemap: &File, runs: bool, begun: Monotonic) -> Result<(), SendError> {
        let pages = match self.spec.pages {
            SentPages::All => Some(image::Pages::All),
            SentPages::Changed => Some(image::Pages::Changed),
            SentPages::None => None,
        };
        let consumer = match pages {
            Some(pages) => {
                let touched = || image::touched(&self.ram, pages, pagemap).map_err(SendError::Find);
                Some(dirty.subscribe_touched(touched)?)
            }
            None => None,
        };
        if let Some(consumer) = consumer.as_ref().filter(|_| runs) {
            self.rounds(consumer)?;
        }
        self.counts.running_ns = nanos(self.sender.clock.monotonic().since(begun));
        self.critical(consumer.as_ref())
    }

    /// Rounds, until what is left can be sent while the guest stands still.
    fn rounds(&mut self, consumer: &DirtyConsumer) -> Result<(), SendError> {
        let spec = &self.spec;
        let policy = Policy {
            pause_max: Duration::from_millis(spec.pause_ms_max.into()),
            rounds_max: spec.rounds_max,
            deadline: Duration::from_millis(spec.deadline_ms),
            throttle: spec.throttle,
            unconverged: if spec.force { Unconverged::Force } else { Unconverged::Abort },
        };
        let mut pre_copy = PreCopy::new(policy, PAUSE_FIXED);
        loop {
            let begun = self.sender.clock.monotonic();
            let sent = self.round(consumer)?;
            let took = self.sender.clock.monotonic().since(begun);
            let dirty = bytes(consumer.harvest().map_err(SendError::Log)?);
            self.counts.rounds += 1;
            let decision = pre_copy.after(Round { sent, took, dirty });
            self.sender.progress(|progress| {
                progress.rounds = self.counts.rounds;
                progress.rate_bytes = pre_copy.rate().map_or(0, |rate| rate.0);
                progress.dirty_rate_bytes = per_second(dirty, took);
                progress.pause_expected_ns = nanos(pre_copy.pause_expected(dirty));
            });
            match decision {
                Decision::Round => {}
                Decision::Throttle(share) => {
                    self.sender.progress(|progress| progress.vcpu_share = share);
                    self.sender.tell(News::Throttle(share));
                }
                Decision::Critical => return Ok(()),
                Decision::Abort(abort) => return Err(abort.into()),
            }
        }
    }

    /// Sends every page in the set, and waits until all are acknowledged.
    fn round(&mut self, consumer: &DirtyConsumer) -> Result<Bytes, SendError> {
        let begun = self.sender.clock.monotonic();
        let all = bytes(consumer.snapshot().len());
        self.sender.progress(|progress| (progress.round_bytes, progress.round_sent_bytes) = (all.0, 0));
        let mut sent = Bytes(0);
        let mut buffer = Vec::new();
        loop {
            let chunk = consumer.take_batch(PROTECTED_AT_ONCE).map_err(SendError::Log)?;
            if chunk.is_empty() {
                break;
            }
            for run in chunk {
                for piece in pieces(run) {
                    self.send_pages(piece, &mut buffer)?;
                    sent.0 += piece.count.0 * PAGE_BYTES;
                    self.go_on(begun, sent)?;
                }
            }
        }
        let number = self.round.to_le_bytes();
        self.round += 1;
        for lane in &mut self.lanes {
            lane.push(Kind::RoundEnd, &number, &[], 0)?;
        }
        for at in 0..self.lanes.len() {
            self.take_acks(at, Lane::is_waiting)?;
        }
        Ok(sent)
    }

    /// Takes acknowledgements of a connection while that is so. Each takes as long as the other end likes, within its silence.
    fn take_acks(&mut self, at: usize, is_so: impl Fn(&Lane) -> bool) -> Result<(), SendError> {
        while let Some(lane) = self.lanes.get_mut(at).filter(|lane| is_so(lane)) {
            lane.take_ack()?;
            self.hear()?;
        }
        Ok(())
    }

    /// Sends pages that follow each other on the connection that has least to do.
    fn send_pages(&mut self, run: PageRun, buffer: &mut Vec<u8>) -> Result<(), SendError> {
        pages::read(&self.ram, run, buffer).map_err(SendError::Read)?;
        let least = self.lanes.iter().zip(0..).min_by_key(|(lane, _)| lane.in_flight_bytes);
        // There is at least one.
        let Some((_, at)) = least else { return Ok(()) };
        let mut first = run.first;
        for part in pages::by_kind(buffer) {
            let count = part.count();
            let Some(lane) = self.lanes.get_mut(at) else { return Ok(()) };
            let Some(head) = Pages::new(first, count).map(Pages::to_bytes) else { continue };
            if part.zero {
                lane.push(Kind::ZeroPages, &head, &[], 0)?;
                self.counts.zero_pages += count.0;
            } else {
                let memory = count.0 * PAGE_BYTES;
                match self.packer.as_mut().and_then(|packer| packer.pack(part.bytes())) {
                    Some(block) => {
                        lane.push(Kind::PackedPages, &head, block, memory)?;
                        self.packed.pages += count.0;
                        self.packed.bytes += block.len() as u64;
                    }
                    None => lane.push(Kind::Pages, &head, part.bytes(), memory)?,
                }
                self.counts.pages += count.0;
            }
            self.take_acks(at, Lane::is_full)?;
            first.0 += count.0;
        }
        Ok(())
    }

    /// Between two pieces: whether to go on, and when.
    fn go_on(&mut self, begun: Monotonic, sent: Bytes) -> Result<(), SendError> {
        self.sender.progress(|progress| {
            progress.sent_bytes += sent.0 - progress.round_sent_bytes.min(sent.0);
            progress.round_sent_bytes = sent.0;
        });
        self.hear()?;
        let Some(rate) = self.spec.rate_bytes_max.filter(|_| !self.held) else { return Ok(()) };
        let due = u64::try_from(u128::from(sent.0) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
        let early = Duration::from_nanos(due).saturating_sub(self.sender.clock.monotonic().since(begun));
        if early.is_zero() {
            return Ok(());
        }
        let round = self.round;
        self.lanes.iter_mut().try_for_each(|lane| lane.keep_alive(round))?;
        match self.sender.jobs.recv_timeout(early) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(SendError::Cancelled),
        }
    }

    /// What the first thread has told meanwhile.
    fn hear(&mut self) -> Result<(), SendError> {
        match self.sender.jobs.try_recv() {
            Err(TryRecvError::Empty) => Ok(()),
            // It is collected while the last pages are sent.
            Ok(Job::State(state)) => {
                self.state = Some(state);
                Ok(())
            }
            Ok(_) | Err(TryRecvError::Disconnected) => Err(SendError::Cancelled),
        }
    }

    /// The guest stands still: the pages that are left, and the state.
    fn critical(&mut self, consumer: Option<&DirtyConsumer>) -> Result<(), SendError> {
        self.sender.tell(News::Converged);
        let Ok(Job::Held) = self.sender.jobs.recv() else { return Err(SendError::Cancelled) };
        let begun = self.sender.clock.monotonic();
        self.held = true;
        let bound = Duration::from_millis(self.spec.pause_ms_max.into()).saturating_mul(HELD_TIMES_MAX).max(HELD_MIN);
        let deadline = (!self.spec.force).then(|| begun.after(bound));
        for lane in &mut self.lanes {
            lane.link.connection_mut().hurry(SILENCE_MAX_HELD, deadline).map_err(SendError::Prepare)?;
        }
        self.sender.progress(|progress| progress.phase = SendPhase::Critical);
        if let Some(consumer) = consumer {
            consumer.harvest().map_err(SendError::Log)?;
            self.counts.last_pages = self.round(consumer)?.0 / PAGE_BYTES;
        }
        let last_sent = self.sender.clock.monotonic();
        let state = match self.state.take() {
            Some(state) => state,
            None => match self.sender.jobs.recv() {
                Ok(Job::State(state)) => state,
                Ok(_) | Err(_) => return Err(SendError::Cancelled),
            },
        };
        self.hand_over(&state)?;
        self.counts.state_bytes = state.len() as u64;
        self.counts.last_pages_ns = nanos(last_sent.since(begun));
        self.counts.ready_ns = nanos(self.sender.clock.monotonic().since(last_sent));
        Ok(())
    }

    /// Sends the state and waits until the other end has made a machine of it.
    fn hand_over(&mut self, state: &[u8]) -> Result<(), SendError> {
        if state.len() > STATE_BYTES_MAX {
            return Err(SendError::StateBytes(state.len()));
        }
        // There is at least one.
        let Some(lane) = self.lanes.first_mut() else { return Ok(()) };
        let digest = state_digest(state);
        let mut parts = state.chunks(BODY_BYTES_MAX as usize);
        let sent = parts.try_for_each(|part| lane.link.send(Kind::State, part));
        sent.and_then(|()| lane.link.send(Kind::End, &digest)).map_err(|source| lane.failed(source))?;
        let mut body = Vec::new();
        lane.link.expect(Kind::Ready, "Ready", &mut body).map_err(|source| lane.failed(source))?;
        if body == digest { Ok(()) } else { Err(SendError::OtherState) }
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
