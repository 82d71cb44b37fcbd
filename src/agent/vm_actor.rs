//! One task per VM owns its record and its process; everybody else asks through its inbox and reads the record it
//! publishes. Exec and console do not pass here: they connect to the VMM by themselves.
//!
//! ```text
//! request ─▶ vm_state::step ─▶ [ledger: state, operation, steps] ─▶ work (effects) ─▶ step ─▶ [ledger] ─▶ answer
//! ```

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument;

use super::ledger::{LedgerError, Write};
use super::migration_record::MoveRecord;
use super::peers::LineAhead;
use super::record::{OperationError, OperationRecord, OperationState, StepRecord, StepState, VmRecord};
use super::shared::{Shared, VmHandle};
use super::vm_state::{Event, Goal, Step, VmState, step};
use super::work::{Report, Work, ended};
use super::world::{VmmHost, World, random_array};
use crate::clock::{Clock, Monotonic, UnixNanos};
use crate::ids::OperationId;

mod asked;
mod ending;
mod recovery;
mod verb;
mod waking;

pub use verb::{Arrival, SwapOrder, Verb, VerbError};

/// Requests that may wait for one VM. More are refused at once: somebody calls in a loop.
pub(crate) const INBOX_MAX: usize = 32;

/// Time after which what a VM left behind is taken away again, if that failed.
const FORGET_AGAIN: Duration = Duration::from_secs(10);

/// Something asked of a VM.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) verb: Verb,
    pub(crate) reply: Reply,
}

type Reply = oneshot::Sender<Result<Arc<VmRecord>, VerbError>>;

/// What an actor begins with, besides its record.
#[derive(Debug)]
pub(crate) enum Begin {
    /// The launch was just recorded, with this operation, at this time.
    Launch(Box<OperationRecord>, Monotonic),
    /// The agent restarted: continue what is unfinished.
    Recover(Box<Recovered>),
}

/// What recovery knows about a VM that an earlier agent left.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// The operation that was not ended.
    pub(crate) operation: Option<OperationRecord>,
}

type Working<W> = Pin<Box<dyn Future<Output = Report<W>> + Send>>;

struct VmActor<W: World> {
    shared: Arc<Shared<W>>,
    record: VmRecord,
    published: watch::Sender<Arc<VmRecord>>,
    process: Option<<W::Vmm as VmmHost>::Process>,
    inbox: mpsc::Receiver<Request>,
    /// Requests that came during work that they could only hurry.
    waiting: VecDeque<Request>,
    work: Option<Working<W>>,
    hurry: watch::Sender<bool>,
    /// Who waits for the present work.
    asker: Option<(Verb, Reply)>,
    /// Why what they asked for failed, while that is taken back.
    failed: Option<OperationError>,
    /// When its launch was asked for, if that was asked of this agent.
    launch_asked_at: Option<Monotonic>,
    /// Of the machine that is sent to another host, until that has been told.
    sent: Option<Sent>,
    /// When it could not be woken.
    wake_failed_at: Option<Monotonic>,
    over: bool,
}

/// What is known of a machine between the operation that sent it and the one that leads it away.
#[derive(Default)]
struct Sent {
    /// Since when it stands still.
    held_at: Option<Monotonic>,
    /// What moving it took so far.
    moved: Option<MoveRecord>,
    /// A line to the host that is to be told.
    line: Option<LineAhead>,
}

/// Starts the actor of a VM that is in the ledger, and makes it known. `process`: its VMM, where that is there already and
/// held.
pub(crate) fn start<W: World>(
    shared: &Arc<Shared<W>>,
    record: VmRecord,
    begin: Begin,
    process: Option<<W::Vmm as VmmHost>::Process>,
) -> VmHandle {
    let (inbox, requests) = mpsc::channel(INBOX_MAX);
    let (published, view) = watch::channel(Arc::new(record.clone()));
    let handle = VmHandle { id: record.id.clone(), name: record.name.clone(), inbox, record: view };
    shared.vms().insert(record.id.clone(), handle.clone());
    let actor = VmActor {
        shared: Arc::clone(shared),
        record,
        published,
        process,
        inbox: requests,
        waiting: VecDeque::new(),
        work: None,
        hurry: watch::Sender::new(false),
        asker: None,
        failed: None,
        launch_asked_at: None,
        sent: None,
        wake_failed_at: None,
        over: false,
    };
    tokio::spawn(actor.run(begin));
    handle
}

impl<W: World> VmActor<W> {
    async fn run(mut self, begin: Begin) {
        if let Err(error) = self.live(begin).await {
            self.shared.declare_broken(&error);
            // It stays known, and goes on: what belongs to no VM that is known is ended and removed (`recover::sweep`),
            // which may be about to look while this agent ends.
            return;
        }
        self.shared.vms().remove(&self.record.id);
        // What it was ended for, if its end was asked for before that was seen.
        let _ = self.shared.fillings.loss(&self.record.id);
        self.shared.note_vm_change();
    }

    async fn live(&mut self, begin: Begin) -> Result<(), LedgerError> {
        match begin {
            Begin::Launch(operation, asked_at) => {
                self.launch_asked_at = Some(asked_at);
                self.perform(*operation, Duration::ZERO, Some(asked_at));
            }
            Begin::Recover(recovered) => self.recover(*recovered).await?,
        }
        while !self.over {
            let may_take = self.work.is_none() || self.may_be_hurried();
            let call = self.call_to_wake();
            tokio::select! {
                biased;
                // What was begun ends first: its result decides what the rest may do.
                report = working(&mut self.work) => self.finish(report).await?,
                // A VM that ended is told so before it is asked anything more.
                end = ended(self.process.as_ref()), if self.work.is_none() && self.record.state.holds_resources() => {
                    self.vmm_ended(end, None).await?;
                }
                cause = call.wait() => self.wake(cause).await?,
                // What is left of one that is gone is in the way of the next of its name, and nobody asks for its end again.
                () = tokio::time::sleep(FORGET_AGAIN), if self.work.is_none() && self.record.state == VmState::Gone => {
                    self.remove().await?;
                }
                request = self.inbox.recv(), if may_take && self.waiting.len() < INBOX_MAX => match request {
                    Some(request) => self.take(request).await?,
                    // The agent is ending: the VM goes on.
                    None => return Ok(()),
                },
            }
        }
        Ok(())
    }

    fn new_operation(&self, goal: Goal, then_remove: bool, next: &Step) -> OperationRecord {
        // An id only has to differ from others; the zeros of a host without randomness are refused by the ledger.
        let random = random_array(&self.shared.world).unwrap_or_default();
        // A VM that is there to become a bundle is of no use once it has ended, however it did.
        let then_remove = then_remove || self.record.spec.build.is_some();
        operation_for(
            &self.record,
            OperationId::from_random(random),
            goal,
            then_remove,
            next,
            self.shared.world.clock().wall(),
        )
    }

    /// Goes to the next state: in the ledger first, then for all to see.
    async fn turn(
        &mut self,
        next: Step,
        mut writes: Vec<Write>,
        begun: Option<&OperationRecord>,
    ) -> Result<(), LedgerError> {
        let changed = next.state != self.record.state;
        self.record.state = next.state;
        if self.record.state == VmState::Running || !self.record.state.holds_resources() {
            self.record.swap = None;
        }
        if !self.record.state.holds_resources() {
            self.record.quarantine = None;
        }
        if let Some(operation) = begun {
            self.record.operation = Some(operation.id.clone());
            writes.push(Write::Operation(Box::new(operation.clone())));
            writes.push(self.shared.operation_event(operation));
        }
        self.record.revision += 1;
        writes.push(Write::Vm(Box::new(self.record.clone())));
        if changed {
            tracing::info!(vm = %self.record.id, state = self.record.state.name(), "vm");
            writes.push(self.shared.vm_event(&self.record));
        }
        self.shared.commit(writes).await?;
        self.published.send_replace(Arc::new(self.record.clone()));
        self.shared.note_vm_change();
        Ok(())
    }

    fn perform(&mut self, mut operation: OperationRecord, grace: Duration, asked_at: Option<Monotonic>) {
        let sent = self.sent.take().filter(|_| operation.goal == Goal::Leave);
        let Sent { held_at, moved, line } = sent.unwrap_or_default();
        operation.moved = moved.or(operation.moved);
        self.hurry.send_replace(false);
        let work = Work {
            shared: Arc::clone(&self.shared),
            record: self.record.clone(),
            operation,
            process: self.process.clone(),
            hurry: self.hurry.subscribe(),
            grace,
            asked_at,
            held_at,
            has_received: false,
            line,
            ran_there_at: None,
            successor: None,
            others: Vec::new(),
            way: None,
            turn: None,
            writes: Vec::new(),
        };
        // Whatever is logged on the way says of which operation it is.
        let span = tracing::info_span!("operation", op = %work.operation.id, vm = %self.record.id);
        self.work = Some(Box::pin(work.run().instrument(span)));
    }

    fn stay(&self) -> Step {
        Step { state: self.record.state.clone(), effects: Vec::new() }
    }

    async fn remove(&mut self) -> Result<(), LedgerError> {
        let Ok(next) = step(&self.record.state, &Event::RemoveAsked) else { return Ok(()) };
        let operation = self.new_operation(Goal::Remove, true, &next);
        self.turn(next, Vec::new(), Some(&operation)).await?;
        self.perform(operation, Duration::ZERO, None);
        Ok(())
    }

    /// Forgets a VM that is another host's, with its addresses.
    async fn forget_left(&mut self) -> Result<(), LedgerError> {
        let Ok(next) = step(&self.record.state, &Event::ForgetLeft) else { return Ok(()) };
        let operation = self.new_operation(Goal::Remove, true, &next);
        self.turn(next, Vec::new(), Some(&operation)).await?;
        self.perform(operation, Duration::ZERO, None);
        Ok(())
    }
}

/// The operation that performs a step's effects.
pub(crate) fn operation_for(
    vm: &VmRecord,
    id: OperationId,
    goal: Goal,
    then_remove: bool,
    next: &Step,
    now: UnixNanos,
) -> OperationRecord {
    let may_have_volumes = !vm.spec.volumes.is_empty();
    let pending = |&effect| StepRecord { effect, state: StepState::Pending, took_us: None, note: None };
    OperationRecord {
        id,
        vm: vm.id.clone(),
        goal,
        then_remove,
        state: OperationState::Running,
        steps: next.effects.iter().filter(|effect| may_have_volumes || !effect.is_for_volumes()).map(pending).collect(),
        makes: None,
        moved: None,
        migration: vm.migration.clone().filter(|_| {
            matches!(
                (goal, &next.state),
                (Goal::Migrate | Goal::Leave | Goal::Arrive, _) | (Goal::Undo, VmState::Sending)
            )
        }),
        error: None,
        created_at: now,
        ended_at: None,
    }
}

async fn working<W: World>(work: &mut Option<Working<W>>) -> Report<W> {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}
