//! The loop: everything this program waits for comes through here.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::fmt::Write as _;

use hearth_guest_wire::Shutdown;

use crate::console::ConsoleShell;
use crate::ending::Ending;
use crate::identity::CurrentIdentity;
use crate::link::{Link, Part, Refusal, Served};
use crate::links::Links;
use crate::mounts;
use crate::program::{READ_BYTES, Stream};
use crate::role::{ListenAddress, Role};
use crate::root::{OldRoot, Root};
use crate::sys::{self, Console, Epoll, Errno, Event, Fd, Interest, Running, Signals, Timer};

/// Connections served at once. One for each concurrent exec, some for requests; a set of them is one word.
const LINKS_MAX: usize = 64;

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

const SIGINT: u8 = 2;
const SIGUSR1: u8 = 10;
const SIGUSR2: u8 = 12;
const SIGTERM: u8 = 15;
const SIGCHLD: u8 = 17;

/// What the connections share.
pub(crate) struct Guest {
    /// What this process is to the guest.
    pub(crate) role: Role,
    /// Words that programs inherit.
    pub(crate) environment: Vec<&'static CStr>,
    /// CLOCK_MONOTONIC when this program began.
    pub(crate) started_ns: u64,
    /// What the loop waits for.
    pub(crate) epoll: Epoll,
    /// Room for one read of anything.
    pub(crate) scratch: Box<[u8]>,
    /// Programs that have not ended.
    pub(crate) programs_running: u32,
    /// Connections whose program or hook is to be started, in order, by the base of their tokens.
    pub(crate) starting: VecDeque<u64>,
    /// Who the guest is, once it was told.
    pub(crate) identity: Option<CurrentIdentity>,
    /// Its root file system.
    pub(crate) root: Root,
    /// Children that sync, kept until they are reaped.
    pub(crate) errands: Vec<Running>,
    timer: Timer,
    timer_ns: Option<u64>,
    rest: Rest,
    console: ConsoleShell,
    ending: Option<Ending>,
}

/// What PID 1 has yet to do for the guest when nothing else is to be done.
enum Rest {
    /// A step of the mounts, then all the others.
    Mounts(mounts::Rest),
    /// The image's links.
    Links(Links),
    /// The files of a root that is none any more.
    OldRoot(OldRoot),
    /// Nothing.
    Done,
}

impl Guest {
    /// Wakes the loop in that many nanoseconds, and says when that is.
    pub(crate) fn wake_in(&mut self, wait_ns: u64) -> u64 {
        let at_ns = sys::monotonic_ns().saturating_add(wait_ns);
        self.wake_at(at_ns);
        at_ns
    }

    /// Wakes the loop in that many milliseconds, and says when that is.
    pub(crate) fn wake_in_ms(&mut self, wait_ms: u32) -> u64 {
        self.wake_in(u64::from(wait_ms) * 1_000_000)
    }

    fn wake_at(&mut self, at_ns: u64) {
        if self.timer_ns.is_none_or(|set| at_ns < set) {
            // A timer descriptor that exists takes any time.
            let _ = self.timer.set(at_ns);
            self.timer_ns = Some(at_ns);
        }
    }

    /// Whether nothing is left to do.
    fn is_at_rest(&self) -> bool {
        matches!(self.rest, Rest::Done) && self.identity.as_ref().is_none_or(CurrentIdentity::is_recorded)
    }

    /// One step of what is left to do.
    fn do_rest(&mut self) {
        match &mut self.rest {
            Rest::Mounts(step) => {
                self.rest = step.step().map_or_else(|| Rest::Links(Links::read()), Rest::Mounts);
            }
            Rest::Links(links) => {
                if !links.make_one() {
                    self.rest_is_done();
                }
            }
            Rest::OldRoot(old) => {
                if !old.remove_one() {
                    self.rest_is_done();
                }
            }
            Rest::Done => self.record_identity(),
        }
    }

    fn rest_is_done(&mut self) {
        self.rest = Rest::Done;
        // A shell may have it: the root changed after somebody had typed.
        if self.console == ConsoleShell::Off {
            self.console.wait(&self.epoll, CONSOLE);
        }
    }

    /// The guest has another root. The image's links are of the one before.
    fn root_changed(&mut self, old: OldRoot) {
        self.rest = Rest::OldRoot(old);
    }

    /// Does what is left of the mounts.
    pub(crate) fn finish_mounts(&mut self) {
        while matches!(self.rest, Rest::Mounts(_)) {
            self.do_rest();
        }
    }

    fn record_identity(&mut self) {
        if let Some(identity) = &mut self.identity {
            identity.record();
        }
    }

    /// Does what must be there before this program is started.
    pub(crate) fn prepare_for(&mut self, program: &[u8]) {
        self.finish_mounts();
        self.record_identity();
        if let Rest::Links(links) = &mut self.rest {
            links.make_for(program);
        }
    }

    /// Begins to end the guest.
    pub(crate) fn end(&mut self, how: Shutdown) -> Result<(), Errno> {
        match self.role {
            Role::FirstProcess => {
                if self.ending.is_none() {
                    self.console.hang_up();
                    self.ending = Some(Ending::new(how));
                }
                Ok(())
            }
            Role::GuestService => crate::ending::ask_first_process(how),
            Role::Service => Err(Errno::PERM),
        }
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Signals,
    Timer,
    Console,
    Link { slot: usize, generation: u32, part: Part },
}

/// Low byte: which source. Next byte: the slot. High half: how often the slot was used before, so that an event of a
/// connection that is gone is not taken for one of its successor.
const LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const TIMER: u64 = 3;
const SOCKET: u64 = 4;
const INPUT: u64 = 5;
const OUTPUT: u64 = 6;
const ERRORS: u64 = 7;
const CONSOLE: u64 = 8;
const REGISTRAR: u64 = 9;

fn link_base(slot: usize, generation: u32) -> u64 {
    u64::from(generation) << 32 | (slot as u64) << 8
}

fn link_token(base: u64, part: Part) -> u64 {
    base | match part {
        Part::Socket => SOCKET,
        Part::Registrar => REGISTRAR,
        Part::Stream(Stream::Input) => INPUT,
        Part::Stream(Stream::Output) => OUTPUT,
        Part::Stream(Stream::Errors) => ERRORS,
    }
}

fn source(token: u64) -> Option<Source> {
    let [kind, slot, _, _, generation @ ..] = token.to_le_bytes();
    let part = match u64::from(kind) {
        LISTENER => return Some(Source::Listener),
        SIGNALS => return Some(Source::Signals),
        TIMER => return Some(Source::Timer),
        CONSOLE => return Some(Source::Console),
        SOCKET => Part::Socket,
        REGISTRAR => Part::Registrar,
        INPUT => Part::Stream(Stream::Input),
        OUTPUT => Part::Stream(Stream::Output),
        ERRORS => Part::Stream(Stream::Errors),
        _ => return None,
    };
    Some(Source::Link { slot: usize::from(slot), generation: u32::from_le_bytes(generation), part })
}

/// A place for a connection.
#[derive(Default)]
struct Slot {
    link: Option<Box<Link>>,
    generation: u32,
}

/// The loop and all it owns.
pub(crate) struct Server {
    guest: Guest,
    listener: Fd,
    signals: Signals,
    slots: Vec<Slot>,
    /// Slots to serve, one bit each.
    due: u64,
}

impl Server {
    /// Listens. From here on the kernel takes connections.
    pub(crate) fn new(
        role: Role,
        address: &ListenAddress,
        environment: &[&'static CStr],
        started_ns: u64,
    ) -> Result<Self, Errno> {
        let listener = match address {
            ListenAddress::Vsock(port) => sys::listen_vsock(*port)?,
            ListenAddress::Unix(path) => sys::listen_unix(path)?,
        };
        let epoll = Epoll::new()?;
        let signals = Signals::new(&[SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2])?;
        let timer = Timer::new()?;
        epoll.add(&listener, LISTENER, Interest::Level)?;
        epoll.add(signals.fd(), SIGNALS, Interest::Level)?;
        epoll.add(timer.fd(), TIMER, Interest::Level)?;
        let guest = Guest {
            role,
            // Words without a value cannot be told from the kernel's own flags.
            environment: environment.iter().copied().filter(|word| word.to_bytes().contains(&b'=')).collect(),
            started_ns,
            epoll,
            scratch: vec![0; READ_BYTES].into_boxed_slice(),
            programs_running: 0,
            starting: VecDeque::new(),
            identity: None,
            root: Root::InMemory,
            errands: Vec::new(),
            timer,
            timer_ns: None,
            rest: if role == Role::FirstProcess { Rest::Mounts(mounts::Rest::FIRST) } else { Rest::Done },
            console: ConsoleShell::Off,
            ending: None,
        };
        let slots = (0..LINKS_MAX).map(|_| Slot::default()).collect();
        Ok(Self { guest, listener, signals, slots, due: 0 })
    }

    /// Serves until a service is told to stop, or the guest ends.
    pub(crate) fn serve(&mut self) -> Result<(), Errno> {
        let mut events = [Event::EMPTY; EVENTS];
        loop {
            let busy = self.due != 0 || !self.guest.starting.is_empty();
            let happened = self.guest.epoll.wait(&mut events, busy || !self.guest.is_at_rest())?;
            if happened.is_empty() && !busy {
                self.guest.do_rest();
                continue;
            }
            // Streams before signals: a program's last words are noted before its end is.
            let (mut signalled, mut timed, mut called) = (false, false, false);
            for event in happened {
                match source(event.token()) {
                    Some(Source::Listener) => called = true,
                    Some(Source::Signals) => signalled = true,
                    Some(Source::Timer) => timed = true,
                    Some(Source::Console) => self.guest.console.start(&self.guest.epoll, &self.guest.environment),
                    Some(Source::Link { slot, generation, part }) => {
                        if let Some(place) = self.slots.get_mut(slot)
                            && place.generation == generation
                            && let Some(link) = &mut place.link
                        {
                            link.note(part, event.happened());
                            self.due |= 1 << slot;
                        }
                    }
                    None => {}
                }
            }
            if signalled && self.take_signals() {
                return Ok(());
            }
            if timed {
                self.take_time();
            }
            self.serve_links();
            if called {
                self.take_connections();
            }
            self.start_one_program();
            self.go_on_ending();
        }
    }

    fn serve_links(&mut self) {
        let mut due = core::mem::take(&mut self.due);
        while due != 0 {
            let slot = due.trailing_zeros();
            due &= due - 1;
            let Some(place) = self.slots.get_mut(slot as usize) else { continue };
            let Some(link) = &mut place.link else { continue };
            match link.serve(&mut self.guest) {
                Served::Idle => {}
                Served::Busy => self.due |= 1 << slot,
                Served::Over => {
                    if link.runs_program() {
                        self.guest.programs_running = self.guest.programs_running.saturating_sub(1);
                    }
                    place.link = None;
                    place.generation = place.generation.wrapping_add(1);
                }
            }
        }
    }

    /// Starts one program: a start takes long, and whoever greets meanwhile is answered before the next.
    fn start_one_program(&mut self) {
        let Some(base) = self.guest.starting.pop_front() else { return };
        if let Some(Source::Link { slot, generation, .. }) = source(link_token(base, Part::Socket))
            && let Some(place) = self.slots.get_mut(slot)
            && place.generation == generation
            && let Some(link) = &mut place.link
        {
            link.start(&mut self.guest);
            self.due |= 1 << slot;
        }
    }

    fn take_connections(&mut self) {
        // Those that are left when the bound is met are told again.
        for _ in 0..LINKS_MAX {
            let Ok(socket) = sys::accept(&self.listener) else { return };
            self.take_connection(socket);
        }
    }

    fn take_connection(&mut self, socket: Fd) {
        let free = self.slots.iter_mut().enumerate().find(|(_, place)| place.link.is_none());
        let Some((slot, place)) = free else {
            Link::new(socket, link_token, 0).refuse(Errno::MFILE, "too many connections");
            return;
        };
        let base = link_base(slot, place.generation);
        let link = Link::new(socket, link_token, base);
        match self.guest.epoll.add(link.socket(), link_token(base, Part::Socket), Interest::Edges) {
            Ok(()) => place.link = Some(Box::new(link)),
            Err(errno) => link.refuse(errno, "listen to the connection"),
        }
    }

    /// Reaps, and takes what a person or PID 1's other callers ask for; says whether this program is to stop.
    fn take_signals(&mut self) -> bool {
        let came = self.signals.take();
        let has = |signal: u8| came & 1 << signal != 0;
        if has(SIGCHLD) {
            self.take_children();
        }
        if self.guest.role != Role::FirstProcess {
            return has(SIGTERM) || has(SIGINT);
        }
        // What busybox's reboot, poweroff and halt send to PID 1. A halted machine is of no use to its host: it goes off.
        let how = if has(SIGTERM) {
            Some(Shutdown::Reboot)
        } else if has(SIGUSR1) || has(SIGUSR2) {
            Some(Shutdown::PowerOff)
        } else {
            None
        };
        if let Some(how) = how
            && let Err(errno) = self.guest.end(how)
        {
            let _ = writeln!(Console, "hearth-init: end the guest: errno {}", errno.number());
        }
        false
    }

    /// Reaps what ended; says whether no child is left.
    fn take_children(&mut self) -> bool {
        loop {
            let child = match sys::reap() {
                Ok(Some(child)) => child,
                Ok(None) => return false,
                Err(Errno::INTR) => continue,
                Err(_) => return true,
            };
            self.guest.errands.retain(|errand| errand.pid() != child.pid);
            if let Some(entered) = self.guest.root.reaped(child.pid, child.exit) {
                self.answer_for_root(entered);
                continue;
            }
            if self.guest.console.reaped(child.pid) {
                self.guest.console.wait(&self.guest.epoll, CONSOLE);
                continue;
            }
            for (slot, place) in self.slots.iter_mut().enumerate() {
                if let Some(link) = &mut place.link
                    && link.reaped(child.pid, child.exit, &mut self.guest)
                {
                    self.due |= 1 << slot;
                    break;
                }
            }
        }
    }

    /// The root was changed, or not: says so to those who asked for it.
    fn answer_for_root(&mut self, entered: Result<OldRoot, Refusal>) {
        let entered = entered.map(|old| self.guest.root_changed(old));
        for (slot, place) in self.slots.iter_mut().enumerate() {
            if let Some(link) = &mut place.link
                && link.root_entered(&entered)
            {
                self.due |= 1 << slot;
            }
        }
    }

    /// The timer went off: those whose time has come, and the next time.
    fn take_time(&mut self) {
        self.guest.timer.take();
        self.guest.timer_ns = None;
        let now_ns = sys::monotonic_ns();
        let mut next_ns = self.guest.ending.as_ref().map(Ending::deadline_ns);
        for (slot, place) in self.slots.iter_mut().enumerate() {
            let Some(link) = &mut place.link else { continue };
            match link.deadline_ns() {
                Some(at_ns) if at_ns <= now_ns => {
                    link.expire(&mut self.guest);
                    self.due |= 1 << slot;
                }
                Some(at_ns) => next_ns = Some(next_ns.map_or(at_ns, |next: u64| next.min(at_ns))),
                None => {}
            }
        }
        if let Some(at_ns) = next_ns {
            self.guest.wake_at(at_ns);
        }
    }

    /// The guest is being ended: the next step, if its time has come.
    fn go_on_ending(&mut self) {
        if self.guest.ending.is_none() {
            return;
        }
        let alone = self.take_children();
        if let Some(ending) = &mut self.guest.ending {
            let at_ns = ending.go_on(alone, sys::monotonic_ns(), &mut self.guest.errands);
            self.guest.wake_at(at_ns);
        }
    }
}
