//! What ended: an operation, or the VMM. What of it is written, what follows, and who is told.

use std::sync::Arc;
use std::time::Duration;

use super::waking::has_no_way_back;
use super::{Request, Sent, Verb, VerbError, VmActor};
use crate::agent::guest::printable;
use crate::agent::ledger::{LedgerError, Write};
use crate::agent::record::{OperationError, OperationRecord, OperationState};
use crate::agent::vm_state::{Event, FailureCause, Goal, VmState, step};
use crate::agent::volumes::{settled, taken_back};
use crate::agent::work::{Outcome, Report};
use crate::agent::world::{ProcessEnd, VmDisk, World};
use crate::clock::Clock;
use crate::report::Retry;
use crate::wire::last_words::LastWords;

impl<W: World> VmActor<W> {
    /// Takes in what work did, decides, and goes on with what follows from it.
    pub(super) async fn finish(&mut self, report: Report<W>) -> Result<(), LedgerError> {
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
            // The undoing of a send, or the cleaning up behind one, found that it had been decided: the VM is the other
            // host's.
            Outcome::Decided => {
                self.record.remains = None;
                (OperationState::Succeeded, None, Some(Event::Done(Goal::Migrate)))
            }
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
    pub(super) async fn conclude(
        &mut self,
        operation: OperationRecord,
        event: Option<Event>,
    ) -> Result<(), LedgerError> {
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

    pub(super) fn end_operation(
        &self,
        operation: &mut OperationRecord,
        state: OperationState,
        error: Option<OperationError>,
    ) {
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

    /// The VMM ended by itself, alone or during an operation: keeps what it left, records why, cleans up.
    pub(super) async fn vmm_ended(
        &mut self,
        end: ProcessEnd,
        operation: Option<OperationRecord>,
    ) -> Result<(), LedgerError> {
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

/// What a VMM's end means for its VM. Its words are untrusted: they can only choose among failures and a stop.
fn end_event(words: Option<LastWords>, end: ProcessEnd) -> Event {
    let cause = match words {
        Some(LastWords::Stopped | LastWords::GuestPoweredOff | LastWords::GuestRebooted) => return Event::VmmStopped,
        Some(LastWords::GuestPanic) => FailureCause::GuestPanic,
        Some(LastWords::GuestFault { detail }) => FailureCause::GuestFault { detail: printable(&detail) },
        Some(LastWords::VmmError { detail }) => FailureCause::VmmError { detail: printable(&detail) },
        None => match end {
            ProcessEnd::Exited(code) => FailureCause::VmmExited { code },
            ProcessEnd::Signalled(signal) => FailureCause::VmmKilled { signal },
            ProcessEnd::Unknown => FailureCause::VmmGone,
        },
    };
    Event::VmmFailed { cause }
}

pub(super) fn error_of(cause: &FailureCause) -> OperationError {
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
