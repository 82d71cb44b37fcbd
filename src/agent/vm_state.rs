//! What a VM may do next: a pure step function. It decides; the VM's actor performs.
//!
//! ```text
//! reserved ─launch─▶ launching ─▶ running ⇄ paused
//!                        │           │        │
//!                        ▼           ▼        ▼
//!                     failed      stopping ─▶ stopped          any of stopped, failed ─remove─▶ gone
//!
//! launching ─in a cluster─▶ registering ─▶ running        running, paused ─snapshot─▶ saving ─▶ as before
//!
//! running ─swap out─▶ swapping_out ─▶ swapped_out ─wake─▶ waking ─▶ running
//!
//! running, paused ─hand over─▶ handing_over ─▶ as before, in another process
//!
//! running, paused ─attach, detach─▶ changing_volumes ─▶ as before
//!
//! running ─migrate─▶ sending ─▶ handed_over        at the other host:  arriving ─▶ running
//! ```
//! What is asked of a VM that is `saving`, `handing_over`, `swapping_out` or `waking` waits until that is over.
//! A VM that a bundle is built from is launched, warmed up, saved and stopped by one list of effects; it is forgotten
//! afterwards.
//!
//! The new state is written to the ledger together with the effects that lead on from it, before the first of them is
//! performed. So a record never says less than what may be there, and performing the effects again is always right.
//!
//! Of a hibernated VM exactly one of two is the truth: its process, until [`Effect::KeepSealed`] is done, or its sealed
//! file, until [`Effect::DiscardSealed`] is. A guest that may have run since is never taken back to its file.
//!
//! Of a VM that is handed over, its process is the machine until [`Effect::MoveMachine`] is done, and the other one from
//! then on: the process that its record names, at any time. The other of the two is ended, whichever way it goes.
//!
//! A VM that is migrated is the source's until its record there says [`VmState::HandedOver`], in the transaction that ends
//! its operation; from then on it is the target's, whose copy has not run before. The source's ledger is what decides, and
//! what the target asks when it does not know.

use serde::{Deserialize, Serialize};

use super::effect::Effect;
pub use super::failure::FailureCause;

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
    /// Another process takes the machine over from its process.
    HandingOver {
        /// Whether it ran before, and is to run again.
        then_running: bool,
    },
    /// Volumes are being attached to it or taken from it.
    ChangingVolumes {
        /// Whether it runs.
        then_running: bool,
    },
    /// It stands still, and its memory is being moved out.
    SwappingOut {
        /// Where to.
        mode: SwapMode,
    },
    /// It stands still, and its memory is elsewhere.
    SwappedOut {
        /// Where.
        mode: SwapMode,
    },
    /// It is on its way back from there.
    Waking {
        /// From where.
        mode: SwapMode,
    },
    /// Its state is on the way to another host.
    Sending,
    /// Another host owns it.
    HandedOver,
    /// Its state is coming from another host.
    Arriving {
        /// Whether its addresses are of this host's subnet: it is coming back.
        returning: bool,
    },
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

/// Where an idle VM's memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapMode {
    /// To the host's swap; its process stays.
    Page,
    /// To an encrypted file together with its state; its process ends.
    Hibernate,
}

impl SwapMode {
    /// The mode's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Hibernate => "hibernate",
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
            Self::HandingOver { .. } => "handing_over",
            Self::ChangingVolumes { .. } => "changing_volumes",
            Self::SwappingOut { .. } => "swapping_out",
            Self::SwappedOut { .. } => "swapped_out",
            Self::Waking { .. } => "waking",
            Self::Sending => "sending",
            Self::HandedOver => "handed_over",
            Self::Arriving { .. } => "arriving",
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
    SnapshotAsked {
        /// Whether most of memory is copied while the guest runs.
        live: bool,
    },
    /// Somebody wants it in another process.
    HandOverAsked,
    /// Somebody wants it to have other volumes: those that its record says.
    VolumesAsked,
    /// Somebody wants it on another host.
    MigrateAsked,
    /// Another host wants to hand it over.
    ArriveAsked,
    /// What is here of one that was handed over is of no use.
    ForgetLeft,
    /// Somebody, or the host's need of memory, wants its memory moved out.
    SwapOutAsked(SwapMode),
    /// Somebody, or a packet for it, wants it back.
    WakeAsked,
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
    /// So did one that nothing is left to take back for: on the way back from a failed snapshot, swap-out or
    /// hand-over, or behind the point from which a wake or hand-over does not go back.
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
    /// From a machine of a bundle that was kept ready, to run.
    Pool,
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
    /// It goes on as before a snapshot, swap-out or hand-over that failed.
    Undo,
    /// Its memory is out.
    SwapOut,
    /// It is back, and runs.
    Wake,
    /// The guest runs, has its identity, and is to register.
    Enlist,
    /// The guest has registered.
    Register,
    /// It goes on as before, in another process.
    HandOver,
    /// It has the volumes that its record says.
    ChangeVolumes,
    /// It stands ready on another host, and still here.
    Migrate,
    /// It goes on on the other host, and nothing but its record and a way to there is left.
    Leave,
    /// It goes on here.
    Arrive,
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

const LAUNCH: [Effect; 11] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::AcquireLeases,
    Effect::StartVmm,
    Effect::BuildMachine,
    Effect::PlugVolumes,
    Effect::ConnectVolumes,
    Effect::RunMachine,
    Effect::GreetGuest,
    Effect::MountVolumes,
    Effect::OpenNetwork,
];
/// What comes before `RunMachine` was done before, of a machine that was kept ready.
const LAUNCH_FROM_BUNDLE: [Effect; 11] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::StartVmm,
    Effect::RestoreMachine,
    Effect::AcquireLeases,
    Effect::PlugVolumes,
    Effect::ConnectVolumes,
    Effect::RunMachine,
    Effect::GreetGuest,
    Effect::MountVolumes,
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
/// The guest goes on before the bundle is made durable: that takes longer than the save, and needs no pause. The first is
/// that of live ones: the guest runs while most of its memory is copied, with its file systems as they are, and only what
/// is left is saved at rest.
const SNAPSHOT_LIVE: [Effect; 7] = [
    Effect::CopyMemory,
    Effect::QuiesceGuest,
    Effect::HoldMachine,
    Effect::SaveMachine,
    Effect::RunMachine,
    Effect::ThawGuest,
    Effect::CommitBundle,
];
const SNAPSHOT_PAUSED: [Effect; 2] = [Effect::SaveMachine, Effect::CommitBundle];
const UNDO_SNAPSHOT: [Effect; 3] = [Effect::DiscardSaved, Effect::RunMachine, Effect::ThawGuest];
/// The taps are held for the process that takes over: a tap has one opener, whose descriptors can be copied.
const HAND_OVER: [Effect; 10] = [
    Effect::HoldTaps,
    Effect::StartSuccessor,
    Effect::MoveMachine,
    Effect::TakeOver,
    Effect::PlugVolumes,
    Effect::ReconnectVolumes,
    Effect::RunMachine,
    Effect::ReleaseTaps,
    Effect::EndOthers,
    Effect::SetGuestClock,
];
const HAND_OVER_PAUSED: [Effect; 8] = [
    Effect::HoldTaps,
    Effect::StartSuccessor,
    Effect::MoveMachine,
    Effect::TakeOver,
    Effect::PlugVolumes,
    Effect::ReconnectVolumes,
    Effect::ReleaseTaps,
    Effect::EndOthers,
];
/// Of a VM with volumes, the conversion of the first one's lease decides who goes on.
const SEND: [Effect; 3] = [Effect::ArrangeArrival, Effect::SendMachine, Effect::ConvertLease];
const UNDO_SEND: [Effect; 4] = [Effect::SettleLease, Effect::CancelArrival, Effect::RunMachine, Effect::SetGuestClock];
/// Packets are led there before the last that waited here follow: none comes here any more then.
const LEAVE: [Effect; 9] = [
    Effect::ConvertOthers,
    Effect::ConfirmArrival,
    Effect::LeadElsewhere,
    Effect::ForwardPackets,
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::LeaveNetwork,
    Effect::RemoveDirectory,
];
/// It may have been decided before its VMM ended: then it is not this host's end.
const CLEAN_SENDING: [Effect; 9] = [
    Effect::SettleLease,
    Effect::CancelArrival,
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
/// Its volumes' leases stand by before the other host is told that there is a place.
const ARRIVE: [Effect; 10] = [
    Effect::MakeDirectory,
    Effect::MakeNetwork,
    Effect::AcquireLeases,
    Effect::StartVmm,
    Effect::ConnectVolumes,
    Effect::ReceiveMachine,
    Effect::AwaitDecision,
    Effect::PlugVolumes,
    Effect::OpenNetwork,
    Effect::RunMachine,
];
const LEAVE_AGAIN: [Effect; 5] =
    [Effect::EndVmm, Effect::DisconnectVolumes, Effect::ReleaseLeases, Effect::LeaveNetwork, Effect::RemoveDirectory];
/// The other process goes first: from then on none but the recorded one can run the machine.
const UNDO_HAND_OVER: [Effect; 4] = [Effect::EndOthers, Effect::RunMachine, Effect::ReleaseTaps, Effect::SetGuestClock];
const UNDO_HAND_OVER_PAUSED: [Effect; 3] = [Effect::EndOthers, Effect::HoldMachine, Effect::ReleaseTaps];
const CLEAN_BOTH: [Effect; 8] = [
    Effect::EndVmm,
    Effect::EndOthers,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
/// Its taps are held first, so that a packet that comes from then on waits and wakes it.
const PAGE_OUT: [Effect; 3] = [Effect::HoldMachine, Effect::HoldTaps, Effect::PageOut];
const HIBERNATE: [Effect; 5] =
    [Effect::HoldMachine, Effect::HoldTaps, Effect::SealMachine, Effect::KeepSealed, Effect::EndVmm];
const UNDO_PAGE_OUT: [Effect; 3] = [Effect::RunMachine, Effect::ReleaseTaps, Effect::SetGuestClock];
const UNDO_HIBERNATE: [Effect; 4] =
    [Effect::DiscardSealed, Effect::RunMachine, Effect::ReleaseTaps, Effect::SetGuestClock];
const WAKE_PAGED: [Effect; 3] = [Effect::RunMachine, Effect::ReleaseTaps, Effect::SetGuestClock];
/// The file goes before the guest runs: what is in memory is the truth from then on.
const WAKE_HIBERNATED: [Effect; 7] = [
    Effect::StartVmm,
    Effect::UnsealMachine,
    Effect::DiscardSealed,
    Effect::PlugVolumes,
    Effect::RunMachine,
    Effect::ReleaseTaps,
    Effect::SetGuestClock,
];
/// A hibernated guest is woken to be shut down: its file systems are as they were in the middle of things.
const SHUT_DOWN_HIBERNATED: [Effect; 13] = [
    Effect::StartVmm,
    Effect::UnsealMachine,
    Effect::DiscardSealed,
    Effect::PlugVolumes,
    Effect::RunMachine,
    Effect::ShutDownGuest,
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
const RESUME: [Effect; 2] = [Effect::RunMachine, Effect::SetGuestClock];
const CLEAN: [Effect; 7] = [
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
const SHUT_DOWN: [Effect; 9] = [
    Effect::RunMachine,
    Effect::ShutDownGuest,
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::KeepRemains,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
];
const FORGET: [Effect; 7] = [
    Effect::EndVmm,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
    Effect::RemoveNetwork,
    Effect::RemoveDirectory,
    Effect::ReleaseUid,
    Effect::Forget,
];
/// One list for both ways: each step compares what is with what is to be.
const CHANGE_VOLUMES: [Effect; 7] = [
    Effect::UnmountVolumes,
    Effect::AcquireLeases,
    Effect::PlugVolumes,
    Effect::ConnectVolumes,
    Effect::MountVolumes,
    Effect::DisconnectVolumes,
    Effect::ReleaseLeases,
];

fn swap_out(mode: SwapMode) -> Result<Step, Denied> {
    let effects: &[Effect] = match mode {
        SwapMode::Page => &PAGE_OUT,
        SwapMode::Hibernate => &HIBERNATE,
    };
    step_to(VmState::SwappingOut { mode }, effects)
}

const fn waking(mode: SwapMode) -> &'static [Effect] {
    match mode {
        SwapMode::Page => &WAKE_PAGED,
        SwapMode::Hibernate => &WAKE_HIBERNATED,
    }
}

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
                Origin::Pool => step_to(S::Launching, &LAUNCH_FROM_BUNDLE[4..]),
                Origin::Build => step_to(S::Launching, &BUILD),
            },
            _ => denied(),
        },
        Event::SnapshotAsked { live } => match state {
            S::Running if *live => step_to(S::Saving { then_running: true }, &SNAPSHOT_LIVE),
            S::Running => step_to(S::Saving { then_running: true }, &SNAPSHOT_LIVE[1..]),
            S::Paused => step_to(S::Saving { then_running: false }, &SNAPSHOT_PAUSED),
            _ => denied(),
        },
        Event::HandOverAsked => match state {
            S::Running => step_to(S::HandingOver { then_running: true }, &HAND_OVER),
            S::Paused => step_to(S::HandingOver { then_running: false }, &HAND_OVER_PAUSED),
            _ => denied(),
        },
        Event::VolumesAsked => match state {
            S::Running => step_to(S::ChangingVolumes { then_running: true }, &CHANGE_VOLUMES),
            S::Paused => step_to(S::ChangingVolumes { then_running: false }, &CHANGE_VOLUMES),
            _ => denied(),
        },
        Event::MigrateAsked => match state {
            S::Running => step_to(S::Sending, &SEND),
            _ => denied(),
        },
        Event::ArriveAsked => match state {
            S::Reserved => step_to(S::Arriving { returning: false }, &ARRIVE),
            S::HandedOver => step_to(S::Arriving { returning: true }, &ARRIVE),
            _ => denied(),
        },
        Event::ForgetLeft => match state {
            S::HandedOver => step_to(S::Gone, &FORGET),
            _ => denied(),
        },
        Event::SwapOutAsked(mode) => match state {
            S::SwappedOut { mode: is } if is == mode => stay(),
            S::Running => swap_out(*mode),
            // From swap to a file; the other way round it would have to be woken.
            S::SwappedOut { mode: SwapMode::Page } => swap_out(*mode),
            _ => denied(),
        },
        Event::WakeAsked => match state {
            S::Running => stay(),
            S::SwappedOut { mode } => step_to(S::Waking { mode: *mode }, waking(*mode)),
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
            S::Paused | S::SwappedOut { mode: SwapMode::Page } => step_to(S::Stopping, &SHUT_DOWN),
            S::SwappedOut { mode: SwapMode::Hibernate } => step_to(S::Stopping, &SHUT_DOWN_HIBERNATED),
            // A guest that is not up yet has nothing to shut down.
            S::Reserved | S::Launching | S::Registering | S::Stopping => step_to(S::Stopping, &CLEAN),
            S::Stopped | S::Failed { .. } => stay(),
            _ => denied(),
        },
        Event::KillAsked => match state {
            S::Reserved
            | S::Launching
            | S::Registering
            | S::Running
            | S::Paused
            | S::Saving { .. }
            | S::ChangingVolumes { .. }
            | S::SwappingOut { .. }
            | S::SwappedOut { .. }
            | S::Waking { .. }
            | S::Stopping => step_to(S::Stopping, &CLEAN),
            S::HandingOver { .. } => step_to(S::Stopping, &CLEAN_BOTH),
            S::Sending => step_to(S::Stopping, &CLEAN_SENDING),
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
            (S::Saving { then_running }, Goal::Snapshot | Goal::Undo)
            | (S::HandingOver { then_running }, Goal::HandOver | Goal::Undo)
            | (S::ChangingVolumes { then_running }, Goal::ChangeVolumes | Goal::Undo) => {
                step_to(if *then_running { S::Running } else { S::Paused }, &[])
            }
            // Its VMM ended here before that was known.
            (S::Sending | S::Stopping | S::Stopped | S::Failed { .. }, Goal::Migrate) => step_to(S::HandedOver, &LEAVE),
            (S::HandedOver, Goal::Leave) => stay(),
            (S::Sending, Goal::Undo) | (S::Arriving { .. }, Goal::Arrive) => step_to(S::Running, &[]),
            (S::SwappingOut { mode }, Goal::SwapOut) => step_to(S::SwappedOut { mode: *mode }, &[]),
            // A wake that went back ended what it had begun.
            (S::SwappedOut { .. }, Goal::SwapOut) => stay(),
            (S::SwappingOut { .. }, Goal::Undo) | (S::Waking { .. }, Goal::Wake) => step_to(S::Running, &[]),
            // Cleaning up after an end, and forgetting, change nothing that is told of the VM.
            (S::Stopped | S::Failed { .. }, Goal::Stop) | (S::Gone, Goal::Remove) => stay(),
            _ => denied(),
        },
        Event::WorkFailed { cause } => match state {
            S::Launching | S::Registering => step_to(S::Failed { cause: cause.clone() }, &CLEAN),
            S::Saving { then_running: true } => step_to(state.clone(), &UNDO_SNAPSHOT),
            S::Saving { then_running: false } => step_to(state.clone(), &UNDO_SNAPSHOT[..1]),
            S::ChangingVolumes { .. } => step_to(state.clone(), &CHANGE_VOLUMES),
            S::Sending => step_to(S::Sending, &UNDO_SEND),
            // Before it was decided there is nothing of it here that is needed; afterwards it was lost before it ever ran
            // here, and the host it came from tells of that.
            S::Arriving { returning: false } => step_to(S::Gone, &FORGET),
            S::Arriving { returning: true } => step_to(S::HandedOver, &LEAVE_AGAIN),
            // It is the other host's, whatever is left here.
            S::HandedOver => stay(),
            S::HandingOver { then_running: true } => step_to(state.clone(), &UNDO_HAND_OVER),
            S::HandingOver { then_running: false } => step_to(state.clone(), &UNDO_HAND_OVER_PAUSED),
            S::SwappingOut { mode: SwapMode::Page } => step_to(state.clone(), &UNDO_PAGE_OUT),
            S::SwappingOut { mode: SwapMode::Hibernate } => step_to(state.clone(), &UNDO_HIBERNATE),
            S::Waking { mode: SwapMode::Page } => step_to(S::SwappedOut { mode: SwapMode::Page }, &PAGE_OUT[..2]),
            S::Waking { mode: SwapMode::Hibernate } => {
                step_to(S::SwappedOut { mode: SwapMode::Hibernate }, &HIBERNATE[4..])
            }
            S::Stopping => step_to(S::Failed { cause: cause.clone() }, &[]),
            S::Running | S::Paused | S::SwappedOut { .. } | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
        Event::UndoFailed { cause } => match state {
            S::Saving { .. } | S::SwappingOut { .. } | S::Waking { .. } | S::ChangingVolumes { .. } => {
                step_to(S::Failed { cause: cause.clone() }, &CLEAN)
            }
            S::HandingOver { .. } => step_to(S::Failed { cause: cause.clone() }, &CLEAN_BOTH),
            S::Sending => step_to(S::Failed { cause: cause.clone() }, &CLEAN_SENDING),
            S::HandedOver => step_to(S::Failed { cause: cause.clone() }, &CLEAN),
            _ => denied(),
        },
        Event::VmmStopped => match state {
            S::Launching
            | S::Registering
            | S::Running
            | S::Paused
            | S::Saving { .. }
            | S::ChangingVolumes { .. }
            | S::SwappingOut { .. }
            | S::SwappedOut { .. }
            | S::Waking { .. } => step_to(S::Stopped, &CLEAN),
            S::HandingOver { .. } => step_to(S::Stopped, &CLEAN_BOTH),
            S::Sending => step_to(S::Stopped, &CLEAN_SENDING),
            // What ends here then is not the machine any more.
            S::HandedOver => stay(),
            S::Stopping | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
        Event::VmmFailed { cause } => match state {
            S::Launching
            | S::Registering
            | S::Running
            | S::Paused
            | S::Saving { .. }
            | S::ChangingVolumes { .. }
            | S::SwappingOut { .. }
            | S::SwappedOut { .. }
            | S::Waking { .. } => step_to(S::Failed { cause: cause.clone() }, &CLEAN),
            S::HandingOver { .. } => step_to(S::Failed { cause: cause.clone() }, &CLEAN_BOTH),
            S::Sending => step_to(S::Failed { cause: cause.clone() }, &CLEAN_SENDING),
            S::HandedOver => stay(),
            S::Stopping | S::Stopped | S::Failed { .. } | S::Gone => stay(),
            _ => denied(),
        },
    }
}

#[cfg(test)]
mod tests;
