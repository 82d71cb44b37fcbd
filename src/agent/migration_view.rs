//! Migrations as they are shown: what the operations of one say together.

use std::collections::BTreeMap;

use super::effect::Effect;
use super::migration_record::{MigrationRecord, MoveRecord};
use super::record::{OperationError, OperationRecord, OperationState, StepRecord, StepState};
use super::vm_state::Goal;
use crate::clock::UnixNanos;
use crate::ids::{MigrationId, VmId};
use crate::wire::control::SendProgress;

/// Which way a migration goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From here.
    Out,
    /// To here.
    In,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationState {
    /// The other host makes a place for it.
    Preparing,
    /// Its memory is copied while it runs.
    Copying,
    /// It stands still for the rest.
    Critical,
    /// It is the other host's; what is here is taken away.
    HandedOver,
    /// It did not come about, and goes on here.
    RollingBack,
    /// It is coming from the other host.
    Receiving,
    /// It is here, and stands still until the other host has decided.
    Ready,
    /// It is this host's, and about to run.
    Starting,
    /// It runs where it was to go.
    Completed,
    /// It was given up by request.
    Cancelled,
    /// It did not come about.
    Failed,
}

impl MigrationState {
    /// The state's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::Critical => "critical",
            Self::HandedOver => "handed_over",
            Self::RollingBack => "rolling_back",
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

/// A migration, as this host knows it.
#[derive(Debug, Clone)]
pub struct MigrationView {
    /// Where to, or from, and how.
    pub way: MigrationRecord,
    /// The VM.
    pub vm: VmId,
    /// Its name, if it is known here and has one.
    pub vm_name: Option<String>,
    /// Which way it goes.
    pub direction: Direction,
    /// How far it is.
    pub state: MigrationState,
    /// How far the copying is, while it is copied from here.
    pub progress: Option<MigrationProgress>,
    /// What it took, as far as it is known here.
    pub moved: Option<MoveRecord>,
    /// All that was done for it here, in order.
    pub steps: Vec<StepRecord>,
    /// Why it did not come about.
    pub error: Option<OperationError>,
    /// When it began here.
    pub created_at: UnixNanos,
    /// When all was done here.
    pub ended_at: Option<UnixNanos>,
}

/// How far copying a VM's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationProgress {
    /// Rounds that are over.
    pub rounds: u32,
    /// Bytes of guest memory that were to be sent when this round began.
    pub round_bytes: u64,
    /// Those of them that were sent.
    pub round_sent_bytes: u64,
    /// Bytes of guest memory that were sent in all.
    pub sent_bytes: u64,
    /// Bytes a second over the rounds so far; 0 before the first is over.
    pub rate_bytes: u64,
    /// Bytes a second that the guest wrote in the last round.
    pub dirty_rate_bytes: u64,
    /// How long it would stand still if it did now, in nanoseconds; 0 before the first round is over.
    pub pause_expected_ns: u64,
    /// Share of the time in which the vCPUs may run, in percent.
    pub vcpu_share: u8,
}

impl From<SendProgress> for MigrationProgress {
    fn from(said: SendProgress) -> Self {
        let SendProgress { rounds, round_bytes, round_sent_bytes, sent_bytes, .. } = said;
        let SendProgress { rate_bytes, dirty_rate_bytes, pause_expected_ns, vcpu_share, .. } = said;
        Self {
            rounds,
            round_bytes,
            round_sent_bytes,
            sent_bytes,
            rate_bytes,
            dirty_rate_bytes,
            pause_expected_ns,
            vcpu_share,
        }
    }
}

/// How far a migration is, by its operations in the order in which they began.
fn state_of(operations: &[OperationRecord]) -> MigrationState {
    use MigrationState as S;
    let Some(last) = operations.last() else { return S::Failed };
    let is_done = |effect| last.steps.iter().any(|step| step.effect == effect && step.state == StepState::Done);
    match (last.goal, last.state) {
        (Goal::Migrate, OperationState::Running) if is_done(Effect::ArrangeArrival) => S::Copying,
        (Goal::Migrate, OperationState::Running) => S::Preparing,
        // Written in one transaction with what follows.
        (Goal::Migrate, OperationState::Succeeded) | (Goal::Leave, OperationState::Running) => S::HandedOver,
        (Goal::Arrive, OperationState::Running) if is_done(Effect::AwaitDecision) => S::Starting,
        (Goal::Arrive, OperationState::Running) if is_done(Effect::ReceiveMachine) => S::Ready,
        (Goal::Arrive, OperationState::Running) => S::Receiving,
        (Goal::Leave | Goal::Arrive, OperationState::Succeeded) => S::Completed,
        (Goal::Undo, OperationState::Running) => S::RollingBack,
        (Goal::Undo, _) => match operations.iter().find(|operation| operation.goal == Goal::Migrate) {
            Some(sending) if sending.state == OperationState::Cancelled => S::Cancelled,
            Some(_) | None => S::Failed,
        },
        (_, OperationState::Cancelled) => S::Cancelled,
        (_, _) => S::Failed,
    }
}

/// The migrations that operations belong to, newest first. `operations` are newest first.
pub(super) fn views(operations: &[OperationRecord]) -> Vec<MigrationView> {
    let mut order: Vec<(MigrationId, Direction)> = Vec::new();
    let mut parts: BTreeMap<(MigrationId, bool), Vec<OperationRecord>> = BTreeMap::new();
    for operation in operations {
        let Some(way) = &operation.migration else { continue };
        let direction = if operation.goal == Goal::Arrive { Direction::In } else { Direction::Out };
        let part = parts.entry((way.id.clone(), direction == Direction::In)).or_default();
        if part.is_empty() {
            order.push((way.id.clone(), direction));
        }
        part.insert(0, operation.clone());
    }
    order
        .into_iter()
        .filter_map(|(id, direction)| {
            let operations = parts.remove(&(id, direction == Direction::In))?;
            let (first, last) = (operations.first()?, operations.last()?);
            let state = state_of(&operations);
            Some(MigrationView {
                way: first.migration.clone()?,
                vm: first.vm.clone(),
                vm_name: None,
                direction,
                state,
                progress: None,
                moved: operations.iter().rev().find_map(|operation| operation.moved),
                steps: operations.iter().flat_map(|operation| operation.steps.clone()).collect(),
                error: operations.iter().find_map(|operation| operation.error.clone()),
                created_at: first.created_at,
                ended_at: last.ended_at.filter(|_| state.is_final()),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
