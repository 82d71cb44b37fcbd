//! What a VM may do next: a pure step function. It decides; the VM's actor performs.
//!
//! ```text
//! reserved ─launch─▶ launching ─▶ running ⇄ paused
//!                        │           │        │
//!                        ▼           ▼        ▼
//!                     failed      stopping ─▶ stopped          any of stopped, failed ─remove─▶ gone
//!
//! launching ─in a cluster─▶ registering ─▶ running        running, paused ─snapshot─▶ saving ─▶ as before
//! ```
//! What is asked of a VM that is `saving` waits until that is over.
//! A VM that a bundle is built from is launched, warmed up, saved and stopped by one list of effects; it is forgotten
//! afterwards.
//!
//! The new state is written to the ledger together with the effects that lead on from it, before the first of them is
//! performed. So a record never says less than what may be there, and performing the effects again is always right.
//!
//! The states of later work (swap-out, migration) are listed so that records and clients know their names; nothing leads
//! to them yet.

use serde::{Deserialize, Serialize};

use super::effect::Effect;

/// What a VM is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum VmState {
    /// It has an id, a name and a uid; nothing else exists.
    Reserved,
    /// From the first effect of a launch until the guest agent has its identity.
    Launching,
    /// Waiting for the guest's registration with its cluster.
    Registering,
    /// The guest runs and answers.
    Running,
    /// No vCPU runs; memory is kept.
    Paused,
    /// Its state is being written to a bundle.
    Saving {
        /// Whether it ran before, and is to run again.
        then_running: bool,
    },
    /// Its state is being written so that its process can end.
    SwappingOut,
    /// It has no process; its state is kept.
    SwappedOut,
    /// Its state is on the way to another host.
    Sending,
    /// Another host owns it.
    HandedOver,
    /// Its state is coming from another host.
    Arriving,
    /// It is being shut down or cleaned up.
    Stopping,
    /// It ended as asked, or its guest powered off. Only the record is left.
    Stopped,
    /// It ended otherwise. Only the record is left.
    Failed {
        /// Why.
        #[serde(flatten)]
        cause: FailureCause,
    },
    /// It is being forgotten.
    Gone,
}

/// Why a VM failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum FailureCause {
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest did what its virtual processor cannot go on from.
    GuestFault {
        /// What KVM said.
        detail: String,
    },
    /// The guest agent did not answer in time.
    GuestUnreachable {
        /// How long was waited, in milliseconds, and what the last try said.
        detail: String,
    },
    /// The VMM gave up and said why.
    VmmError {
        /// Its words.
        detail: String,
    },
    /// The VMM was ended by a signal.
    VmmKilled {
        /// Linux signal number.
        signal: i32,
    },
    /// The VMM exited without last words.
    VmmExited {
        /// Its exit code.
        code: i32,
    },
    /// The VMM was gone when the agent looked for it, and left no last words.
    VmmGone,
    /// The kernel, initrd or their fit into memory is wrong.
    BadImage {
        /// What is wrong.
        detail: String,
    },
    /// The host refused something.
    Host {
        /// What failed.
        detail: String,
    },
    /// The bundle cannot be made or restored.
    Bundle {
        /// What is wrong.
        detail: String,
    },
    /// The program that warms a guest up failed, or did not get ready in time.
    WarmUp {
        /// What it said.
        detail: String,
    },
    /// The guest did not register with its cluster.
    NotRegistered {
        /// What happened instead.
        detail: String,
    },
    /// The agent was restarted in the middle of something that is not begun again.
    Interrupted,
}

impl FailureCause {
    /// The cause's name, as in records and answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::GuestPanic => "guest_panic",
            Self::GuestFault { .. } => "guest_fault",
            Self::GuestUnreachable { .. } => "guest_unreachable",
            Self::VmmError { .. } => "vmm_error",
            Self::VmmKilled { .. } => "vmm_killed",
            Self::VmmExited { .. } => "vmm_exited",
            Self::VmmGone => "vmm_gone",
            Self::BadImage { .. } => "bad_image",
            Self::Host { .. } => "host",
            Self::Bundle { .. } => "bundle",
            Self::WarmUp { .. } => "warm_up",
            Self::NotRegistered { .. } => "not_registered",
            Self::Interrupted => "interrupted",
        }
    }

    /// What is known beyond the name.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::GuestPanic => Some("the guest's kernel panicked".to_owned()),
            Self::VmmGone => Some("the VMM of an earlier agent ended without last words".to_owned()),
            Self::VmmKilled { signal } => Some(format!("killed by signal {signal}")),
            Self::VmmExited { code } => Some(format!("exit code {code}")),
            Self::Interrupted => Some("the agent was restarted in the middle of it".to_owned()),
            Self::GuestFault { detail }
            | Self::GuestUnreachable { detail }
            | Self::VmmError { detail }
            | Self::BadImage { detail }
            | Self::Host { detail }
            | Self::Bundle { detail }
            | Self::WarmUp { detail }
            | Self::NotRegistered { detail } => Some(detail.clone()),
        }
    }
}

impl VmState {
    /// The state's name, as in records, events and answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Launching => "launching",
            Self::Registering => "registering",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saving { .. } => "saving",
            Self::SwappingOut => "swapping_out",
            Self::SwappedOut => "swapped_out",
            Self::Sending => "sending",
            Self::HandedOver => "handed_over",
            Self::Arriving => "arriving",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed { .. } => "failed",
            Self::Gone => "gone",
        }
    }

    /// Whether a VMM, a directory and a uid may belong to a VM in this state.
    pub const fn holds_resources(&self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed { .. } | Self::Gone)
    }

    /// Whether it ended and waits to be removed.
    pub const fn has_ended(&self) -> bool {
        matches!(self, Self::Stopped | Self::Failed { .. })
    }
}

/// What happens to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// Somebody wants it to run.
    LaunchAsked(Origin),
    /// Somebody wants a bundle of it.
    SnapshotAsked,
    /// Somebody wants it paused.
    PauseAsked,
    /// Somebody wants it to go on.
    ResumeAsked,
    /// Somebody wants it to end, its guest shut down first.
    StopAsked,
    /// Somebody wants it to end at once.
    KillAsked,
    /// Somebody wants it forgotten.
    RemoveAsked,
    /// The effects of the state were performed, with this in mind.
    Done(Goal),
    /// One of the effects failed for good.
    WorkFailed {
        /// Why.
        cause: FailureCause,
    },
    /// So did one of those that were to take a failed snapshot back.
    UndoFailed {
        /// Why.
        cause: FailureCause,
    },
    /// Its VMM ended by itself, and the guest had ended as asked or by its own wish.
    VmmStopped,
    /// Its VMM ended otherwise.
    VmmFailed {
        /// Why.
        cause: FailureCause,
    },
}

/// What a VM is launched from, and what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// From an image, to run.
    Image,
    /// From a bundle, to run.
    Bundle,
    /// From an image, to become a bundle.
    Build,
}

/// What a list of effects leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The guest runs and has its identity.
    Launch,
    /// No vCPU runs.
    Pause,
    /// The vCPUs run again and the guest's clock is right.
    Resume,
    /// Nothing but the record is left.
    Stop,
    /// Nothing is left.
    Remove,
    /// There is a bundle of it, and nothing else is wanted of it.
    Build,
    /// There is a bundle of it, and it goes on as before.
    Snapshot,
    /// It goes on as before a snapshot that failed.
    Undo,
    /// The guest runs, has its identity, and is to register.
    Enlist,
    /// The guest has registered.
    Register,
}

/// The event asks for something that is not possible in this state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not possible while the VM is {}", state.name())]
pub struct Denied {
    /// The state it is in.
    pub state: VmState,
}

/// A decision: the state to record, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// The state from now on.
    pub state: VmState,
    /// What to do, in this order.
    pub effects: Vec<Effect>,
}

fn step_to(state: VmState, effects: &[Effect]) -> Result<Step, Denied> {
    Ok(Step { state, effects: effects.to_vec() })
}

const LAUNCH: [Effect; 7] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::StartVmm,
    Effect::BuildMachine,
    Effect::RunMachine,
    Effect::GreetGuest,
    Effect::OpenNetwork,
];
const LAUNCH_FROM_BUNDLE: [Effect; 7] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::StartVmm,
    Effect::RestoreMachine,
    Effect::RunMachine,
    Effect::GreetGuest,
    Effect::OpenNetwork,
];
/// The jail stays closed: nothing reaches a guest that has not got its identity for good.
const BUILD: [Effect; 11] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::StartVmm,
    Effect::BuildMachine,
    Effect::RunMachine,
    Effect::GreetGuest,
    Effect::WarmUp,
    Effect::QuiesceGuest,
    Effect::HoldMachine,
    Effect::SaveMachine,
    Effect::CommitBundle,
];
/// The guest goes on before the bundle is made durable: that takes longer than the save, and needs no pause.
const SNAPSHOT: [Effect; 6] = [
    Effect::QuiesceGuest,
    Effect::HoldMachine,
    Effect::SaveMachine,
    Effect::RunMachine,
    Effect::ThawGuest,
    Effect::CommitBundle,
];
const SNAPSHOT_PAUSED: [Effect; 2] = [Effect::SaveMachine, Effect::CommitBundle];
const UNDO_SNAPSHOT: [Effect; 3] = [Effect::DiscardSaved, Effect::RunMachine, Effect::ThawGuest];
const RESUME: [Effect; 2] = [Effect::RunMachine, Effect::SetGuestClock];
const CLEAN: [Effect; 5] =
    [Effect::EndVmm, Effect::KeepRemains, Effect::RemoveNetwork, Effect::RemoveDirectory, Effect::ReleaseUid];
const SHUT_DOWN: [Effect; 7] = [
    Effect::RunMachine,
    Effect::ShutDownGuest,
    Effect::EndVmm,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
const FORGET: [Effect; 5] =
    [Effect::EndVmm, Effect::RemoveNetwork, Effect::RemoveDirectory, Effect::ReleaseUid, Effect::Forget];

/// The next state and what to do, or why not. Every pair of state and event has an answer; the golden file
/// `tests/golden/vm_state.txt` shows them all.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "whatever is not allowed is denied; the golden file shows all pairs"
)]
pub(super) fn step(state: &VmState, event: &Event) -> Result<Step, Denied> {
    use VmState as S;
    let denied = || Err(Denied { state: state.clone() });
    let stay = || step_to(state.clone(), &[]);
    match event {
        Event::LaunchAsked(origin) => match state {
            // Launching again is what an agent does that finds a launch its predecessor did not finish.
            S::Reserved | S::Launching => match origin {
                Origin::Image => step_to(S::Launching, &LAUNCH),
                Origin::Bundle => step_to(S::Launching, &LAUNCH_FROM_BUNDLE),
                Origin::Build => step_to(S::Launching, &BUILD),
            },
            _ => denied(),
        },
        Event::SnapshotAsked => match state {
            S::Running => step_to(S::Saving { then_running: true }, &SNAPSHOT),
            S::Paused => step_to(S::Saving { then_running: false }, &SNAPSHOT_PAUSED),
            _ => denied(),
        },
        Event::PauseAsked => match state {
            S::Running => step_to(S::Running, &[Effect::HoldMachine]),
            S::Paused => stay(),
            _ => denied(),
        },
        Event::ResumeAsked => match state {
            S::Paused => step_to(S::Paused, &RESUME),
            S::Running => stay(),
            _ => denied(),
        },
        Event::StopAsked => match state {
            S::Running => step_to(S::Stopping, &SHUT_DOWN[1..]),
            S::Paused => step_to(S::Stopping, &SHUT_DOWN),
            // A guest that is not up yet has nothing to shut down.
            S::Reserved | S::Launching | S::Registering | S::Stopping => step_to(S::Stopping, &CLEAN),
            S::Stopped | S::Failed { .. } => stay(),
            _ => denied(),
        },
        Event::KillAsked => match state {
            S::Reserved | S::Launching | S::Registering | S::Running | S::Paused | S::Saving { .. } | S::Stopping => {
                step_to(S::Stopping, &CLEAN)
            }
            S::Stopped | S::Failed { .. } => stay(),
            _ => denied(),
        },
        Event::RemoveAsked => match state {
            S::Stopped | S::Failed { .. } | S::Gone => step_to(S::Gone, &FORGET),
            _ => denied(),
        },
        Event::Done(goal) => match (state, goal) {
            (S::Launching, Goal::Launch) | (S::Paused, Goal::Resume) => step_to(S::Running, &[]),
            (S::Running, Goal::Pause) => step_to(S::Paused, &[]),
            (S::Stopping, Goal::Stop) => step_to(S::Stopped, &[]),
            (S::Launching, Goal::Build) => step_to(S::Stopped, &CLEAN),
            (S::Launching, Goal::Enlist) => step_to(S::Registering, &[Effect::Register]),
            (S::Registering, Goal::Register) => step_to(S::Running, &[]),
            (S::Saving { then_running }, Goal::Snapshot | Goal::Undo) => {
                step_to(if *then_running { S::Running } else { S::Paused }, &[])
            }
            // Cleaning up after an end, and forgetting, change nothing that is told of the VM.
            (S::Stopped | S::Failed { .. }, Goal::Stop) | (S::Gone, Goal::Remove) => stay(),
            _ => denied(),
        },
        Event::WorkFailed { cause } => match state {
            S::Launching | S::Registering => step_to(S::Failed { cause: cause.clone() }, &CLEAN),
            S::Saving { then_running: true } => step_to(state.clone(), &UNDO_SNAPSHOT),
            S::Saving { then_running: false } => step_to(state.clone(), &UNDO_SNAPSHOT[..1]),
            S::Stopping => step_to(S::Failed { cause: cause.clone() }, &[]),
            S::Running | S::Paused | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
        Event::UndoFailed { cause } => match state {
            S::Saving { .. } => step_to(S::Failed { cause: cause.clone() }, &CLEAN),
            _ => denied(),
        },
        Event::VmmStopped => match state {
            S::Launching | S::Registering | S::Running | S::Paused | S::Saving { .. } => step_to(S::Stopped, &CLEAN),
            S::Stopping | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
        Event::VmmFailed { cause } => match state {
            S::Launching | S::Registering | S::Running | S::Paused | S::Saving { .. } => {
                step_to(S::Failed { cause: cause.clone() }, &CLEAN)
            }
            S::Stopping | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
    }
}

#[cfg(test)]
mod tests {
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
            S::SwappingOut,
            S::SwappedOut,
            S::Sending,
            S::HandedOver,
            S::Arriving,
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
            Event::LaunchAsked(Origin::Build),
            Event::SnapshotAsked,
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
        events.extend([Event::WorkFailed { cause: cause.clone() }, Event::UndoFailed { cause: cause.clone() }]);
        events.extend([Event::VmmStopped, Event::VmmFailed { cause }]);
        events
    }

    #[test]
    fn the_whole_matrix_is_as_in_the_golden_file() {
        let mut text = String::new();
        for state in states() {
            for event in events() {
                let next = match step(&state, &event) {
                    Ok(Step { state, effects }) if effects.is_empty() => state.name().to_owned(),
                    Ok(Step { state, effects }) => {
                        let names: Vec<_> = effects.iter().map(|effect| effect.name()).collect();
                        format!("{} by {}", state.name(), names.join(" "))
                    }
                    Err(Denied { .. }) => "-".to_owned(),
                };
                // Without the cause, which is the same for all.
                let shown = format!("{event:?}");
                let event = shown.split(' ').next().unwrap_or_default();
                let was =
                    if state == (VmState::Saving { then_running: false }) { "saving paused" } else { state.name() };
                let _ = writeln!(text, "{was:<13} {event:<20} {next}");
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
}
