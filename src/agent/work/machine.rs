//! Effects on the VM's machine: it is made, runs, and is held.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::outcome::bad_image;
use super::{Outcome, Work, ask_failed, host, micros};
use crate::agent::bundles::BundleError;
use crate::agent::command_line::command_line;
use crate::agent::filling::Chunks;
use crate::agent::vm_state::{FailureCause, Goal};
use crate::agent::world::{Ask, AskError, FillingPlan, LaunchPlan, RestorePlan, VmDisk, VmmHost, World};
use crate::clock::Clock;
use crate::ids::BundleId;
use crate::report::chain;
use crate::units::MIB;
use crate::wire::control::{Answer, MachineState, Request, SendPhase};

/// How often and how long it is waited for a send to be given up: 10 s, more than its own waits while a guest is held.
const GIVE_UP_TRIES: u32 = 500;
const GIVE_UP_AGAIN: Duration = Duration::from_millis(20);

impl<W: World> Work<W> {
    pub(super) async fn build_machine(&mut self) -> Result<(), Outcome> {
        if self.status().await?.state != MachineState::Empty {
            return Ok(());
        }
        let disk = self.shared.world.disk();
        let image = disk.image(&self.record.spec.image).await.map_err(|error| bad_image(chain(&error)))?;
        let additions = disk.command_line_additions().await;
        let spec = &self.record.spec;
        let plan = LaunchPlan {
            image: spec.image.clone(),
            vcpus: spec.vcpus,
            memory_bytes: u64::from(spec.memory_mib).saturating_mul(MIB),
            command_line: command_line(&additions, &image.command_line, spec.root().is_some()),
            disks: spec.disks.clone(),
            network_limits: spec.network_limits,
        };
        self.make_machine(Ask::Launch(plan)).await
    }

    pub(super) async fn restore_machine(&mut self) -> Result<(), Outcome> {
        if self.status().await?.state != MachineState::Empty {
            return Ok(());
        }
        let spec = &self.record.spec;
        let Some(bundle) = spec.bundle.clone() else { return Err(host("this VM has no bundle".to_owned())) };
        let filling = if spec.lazy { self.begin_serving(&bundle).await? } else { None };
        let spec = &self.record.spec;
        let plan = RestorePlan {
            bundle,
            memory_bytes: u64::from(spec.memory_mib).saturating_mul(MIB),
            disks: spec.disks.clone(),
            network_limits: spec.network_limits,
            filling,
        };
        // It is read from the disk while the machine is made.
        let set = self.shared.working_set(&self.record).await;
        self.make_machine(Ask::Restore(plan)).await?;
        if let Some(set) = set {
            self.shared.prefault(&self.record, set).await;
        }
        Ok(())
    }

    /// Serves the memory of a machine that is about to be made of a bundle that is not whole; `None`: it is whole.
    pub(super) async fn begin_serving(&self, bundle: &BundleId) -> Result<Option<FillingPlan>, Outcome> {
        let no_bundle = |error: BundleError| Outcome::Failed(FailureCause::Bundle { detail: chain(&error) });
        let Some(filling) = self.shared.filling(bundle).await.map_err(no_bundle)? else { return Ok(None) };
        let bound = self.shared.world.vmm().bind_to_fill(&self.record).await;
        let (port, near) = bound.map_err(|error| host(format!("make a port for the VM's memory: {error}")))?;
        let partial = Arc::clone(&filling.partial);
        // Before it is made, as it reaches its memory while it is.
        self.shared.serve(&self.record, Chunks::Coming(filling), near);
        Ok(Some(FillingPlan { partial, port }))
    }

    pub(super) async fn make_machine(&mut self, ask: Ask) -> Result<(), Outcome> {
        let sent = self.now();
        let Answer::Launched(phases) = self.ask(ask).await? else {
            return Err(ask_failed(AskError::Unexpected));
        };
        let timings = &mut self.record.timings;
        timings.build_us = Some(micros(self.shared.world.clock().monotonic().since(sent)));
        timings.vm_us = Some(phases.vm_ns / 1000);
        timings.load_us = Some(phases.load_ns / 1000);
        timings.devices_us = Some(phases.devices_ns / 1000);
        Ok(())
    }

    pub(super) async fn run_machine(&mut self) -> Result<(), Outcome> {
        self.wait_for_turn().await?;
        if self.operation.goal == Goal::Undo {
            self.give_up_send().await?;
        }
        // Of a launch that this agent began, and of a machine that it received, it is known that it stands still; whoever
        // continues one looks.
        let is_known = self.is_launch() && self.asked_at.is_some() || self.has_received;
        let runs = !is_known && self.status().await?.state == MachineState::Running;
        if !runs {
            self.ask(Ask::Resume).await?;
        }
        self.note_run();
        if let (Goal::Arrive, Some(way)) = (self.operation.goal, &self.record.migration) {
            self.shared.arrivals.ran(&way.id, self.now());
        }
        if self.is_launch() {
            self.record.timings.resumed_us = self.asked_at.map(|asked| micros(self.now().since(asked)));
        }
        Ok(())
    }

    pub(super) const fn is_launch(&self) -> bool {
        matches!(self.operation.goal, Goal::Launch | Goal::Enlist | Goal::Build)
    }

    /// Has the machine sent to nobody any more: whether it was about to be, or stands ready elsewhere and is not to go on
    /// there. It needs a moment to give up what it was doing.
    pub(super) async fn give_up_send(&mut self) -> Result<(), Outcome> {
        // One of the version before cannot have begun.
        if self.record.wire_version < Request::CancelSend.since_version() {
            return Ok(());
        }
        for _ in 0..GIVE_UP_TRIES {
            self.ask(Ask::CancelSend).await?;
            let Answer::Sending(progress) = self.ask(Ask::SendProgress).await? else {
                return Err(ask_failed(AskError::Unexpected));
            };
            if progress.phase == SendPhase::None {
                return Ok(());
            }
            sleep(GIVE_UP_AGAIN).await;
        }
        Err(host("the VMM does not give up sending the machine".to_owned()))
    }

    pub(super) async fn hold_machine(&mut self) -> Result<(), Outcome> {
        if self.operation.goal == Goal::Undo {
            self.give_up_send().await?;
        }
        let state = self.status().await?.state;
        if self.operation.goal == Goal::Pause && state == MachineState::Running {
            // Whoever makes a bundle of it then cannot ask it any more.
            self.note_secrets().await;
        }
        self.note_hold();
        match state {
            MachineState::Paused => Ok(()),
            MachineState::Running | MachineState::Empty => self.ask(Ask::Pause).await.map(|_| ()),
        }
    }
}
