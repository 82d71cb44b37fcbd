//! What the host may ask for, and how it is answered: at once, or by way of a phase of its own.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::mem;

use hearth_guest_wire::{Exit, FromGuest, JOIN_TEXT_BYTES_MAX, Join, ToGuest};

use super::{Link, Part, Phase};
use crate::hooks::Hooks;
use crate::identity;
use crate::net::{self, hardware};
use crate::program::{GRACE_NS, Program};
use crate::registrar::RegistrarCall;
use crate::root::Entered;
use crate::secrets;
use crate::server::Guest;
use crate::stats;
use crate::sys::{self, Errand, Errno};

/// Errands (syncs) that may be under way; a later one waits for a disk that does not answer the earlier ones either.
const ERRANDS_MAX: usize = 8;

/// What was asked for, for a refusal that does not say.
const ENTER_ROOT: &str = "have the root on a disk";

/// What a guest says that does not know who it is.
const NOBODY: &str = "this guest was given no identity";

impl Link {
    /// One request of the host.
    pub(super) fn request(&mut self, message: ToGuest, guest: &mut Guest) {
        match message {
            ToGuest::Exec(exec) => {
                self.phase = Phase::Starting(Box::new(exec));
                guest.starting.push_back(self.token_base);
            }
            ToGuest::Identity(identity) => {
                guest.finish_mounts();
                let applied = guest.permitted().and_then(|()| identity::apply(identity, &mut guest.identity));
                self.answer(applied, "apply the identity");
            }
            ToGuest::Network(interfaces) => {
                guest.finish_mounts();
                let applied = guest.permitted().and_then(|()| net::apply(&interfaces));
                self.answer(applied, "apply the network");
            }
            ToGuest::Hardware(changes) => {
                let applied = guest.permitted().and_then(|()| hardware::change(&changes));
                self.answer(applied, "change hardware addresses");
            }
            ToGuest::SetClock { unix_ns } => {
                let applied = guest.permitted().and_then(|()| sys::set_wall_ns(unix_ns).map_err(From::from));
                self.answer(applied, "set the clock");
            }
            ToGuest::Quiesce { timeout_ms } => self.quiesce(timeout_ms, guest),
            // A quiesce holds nothing back (see `guest/README.md`), so there is nothing to let go.
            ToGuest::Thaw => self.outgoing.push(&FromGuest::Done),
            ToGuest::Root { disk, read_only } => {
                guest.finish_mounts();
                match guest.root.ask(guest.role, &disk, read_only) {
                    Ok(Entered::Later) => self.phase = Phase::EnteringRoot,
                    Ok(Entered::Now) => self.answer(Ok(()), ENTER_ROOT),
                    Err(refusal) => self.answer(Err(refusal), ENTER_ROOT),
                }
            }
            ToGuest::Secrets => {
                guest.finish_mounts();
                match secrets::names() {
                    Ok(names) => self.outgoing.push(&FromGuest::Secrets(names)),
                    Err(refusal) => self.answer(Err(refusal), "look for secrets"),
                }
            }
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
            ToGuest::RunHooks { timeout_ms } => {
                let begun = self.run_hooks(timeout_ms, guest);
                self.refuse_request(begun, "run the hooks");
            }
            ToGuest::Join(join) => {
                let begun = self.join(join, guest);
                self.refuse_request(begun, "join the cluster");
            }
            ToGuest::Hello { .. }
            | ToGuest::Registered { .. }
            | ToGuest::RegistrationRefused { .. }
            | ToGuest::Stdin(_)
            | ToGuest::StdinClosed
            | ToGuest::Signal { .. }
            | ToGuest::Resize { .. } => self.violated(String::from("message out of place")),
        }
    }

    /// Starts the program or hook it was asked for: the loop does this one connection at a time.
    pub(crate) fn start(&mut self, guest: &mut Guest) {
        match &mut self.phase {
            Phase::Starting(exec) => {
                let exec = mem::take(&mut **exec);
                self.start_program(exec, guest);
            }
            Phase::Hooks(hooks) => {
                if let Some(path) = hooks.next() {
                    guest.prepare_for(path.to_bytes());
                }
                match hooks.start_next(&guest.environment) {
                    Some(pid) => guest.queue(pid),
                    None => self.hooks_ran(),
                }
            }
            Phase::Greeting
            | Phase::Requests
            | Phase::Quiescing { .. }
            | Phase::EnteringRoot
            | Phase::Registering(_)
            | Phase::Joining(_)
            | Phase::Running(_)
            | Phase::Closing
            | Phase::Parting => {}
        }
    }

    fn start_program(&mut self, exec: hearth_guest_wire::Exec, guest: &mut Guest) {
        guest.prepare_for(exec.argv.first().map(String::as_bytes).unwrap_or_default());
        let timeout_ms = exec.timeout_ms;
        let (token, base) = (self.token, self.token_base);
        let watch = |stream| token(base, Part::Stream(stream));
        match Program::start(exec, &guest.environment, &guest.epoll, watch) {
            Ok(program) => {
                guest.queue(program.pid());
                if timeout_ms > 0 {
                    self.deadline_ns = Some(guest.wake_in_ms(timeout_ms));
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
        self.back_to_requests();
    }

    /// The root was changed, or not: says whether that was this connection's question.
    pub(crate) fn root_entered(&mut self, entered: &Result<(), Refusal>) -> bool {
        let asked = matches!(self.phase, Phase::EnteringRoot);
        if asked {
            self.answer(entered.clone(), ENTER_ROOT);
            self.back_to_requests();
        }
        asked
    }

    fn run_hooks(&mut self, timeout_ms: u32, guest: &mut Guest) -> Result<(), Refusal> {
        guest.finish_mounts();
        let identity = guest.identity.as_ref().ok_or_else(nobody)?;
        match Hooks::find(identity, &mut guest.scratch)? {
            None => self.outgoing.push(&FromGuest::HooksRan(hearth_guest_wire::HooksRan::default())),
            Some(hooks) => {
                self.phase = Phase::Hooks(Box::new(hooks));
                self.deadline_ns = Some(guest.wake_in_ms(timeout_ms));
                guest.starting.push_back(self.token_base);
            }
        }
        Ok(())
    }

    fn hooks_ran(&mut self) {
        if let Phase::Hooks(hooks) = &mut self.phase {
            self.outgoing.push(&FromGuest::HooksRan(hooks.take_outcome()));
            self.back_to_requests();
        }
    }

    fn join(&mut self, join: Join, guest: &mut Guest) -> Result<(), Refusal> {
        let identity = guest.identity.as_ref().ok_or_else(nobody)?;
        if [&join.cluster_id, &join.executor_id, &join.token].iter().any(|text| text.len() > JOIN_TEXT_BYTES_MAX) {
            let what = Some(format!("a text of more than {JOIN_TEXT_BYTES_MAX} bytes"));
            return Err(Refusal { errno: Errno::INVAL, what });
        }
        let registration = identity.registration(&join);
        let Some(endpoint) = join.endpoint else {
            self.outgoing.push(&FromGuest::Register(registration));
            self.phase = Phase::Registering(Box::new(join));
            return Ok(());
        };
        if let Some(epoch) = identity.epoch_of(&join) {
            self.outgoing.push(&FromGuest::Joined { epoch });
            return Ok(());
        }
        let timeout_ms = join.timeout_ms;
        let token = (self.token)(self.token_base, Part::Registrar);
        let call = RegistrarCall::place(endpoint, join, &registration, &guest.epoll, token)?;
        self.phase = Phase::Joining(call);
        self.deadline_ns = Some(guest.wake_in_ms(timeout_ms));
        Ok(())
    }

    /// The registrar elsewhere has answered, or will not.
    pub(super) fn joined(&mut self, result: Result<u64, Refusal>, guest: &mut Guest) {
        let phase = mem::replace(&mut self.phase, Phase::Requests);
        self.deadline_ns = None;
        match result {
            Ok(epoch) => {
                if let Phase::Joining(call) = phase {
                    guest.registered(call.into_join(), epoch);
                }
                self.outgoing.push(&FromGuest::Joined { epoch });
            }
            Err(refusal) => self.refuse_request(Err(refusal), "join the cluster"),
        }
    }

    /// The host, which is the registrar, has taken the guest or not.
    pub(super) fn registered(&mut self, epoch: Option<u64>, guest: &mut Guest) {
        let Phase::Registering(join) = mem::replace(&mut self.phase, Phase::Requests) else { return };
        if let Some(epoch) = epoch {
            guest.registered(*join, epoch);
        }
        self.outgoing.push(&FromGuest::Done);
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
            Phase::Hooks(hooks) => {
                let reaped = hooks.reaped(pid, exit);
                if reaped {
                    guest.starting.push_back(self.token_base);
                }
                reaped
            }
            Phase::Running(_)
            | Phase::Quiescing { .. }
            | Phase::EnteringRoot
            | Phase::Registering(_)
            | Phase::Joining(_)
            | Phase::Greeting
            | Phase::Requests
            | Phase::Starting(_)
            | Phase::Closing
            | Phase::Parting => false,
        }
    }

    /// Its deadline has passed.
    pub(crate) fn expire(&mut self, guest: &mut Guest) {
        self.deadline_ns = None;
        match &mut self.phase {
            Phase::Running(program) => program.expire(),
            Phase::Quiescing { began_ns, .. } => {
                let began_ns = *began_ns;
                self.quiesced(began_ns, false);
            }
            Phase::Hooks(hooks) => {
                hooks.expire();
                self.hooks_ran();
            }
            Phase::Joining(_) => {
                let what = Some(String::from("the registrar did not answer in time"));
                self.joined(Err(Refusal { errno: Errno::TIMEDOUT, what }), guest);
            }
            Phase::Parting => self.peer_gone = true,
            Phase::Greeting
            | Phase::Requests
            | Phase::EnteringRoot
            | Phase::Registering(_)
            | Phase::Starting(_)
            | Phase::Closing => {}
        }
    }

    /// What was asked for is over.
    fn back_to_requests(&mut self) {
        self.deadline_ns = None;
        self.phase = Phase::Requests;
    }

    /// Says how a request came out.
    fn answer(&mut self, result: Result<(), Refusal>, what: &str) {
        match result {
            Ok(()) => self.outgoing.push(&FromGuest::Done),
            Err(refusal) => self.refuse_request(Err(refusal), what),
        }
    }

    /// Says that a request cannot be carried out, if so; otherwise its answer is given, or comes later.
    fn refuse_request(&mut self, result: Result<(), Refusal>, what: &str) {
        if let Err(Refusal { errno, what: known }) = result {
            let what = known.unwrap_or_else(|| String::from(what));
            self.outgoing.push(&FromGuest::Failed { errno: errno.number(), what });
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, Clone)]
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

fn nobody() -> Refusal {
    Refusal { errno: Errno::NODATA, what: Some(String::from(NOBODY)) }
}

impl Guest {
    /// Whether this process may change what belongs to the whole guest.
    fn permitted(&self) -> Result<(), Refusal> {
        if self.role.owns_guest() {
            return Ok(());
        }
        Err(Refusal {
            errno: Errno::PERM,
            what: Some(String::from("this agent is a service without a guest of its own")),
        })
    }

    fn registered(&mut self, join: Join, epoch: u64) {
        if let Some(identity) = &mut self.identity {
            identity.registered(join, epoch);
        }
    }

    /// Gives a program that was started the priority of any program.
    fn queue(&self, pid: i32) {
        if self.role.owns_guest() {
            sys::queue_group(pid);
        }
    }
}
