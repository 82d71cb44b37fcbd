//! What brings a VM back whose memory is out, besides those who ask for it: a packet, the time, a failure of what was to
//! be done with it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::{SwapOrder, VmActor};
use crate::agent::effect::Effect;
use crate::agent::ledger::{LedgerError, NewEvent, Write};
use crate::agent::record::{OperationRecord, StepState, Subject, SwapRecord, WakeCause};
use crate::agent::shared::Shared;
use crate::agent::vm_state::{Event, FailureCause, Goal, VmState, step};
use crate::agent::world::{VmmHost, VmmProcess, World};
use crate::clock::{Clock, UnixNanos};
use crate::ids::VmId;

/// How long after a wake that failed the next packet or time is waited for: what failed may go on failing.
const WAKE_AGAIN: Duration = Duration::from_secs(5);

/// Whether its memory is out and nothing is done about it.
const fn is_out(state: &VmState) -> bool {
    matches!(state, VmState::SwappedOut { .. })
}

/// Whether what failed leaves nothing to go back to: what was to take another failure back, a hibernated VM whose file
/// is the machine already or not any more, or is no good.
pub(super) fn has_no_way_back(operation: &OperationRecord, cause: &FailureCause) -> bool {
    let done = |effect| operation.steps.iter().any(|step| step.effect == effect && step.state == StepState::Done);
    match operation.goal {
        Goal::Undo => true,
        Goal::Wake => done(Effect::DiscardSealed) || matches!(cause, FailureCause::SwapStateCorrupt { .. }),
        Goal::SwapOut => done(Effect::KeepSealed),
        Goal::HandOver => done(Effect::MoveMachine),
        // The other host has it, or nobody.
        Goal::Leave if !matches!(cause, FailureCause::LostOnTheWay { .. }) => false,
        Goal::Leave => {
            operation.steps.iter().any(|step| step.effect == Effect::ConfirmArrival) && !done(Effect::ConfirmArrival)
        }
        Goal::Launch
        | Goal::Pause
        | Goal::Resume
        | Goal::Stop
        | Goal::Remove
        | Goal::Build
        | Goal::Snapshot
        | Goal::ChangeVolumes
        | Goal::Migrate
        | Goal::Arrive
        | Goal::Enlist
        | Goal::Register => false,
    }
}

/// What may wake a VM at the moment, besides requests.
pub(super) struct CallToWake<W: World> {
    shared: Arc<Shared<W>>,
    vm: VmId,
    /// Whether a packet may.
    packet: bool,
    /// How long until the time does.
    time: Option<Duration>,
    /// How long nothing does, as the last wake failed.
    rest: Duration,
}

impl<W: World> CallToWake<W> {
    /// Resolves when something wakes it.
    pub(super) async fn wait(self) -> WakeCause {
        let packet = async {
            if !self.packet {
                return std::future::pending().await;
            }
            sleep(self.rest).await;
            self.shared.world.vmm().packet_waits(&self.vm).await;
        };
        let time = async {
            match self.time {
                Some(time) => sleep(self.rest.max(time)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = packet => WakeCause::Packet,
            () = time => WakeCause::Timer,
        }
    }
}

impl<W: World> VmActor<W> {
    /// What may wake this VM now: nothing, unless its memory is out and nothing is being done about it.
    pub(super) fn call_to_wake(&self) -> CallToWake<W> {
        let is_out = self.work.is_none() && self.record.quarantine.is_none() && is_out(&self.record.state);
        let may = |cause| is_out && self.record.spec.swap.wake.contains(&cause);
        let clock = self.shared.world.clock();
        let between = |from: UnixNanos, to: UnixNanos| Duration::from_nanos(to.0.saturating_sub(from.0));
        // Never longer than it was asked for, if the wall clock was set back meanwhile.
        let left = |swap: &SwapRecord| swap.wake_at.map(|at| between(clock.wall(), at).min(between(swap.at, at)));
        let wake_at = self.record.swap.as_ref().and_then(left);
        CallToWake {
            shared: Arc::clone(&self.shared),
            vm: self.record.id.clone(),
            packet: may(WakeCause::Packet),
            time: wake_at.filter(|_| may(WakeCause::Timer)),
            rest: self
                .wake_failed_at
                .map_or(Duration::ZERO, |at| WAKE_AGAIN.saturating_sub(clock.monotonic().since(at))),
        }
    }

    /// Begins to bring it back.
    pub(super) async fn wake(&mut self, cause: WakeCause) -> Result<(), LedgerError> {
        let Ok(next) = step(&self.record.state, &Event::WakeAsked) else { return Ok(()) };
        let operation = self.new_operation(Goal::Wake, false, &next);
        let event = self.waking_event(cause, &operation);
        self.turn(next, vec![event], Some(&operation)).await?;
        self.perform(operation, Duration::ZERO, None);
        Ok(())
    }

    /// Says what woke it.
    pub(super) fn waking_event(&self, cause: WakeCause, operation: &OperationRecord) -> Write {
        tracing::info!(vm = %self.record.id, op = %operation.id, by = cause.name(), "waking");
        if let Some(process) = &self.process {
            // It is needed in a moment.
            process.page_in();
        }
        Write::Event(NewEvent {
            at: self.shared.world.clock().wall(),
            kind: "vm_waking",
            subject: Subject::Vm(self.record.id.clone()),
            operation: Some(operation.id.clone()),
            body: serde_json::json!({ "by": cause.name() }),
        })
    }

    pub(super) fn swap_record(&self, order: &SwapOrder) -> SwapRecord {
        let at = self.shared.world.clock().wall();
        let after = |wait: Duration| UnixNanos(at.0.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX)));
        SwapRecord { at, because: order.because.clone(), wake_at: order.wake_after.map(after) }
    }
}
