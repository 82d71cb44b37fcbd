//! Which state a migration is in, by its operations.

use super::*;
use crate::agent::migration_record::MovePolicy;
use crate::agent::record::OperationRecord;
use crate::ids::OperationId;

fn way(number: u8) -> MigrationRecord {
    let id = MigrationId::from_random([number; 10]);
    MigrationRecord { id, peer: "other".to_owned(), host: 2, policy: MovePolicy::default() }
}

fn operation(number: u8, goal: Goal, state: OperationState, done: &[Effect]) -> OperationRecord {
    let step = |&effect| StepRecord { effect, state: StepState::Done, took_us: Some(1), note: None };
    OperationRecord {
        id: OperationId::from_random([number; 10]),
        vm: VmId::from_random([1; 10]),
        goal,
        then_remove: false,
        state,
        steps: done.iter().map(step).collect(),
        makes: None,
        moved: None,
        migration: Some(way(7)),
        error: None,
        created_at: UnixNanos(number.into()),
        ended_at: (state != OperationState::Running).then_some(UnixNanos(100 + u64::from(number))),
    }
}

/// Goal and state of an operation, and which of its effects are done.
type Part = (Goal, OperationState, &'static [Effect]);

#[test]
fn a_migration_is_as_far_as_its_last_operation() {
    use OperationState::{Cancelled, Failed, Running, Succeeded};
    let cases: [(&[Part], MigrationState); 12] = [
        (&[(Goal::Migrate, Running, &[])], MigrationState::Preparing),
        (&[(Goal::Migrate, Running, &[Effect::ArrangeArrival])], MigrationState::Copying),
        (&[(Goal::Migrate, Succeeded, &[]), (Goal::Leave, Running, &[])], MigrationState::HandedOver),
        (&[(Goal::Migrate, Succeeded, &[]), (Goal::Leave, Succeeded, &[])], MigrationState::Completed),
        (&[(Goal::Migrate, Succeeded, &[]), (Goal::Leave, Failed, &[])], MigrationState::Failed),
        (&[(Goal::Migrate, Failed, &[]), (Goal::Undo, Running, &[])], MigrationState::RollingBack),
        (&[(Goal::Migrate, Failed, &[]), (Goal::Undo, Succeeded, &[])], MigrationState::Failed),
        (&[(Goal::Migrate, Cancelled, &[]), (Goal::Undo, Succeeded, &[])], MigrationState::Cancelled),
        (&[(Goal::Arrive, Running, &[])], MigrationState::Receiving),
        (&[(Goal::Arrive, Running, &[Effect::ReceiveMachine])], MigrationState::Ready),
        (&[(Goal::Arrive, Running, &[Effect::ReceiveMachine, Effect::AwaitDecision])], MigrationState::Starting),
        (&[(Goal::Arrive, Succeeded, &[])], MigrationState::Completed),
    ];
    for (parts, wanted) in cases {
        let mut operations: Vec<OperationRecord> =
            (1..).zip(parts).map(|(number, (goal, state, done))| operation(number, *goal, *state, done)).collect();
        operations.reverse();
        let views = views(&operations);
        assert_eq!(views.len(), 1, "{parts:?}");
        assert_eq!(views[0].state, wanted, "{parts:?}");
        assert_eq!(views[0].ended_at.is_some(), wanted.is_final(), "{parts:?}");
        assert_eq!(views[0].created_at, UnixNanos(1), "{parts:?}");
    }
}

#[test]
fn operations_of_nothing_else_are_among_them() {
    let mut other = operation(9, Goal::Stop, OperationState::Succeeded, &[]);
    other.migration = None;
    assert!(views(&[other]).is_empty());
}
