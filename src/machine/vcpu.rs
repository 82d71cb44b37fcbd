//! One thread per vCPU: it alone runs the vCPU and reads or writes its state; its owner sends commands.
//!
//! ```text
//!            Run               Pause, kick
//!  Paused ─────────▶ Running ───────────────▶ Paused
//!                      │ an event that ends the guest's run
//!                      ▼
//!                   Finished (answers commands, runs no more)      Stop: the thread ends, from any state
//! ```
//! The owner sends one command and waits for its answer before it sends the next, so both channels hold one message.
//! The exception is a rest, which is not answered: the command after it waits until it was taken, which the kick sees to.
//! A running vCPU looks for commands when KVM_RUN is interrupted; the kick makes sure that it is. Before a vCPU counts
//! as paused, a port or memory access the guest was in the middle of is completed: KVM keeps its other half until the
//! next KVM_RUN, and state read before that would repeat or lose the access.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuExit;

use super::bus::{Access, Bus};
use super::counters::Counters;
use super::events::{EventSender, MachineEvent};
use super::exit::{Exit, InternalError, VcpuFailure, sort};
use super::vcpu_saved::{self, MsrIndices, VcpuV1};
use crate::clock::{Clock, Monotonic};
use crate::sys::kvm::{BoundVcpu, CallError, Vcpu};
use crate::sys::signal;
use crate::sys::thread::{self, ThreadClass};

/// Most parts of one pending access: an instruction touches at most two pages of two operands in 8-byte pieces of 64
/// bytes; far above that, and a bound on what a guest can make the pause take.
const PENDING_PARTS_MAX: u32 = 64;

/// What all vCPU threads of a machine share.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) ports: Bus,
    pub(super) mmio: Bus,
    pub(super) events: EventSender,
    pub(super) counters: Arc<Counters>,
    pub(super) clock: SharedClock,
    /// When vCPU 0 entered guest mode for the first time in this process.
    pub(super) first_entry: OnceLock<Monotonic>,
}

/// The clock a machine was given.
#[derive(Clone)]
pub(super) struct SharedClock(pub(super) Arc<dyn Clock>);

impl std::fmt::Debug for SharedClock {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("SharedClock")
    }
}

/// A vCPU's TSC as it was when the vCPU paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PausedTsc {
    /// What is added to the host's TSC to give the guest's.
    pub(super) offset: u64,
    /// Its frequency.
    pub(super) khz: u32,
}

/// How a vCPU's clocks change as it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RunClock {
    /// The TSC offset to go on with, if it may change.
    pub(super) tsc_offset: Option<u64>,
    /// The vCPU's state came from saved sections and it has not run since.
    pub(super) restored: bool,
}

enum Command {
    Run(RunClock),
    Pause,
    Save(MsrIndices),
    /// Run no guest for this long; not answered.
    Rest(Duration),
    Stop,
}

enum Answer {
    Running,
    Paused(PausedTsc),
    Failed(CallError),
    Saved(Box<VcpuV1>),
}

/// Why a vCPU did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskVcpuError {
    /// Its thread has ended.
    #[error("vCPU {vcpu}: its thread has ended")]
    Gone {
        /// Which one.
        vcpu: u8,
    },
    /// It could not be kicked.
    #[error("vCPU {vcpu}: kick its thread")]
    Kick {
        /// Which one.
        vcpu: u8,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A KVM call failed.
    #[error("vCPU {vcpu}")]
    Call {
        /// Which one.
        vcpu: u8,
        /// The call.
        #[source]
        source: CallError,
    },
}

/// The owner's side of a vCPU thread. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct VcpuThread {
    index: u8,
    commands: SyncSender<Command>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread; the vCPU is paused.
    pub(super) fn start(index: u8, vcpu: Vcpu, around: Arc<Surroundings>) -> io::Result<Self> {
        signal::install()?;
        let (commands, inbox) = sync_channel(1);
        let (outbox, answers) = sync_channel(1);
        let thread = thread::start(ThreadClass::Vcpu, format!("vcpu{index}"), move || {
            // A blocked kick would leave the owner waiting for ever; the thread ends instead and says so by its absence.
            if signal::unblock().is_ok() {
                let bound = vcpu.bind();
                Runner { index, bound, pending: false, around, inbox, outbox }.live();
            }
        })?;
        Ok(Self { index, commands, answers, thread: Some(thread) })
    }

    /// Tells the vCPU to run; [`VcpuThread::wait_running`] waits for its answer.
    pub(super) fn begin_run(&self, clock: RunClock) -> Result<(), AskVcpuError> {
        self.send(Command::Run(clock))
    }

    /// Tells the vCPU to pause and kicks it.
    pub(super) fn begin_pause(&self) -> Result<(), AskVcpuError> {
        self.send(Command::Pause)?;
        self.kick()
    }

    /// Waits until what [`VcpuThread::begin_run`] began is done.
    pub(super) fn wait_running(&self) -> Result<(), AskVcpuError> {
        match self.answer()? {
            Answer::Running => Ok(()),
            Answer::Paused(_) | Answer::Saved(_) | Answer::Failed(_) => Err(self.gone()),
        }
    }

    /// Waits until what [`VcpuThread::begin_pause`] began is done.
    pub(super) fn wait_paused(&self) -> Result<PausedTsc, AskVcpuError> {
        match self.answer()? {
            Answer::Paused(tsc) => Ok(tsc),
            Answer::Running | Answer::Saved(_) | Answer::Failed(_) => Err(self.gone()),
        }
    }

    /// Has a running vCPU rest once. One that was told something else already has no time for it.
    pub(super) fn rest(&self, time: Duration) {
        if self.commands.try_send(Command::Rest(time)).is_ok() {
            // Not resting is what happens if this fails.
            let _ = self.kick();
        }
    }

    /// The vCPU's state; only while it is paused.
    pub(super) fn save(&self, indices: &MsrIndices) -> Result<VcpuV1, AskVcpuError> {
        self.send(Command::Save(indices.clone()))?;
        match self.answer()? {
            Answer::Saved(state) => Ok(*state),
            Answer::Running | Answer::Paused(_) | Answer::Failed(_) => Err(self.gone()),
        }
    }

    /// Begins something on all vCPUs before any is waited for, then waits for all that began, so that no answer stays
    /// unread; the first failure is told.
    pub(super) fn all<T>(
        vcpus: &[Self],
        begin: impl Fn(&Self) -> Result<(), AskVcpuError>,
        wait: impl Fn(&Self) -> Result<T, AskVcpuError>,
    ) -> Result<Vec<T>, AskVcpuError> {
        let begun: Vec<_> = vcpus.iter().map(|vcpu| (vcpu, begin(vcpu))).collect();
        let done: Vec<_> = begun.into_iter().map(|(vcpu, begun)| begun.and_then(|()| wait(vcpu))).collect();
        done.into_iter().collect()
    }

    fn answer(&self) -> Result<Answer, AskVcpuError> {
        match self.answers.recv() {
            Ok(Answer::Failed(source)) => Err(AskVcpuError::Call { vcpu: self.index, source }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.gone()),
        }
    }

    fn gone(&self) -> AskVcpuError {
        AskVcpuError::Gone { vcpu: self.index }
    }

    fn send(&self, command: Command) -> Result<(), AskVcpuError> {
        self.commands.send(command).map_err(|_| self.gone())
    }

    fn kick(&self) -> Result<(), AskVcpuError> {
        let kicked = self.thread.as_ref().map_or(Ok(()), signal::kick);
        kicked.map_err(|source| AskVcpuError::Kick { vcpu: self.index, source })
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        // Nobody listens any more: a thread that is about to answer must not wait for room.
        self.answers = sync_channel(0).1;
        // A thread that is gone needs neither.
        let _ = self.send(Command::Stop);
        let _ = self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunState {
    Running,
    Paused,
    Finished,
    Gone,
}

enum Step {
    /// A device took the access; its other half is still in KVM.
    Accessed,
    /// Time to look for commands.
    Interrupted,
    /// The guest cannot go on.
    Ended(MachineEvent),
}

/// The thread's side.
struct Runner {
    index: u8,
    bound: BoundVcpu,
    /// An access waits for its second half.
    pending: bool,
    around: Arc<Surroundings>,
    inbox: Receiver<Command>,
    outbox: SyncSender<Answer>,
}

impl Runner {
    fn live(mut self) {
        let mut state = RunState::Paused;
        while state != RunState::Gone {
            state = match state {
                RunState::Running => self.run(),
                RunState::Paused | RunState::Finished => match self.inbox.recv() {
                    Ok(command) => self.obey(state, command),
                    Err(_) => RunState::Gone,
                },
                RunState::Gone => RunState::Gone,
            };
        }
    }

    /// Runs the guest until a command or the end of its run changes the state.
    fn run(&mut self) -> RunState {
        loop {
            match self.step() {
                Step::Accessed if self.around.events.ended() => return RunState::Finished,
                Step::Accessed => {}
                Step::Interrupted => {
                    // Cleared before looking: a kick after this is seen by the next KVM_RUN.
                    self.bound.clear_immediate_exit();
                    match self.inbox.try_recv() {
                        Ok(Command::Rest(time)) => match self.inbox.recv_timeout(time) {
                            Ok(command) => return self.obey(RunState::Running, command),
                            Err(RecvTimeoutError::Timeout) => {}
                            Err(RecvTimeoutError::Disconnected) => return RunState::Gone,
                        },
                        Ok(command) => return self.obey(RunState::Running, command),
                        Err(TryRecvError::Empty) if self.around.events.ended() => return RunState::Finished,
                        Err(TryRecvError::Empty) => {}
                        Err(TryRecvError::Disconnected) => return RunState::Gone,
                    }
                }
                Step::Ended(event) => {
                    self.around.events.send(event);
                    return RunState::Finished;
                }
            }
        }
    }

    fn obey(&mut self, state: RunState, command: Command) -> RunState {
        let (answer, next) = match (command, state) {
            (Command::Stop, _) => return RunState::Gone,
            (Command::Rest(_), state) => return state,
            (Command::Run(clock), RunState::Paused) => match self.begin(clock) {
                Ok(()) => (Answer::Running, RunState::Running),
                Err(error) => (Answer::Failed(error), RunState::Paused),
            },
            // A finished vCPU takes part in everything but running.
            (Command::Run(_), state) => (Answer::Running, state),
            (Command::Pause, state) => {
                let still = self.complete_pending();
                let next = if state == RunState::Finished || !still { RunState::Finished } else { RunState::Paused };
                (self.paused_tsc().map_or_else(Answer::Failed, Answer::Paused), next)
            }
            (Command::Save(indices), state) => match vcpu_saved::save(self.bound.vcpu(), &indices) {
                Ok(saved) => (Answer::Saved(Box::new(saved)), state),
                Err(error) => (Answer::Failed(error), state),
            },
        };
        // The owner may be gone already, then the next receive says so.
        let _ = self.outbox.send(answer);
        next
    }

    /// The last things before the guest goes on.
    fn begin(&mut self, clock: RunClock) -> Result<(), CallError> {
        let vcpu = self.bound.vcpu();
        vcpu_saved::set_clocks(vcpu, clock.tsc_offset, clock.restored)?;
        // Tells the guest's watchdogs that it stood still. Refused (EINVAL) when the guest uses no kvmclock, which is
        // not an error. Before going on, not at the pause: the mark is part of the guest's memory by then.
        let _ = vcpu.fd().kvmclock_ctrl();
        if self.index == 0 {
            self.around.first_entry.get_or_init(|| self.around.clock.0.monotonic());
        }
        self.bound.clear_immediate_exit();
        Ok(())
    }

    fn paused_tsc(&self) -> Result<PausedTsc, CallError> {
        let vcpu = self.bound.vcpu();
        let khz = vcpu.fd().get_tsc_khz().map_err(CallError::of("KVM_GET_TSC_KHZ"))?;
        Ok(PausedTsc { offset: vcpu.tsc_offset()?, khz })
    }

    /// Lets KVM finish an access whose device half is done. False when the guest's run ended on the way.
    fn complete_pending(&mut self) -> bool {
        for _ in 0..PENDING_PARTS_MAX {
            if !self.pending {
                return true;
            }
            self.bound.request_immediate_exit();
            let step = self.step();
            self.bound.clear_immediate_exit();
            if let Step::Ended(event) = step {
                self.around.events.send(event);
                return false;
            }
        }
        let failure = VcpuFailure::PendingAccess;
        self.around.events.send(MachineEvent::VcpuFailed { vcpu: self.index, failure });
        false
    }

    /// One entry into guest mode and what it came back for.
    fn step(&mut self) -> Step {
        let around = &*self.around;
        around.counters.exits.add();
        let exit = match self.bound.run() {
            Ok((VcpuExit::IoIn(port, data), detail)) => {
                for operand in data.chunks_mut(detail.operand_bytes.max(1)) {
                    count(&around.counters.unknown_ports, around.ports.read(u64::from(port), operand));
                }
                self.pending = true;
                return Step::Accessed;
            }
            Ok((VcpuExit::IoOut(port, data), detail)) => {
                for operand in data.chunks(detail.operand_bytes.max(1)) {
                    count(&around.counters.unknown_ports, around.ports.write(u64::from(port), operand));
                }
                self.pending = true;
                return Step::Accessed;
            }
            Ok((VcpuExit::MmioRead(address, data), _)) => {
                count(&around.counters.unknown_mmio, around.mmio.read(address, data));
                self.pending = true;
                return Step::Accessed;
            }
            Ok((VcpuExit::MmioWrite(address, data), _)) => {
                count(&around.counters.unknown_mmio, around.mmio.write(address, data));
                self.pending = true;
                return Step::Accessed;
            }
            Ok((exit, detail)) => sort(&exit, detail),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                Exit::Interrupted
            }
            Err(error) => Exit::Failed(VcpuFailure::Run { errno: error.raw_os_error().unwrap_or(0) }),
        };
        self.pending = false;
        let vcpu = self.index;
        match exit {
            Exit::Interrupted => Step::Interrupted,
            Exit::Shutdown => Step::Ended(MachineEvent::TripleFault { vcpu }),
            Exit::InternalError(detail) => {
                let error = InternalError::locate(detail, self.bound.vcpu());
                Step::Ended(MachineEvent::InternalError { vcpu, error })
            }
            Exit::Failed(failure) => Step::Ended(MachineEvent::VcpuFailed { vcpu, failure }),
        }
    }
}

fn count(counter: &super::counters::Counter, access: Access) {
    if access == Access::Unknown {
        counter.add();
    }
}
