//! Effects that are tried again: of a VM that is this host's for good and does not run yet, a failure would be its end.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{Outcome, Work};
use crate::agent::effect::Effect;
use crate::agent::record::{StepRecord, StepState};
use crate::agent::vm_state::{Goal, VmState};
use crate::agent::world::{VmmProcess, World};

/// First and longest time between two tries of what a machine needs that is this host's for good, and how long it is tried:
/// what is in its way then is not on its way out.
const FORWARD_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
const FORWARD_LIMIT: Duration = Duration::from_secs(60);

impl<W: World> Work<W> {
    /// Whether the VM is this host's and does not run yet, at the end of its way here or back where it was to go from: if it
    /// does not come to run here, it is lost.
    pub(super) fn is_here_or_lost(&self) -> bool {
        let decided = |step: &StepRecord| step.effect == Effect::AwaitDecision && step.state == StepState::Done;
        let goal = self.operation.goal;
        (goal == Goal::Arrive && self.operation.steps.iter().any(decided))
            || (goal == Goal::Undo && self.record.state == VmState::Sending)
    }

    /// Performs an effect again until it succeeds, the machine has ended, or it was tried for long enough.
    pub(super) async fn perform_until_done(&mut self, effect: Effect) -> Result<(), Outcome> {
        let begun = self.now();
        let (mut wait, longest) = FORWARD_AGAIN;
        loop {
            let cause = match self.perform(effect).await {
                Err(Outcome::Failed(cause)) if self.now().since(begun) < FORWARD_LIMIT => cause,
                done => return done,
            };
            tracing::warn!(vm = %self.record.id, step = effect.name(), ?cause, "the VM is this host's and does not run yet: tried again");
            match self.process.clone() {
                Some(process) => {
                    if let Ok(end) = timeout(wait, process.ended()).await {
                        return Err(Outcome::VmmEnded(end));
                    }
                }
                None => sleep(wait).await,
            }
            wait = longest.min(wait.saturating_mul(2));
        }
    }
}
