//! One connection of the host: greeting, then requests or one program.
//!
//! ```text
//!   Greeting ──Hello──▶ Requests ──Exec──▶ Starting ──▶ Running ──finished──▶ Closing ──all sent──▶ Parting ──▶ gone
//!                        │  ▲                              │ host closes: the program's group is killed ──▶ gone
//!      Quiesce, Root,    ▼  │ done, or late                └ frame out of place ──▶ Closing (program killed)
//!      RunHooks, Join    Quiescing, EnteringRoot, Hooks, Registering, Joining
//! ```
//!
//! Readiness is remembered (edge-triggered): a socket is read until it gives less than was asked for, written until it
//! takes less than it was given. Nothing more is read from the host while its last bytes for the program are not
//! written, and nothing from the program while the host has not taken what is there: both sides feel the other's pace,
//! and a connection holds at most one frame in each direction and one read.

mod requests;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use hearth_guest_wire::frame::Decoder;
use hearth_guest_wire::{Exec, Exit, FromGuest, Join, ToGuest, VERSION, VERSION_MIN};

use crate::hooks::Hooks;
use crate::outgoing::Outgoing;
use crate::program::{Program, Stream};
use crate::registrar::RegistrarCall;
use crate::server::Guest;
use crate::sys::{self, Errno, Fd, Happened};
pub(crate) use requests::Refusal;

/// Turns a connection gets before the others get theirs.
const TURNS: u32 = 8;

/// How long the host is left to close a connection that is over.
const PARTING_NS: u64 = 2_000_000_000;

/// Which descriptor of a connection an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The connection itself.
    Socket,
    /// A stream of its program.
    Stream(Stream),
    /// The registrar that the guest is to register with.
    Registrar,
}

/// What a connection is for at the moment.
enum Phase {
    /// Nothing but a Hello is understood.
    Greeting,
    /// Any request.
    Requests,
    /// A sync is under way; the next request waits.
    Quiescing { pid: i32, began_ns: u64 },
    /// A disk is mounted that is to be the root; the next request waits.
    EnteringRoot,
    /// Hooks run; the next request waits.
    Hooks(Box<Hooks>),
    /// The host was asked to register the guest; only its answer is understood.
    Registering(Box<Join>),
    /// A registrar elsewhere was asked; the next request waits.
    Joining(Box<RegistrarCall>),
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
            (Part::Registrar, Phase::Joining(call)) => call.note(happened),
            (
                Part::Stream(_) | Part::Registrar,
                Phase::Greeting
                | Phase::Requests
                | Phase::Quiescing { .. }
                | Phase::EnteringRoot
                | Phase::Hooks(_)
                | Phase::Registering(_)
                | Phase::Joining(_)
                | Phase::Starting(_)
                | Phase::Running(_)
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
            if self.peer_gone && matches!(self.phase, Phase::Starting(_) | Phase::Hooks(_) | Phase::Joining(_)) {
                return Served::Over;
            }
            if let Phase::Joining(call) = &mut self.phase
                && let Some(result) = call.go_on(&mut guest.scratch)
            {
                self.joined(result, guest);
                moved = true;
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
                Phase::Greeting | Phase::Requests | Phase::Registering(_) => true,
                Phase::Running(program) => program.takes_input(),
                Phase::Quiescing { .. }
                | Phase::EnteringRoot
                | Phase::Hooks(_)
                | Phase::Joining(_)
                | Phase::Starting(_)
                | Phase::Closing
                | Phase::Parting => false,
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
            (Phase::Registering(_), ToGuest::Registered { epoch }) => self.registered(Some(epoch), guest),
            (Phase::Registering(_), ToGuest::RegistrationRefused { .. }) => self.registered(None, guest),
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
                | Phase::EnteringRoot
                | Phase::Hooks(_)
                | Phase::Registering(_)
                | Phase::Joining(_)
                | Phase::Starting(_)
                | Phase::Closing
                | Phase::Parting,
                _,
            ) => {
                self.violated(String::from("message out of place"));
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
