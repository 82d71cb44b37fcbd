//! Takes a machine from another VMM: one thread for each connection puts pages where they belong and acknowledges them;
//! the state goes to the first thread, which makes the machine of it.
//!
//! ```text
//!  connection's thread                      first thread
//!  Hello, pages ... Ack ...                 serves its agent
//!  End: digest of the state fits ─ State ─▶ builds the machine
//!  Ready ◀───────────────────────── Ready ─ answers the agent
//!  packets that waited, to the guest        resumes when its agent says so
//! ```
//! Everything that comes is another host's word: lengths, page numbers and order are checked before they are used, and
//! what is wrong ends the migration. The memory is nobody's until the machine is built.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::log;
use super::socket::BoundedSocket;
use super::tls::{End, TlsError, Wire};
use crate::clock::{Clock, Monotonic, SystemClock};
use crate::machine::pages::{ArrivingRam, ReachPagesError};
use crate::machine::{GuestRam, GuestTime, PacketDoor, PageRun};
use crate::sys::thread::{self, ThreadClass};
use crate::wire::control::{ReceiveSpec, ReceivedMemory, StreamTls};
use crate::wire::intake::{Intake, Step};
use crate::wire::link::{Link, LinkError};
use crate::wire::stream::{Kind, StreamError, state_digest};

/// How long the other end may keep still. It is the one that hurries while its guest stands still; here nothing runs yet.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long the agents may take to decide, once the machine stands ready. After that packets are not waited for.
const DECISION_MAX: Duration = Duration::from_secs(600);

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveMachineError {
    /// A connection failed, or what came by it is wrong.
    #[error("the migration's stream")]
    Link(#[from] LinkError),
    /// What was given for TLS is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Two connections have one number.
    #[error("two connections are number {0}")]
    Twice(u8),
    /// Guest memory could not be written.
    #[error("put pages into guest memory")]
    Memory(#[from] ReachPagesError),
    /// The host refused something.
    #[error("prepare a connection")]
    Prepare(#[source] io::Error),
}

impl From<StreamError> for ReceiveMachineError {
    fn from(error: StreamError) -> Self {
        Self::Link(error.into())
    }
}

/// What came.
#[derive(Debug)]
pub(super) enum Arrival {
    /// All pages are in memory, and this is the state.
    State {
        /// The state.
        state: Vec<u8>,
        /// When its guest came to stand still.
        stopped: StoppedBetween,
    },
    /// It will not come about.
    Failed(ReceiveMachineError),
}

/// When a guest that came from elsewhere stopped, as can be told here by the own clock: the other end holds it when all of a
/// round was acknowledged, and sends its state when it stands still. From another host come only guests that run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoppedBetween {
    after: Monotonic,
    before: Monotonic,
    /// Whether it was another process of this host that it came from.
    here: bool,
}

impl StoppedBetween {
    /// What its clocks are to show if it goes on now.
    pub(super) fn until(self, now: Monotonic) -> GuestTime {
        let ns = |since: Monotonic| u64::try_from(now.since(since).as_nanos()).unwrap_or(u64::MAX);
        match self.here {
            true => GuestTime::PassesHere { at_most_ns: ns(self.after) },
            false => GuestTime::Passes { at_least_ns: ns(self.before), at_most_ns: ns(self.after) },
        }
    }
}

/// What was seen of a stream that tells when its guest stopped.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// When the last round ended, with its number, and when the one before it did: the last one is that of the guest that
    /// stands still.
    last: Option<u32>,
    last_ended: Monotonic,
    before_ended: Monotonic,
    /// When the state began to come.
    state: Option<Monotonic>,
}

impl Seen {
    const fn from(greeted: Monotonic) -> Self {
        Self { last: None, last_ended: greeted, before_ended: greeted, state: None }
    }

    fn saw(&mut self, kind: Kind, body: &[u8], now: Monotonic) {
        if kind == Kind::State {
            self.state.get_or_insert(now);
        }
        if kind != Kind::RoundEnd {
            return;
        }
        // The same number may be said several times: connections are kept alive by it.
        let number = body.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        if number != self.last {
            (self.last, self.before_ended) = (number, self.last_ended);
        }
        self.last_ended = now;
    }

    fn stopped(self, now: Monotonic, here: bool) -> StoppedBetween {
        StoppedBetween { after: self.before_ended, before: self.state.unwrap_or(now), here }
    }
}

/// What the thread of connection 0 is told.
#[derive(Debug)]
enum Verdict {
    /// The machine stands ready, and this is where packets for it go.
    Ready(PacketDoor),
    /// It could not be made.
    No(String),
}

/// A machine on its way here. Dropping it does not end its threads: they end with their connections.
#[derive(Debug)]
pub(super) struct Receiving {
    arrivals: Receiver<Arrival>,
    verdict: SyncSender<Verdict>,
    bell: Arc<EventFd>,
    ram: GuestRam,
}

/// What the threads share.
struct Line {
    ram: ArrivingRam,
    token: [u8; 32],
    memory: ReceivedMemory,
    tls: Option<StreamTls>,
    connections: u8,
    clock: SystemClock,
    /// Numbers of the connections that were greeted.
    greeted: Mutex<Vec<u8>>,
    arrivals: SyncSender<Arrival>,
    verdict: Mutex<Option<Receiver<Verdict>>>,
    bell: Arc<EventFd>,
}

/// Arrivals that may wait: one for each connection.
const ARRIVALS_MAX: usize = 8;

impl Receiving {
    /// Starts a thread for each connection.
    pub(super) fn start(
        ram: GuestRam,
        spec: &ReceiveSpec,
        sockets: Vec<OwnedFd>,
        clock: SystemClock,
    ) -> io::Result<Self> {
        let (teller, arrivals) = sync_channel(ARRIVALS_MAX);
        let (verdict, inbox) = sync_channel(1);
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let line = Arc::new(Line {
            ram: ArrivingRam::new(ram.clone(), spec.memory == ReceivedMemory::Image),
            token: spec.token.0,
            memory: spec.memory,
            tls: spec.tls.clone(),
            connections: u8::try_from(sockets.len()).unwrap_or(u8::MAX),
            clock,
            greeted: Mutex::default(),
            arrivals: teller,
            verdict: Mutex::new(Some(inbox)),
            bell: Arc::clone(&bell),
        });
        for (at, socket) in sockets.into_iter().enumerate() {
            let line = Arc::clone(&line);
            // Nobody waits for it: it ends with its connection.
            drop(thread::start(ThreadClass::Stream, format!("stream-{at}"), move || line.serve(socket))?);
        }
        Ok(Self { arrivals, verdict, bell, ram })
    }

    /// Readable when something came.
    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// What came, if anything.
    pub(super) fn arrival(&self) -> Option<Arrival> {
        let _ = self.bell.read();
        self.arrivals.try_recv().ok()
    }

    /// The memory that the pages went to.
    pub(super) fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// Tells the other end that the machine stands ready, or why it does not.
    pub(super) fn tell(&self, result: Result<PacketDoor, String>) {
        let verdict = result.map_or_else(Verdict::No, Verdict::Ready);
        let _ = self.verdict.try_send(verdict);
    }
}

impl Line {
    fn serve(&self, socket: OwnedFd) {
        if let Err(error) = self.receive(socket) {
            self.tell(Arrival::Failed(error));
        }
    }

    fn tell(&self, arrival: Arrival) {
        let _ = self.arrivals.try_send(arrival);
        let _ = self.bell.write(1);
    }

    fn receive(&self, socket: OwnedFd) -> Result<(), ReceiveMachineError> {
        let socket = BoundedSocket::new(socket, self.clock, SILENCE_MAX).map_err(ReceiveMachineError::Prepare)?;
        let mut link = Link::new(Wire::new(socket, self.tls.as_ref(), End::Target)?, None);
        let result = self.take_pages(&mut link);
        let Ok(Some((state, stopped))) = result else {
            if let Err(error) = &result {
                link.give_up(&crate::report::chain(error));
            }
            return result.map(drop);
        };
        let digest = state_digest(&state);
        let verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.tell(Arrival::State { state, stopped });
        match verdict.map(|verdict| verdict.recv()) {
            Some(Ok(Verdict::Ready(door))) => {
                let forwarded = link.send(Kind::Ready, &digest).and_then(|()| take_packets(&mut link, &door));
                door.end();
                if let Err(error) = forwarded {
                    // The machine is here, whatever became of the packets; its agent counts what went over.
                    log::say(format_args!("packets from the host before: {}", crate::report::chain(&error)));
                }
            }
            Some(Ok(Verdict::No(reason))) => link.give_up(&reason),
            // The first thread is gone.
            Some(Err(_)) | None => {}
        }
        Ok(())
    }

    /// Takes what comes ([`Intake`] says what that may be) until the state is here too, on connection 0; on the others,
    /// until the other end hangs up.
    fn take_pages(&self, link: &mut Link<Wire>) -> Result<Option<(Vec<u8>, StoppedBetween)>, ReceiveMachineError> {
        let mut intake = Intake::new(self.token, self.connections, self.memory != ReceivedMemory::Shared);
        let mut body = Vec::new();
        let mut seen = Seen::from(self.clock.monotonic());
        loop {
            let is_another = intake.number().is_some_and(|number| number > 0);
            let kind = match link.receive(&mut body) {
                Ok(kind) => kind,
                // Between two frames: the other end is done with this connection, or connection 0 tells what happened.
                Err(LinkError::Io { source, .. }) if is_another && source.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            };
            seen.saw(kind, &body, self.clock.monotonic());
            match intake.take(kind, &body, |first| self.ram.pages_from(first))? {
                Step::Greet(hello) => {
                    self.greeted(hello.connection)?;
                    link.send(Kind::Hello, &hello.to_bytes())?;
                }
                Step::Put(first, count, content) => self.ram.put(PageRun { first, count }, content)?,
                Step::PutZeroes(first, count) => self.ram.put_zeroes(PageRun { first, count })?,
                Step::Nothing => {}
                Step::State(state) => {
                    // Between hosts all is encrypted, within one nothing is.
                    return Ok(Some((state, seen.stopped(self.clock.monotonic(), self.tls.is_none()))));
                }
            }
            if intake.ack_is_due() {
                link.send(Kind::Ack, &link.received().to_le_bytes())?;
            }
        }
    }

    /// A connection says that it is this one of them.
    fn greeted(&self, number: u8) -> Result<(), ReceiveMachineError> {
        let mut greeted = self.greeted.lock().unwrap_or_else(PoisonError::into_inner);
        if greeted.contains(&number) {
            return Err(ReceiveMachineError::Twice(number));
        }
        greeted.push(number);
        Ok(())
    }
}

/// Takes the packets that waited for the guest where it was, until there are no more.
fn take_packets(link: &mut Link<Wire>, door: &PacketDoor) -> Result<(), LinkError> {
    let failed = |source| LinkError::Io { what: "prepare a connection", source };
    link.connection_mut().hurry(DECISION_MAX, None).map_err(failed)?;
    let mut body = Vec::new();
    loop {
        let found = link.receive(&mut body)?;
        match (found, body.split_first()) {
            (Kind::PacketsEnd, _) => return Ok(()),
            (Kind::Packet, Some((index, packet))) => drop(door.add(*index, packet)),
            (_, _) => return Err(StreamError::Unexpected { found, wanted: "a packet" }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at(ms: u64) -> Monotonic {
        Monotonic(ms * MS)
    }

    fn seen(frames: &[(Kind, u32, u64)]) -> GuestTime {
        let mut seen = Seen::from(at(1));
        for (kind, number, ms) in frames {
            seen.saw(*kind, &number.to_le_bytes(), at(*ms));
        }
        let here = seen.stopped(at(90), true).until(at(100));
        let there = seen.stopped(at(90), false).until(at(100));
        assert!(matches!(
            (here, there),
            (GuestTime::PassesHere { at_most_ns: here }, GuestTime::Passes { at_most_ns: there, .. }) if here == there
        ));
        there
    }

    #[test]
    fn a_guest_stopped_between_its_last_whole_round_and_its_state() {
        let passes =
            |at_least_ms, at_most_ms| GuestTime::Passes { at_least_ns: at_least_ms * MS, at_most_ns: at_most_ms * MS };
        use Kind::{Pages, RoundEnd, State};
        // Two rounds while it ran, one while it did not.
        let rounds = [(RoundEnd, 0, 20), (Pages, 9, 30), (RoundEnd, 1, 40), (Pages, 9, 45), (RoundEnd, 2, 60)];
        let state = [(State, 9, 70), (State, 9, 80)];
        assert_eq!(seen(&[&rounds[..], &state].concat()), passes(30, 60));
        // One that was said again to be heard of, and one that stood still all the time.
        assert_eq!(seen(&[&[(RoundEnd, 0, 10), (RoundEnd, 0, 30)], &rounds[2..], &state].concat()), passes(30, 60));
        assert_eq!(seen(&[&[(RoundEnd, 0, 50)], &state[..]].concat()), passes(30, 99));
        // Nothing is copied of memory that both map.
        assert_eq!(seen(&state), passes(30, 99));
    }
}
