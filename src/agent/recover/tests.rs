//! What becomes of bundles that an earlier agent was making.

use super::*;
use crate::agent::fixture::vm;
use crate::agent::record::{BuildSpec, StepRecord};
use crate::agent::vm_state::SwapMode;
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
        moved: None,
        migration: None,
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
        assert_eq!(plan(&record, Some(snapshot(done)), true, None), wanted, "{done} steps done");
        assert_eq!(plan(&record, Some(snapshot(done)), false, None), Plan::Ended(Some(snapshot(done))));
        assert_eq!(still_to_commit(&[snapshot(done)]).len(), usize::from(saved));
    }
    for done in 0..=4 {
        let (saved, record) = (done >= 3, in_state(VmState::Launching));
        let wanted = if saved { Plan::Continue(build(done)) } else { Plan::Undo(build(done)) };
        assert_eq!(plan(&record, Some(build(done)), true, None), wanted, "{done} steps done");
        // Nothing was there yet: it can begin anew.
        let wanted = if done == 0 { Plan::Continue(build(0)) } else { Plan::Ended(Some(build(done))) };
        assert_eq!(plan(&record, Some(build(done)), false, None), wanted, "{done} steps done, and the VMM is gone");
        assert_eq!(still_to_commit(&[build(done)]).len(), usize::from(saved));
    }
}

#[test]
fn a_snapshot_that_is_taken_back_is_taken_back_again() {
    let effects = [Effect::DiscardSaved, Effect::RunMachine, Effect::ThawGuest];
    let undo = |done| operation(Goal::Undo, &effects, done);
    assert_eq!(plan(&in_state(RUNNING), Some(undo(2)), true, None), Plan::Continue(undo(0)));
    assert_eq!(plan(&in_state(RUNNING), Some(undo(2)), false, None), Plan::Ended(Some(undo(2))));
    assert_eq!(plan(&in_state(RUNNING), None, true, None), Plan::Clean, "no VM stays in saving");
}

#[test]
fn what_was_there_to_become_a_bundle_is_forgotten() {
    let spec = BuildSpec { warmup: None, ready_marker: None, timeout_s: 1 };
    let mut ended = in_state(VmState::Stopped);
    assert_eq!(plan(&ended, None, false, None), Plan::Rest);
    ended.spec.build = Some(spec);
    assert_eq!(plan(&ended, None, false, None), Plan::Clean);
}

#[test]
fn what_contradicts_itself_is_left_alone_but_for_its_end() {
    let doubt = Doubt::OtherSecret { pid: 7 };
    let quarantined = Plan::Quarantine(doubt.clone());
    for state in [VmState::Running, VmState::Paused, RUNNING] {
        assert_eq!(plan(&in_state(state.clone()), None, true, Some(doubt.clone())), quarantined);
        assert_eq!(plan(&in_state(state), Some(snapshot(2)), true, Some(doubt.clone())), quarantined);
    }
    let stop = operation(Goal::Stop, &[Effect::EndVmm], 0);
    let record = in_state(VmState::Stopping);
    assert_eq!(plan(&record, Some(stop.clone()), true, Some(doubt)), Plan::Continue(stop));
}

#[test]
fn of_a_hibernated_vm_the_file_or_the_process_is_the_truth() {
    let (out, waking) = (SwapMode::Hibernate, VmState::Waking { mode: SwapMode::Hibernate });
    let record = in_state(VmState::SwappedOut { mode: out });
    assert_eq!(plan(&record, None, false, None), Plan::Rest);
    assert_eq!(plan(&record, None, true, None), Plan::Quarantine(Doubt::ProcessBesideFile { pid: 0 }));
    let effects = [Effect::HoldMachine, Effect::SealMachine, Effect::KeepSealed, Effect::EndVmm];
    let swap_out = |done| operation(Goal::SwapOut, &effects, done);
    let record = in_state(VmState::SwappingOut { mode: out });
    for done in 0..=4 {
        let kept = done >= 3;
        let wanted = if kept { Plan::Continue(swap_out(done)) } else { Plan::Undo(swap_out(done)) };
        assert_eq!(plan(&record, Some(swap_out(done)), true, None), wanted, "{done} steps done");
        let wanted = if kept { Plan::Continue(swap_out(done)) } else { Plan::Ended(Some(swap_out(done))) };
        assert_eq!(plan(&record, Some(swap_out(done)), false, None), wanted, "{done} steps done, and it is gone");
    }
    let effects = [Effect::StartVmm, Effect::UnsealMachine, Effect::DiscardSealed, Effect::RunMachine];
    let wake = |done| operation(Goal::Wake, &effects, done);
    for done in 0..=4 {
        assert_eq!(plan(&in_state(waking.clone()), Some(wake(done)), true, None), Plan::Continue(wake(0)));
        let wanted = if done >= 3 { Plan::Ended(Some(wake(done))) } else { Plan::Continue(wake(0)) };
        assert_eq!(plan(&in_state(waking.clone()), Some(wake(done)), false, None), wanted, "{done} steps done");
    }
}

#[test]
fn what_ends_a_hibernated_vm_begins_nothing_again_that_is_over() {
    let effects = [
        Effect::StartVmm,
        Effect::UnsealMachine,
        Effect::DiscardSealed,
        Effect::RunMachine,
        Effect::ShutDownGuest,
        Effect::EndVmm,
        Effect::RemoveDirectory,
    ];
    for (done, lives) in (0..=7).flat_map(|done| [(done, true), (done, false)]) {
        let found = plan(&in_state(VmState::Stopping), Some(operation(Goal::Stop, &effects, done)), lives, None);
        let Plan::Continue(found) = found else { panic!("{done} steps done, lives: {lives}: {found:?}") };
        let steps: Vec<Effect> = found.steps.iter().map(|step| step.effect).collect();
        let over = done >= 6 || done >= 3 && !lives;
        let wanted = match (over, lives) {
            (true, _) => effects[5..].to_vec(),
            (false, true) => effects.to_vec(),
            (false, false) => [&effects[..4], &effects[5..]].concat(),
        };
        assert_eq!(steps, wanted, "{done} steps done, lives: {lives}");
    }
}
