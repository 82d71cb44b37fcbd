//! Performing an operation's effects, one after the other, each recorded when done. Runs inside the VM's actor as a
//! future beside its inbox, so that a stop can cut short the two effects that wait for a guest.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;

use super::effect::Effect;
use super::ledger::Write;
use super::migration_record::Uncompressed;
use super::peers::LineAhead;
use super::record::{OperationRecord, StepRecord, StepState, VmRecord};
use super::session_end::quarantine;
use super::shared::Shared;
use super::vm_state::Goal;
use super::world::{SendOrder, VmDisk, VmNetworks, VmmHost, VmmProcess, World};
use crate::clock::{Clock, Monotonic};

mod arriving;
mod greeting;
mod handing_over;
mod leases;
mod machine;
mod outcome;
mod prefaulting;
mod process;
mod registering;
mod retrying;
mod root;
mod saving;
mod secrets;
mod sending;
mod swapping;
mod volumes;

pub(super) use outcome::Outcome;
use outcome::{ask_failed, host, no_network, note_of, unreachable};
pub(super) use process::ended;

/// How long a VMM may take to end after a guest that failed: its end, with last words, says more than the failure.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(500);

type Process<W> = <<W as World>::Vmm as VmmHost>::Process;

/// What a piece of work needs and keeps.
pub(super) struct Work<W: World> {
    pub(super) shared: Arc<Shared<W>>,
    pub(super) record: VmRecord,
    pub(super) operation: OperationRecord,
    pub(super) process: Option<Process<W>>,
    /// Becomes true when somebody wants this over sooner.
    pub(super) hurry: watch::Receiver<bool>,
    /// How long a guest may take to power off.
    pub(super) grace: Duration,
    /// When the request came, if it came to this agent.
    pub(super) asked_at: Option<Monotonic>,
    /// Since when no vCPU runs, for a save.
    pub(super) held_at: Option<Monotonic>,
    /// Since when it runs on the other host that it went to, as far as this work knows.
    pub(super) ran_there_at: Option<Monotonic>,
    /// Whether the machine came from another host, to this work.
    pub(super) has_received: bool,
    /// A line to the host that the machine goes to, which hears on it that it is its.
    pub(super) line: Option<LineAhead>,
    /// The process that is to take the machine over.
    pub(super) successor: Option<Process<W>>,
    /// Processes that are to end with this work: held, so that their ends are seen.
    pub(super) others: Vec<Process<W>>,
    /// Where the machine is sent, and how it is encrypted; and why it is not compressed, if that was asked for.
    pub(super) way: Option<(SendOrder, Option<Uncompressed>)>,
    /// Its guest's turn, until it has its identity.
    pub(super) turn: Option<OwnedSemaphorePermit>,
    /// What is written together with the present step.
    pub(super) writes: Vec<Write>,
}

/// A piece of work, over.
pub(super) struct Report<W: World> {
    pub(super) record: VmRecord,
    pub(super) operation: OperationRecord,
    pub(super) process: Option<Process<W>>,
    /// Since when no vCPU runs, if some effect held them.
    pub(super) held_at: Option<Monotonic>,
    /// A line to the host that it is on its way to.
    pub(super) line: Option<LineAhead>,
    pub(super) outcome: Outcome,
}

impl<W: World> Work<W> {
    /// Performs the operation's steps that are not done.
    pub(super) async fn run(mut self) -> Report<W> {
        let outcome = self.perform_all().await;
        let Self { record, operation, process, held_at, line, .. } = self;
        Report { record, operation, process, held_at, line, outcome }
    }

    async fn perform_all(&mut self) -> Outcome {
        for index in 0..self.operation.steps.len() {
            // Done by an agent before this one, and not to be done again.
            if self.operation.steps[index].state == StepState::Done {
                continue;
            }
            let effect = self.operation.steps[index].effect;
            let begun = self.now();
            let before = (self.record.clone(), self.operation.makes.clone(), self.operation.moved);
            let performed = if self.is_here_or_lost() && !effect.is_best_effort() {
                self.perform_until_done(effect).await
            } else {
                self.perform(effect).await
            };
            let took = self.now().since(begun);
            let (state, note) = match &performed {
                Ok(()) => (StepState::Done, None),
                Err(outcome) => (StepState::Failed, note_of(outcome)),
            };
            self.shared.metrics.effect_ended(effect.name(), took);
            let took_us = Some(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
            if matches!(effect, Effect::MakeNetwork | Effect::OpenNetwork) && performed.is_ok() {
                let so_far = self.record.timings.network_us.unwrap_or(0);
                self.record.timings.network_us = Some(so_far.saturating_add(micros(took)));
            }
            let step = StepRecord { effect, state, took_us, note };
            tracing::debug!(vm = %self.record.id, step = effect.name(), ?took, done = performed.is_ok(), "step");
            self.operation.steps[index] = step.clone();
            let (record_before, makes_before, moved_before) = before;
            let mut writes = std::mem::take(&mut self.writes);
            writes.push(if self.operation.makes == makes_before && self.operation.moved == moved_before {
                Write::Step { operation: self.operation.id.clone(), index, step }
            } else {
                // What is known of the bundle or the move is recorded with the step that found it out: it is not done
                // again.
                Write::Operation(Box::new(self.operation.clone()))
            });
            if self.record != record_before {
                self.record.revision += 1;
                writes.push(Write::Vm(Box::new(self.record.clone())));
            }
            if performed.is_ok() && self.is_held_after(index) {
                // Nobody waits for a disk while a guest stands still: it is written with what has it run. An agent that
                // is killed before that does it again, or takes it back.
                self.writes = writes;
                continue;
            }
            if effect == Effect::Forget && performed.is_ok() {
                writes.push(Write::NoVm(self.record.id.clone()));
                writes.push(self.shared.removed_event(&self.record));
            }
            if effect == Effect::ReleaseUid && performed.is_ok() {
                writes.extend(self.release());
            }
            if let Err(error) = self.shared.commit(writes).await {
                return Outcome::Broken(error);
            }
            match performed {
                Ok(()) => {}
                Err(Outcome::Failed(_)) if effect.is_best_effort() => {}
                // It runs on the other host: what can be taken away here is.
                Err(Outcome::Failed(cause))
                    if self.operation.goal == Goal::Leave && effect != Effect::ConfirmArrival =>
                {
                    tracing::error!(vm = %self.record.id, step = effect.name(), ?cause, "something of a VM that left is still here");
                }
                // The VM is in the process it is to be in. What the other one is, only says that it stands still: it is
                // ended with the VM at the latest.
                Err(Outcome::Failed(cause)) if effect == Effect::EndOthers && self.operation.goal == Goal::HandOver => {
                    tracing::error!(vm = %self.record.id, ?cause, "the process that had the VM before is not ended");
                }
                // On the way to an end, an end that comes by itself is as good; what is left of it is cleaned up next.
                Err(Outcome::Failed(_) | Outcome::VmmEnded(_)) if self.is_ending() && !effect.is_cleaning() => {}
                Err(outcome) => return self.explain(outcome).await,
            }
        }
        Outcome::Done
    }

    /// Whether the guest stands still behind this step, for no longer than it takes to have it run.
    #[expect(clippy::wildcard_enum_match_arm, reason = "behind most effects it runs, or for nobody to wait for")]
    fn is_held_after(&self, index: usize) -> bool {
        let (goal, [step, later @ ..]) = (self.operation.goal, &self.operation.steps[index..]) else { return false };
        let runs = later.iter().any(|step| step.effect == Effect::RunMachine);
        match step.effect {
            Effect::HoldMachine | Effect::SaveMachine => runs && goal == Goal::Snapshot,
            Effect::AwaitDecision | Effect::OpenNetwork => runs && goal == Goal::Arrive,
            // What ends the operation is the decision, and has all of it.
            Effect::SendMachine => later.is_empty() && goal == Goal::Migrate,
            _ => false,
        }
    }

    const fn is_ending(&self) -> bool {
        matches!(self.operation.goal, Goal::Stop | Goal::Remove)
    }

    /// A failure of something in a VMM that is ending is better told by its end.
    async fn explain(&mut self, outcome: Outcome) -> Outcome {
        if self.is_ending() {
            return outcome;
        }
        match (&outcome, &self.process) {
            (Outcome::Failed(_), Some(process)) => match timeout(LAST_WORDS_WAIT, process.ended()).await {
                Ok(end) => Outcome::VmmEnded(end),
                Err(_) => outcome,
            },
            (_, _) => outcome,
        }
    }

    async fn perform(&mut self, effect: Effect) -> Result<(), Outcome> {
        match effect {
            Effect::MakeDirectory => {
                let made = self.shared.world.disk().make(&self.record.id).await;
                made.map_err(|error| host(format!("make the VM's directory: {error}")))
            }
            Effect::MakeNetwork => self.shared.world.networks().make(&self.record).await.map_err(no_network),
            Effect::OpenNetwork => {
                self.shared.world.networks().open(&self.record).await.map_err(no_network)?;
                self.shared.serve_metadata(&self.record);
                Ok(())
            }
            Effect::RemoveNetwork => {
                self.shared.end_metadata(&self.record.id);
                self.release_taps();
                self.shared.world.networks().remove(&self.record).await.map_err(no_network)
            }
            Effect::StartVmm => self.start_vmm().await,
            Effect::BuildMachine => self.build_machine().await,
            Effect::RestoreMachine => self.restore_machine().await,
            Effect::RunMachine => self.run_machine().await,
            Effect::HoldMachine => self.hold_machine().await,
            Effect::WarmUp => self.warm_up().await,
            Effect::QuiesceGuest => self.quiesce_guest().await,
            Effect::ThawGuest => self.thaw_guest().await,
            Effect::CopyMemory => self.copy_memory().await,
            Effect::SaveMachine => self.save_machine().await,
            Effect::DiscardSaved => self.discard_saved().await,
            Effect::CommitBundle => self.commit_bundle().await,
            Effect::AcquireLeases => self.acquire_leases().await,
            Effect::ConnectVolumes => self.connect_volumes().await,
            Effect::PlugVolumes => self.plug_volumes().await,
            Effect::MountVolumes => self.mount_volumes().await,
            Effect::UnmountVolumes => self.unmount_volumes().await,
            Effect::DisconnectVolumes => self.disconnect_volumes().await,
            Effect::ReconnectVolumes => self.reconnect_volumes().await,
            Effect::ReleaseLeases => self.release_leases().await,
            Effect::ConvertLease => self.convert_lease().await,
            Effect::ConvertOthers => self.convert_others().await,
            Effect::SettleLease => self.settle_lease().await,
            Effect::HoldTaps => self.hold_taps().await,
            Effect::ReleaseTaps => {
                self.release_taps();
                Ok(())
            }
            Effect::ArrangeArrival => self.arrange_arrival().await,
            Effect::SendMachine => self.send_machine().await,
            Effect::CancelArrival => self.cancel_arrival().await,
            Effect::ConfirmArrival => self.confirm_arrival().await,
            Effect::LeadElsewhere => self.lead_elsewhere().await,
            Effect::ForwardPackets => self.forward_packets().await,
            Effect::LeaveNetwork => self.leave_network().await,
            Effect::ReceiveMachine => self.receive_machine().await,
            Effect::AwaitDecision => self.await_decision().await,
            Effect::StartSuccessor => self.start_successor().await,
            Effect::MoveMachine => self.move_machine().await,
            Effect::TakeOver => self.take_over().await,
            Effect::EndOthers => self.end_others().await,
            Effect::PageOut => self.page_out().await,
            Effect::SealMachine => self.seal_machine().await,
            Effect::KeepSealed => self.keep_sealed().await,
            Effect::UnsealMachine => self.unseal_machine().await,
            Effect::DiscardSealed => self.discard_sealed().await,
            Effect::Register => self.register().await,
            Effect::GreetGuest => self.greet_guest().await,
            Effect::SetGuestClock => self.set_guest_clock().await,
            Effect::ShutDownGuest => self.shut_down_guest().await,
            Effect::EndVmm => self.end_vmm().await,
            Effect::KeepRemains => {
                if self.record.remains.is_none() {
                    let (remains, _) = self.shared.world.disk().remains(&self.record.id).await;
                    self.record.remains = Some(remains);
                }
                Ok(())
            }
            Effect::RemoveDirectory => {
                // What was saved and did not become a bundle is the VM's as well.
                self.discard_saved().await?;
                let removed = self.shared.world.disk().remove(&self.record.id).await;
                removed.map_err(|error| host(format!("remove the VM's directory: {error}")))
            }
            // These two are writes, made together with the step.
            Effect::ReleaseUid | Effect::Forget => Ok(()),
        }
    }

    fn now(&self) -> Monotonic {
        self.shared.world.clock().monotonic()
    }

    /// What a VM was lent goes back together: its uid and its addresses, each to rest for its own time.
    fn release(&self) -> [Write; 3] {
        let now = self.shared.steady();
        let config = &self.shared.config;
        let vm = &self.record.id;
        let (uid, local) = (now.after(config.uids.quarantine()), now.after(quarantine(config)));
        [
            Write::Release { vm: vm.clone(), quarantine_until: uid },
            Write::ReleaseLocal { vm: vm.clone(), quarantine_until: local },
            Write::NoSwapKey(vm.clone()),
        ]
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
