//! What becomes of bundles that an earlier agent was making.

use super::*;
use crate::agent::fixture::vm;
use crate::agent::record::{BuildSpec, StepRecord};
use crate::clock::UnixNanos;
use crate::ids::OperationId;

const RUNNING: VmState = VmState::Saving { then_running: true };

/// An operation with the first `done` of these steps done.
fn operation(goal: Goal, effects: &[Effect], done: usize) -> OperationRecord {
    let state = |index| if index < done { StepState::Done } else { StepState::Pending };
    let step = |(index, effect): (usize, &Effect)| {
        let (effect, state) = (*effect, state(index));
        StepRecord { effect, state, took_us: None, note: None }
    };
    OperationRecord {
        id: OperationId::from_random([1; 10]),
        vm: vm(1, "web").id,
        goal,
        then_remove: goal == Goal::Build,
        state: OperationState::Running,
        steps: effects.iter().enumerate().map(step).collect(),
        makes: None,
        error: None,
        created_at: UnixNanos(1),
        ended_at: None,
    }
}

fn snapshot(done: usize) -> OperationRecord {
    let effects = [Effect::HoldMachine, Effect::SaveMachine, Effect::RunMachine, Effect::CommitBundle];
    operation(Goal::Snapshot, &effects, done)
}

fn build(done: usize) -> OperationRecord {
    let effects = [Effect::StartVmm, Effect::WarmUp, Effect::SaveMachine, Effect::CommitBundle];
    operation(Goal::Build, &effects, done)
}

fn in_state(state: VmState) -> VmRecord {
    VmRecord { state, ..vm(1, "web") }
}

#[test]
fn what_is_saved_becomes_a_bundle_and_the_rest_is_taken_back() {
    for done in 0..=4 {
        let (saved, record) = (done >= 2, in_state(RUNNING));
        let wanted = if saved { Plan::Continue(snapshot(done)) } else { Plan::Undo(snapshot(done)) };
        assert_eq!(plan(&record, Some(snapshot(done)), true), wanted, "{done} steps done");
        assert_eq!(plan(&record, Some(snapshot(done)), false), Plan::Ended(Some(snapshot(done))));
        assert_eq!(still_to_commit(&[snapshot(done)]).len(), usize::from(saved));
    }
    for done in 0..=4 {
        let (saved, record) = (done >= 3, in_state(VmState::Launching));
        let wanted = if saved { Plan::Continue(build(done)) } else { Plan::Undo(build(done)) };
        assert_eq!(plan(&record, Some(build(done)), true), wanted, "{done} steps done");
        // Nothing was there yet: it can begin anew.
        let wanted = if done == 0 { Plan::Continue(build(0)) } else { Plan::Ended(Some(build(done))) };
        assert_eq!(plan(&record, Some(build(done)), false), wanted, "{done} steps done, and the VMM is gone");
        assert_eq!(still_to_commit(&[build(done)]).len(), usize::from(saved));
    }
}

#[test]
fn a_snapshot_that_is_taken_back_is_taken_back_again() {
    let effects = [Effect::DiscardSaved, Effect::RunMachine, Effect::ThawGuest];
    let undo = |done| operation(Goal::Undo, &effects, done);
    assert_eq!(plan(&in_state(RUNNING), Some(undo(2)), true), Plan::Continue(undo(0)));
    assert_eq!(plan(&in_state(RUNNING), Some(undo(2)), false), Plan::Ended(Some(undo(2))));
    assert_eq!(plan(&in_state(RUNNING), None, true), Plan::Clean, "no VM stays in saving");
}

#[test]
fn what_was_there_to_become_a_bundle_is_forgotten() {
    let spec = BuildSpec { warmup: None, ready_marker: None, timeout_s: 1 };
    let mut ended = in_state(VmState::Stopped);
    assert_eq!(plan(&ended, None, false), Plan::Rest);
    ended.spec.build = Some(spec);
    assert_eq!(plan(&ended, None, false), Plan::Clean);
}
