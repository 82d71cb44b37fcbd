//! How an actor begins when an earlier agent left its VM: looks for the VMM, takes it over, and goes on by
//! [`recover::plan`].

use std::time::Duration;

use super::ending::error_of;
use super::{Recovered, VmActor};
use crate::agent::effect::Effect;
use crate::agent::ledger::{LedgerError, NewEvent, Write};
use crate::agent::record::{OperationRecord, OperationState, QuarantineRecord, Subject};
use crate::agent::recover::{self, Doubt};
use crate::agent::vm_state::{Event, FailureCause, Goal, SwapMode, VmState, step};
use crate::agent::world::{Ask, AskError, ProcessEnd, VmNetworks, VmmHost, World};
use crate::clock::Clock;
use crate::wire::frame;
use crate::wire::refusal::Refusal;

/// Time before a host is asked again for a process it could not look for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl<W: World> VmActor<W> {
    /// The VMM of this record. A host that cannot tell is asked again: taking a VM for dead would end it.
    async fn look_for_vmm(&mut self) -> Option<<W::Vmm as VmmHost>::Process> {
        if !self.record.state.holds_resources() {
            return None;
        }
        loop {
            match self.shared.world.vmm().find(&self.record).await {
                Ok(found) => return found,
                Err(error) => tracing::warn!(vm = %self.record.id, %error, "cannot look for the VMM"),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Says Hello to a VMM that was found, so that it serves this agent's epoch and no earlier one's any more. Gives
    /// what speaks against its being this record's.
    async fn greet_vmm(&mut self) -> Option<Doubt> {
        let (pid, own) = (self.record.process.map_or(0, |process| process.pid), self.shared.epoch);
        let version = self.record.wire_version;
        if version > frame::VERSION {
            return Some(Doubt::NewerProtocol { version, known: frame::VERSION });
        }
        if version < frame::VERSION_MIN {
            return Some(Doubt::OlderProtocol { version, known: frame::VERSION_MIN });
        }
        match self.shared.world.vmm().ask(&self.record, own, Ask::Status).await {
            Ok(_) => {
                tracing::info!(vm = %self.record.id, state = self.record.state.name(), "adopted");
                None
            }
            Err(AskError::Refused(Refusal::WrongNonce)) => Some(Doubt::OtherSecret { pid }),
            Err(AskError::Refused(Refusal::StaleEpoch { current, .. })) => Some(Doubt::NewerAgent { current, own }),
            // It may answer later; until then verbs on it fail and say why.
            Err(error) => {
                let error = crate::report::chain(&error);
                tracing::warn!(vm = %self.record.id, error, "a VMM that was found does not answer");
                None
            }
        }
    }

    /// Takes over the jail of a VM that runs; what is not as it should be is made so. A VM whose network cannot be seen
    /// to goes on without: the next try comes with the next change there.
    async fn see_to_network(&mut self) {
        if let Err(error) = self.shared.world.networks().open(&self.record).await {
            let error = crate::report::chain(&error);
            tracing::warn!(vm = %self.record.id, error, "the network of a VM that runs is not as it should be");
        }
        self.shared.serve_metadata(&self.record);
    }

    /// Leads to a VM that is on another host, as the agent before did.
    async fn lead_elsewhere(&mut self) {
        let Some(way) = self.record.migration.as_ref().filter(|_| self.record.is_at_home()) else { return };
        if let Err(error) = self.shared.world.networks().lead_elsewhere(&self.record, way.host).await {
            let error = crate::report::chain(&error);
            tracing::warn!(vm = %self.record.id, host = way.peer, error, "nothing leads to a VM that is on another host");
        }
    }

    /// Holds the taps of a VM whose memory is out, as the agent before did: what came since that one ended was dropped
    /// if the VM has no process, and counted.
    async fn hold_taps(&mut self) {
        if let Err(error) = self.shared.world.vmm().hold_taps(&self.record).await {
            tracing::warn!(vm = %self.record.id, %error, "no packet will wake this VM: its taps cannot be held");
        }
    }

    /// Leaves the VM alone, and says why.
    async fn quarantine(&mut self, doubt: &Doubt, operation: Option<OperationRecord>) -> Result<(), LedgerError> {
        let at = self.shared.world.clock().wall();
        let report = doubt.to_string();
        tracing::error!(vm = %self.record.id, report, "in quarantine: nothing is done with it but to end it");
        let body = serde_json::json!({ "report": report });
        let subject = Subject::Vm(self.record.id.clone());
        let event = NewEvent { at, kind: "vm_quarantined", subject, operation: None, body };
        let mut writes = vec![Write::Event(event)];
        if let Some(mut operation) = operation {
            self.end_operation(&mut operation, OperationState::Failed, Some(error_of(&FailureCause::Interrupted)));
            writes.extend([self.shared.operation_event(&operation), Write::Operation(Box::new(operation))]);
        }
        self.record.quarantine = Some(QuarantineRecord { at, report });
        self.turn(self.stay(), writes, None).await
    }

    /// Continues what an earlier agent left: performs unfinished effects again, or sees to a VMM that ended meanwhile.
    pub(super) async fn recover(&mut self, recovered: Recovered) -> Result<(), LedgerError> {
        self.process = self.look_for_vmm().await;
        // A guest that is not on its way up or down has its network, whatever else is to be done with it.
        let (lives, swap) = (self.process.is_some(), self.record.swap_mode());
        // A hibernated one has no process, and is woken by its packets.
        let is_swapped = swap == Some(SwapMode::Hibernate) || swap.is_some() && lives;
        let is_up = matches!(
            self.record.state,
            VmState::Registering
                | VmState::Running
                | VmState::Paused
                | VmState::Saving { .. }
                | VmState::HandingOver { .. }
                | VmState::Sending
        );
        if lives {
            // First: what it is asked may have to wait for memory.
            self.shared.go_on_serving(&self.record).await;
        }
        let doubt = if (is_up || is_swapped) && lives { self.greet_vmm().await } else { None };
        // It is this agent's from here on. What is around it is seen to next, and takes longer.
        self.shared.note_adopted().await?;
        let is_clear = doubt.is_none();
        if is_clear && (is_up && lives || is_swapped) {
            self.see_to_network().await;
        }
        if is_clear && is_swapped {
            self.hold_taps().await;
        }
        let is_decided =
            recovered.operation.as_ref().is_some_and(|operation| recover::was_done(operation, Effect::AwaitDecision));
        let is_away = matches!(self.record.state, VmState::HandedOver | VmState::Arriving { returning: true });
        if is_away && !is_decided {
            self.lead_elsewhere().await;
        }
        if self.record.quarantine.is_some() && is_clear {
            // What was found once need not be there any more.
            self.record.quarantine = None;
            self.turn(self.stay(), Vec::new(), None).await?;
        }
        match recover::plan(&self.record, recovered.operation.clone(), lives, doubt) {
            // Its addresses are another host's, and so is it: the agent before was about to forget it.
            recover::Plan::Rest if self.record.state == VmState::HandedOver && !self.record.is_at_home() => {
                self.forget_left().await
            }
            recover::Plan::Rest => Ok(()),
            recover::Plan::Continue(operation) => {
                self.perform(operation, Duration::ZERO, None);
                Ok(())
            }
            recover::Plan::Undo(mut operation) => {
                let cause = FailureCause::Interrupted;
                self.end_operation(&mut operation, OperationState::Failed, Some(error_of(&cause)));
                self.conclude(operation, Some(Event::WorkFailed { cause })).await
            }
            recover::Plan::TakeBack => {
                let event = Event::WorkFailed { cause: FailureCause::Interrupted };
                let Ok(next) = step(&self.record.state, &event) else { return Ok(()) };
                let undo = self.new_operation(Goal::Undo, false, &next);
                self.turn(next, Vec::new(), Some(&undo)).await?;
                self.perform(undo, Duration::ZERO, None);
                Ok(())
            }
            recover::Plan::Quarantine(doubt) => self.quarantine(&doubt, recovered.operation).await,
            recover::Plan::Clean => {
                let forgets = !self.record.state.holds_resources();
                let (event, goal) =
                    if forgets { (Event::RemoveAsked, Goal::Remove) } else { (Event::KillAsked, Goal::Stop) };
                let Ok(next) = step(&self.record.state, &event) else { return Ok(()) };
                let cleaning = self.new_operation(goal, forgets, &next);
                self.turn(next, Vec::new(), Some(&cleaning)).await?;
                self.perform(cleaning, Duration::ZERO, None);
                Ok(())
            }
            recover::Plan::Ended(operation) => self.vmm_ended(ProcessEnd::Unknown, operation).await,
        }
    }
}
