//! How an actor begins when an earlier agent left its VM: looks for the VMM, takes it over, and goes on by
//! [`recover::plan`].

use std::time::Duration;

use super::{Recovered, VmActor, error_of};
use crate::agent::ledger::LedgerError;
use crate::agent::record::OperationState;
use crate::agent::recover;
use crate::agent::vm_state::{Event, FailureCause, Goal, VmState, step};
use crate::agent::world::{Ask, ProcessEnd, VmNetworks, VmmHost, World};

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

    /// Says Hello to a VMM that was found, so that it serves this agent's epoch and no earlier one's any more.
    async fn greet_vmm(&mut self) {
        match self.shared.world.vmm().ask(&self.record, self.shared.epoch, Ask::Status).await {
            Ok(_) => tracing::info!(vm = %self.record.id, state = self.record.state.name(), "adopted"),
            // It may answer later; until then verbs on it fail and say why.
            Err(error) => {
                let error = crate::report::chain(&error);
                tracing::warn!(vm = %self.record.id, error, "a VMM that was found does not answer");
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

    /// Continues what an earlier agent left: performs unfinished effects again, or sees to a VMM that ended meanwhile.
    pub(super) async fn recover(&mut self, recovered: Recovered) -> Result<(), LedgerError> {
        self.process = self.look_for_vmm().await;
        // A guest that is not on its way up or down has its network, whatever else is to be done with it.
        if matches!(
            self.record.state,
            VmState::Registering | VmState::Running | VmState::Paused | VmState::Saving { .. }
        ) && self.process.is_some()
        {
            self.greet_vmm().await;
            self.see_to_network().await;
        }
        match recover::plan(&self.record, recovered.operation, self.process.is_some()) {
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
