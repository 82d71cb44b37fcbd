//! Every pair of state and event has an answer, and what holds nothing is clean.

use super::*;
use std::fmt::Write;

fn states() -> Vec<VmState> {
    use VmState as S;
    let failed = S::Failed { cause: FailureCause::VmmGone };
    vec![
        S::Reserved,
        S::Launching,
        S::Registering,
        S::Running,
        S::Paused,
        S::Saving { then_running: true },
        S::Saving { then_running: false },
        S::HandingOver { then_running: true },
        S::HandingOver { then_running: false },
        S::SwappingOut { mode: SwapMode::Page },
        S::SwappingOut { mode: SwapMode::Hibernate },
        S::SwappedOut { mode: SwapMode::Page },
        S::SwappedOut { mode: SwapMode::Hibernate },
        S::Waking { mode: SwapMode::Page },
        S::Waking { mode: SwapMode::Hibernate },
        S::Sending,
        S::HandedOver,
        S::Arriving { returning: false },
        S::Arriving { returning: true },
        S::Stopping,
        S::Stopped,
        failed,
        S::Gone,
    ]
}

fn events() -> Vec<Event> {
    let cause = FailureCause::GuestPanic;
    let mut events = vec![
        Event::LaunchAsked(Origin::Image),
        Event::LaunchAsked(Origin::Bundle),
        Event::LaunchAsked(Origin::Pool),
        Event::LaunchAsked(Origin::Build),
        Event::SnapshotAsked { live: false },
        Event::SnapshotAsked { live: true },
        Event::HandOverAsked,
        Event::MigrateAsked,
        Event::ArriveAsked,
        Event::ForgetLeft,
        Event::SwapOutAsked(SwapMode::Page),
        Event::SwapOutAsked(SwapMode::Hibernate),
        Event::WakeAsked,
        Event::PauseAsked,
        Event::ResumeAsked,
        Event::StopAsked,
        Event::KillAsked,
        Event::RemoveAsked,
    ];
    let goals = [Goal::Launch, Goal::Pause, Goal::Resume, Goal::Stop, Goal::Remove];
    events.extend(goals.map(Event::Done));
    let goals = [Goal::Build, Goal::Snapshot, Goal::Undo, Goal::Enlist, Goal::Register];
    events.extend(goals.map(Event::Done));
    events.extend([Goal::SwapOut, Goal::Wake, Goal::HandOver].map(Event::Done));
    events.extend([Goal::Migrate, Goal::Leave, Goal::Arrive].map(Event::Done));
    events.extend([Event::WorkFailed { cause: cause.clone() }, Event::UndoFailed { cause: cause.clone() }]);
    events.extend([Event::VmmStopped, Event::VmmFailed { cause }]);
    events
}

fn shown_state(state: &VmState) -> String {
    if let VmState::SwappingOut { mode } | VmState::SwappedOut { mode } | VmState::Waking { mode } = state {
        return format!("{} {}", state.name(), mode.name());
    }
    if *state == (VmState::Saving { then_running: false }) {
        return "saving paused".to_owned();
    }
    if *state == (VmState::Arriving { returning: true }) {
        return "arriving back".to_owned();
    }
    if *state == (VmState::HandingOver { then_running: false }) {
        return "handing_over paused".to_owned();
    }
    state.name().to_owned()
}

#[test]
fn the_whole_matrix_is_as_in_the_golden_file() {
    let mut text = String::new();
    for state in states() {
        for event in events() {
            let next = match step(&state, &event) {
                Ok(Step { state, effects }) if effects.is_empty() => shown_state(&state),
                Ok(Step { state, effects }) => {
                    let names: Vec<_> = effects.iter().map(|effect| effect.name()).collect();
                    format!("{} by {}", shown_state(&state), names.join(" "))
                }
                Err(Denied { .. }) => "-".to_owned(),
            };
            // Without the cause, which is the same for all.
            let shown = format!("{event:?}");
            let event = shown.split(' ').next().unwrap_or_default();
            let _ = writeln!(text, "{:<22} {event:<23} {next}", shown_state(&state));
        }
    }
    crate::agent::golden::check("vm_state.txt", &text);
}

#[test]
fn what_holds_nothing_is_reached_only_with_cleaning() {
    for state in states() {
        for event in events() {
            let Ok(next) = step(&state, &event) else { continue };
            let ends = state.holds_resources() && !next.state.holds_resources();
            // From `stopping` the cleaning was done before (or could not be, which the record then says).
            if ends && state != VmState::Stopping {
                assert!(next.effects.contains(&Effect::EndVmm), "{state:?} {event:?}");
                assert!(next.effects.contains(&Effect::RemoveNetwork), "{state:?} {event:?}");
                assert!(next.effects.contains(&Effect::ReleaseUid), "{state:?} {event:?}");
            }
        }
    }
}
