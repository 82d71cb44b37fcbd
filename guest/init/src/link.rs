//! One connection of the host: greeting, then requests or one program.
//!
//! ```text
//!   Greeting ──Hello──▶ Requests ──Exec──▶ Starting ──▶ Running ──finished──▶ Closing ──all sent──▶ Parting ──▶ gone
//!                        │  ▲                              │ host closes: the program's group is killed ──▶ gone
//!              Quiesce   ▼  │ sync done                    └ frame out of place ──▶ Closing (program killed)
//!                        Quiescing
//! ```
//!
//! Readiness is remembered (edge-triggered): a socket is read until it gives less than was asked for, written until it
//! takes less than it was given. Nothing more is read from the host while its last bytes for the program are not
//! written, and nothing from the program while the host has not taken what is there: both sides feel the other's pace,
//! and a connection holds at most one frame in each direction and one read.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::mem;

use hearth_guest_wire::frame::Decoder;
use hearth_guest_wire::{Exec, Exit, FromGuest, ToGuest, VERSION, VERSION_MIN};

use crate::identity;
use crate::net;
use crate::outgoing::Outgoing;
use crate::program::{GRACE_NS, Program, Stream};
use crate::server::Guest;
use crate::stats;
use crate::sys::{self, Errand, Errno, Fd, Happened};

/// Turns a connection gets before the others get theirs.
const TURNS: u32 = 8;

/// How long the host is left to close a connection that is over.
const PARTING_NS: u64 = 2_000_000_000;

/// Errands (syncs) that may be under way; a later one waits for a disk that does not answer the earlier ones either.
const ERRANDS_MAX: usize = 8;

/// Which descriptor of a connection an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The connection itself.
    Socket,
    /// A stream of its program.
    Stream(Stream),
}

/// What a connection is for at the moment.
enum Phase {
    /// Nothing but a Hello is understood.
    Greeting,
    /// Any request.
    Requests,
    /// A sync is under way; the next request waits.
    Quiescing { pid: i32, began_ns: u64 },
    /// A program is to be started when its turn comes.
    Starting(Box<Exec>),
    /// It belongs to a program.
    Running(Box<Program>),
    /// What is left is sent, then it ends.
    Closing,
    /// All is sent and said to be: the host is left to close, so that what it still sends finds no closed door (it
    /// would take the last frame for lost). What comes is dropped.
    Parting,
}

/// What serving a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// Nothing to do until an event.
    Idle,
    /// There is more to do, after the others.
    Busy,
    /// It is over.
    Over,
}

/// One connection of the host.
pub(crate) struct Link {
    socket: Fd,
    /// Tokens of this connection, without the part.
    token: fn(u64, Part) -> u64,
    token_base: u64,
    readable: bool,
    peer_gone: bool,
    incoming: Decoder,
    outgoing: Outgoing,
    phase: Phase,
    deadline_ns: Option<u64>,
}

impl Link {
    /// A connection just accepted.
    pub(crate) fn new(socket: Fd, token: fn(u64, Part) -> u64, token_base: u64) -> Self {
        Self {
            socket,
            token,
            token_base,
            readable: false,
            peer_gone: false,
            incoming: Decoder::new(),
            outgoing: Outgoing::default(),
            phase: Phase::Greeting,
            deadline_ns: None,
        }
    }

    /// The connection's descriptor.
    pub(crate) const fn socket(&self) -> &Fd {
        &self.socket
    }

    /// When [`Link::expire`] is due.
    pub(crate) const fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    /// Whether a program of it has not ended.
    pub(crate) fn runs_program(&self) -> bool {
        matches!(&self.phase, Phase::Running(program) if program.runs())
    }

    /// Tells the host why it is not served, as far as the socket takes it.
    pub(crate) fn refuse(mut self, errno: Errno, what: &str) {
        self.fail(errno, String::from(what));
        let _ = self.outgoing.flush(&self.socket);
    }

    /// Remembers what the loop heard.
    pub(crate) fn note(&mut self, part: Part, happened: Happened) {
        match (part, &mut self.phase) {
            (Part::Socket, _) => {
                self.readable |= happened.readable;
                self.peer_gone |= happened.peer_gone;
                if happened.writable {
                    self.outgoing.unblock();
                }
            }
            (Part::Stream(stream), Phase::Running(program)) => program.note(stream, happened),
            (
                Part::Stream(_),
                Phase::Greeting
                | Phase::Requests
                | Phase::Quiescing { .. }
                | Phase::Starting(_)
                | Phase::Closing
                | Phase::Parting,
            ) => {}
        }
    }

    /// Does what can be done now.
    pub(crate) fn serve(&mut self, guest: &mut Guest) -> Served {
        for _ in 0..TURNS {
            let mut moved = self.take_frames(guest);
            let (token, base) = (self.token, self.token_base);
            if self.peer_gone && matches!(self.phase, Phase::Starting(_)) {
                return Served::Over;
            }
            if let Phase::Running(program) = &mut self.phase {
                if self.peer_gone {
                    return Served::Over;
                }
                moved |= program.pump_input(&guest.epoll, |stream| token(base, Part::Stream(stream)));
                moved |= program.pump_output(&mut guest.scratch, &mut self.outgoing);
                if let Some(exit) = program.finished() {
                    self.finish(exit);
                    moved = true;
                }
            }
            // One send for all that one turn made, or for as much as may be held.
            if !moved || !self.outgoing.has_room() {
                match self.outgoing.flush(&self.socket) {
                    Ok(sent) => moved |= sent,
                    Err(_) => return Served::Over,
                }
            }
            if matches!(self.phase, Phase::Closing) && self.outgoing.is_empty() {
                if self.peer_gone || sys::end_sending(&self.socket).is_err() {
                    return Served::Over;
                }
                self.phase = Phase::Parting;
                self.deadline_ns = Some(guest.wake_in(PARTING_NS));
            }
            if matches!(self.phase, Phase::Parting) {
                if self.peer_gone {
                    return Served::Over;
                }
                if self.readable {
                    moved = true;
                    self.receive(guest);
                    self.incoming = Decoder::new();
                }
            }
            if !moved {
                return if self.peer_gone && !self.readable { Served::Over } else { Served::Idle };
            }
        }
        Served::Busy
    }

    /// Takes what the host sent, as far as it can be worked on; says whether anything was done.
    fn take_frames(&mut self, guest: &mut Guest) -> bool {
        let mut moved = false;
        while self.takes_frame() {
            match self.incoming.next::<ToGuest>() {
                Ok(Some(message)) => self.take(message, guest),
                Ok(None) if self.readable => self.receive(guest),
                Ok(None) => break,
                Err(error) => self.violated(format!("{error}")),
            }
            moved = true;
        }
        moved
    }

    /// Whether a frame of the host can be worked on now.
    fn takes_frame(&self) -> bool {
        self.outgoing.has_room()
            && match &self.phase {
                Phase::Greeting | Phase::Requests => true,
                Phase::Running(program) => program.takes_input(),
                Phase::Quiescing { .. } | Phase::Starting(_) | Phase::Closing | Phase::Parting => false,
            }
    }

    fn receive(&mut self, guest: &mut Guest) {
        match sys::receive(&self.socket, &mut guest.scratch) {
            Ok(count @ 1..) => {
                // Less than asked for: the socket is empty. A peer that is gone may have left its end behind.
                self.readable = count == guest.scratch.len() || self.peer_gone;
                self.incoming.push(guest.scratch.get(..count).unwrap_or_default());
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => {
                self.readable = false;
                self.peer_gone = true;
            }
        }
    }

    /// One message of the host.
    fn take(&mut self, message: ToGuest, guest: &mut Guest) {
        match (&mut self.phase, message) {
            (Phase::Greeting, ToGuest::Hello { version }) => {
                if version < VERSION_MIN {
                    self.fail(Errno::PROTO, format!("version {version} is older than {VERSION_MIN}"));
                    return;
                }
                let running_ns = sys::monotonic_ns().saturating_sub(guest.started_ns);
                self.outgoing.push(&FromGuest::Hello { version: VERSION, running_ns });
                self.phase = Phase::Requests;
            }
            (Phase::Requests, message) => self.request(message, guest),
            (Phase::Running(program), ToGuest::Stdin(bytes)) => {
                if bytes.len() > hearth_guest_wire::STREAM_CHUNK_BYTES {
                    self.violated(String::from("input chunk is too long"));
                    return;
                }
                program.give_input(bytes);
            }
            (Phase::Running(program), ToGuest::StdinClosed) => program.end_input(),
            (Phase::Running(program), ToGuest::Signal { number }) => program.signal(number),
            (Phase::Running(program), ToGuest::Resize { rows, columns }) => program.resize(rows, columns),
            (
                Phase::Greeting
                | Phase::Running(_)
                | Phase::Quiescing { .. }
                | Phase::Starting(_)
                | Phase::Closing
                | Phase::Parting,
                _,
            ) => {
                self.violated(String::from("message out of place"));
            }
        }
    }

    /// One request of the host.
    fn request(&mut self, message: ToGuest, guest: &mut Guest) {
        match message {
            ToGuest::Exec(exec) => {
                self.phase = Phase::Starting(Box::new(exec));
                guest.starting.push_back(self.token_base);
            }
            ToGuest::Identity(identity) => {
                guest.finish_mounts();
                let applied = guest.permitted().and_then(|()| identity::apply(&identity));
                self.answer(applied, "apply the identity");
            }
            ToGuest::Network(interfaces) => {
                guest.finish_mounts();
                let applied = guest.permitted().and_then(|()| net::apply(&interfaces));
                self.answer(applied, "apply the network");
            }
            ToGuest::SetClock { unix_ns } => {
                let applied = guest.permitted().and_then(|()| sys::set_wall_ns(unix_ns).map_err(From::from));
                self.answer(applied, "set the clock");
            }
            ToGuest::Quiesce { timeout_ms } => self.quiesce(timeout_ms, guest),
            // A quiesce holds nothing back (see `guest/README.md`), so there is nothing to let go.
            ToGuest::Thaw => self.outgoing.push(&FromGuest::Done),
            ToGuest::Stats => {
                let stats = stats::read(guest.programs_running);
                match stats {
                    Ok(stats) => self.outgoing.push(&FromGuest::Stats(stats)),
                    Err(errno) => self.answer(Err(errno.into()), "read the guest's state"),
                }
            }
            ToGuest::Shutdown(how) => {
                let begun = guest.permitted().and_then(|()| guest.end(how).map_err(From::from));
                self.answer(begun, "end the guest");
            }
            ToGuest::Hardware(_) | ToGuest::RunHooks { .. } | ToGuest::Join(_) => {
                self.answer(Err(Errno::NOSYS.into()), "not made yet");
            }
            ToGuest::Registered { .. }
            | ToGuest::RegistrationRefused { .. }
            | ToGuest::Hello { .. }
            | ToGuest::Stdin(_)
            | ToGuest::StdinClosed
            | ToGuest::Signal { .. }
            | ToGuest::Resize { .. } => self.violated(String::from("message out of place")),
        }
    }

    /// Starts the program it was asked for: the loop does this one connection at a time.
    pub(crate) fn start_program(&mut self, guest: &mut Guest) {
        let Phase::Starting(exec) = &mut self.phase else { return };
        let exec = mem::take(&mut **exec);
        guest.prepare_for(exec.argv.first().map(String::as_bytes).unwrap_or_default());
        let timeout_ms = exec.timeout_ms;
        let (token, base) = (self.token, self.token_base);
        let watch = |stream| token(base, Part::Stream(stream));
        match Program::start(exec, &guest.environment, &guest.epoll, watch) {
            Ok(program) => {
                if guest.role.owns_guest() {
                    sys::queue_group(program.pid());
                }
                if timeout_ms > 0 {
                    self.deadline_ns = Some(guest.wake_in(u64::from(timeout_ms) * 1_000_000));
                }
                // Process ids are positive.
                self.outgoing.push(&FromGuest::Started { pid: program.pid().unsigned_abs() });
                self.phase = Phase::Running(Box::new(program));
                guest.programs_running += 1;
            }
            Err(error) => self.fail(error.errno, error.what),
        }
    }

    fn quiesce(&mut self, timeout_ms: u32, guest: &mut Guest) {
        if guest.errands.len() >= ERRANDS_MAX {
            self.answer(Err(Errno::BUSY.into()), "syncs are under way");
            return;
        }
        match sys::start_errand(Errand::Sync) {
            Ok(errand) => {
                let wait_ns = u64::from(timeout_ms) * 1_000_000;
                let deadline_ns = guest.wake_in(wait_ns);
                self.deadline_ns = Some(deadline_ns);
                self.phase = Phase::Quiescing { pid: errand.pid(), began_ns: deadline_ns - wait_ns };
                guest.errands.push(errand);
            }
            Err(errno) => self.answer(Err(errno.into()), "sync"),
        }
    }

    fn quiesced(&mut self, began_ns: u64, complete: bool) {
        let took_ms = sys::monotonic_ns().saturating_sub(began_ns) / 1_000_000;
        let took_ms = u32::try_from(took_ms).unwrap_or(u32::MAX);
        self.outgoing.push(&FromGuest::Quiesced { complete, took_ms });
        self.deadline_ns = None;
        self.phase = Phase::Requests;
    }

    /// A child ended: says whether it was this connection's.
    pub(crate) fn reaped(&mut self, pid: i32, exit: Exit, guest: &mut Guest) -> bool {
        match &mut self.phase {
            Phase::Running(program) if program.pid() == pid && program.runs() => {
                guest.programs_running = guest.programs_running.saturating_sub(1);
                let held = program.ended(exit);
                self.deadline_ns = held.then(|| guest.wake_in(GRACE_NS));
                true
            }
            Phase::Quiescing { pid: sync, began_ns } if *sync == pid => {
                let began_ns = *began_ns;
                self.quiesced(began_ns, true);
                true
            }
            Phase::Running(_)
            | Phase::Quiescing { .. }
            | Phase::Greeting
            | Phase::Requests
            | Phase::Starting(_)
            | Phase::Closing
            | Phase::Parting => false,
        }
    }

    /// Its deadline has passed.
    pub(crate) fn expire(&mut self) {
        self.deadline_ns = None;
        match &mut self.phase {
            Phase::Running(program) => program.expire(),
            Phase::Quiescing { began_ns, .. } => {
                let began_ns = *began_ns;
                self.quiesced(began_ns, false);
            }
            Phase::Parting => self.peer_gone = true,
            Phase::Greeting | Phase::Requests | Phase::Starting(_) | Phase::Closing => {}
        }
    }

    /// Says how a request came out.
    fn answer(&mut self, result: Result<(), Refusal>, what: &str) {
        match result {
            Ok(()) => self.outgoing.push(&FromGuest::Done),
            Err(Refusal { errno, what: Some(what) }) => {
                self.outgoing.push(&FromGuest::Failed { errno: errno.number(), what });
            }
            Err(Refusal { errno, what: None }) => {
                self.outgoing.push(&FromGuest::Failed { errno: errno.number(), what: String::from(what) });
            }
        }
    }

    /// The program is over and delivered.
    fn finish(&mut self, exit: Exit) {
        self.outgoing.push(&FromGuest::Exited(exit));
        self.phase = Phase::Closing;
    }

    /// The host broke the protocol: says so and ends the connection, and a program with it.
    fn violated(&mut self, what: String) {
        self.fail(Errno::PROTO, what);
    }

    /// Says what failed and ends the connection.
    fn fail(&mut self, errno: Errno, what: String) {
        self.outgoing.push(&FromGuest::Failed { errno: errno.number(), what });
        self.phase = Phase::Closing;
    }
}

/// Why a request was not carried out.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// What the kernel said, or would have.
    pub(crate) errno: Errno,
    /// What failed, when that is more than the request's name.
    pub(crate) what: Option<String>,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, what: None }
    }
}

impl Guest {
    /// Whether this process may change what belongs to the whole guest.
    pub(crate) fn permitted(&self) -> Result<(), Refusal> {
        if self.role.owns_guest() {
            return Ok(());
        }
        Err(Refusal {
            errno: Errno::PERM,
            what: Some(String::from("this agent is a service without a guest of its own")),
        })
    }
}
