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
use super::vm_state::{Denied, Event, FailureCause, Goal, Step, VmState, step};
use super::volumes::{settled, taken_back};
use super::work::{Outcome, Report, Work, ended};
use super::world::{ProcessEnd, VmDisk, VmmHost, World, random_array};
use crate::clock::{Clock, Monotonic, UnixNanos};
use crate::ids::OperationId;
use crate::report::Retry;
use crate::wire::last_words::LastWords;

mod recovery;
mod verb;
mod waking;

pub use verb::{Arrival, SwapOrder, Verb, VerbError};
use waking::has_no_way_back;

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

    /// Only these states' work can wait for a guest for long.
    fn may_be_hurried(&self) -> bool {
        matches!(
            self.record.state,
            VmState::Launching
                | VmState::Registering
                | VmState::Stopping
                | VmState::Saving { .. }
                | VmState::Sending
                | VmState::HandedOver
                | VmState::Arriving { .. }
        )
    }

    async fn take(&mut self, request: Request) -> Result<(), LedgerError> {
        if self.work.is_none() {
            return self.answer(request).await;
        }
        let hurries = match (&request.verb, &self.record.state) {
            // A migration is given up for it, as long as the VM is not the other host's.
            (Verb::CancelMigration(_), VmState::Sending) => true,
            // A snapshot is given up for it as long as the guest's memory is being copied; what follows is soon over.
            (
                Verb::Stop { .. } | Verb::Remove { .. },
                VmState::Launching | VmState::Registering | VmState::Sending | VmState::Saving { .. },
            ) => true,
            // After that, as it will be as it was.
            (_, VmState::Saving { .. }) => false,
            (Verb::Stop { .. } | Verb::Remove { .. }, VmState::HandedOver | VmState::Arriving { .. }) => {
                let denied = Denied { state: self.record.state.clone() };
                self.reply(&request.verb, request.reply, Err(denied));
                return Ok(());
            }
            // What is here of it is still being taken away.
            (Verb::Arrive(_) | Verb::ForgetAway(_), VmState::HandedOver) => false,
            (Verb::Stop { grace } | Verb::Remove { grace }, _) => grace.is_zero(),
            (
                Verb::Pause
                | Verb::Resume
                | Verb::Snapshot(_)
                | Verb::HandOver
                | Verb::ChangeVolumes(_)
                | Verb::Migrate(_)
                | Verb::CancelMigration(_)
                | Verb::Arrive(_)
                | Verb::ForgetAway(_)
                | Verb::SwapOut(_)
                | Verb::Wake(_),
                _,
            ) => {
                // Refused now rather than after a launch of minutes.
                let denied = Denied { state: self.record.state.clone() };
                self.reply(&request.verb, request.reply, Err(denied));
                return Ok(());
            }
            // After what is going on.
            (Verb::SetSwapPolicy(_), _) => false,
        };
        if hurries {
            self.hurry.send_replace(true);
        }
        self.waiting.push_back(request);
        Ok(())
    }

    async fn answer(&mut self, request: Request) -> Result<(), LedgerError> {
        let Request { verb, reply } = request;
        if let (Verb::SetSwapPolicy(_), VmState::HandedOver) = (&verb, &self.record.state) {
            // Where it is now, its policy is kept there.
            let denied = Denied { state: self.record.state.clone() };
            self.reply(&verb, reply, Err(denied));
            return Ok(());
        }
        if let Verb::SetSwapPolicy(policy) = verb {
            self.record.spec.swap = policy;
            self.turn(self.stay(), Vec::new(), None).await?;
            // Whoever asked may have gone.
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::ForgetAway(id) = &verb
            && self.record.migration.as_ref().is_none_or(|way| way.id != *id)
        {
            // It has gone another way since.
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::CancelMigration(_) = &verb {
            // Whatever it was, it is over.
            let is_elsewhere = self.record.state == VmState::HandedOver;
            let denied = if is_elsewhere { Err(Denied { state: self.record.state.clone() }) } else { Ok(()) };
            match denied {
                Ok(()) => drop(reply.send(Ok(Arc::new(self.record.clone())))),
                Err(_) => self.reply(&verb, reply, denied),
            }
            return Ok(());
        }
        if let Some(found) = &self.record.quarantine
            && !matches!(verb, Verb::Stop { .. } | Verb::Remove { .. })
        {
            let (vm, report) = (self.record.id.to_string(), found.report.clone());
            // Whoever asked may have gone.
            let _ = reply.send(Err(VerbError::Quarantined { verb: verb.name(), vm, report }));
            return Ok(());
        }
        if let Some(missing) = self.missing_memory(&verb).or_else(|| self.volumes_in_the_way(&verb)) {
            // Whoever asked may have gone.
            let _ = reply.send(Err(missing));
            return Ok(());
        }
        let (event, goal, grace, then_remove) = match &verb {
            Verb::Snapshot(order) => (Event::SnapshotAsked { live: order.live }, Goal::Snapshot, Duration::ZERO, false),
            Verb::Migrate(_) => (Event::MigrateAsked, Goal::Migrate, Duration::ZERO, false),
            Verb::Arrive(_) => (Event::ArriveAsked, Goal::Arrive, Duration::ZERO, false),
            Verb::ForgetAway(_) => (Event::ForgetLeft, Goal::Remove, Duration::ZERO, true),
            Verb::ChangeVolumes(_) => (Event::VolumesAsked, Goal::ChangeVolumes, Duration::ZERO, false),
            Verb::HandOver => (Event::HandOverAsked, Goal::HandOver, Duration::ZERO, false),
            Verb::SwapOut(order) => (Event::SwapOutAsked(order.mode), Goal::SwapOut, Duration::ZERO, false),
            // Handled above; the state stays.
            Verb::Wake(_) | Verb::SetSwapPolicy(_) | Verb::CancelMigration(_) => {
                (Event::WakeAsked, Goal::Wake, Duration::ZERO, false)
            }
            Verb::Pause => (Event::PauseAsked, Goal::Pause, Duration::ZERO, false),
            Verb::Resume => (Event::ResumeAsked, Goal::Resume, Duration::ZERO, false),
            Verb::Stop { grace } => (stop_event(*grace), Goal::Stop, *grace, false),
            Verb::Remove { grace } if self.record.state.holds_resources() => {
                (stop_event(*grace), Goal::Stop, *grace, true)
            }
            Verb::Remove { grace } => (Event::RemoveAsked, Goal::Remove, *grace, true),
        };
        // A guest that cannot be spoken to is not asked to power off.
        let event =
            if self.record.quarantine.is_some() && event == Event::StopAsked { Event::KillAsked } else { event };
        let next = match step(&self.record.state, &event) {
            Ok(next) => next,
            Err(denied) => {
                self.reply(&verb, reply, Err(denied));
                return Ok(());
            }
        };
        if next.effects.is_empty() {
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::ChangeVolumes(change) = &verb
            && let Err(refused) = change.apply(&mut self.record.spec)
        {
            // Whoever asked may have gone.
            let _ = reply.send(Err(VerbError::Volume { vm: self.record.id.to_string(), refused }));
            return Ok(());
        }
        let mut operation = self.new_operation(goal, then_remove, &next);
        let mut writes = Vec::new();
        match &verb {
            Verb::Snapshot(order) => operation.makes = Some((**order).clone()),
            Verb::SwapOut(order) => self.record.swap = Some(self.swap_record(order)),
            Verb::Wake(cause) => writes.push(self.waking_event(*cause, &operation)),
            Verb::Migrate(way) => {
                self.record.migration = Some(way.clone());
                operation.migration = Some(way.clone());
            }
            Verb::Arrive(arrival) => {
                operation.migration = Some(arrival.way.clone());
                self.record.came_by = Some(arrival.way.id.clone());
                self.record.migration = Some(arrival.way.clone());
                self.record.spec = arrival.spec.clone();
                self.record.guest_protocol = arrival.guest_protocol;
            }
            Verb::HandOver
            | Verb::ChangeVolumes(_)
            | Verb::CancelMigration(_)
            | Verb::ForgetAway(_)
            | Verb::Pause
            | Verb::Resume
            | Verb::Stop { .. }
            | Verb::Remove { .. }
            | Verb::SetSwapPolicy(_) => {}
        }
        self.asker = Some((verb, reply));
        self.turn(next, writes, Some(&operation)).await?;
        self.perform(operation, grace, None);
        Ok(())
    }

    /// A bundle has no volumes: its clones could not all have them.
    fn volumes_in_the_way(&self, verb: &Verb) -> Option<VerbError> {
        let volumes = self.record.spec.volume_uses().count();
        let is_in_the_way = matches!(verb, Verb::Snapshot(_)) && volumes > 0;
        is_in_the_way.then(|| VerbError::HasVolumes { vm: self.record.id.to_string(), volumes })
    }

    /// What reads all of a machine's memory waits until all of it is here.
    fn missing_memory(&self, verb: &Verb) -> Option<VerbError> {
        if !matches!(verb, Verb::Snapshot(_) | Verb::HandOver | Verb::Migrate(_) | Verb::SwapOut(_)) {
            return None;
        }
        let (mapped, chunks) = self.shared.fillings.holds_back(&self.record)?;
        Some(VerbError::Filling { verb: verb.name(), vm: self.record.id.to_string(), mapped, chunks })
    }

    fn reply(&self, verb: &Verb, reply: Reply, denied: Result<(), Denied>) {
        if let Err(source) = denied {
            let error = VerbError::Denied { verb: verb.name(), vm: self.record.id.to_string(), source };
            // Whoever asked may have gone.
            let _ = reply.send(Err(error));
        }
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

    /// Takes in what work did, decides, and goes on with what follows from it.
    async fn finish(&mut self, report: Report<W>) -> Result<(), LedgerError> {
        let Report { record, mut operation, process, held_at, line, outcome } = report;
        self.sent = (operation.goal == Goal::Migrate).then_some(Sent { held_at, moved: operation.moved, line });
        self.work = None;
        self.record = record;
        self.process = process;
        if matches!(self.record.state, VmState::ChangingVolumes { .. }) {
            match &outcome {
                Outcome::Done => settled(&mut self.record.spec.volumes),
                Outcome::Failed(_) if operation.goal == Goal::ChangeVolumes => {
                    taken_back(&mut self.record.spec.volumes);
                }
                Outcome::Failed(_)
                | Outcome::Hurried
                | Outcome::VmmEnded(_)
                | Outcome::Broken(_)
                | Outcome::Decided => {}
            }
        }
        let (state, error, event) = match outcome {
            // The undoing of a send found that it had been decided: the VM is the other host's.
            Outcome::Decided => (OperationState::Succeeded, None, Some(Event::Done(Goal::Migrate))),
            Outcome::Done => (OperationState::Succeeded, None, Some(Event::Done(operation.goal))),
            Outcome::Hurried if matches!(operation.goal, Goal::Migrate | Goal::Snapshot) => {
                let what = if operation.goal == Goal::Migrate { "migration" } else { "snapshot" };
                let message = format!("the {what} was cancelled by request; the VM goes on here");
                let cause = FailureCause::Host { detail: message.clone() };
                let error = OperationError { code: "cancelled".to_owned(), message, retry: Retry::Later };
                (OperationState::Cancelled, Some(error), Some(Event::WorkFailed { cause }))
            }
            Outcome::Hurried => (OperationState::Cancelled, None, None),
            Outcome::Failed(cause) => {
                let error = error_of(&cause);
                let event = if has_no_way_back(&operation, &cause) {
                    Event::UndoFailed { cause }
                } else {
                    Event::WorkFailed { cause }
                };
                (OperationState::Failed, Some(error), Some(event))
            }
            Outcome::VmmEnded(end) => return self.vmm_ended(end, Some(operation)).await,
            Outcome::Broken(error) => return Err(error),
        };
        self.end_operation(&mut operation, state, error);
        if operation.goal == Goal::Wake {
            let failed = state == OperationState::Failed;
            self.wake_failed_at = failed.then(|| self.shared.world.clock().monotonic());
        }
        if operation.goal == Goal::Remove && state == OperationState::Succeeded {
            // The row is gone; only the operation's end is left to write.
            let writes = vec![self.shared.operation_event(&operation), Write::Operation(Box::new(operation))];
            self.shared.commit(writes).await?;
            self.over = true;
            self.answer_asker(None);
            self.dismiss();
            return Ok(());
        }
        self.conclude(operation, event).await
    }

    /// Writes the end of an operation together with the state it leads to, then cleans up, removes, or takes the next
    /// waiting request.
    async fn conclude(&mut self, operation: OperationRecord, event: Option<Event>) -> Result<(), LedgerError> {
        let next = match &event {
            Some(event) => step(&self.record.state, event).unwrap_or_else(|_| self.stay()),
            None => self.stay(),
        };
        let writes = vec![self.shared.operation_event(&operation), Write::Operation(Box::new(operation.clone()))];
        let goal = goal_of(&next.state);
        let more = (!next.effects.is_empty()).then(|| self.new_operation(goal, operation.then_remove, &next));
        self.turn(next, writes, more.as_ref()).await?;
        if let Some(more) = more {
            self.failed = operation.error;
            if more.goal == Goal::Leave {
                self.deny_waiting();
            }
            // Whoever waits is answered when it is as it was before, or nothing but the record is left.
            let asked_at = self.launch_asked_at.filter(|_| more.goal == Goal::Register);
            self.perform(more, Duration::ZERO, asked_at);
            return Ok(());
        }
        let failed = self.failed.take();
        let stopped = operation.goal == Goal::Stop && self.record.state.has_ended();
        if operation.then_remove && stopped {
            return self.remove().await;
        }
        // Its addresses are another host's as well: nothing here is needed any more.
        if self.record.state == VmState::HandedOver && !self.record.is_at_home() {
            return self.forget_left().await;
        }
        self.answer_asker(operation.error.as_ref().or(failed.as_ref()));
        while self.work.is_none()
            && let Some(request) = self.waiting.pop_front()
        {
            self.answer(request).await?;
        }
        Ok(())
    }

    /// The VM is another host's: what was asked of it here is not done, and must not look as if it were.
    fn deny_waiting(&mut self) {
        for Request { verb, reply } in std::mem::take(&mut self.waiting) {
            self.reply(&verb, reply, Err(Denied { state: self.record.state.clone() }));
        }
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

    fn end_operation(&self, operation: &mut OperationRecord, state: OperationState, error: Option<OperationError>) {
        operation.state = state;
        operation.error = error;
        operation.ended_at = Some(self.shared.world.clock().wall());
        self.shared.metrics.operation_ended(operation.goal, state);
        if let Some(error) = &operation.error {
            self.shared.metrics.operation_failed(&error.code);
        }
        if let Some(moved) = &operation.moved
            && matches!(operation.goal, Goal::HandOver | Goal::Leave)
            && state == OperationState::Succeeded
        {
            self.shared.metrics.moved(operation.goal, moved);
        }
        if matches!(operation.goal, Goal::Launch | Goal::Enlist) && state == OperationState::Succeeded {
            self.shared.metrics.launched(&self.record.timings);
        }
    }

    /// The VM is gone, which is what those who asked for its end wanted. The others learn of it by the end of their reply.
    fn dismiss(&mut self) {
        self.inbox.close();
        let waiting = self.waiting.drain(..).chain(std::iter::from_fn(|| self.inbox.try_recv().ok()));
        for Request { verb, reply } in waiting {
            if matches!(verb, Verb::Stop { .. } | Verb::Remove { .. }) {
                // Whoever asked may have gone.
                let _ = reply.send(Ok(Arc::new(self.record.clone())));
            }
        }
    }

    /// Answers whoever waits for the present work, if somebody does.
    fn answer_asker(&mut self, error: Option<&OperationError>) {
        let Some((verb, reply)) = self.asker.take() else { return };
        let answer = match error {
            None => Ok(Arc::new(self.record.clone())),
            Some(error) => Err(VerbError::Failed {
                verb: verb.name(),
                vm: self.record.id.to_string(),
                code: error.code.clone(),
                message: error.message.clone(),
            }),
        };
        // Whoever asked may have gone.
        let _ = reply.send(answer);
    }

    /// The VMM ended by itself, alone or during an operation: keeps what it left, records why, cleans up.
    async fn vmm_ended(&mut self, end: ProcessEnd, operation: Option<OperationRecord>) -> Result<(), LedgerError> {
        let (mut remains, words) = self.shared.world.disk().remains(&self.record.id).await;
        remains.at = Some(self.shared.world.clock().wall());
        remains.exit = Some(end.to_string());
        let ended = match self.shared.fillings.loss(&self.record.id) {
            Some(cause) => Event::VmmFailed { cause },
            None => end_event(words, end),
        };
        let event = match (&operation, ended) {
            // Of a machine on its way here: what became of it, the host tells that it came from.
            (Some(operation), Event::VmmFailed { cause }) if operation.goal == Goal::Arrive => {
                Event::WorkFailed { cause }
            }
            (_, event) => event,
        };
        self.record.remains = Some(remains);
        self.process = None;
        self.record.process = None;
        match operation {
            // What it was there for is done, and does not need it any more: only the operation's end was not written.
            Some(mut operation) if operation.has_made_its_bundle() => {
                self.end_operation(&mut operation, OperationState::Succeeded, None);
                self.conclude(operation, Some(event)).await
            }
            Some(mut operation) => {
                let error = if let Event::VmmFailed { cause }
                | Event::WorkFailed { cause }
                | Event::UndoFailed { cause } = &event
                {
                    error_of(cause)
                } else {
                    let (code, message) = ("guest_ended".to_owned(), "the guest ended".to_owned());
                    OperationError { code, message, retry: Retry::Later }
                };
                self.end_operation(&mut operation, OperationState::Failed, Some(error));
                self.conclude(operation, Some(event)).await
            }
            None => {
                let Ok(next) = step(&self.record.state, &event) else { return Ok(()) };
                let cleaning = self.new_operation(Goal::Stop, false, &next);
                self.turn(next, Vec::new(), Some(&cleaning)).await?;
                self.perform(cleaning, Duration::ZERO, None);
                Ok(())
            }
        }
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

/// What the effects of a state lead to that nobody asked for by a verb.
const fn goal_of(state: &VmState) -> Goal {
    match state {
        VmState::Registering => Goal::Register,
        VmState::Saving { .. }
        | VmState::HandingOver { .. }
        | VmState::ChangingVolumes { .. }
        | VmState::SwappingOut { .. }
        | VmState::Sending => Goal::Undo,
        VmState::HandedOver => Goal::Leave,
        VmState::Arriving { .. } => Goal::Arrive,
        VmState::Gone => Goal::Remove,
        // A wake that went back.
        VmState::SwappedOut { .. } => Goal::SwapOut,
        VmState::Waking { .. } => Goal::Wake,
        VmState::Reserved
        | VmState::Launching
        | VmState::Running
        | VmState::Paused
        | VmState::Stopping
        | VmState::Stopped
        | VmState::Failed { .. } => Goal::Stop,
    }
}

const fn stop_event(grace: Duration) -> Event {
    if grace.is_zero() { Event::KillAsked } else { Event::StopAsked }
}

/// What a VMM's end means for its VM. Its words are untrusted: they can only choose among failures and a stop.
fn end_event(words: Option<LastWords>, end: ProcessEnd) -> Event {
    let cause = match words {
        Some(LastWords::Stopped | LastWords::GuestPoweredOff | LastWords::GuestRebooted) => return Event::VmmStopped,
        Some(LastWords::GuestPanic) => FailureCause::GuestPanic,
        Some(LastWords::GuestFault { detail }) => FailureCause::GuestFault { detail: super::guest::printable(&detail) },
        Some(LastWords::VmmError { detail }) => FailureCause::VmmError { detail: super::guest::printable(&detail) },
        None => match end {
            ProcessEnd::Exited(code) => FailureCause::VmmExited { code },
            ProcessEnd::Signalled(signal) => FailureCause::VmmKilled { signal },
            ProcessEnd::Unknown => FailureCause::VmmGone,
        },
    };
    Event::VmmFailed { cause }
}

fn error_of(cause: &FailureCause) -> OperationError {
    let message = cause.detail().unwrap_or_else(|| cause.name().replace('_', " "));
    let retry = match cause {
        FailureCause::BadImage { .. }
        | FailureCause::BadRoot { .. }
        | FailureCause::Secrets { .. }
        | FailureCause::WarmUp { .. } => Retry::WithChange,
        FailureCause::GuestPanic
        | FailureCause::GuestFault { .. }
        | FailureCause::GuestUnreachable { .. }
        | FailureCause::VmmError { .. }
        | FailureCause::VmmKilled { .. }
        | FailureCause::VmmExited { .. }
        | FailureCause::VmmGone
        | FailureCause::Host { .. }
        | FailureCause::Bundle { .. }
        | FailureCause::BundleUnavailable { .. }
        | FailureCause::Volume { .. }
        | FailureCause::NotRegistered { .. }
        | FailureCause::Interrupted => Retry::Later,
        FailureCause::SwapStateCorrupt { .. } | FailureCause::LostOnTheWay { .. } => Retry::Never,
    };
    OperationError { code: cause.name().to_owned(), message, retry }
}

async fn working<W: World>(work: &mut Option<Working<W>>) -> Report<W> {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}
