//! Effects of moving an idle VM's memory out and back.
//!
//! Held taps come first and go last: a packet that arrives at any moment in between waits in its tap, whichever process
//! has it open, and is read by the guest's device after the wake.

use super::{Outcome, Work, ask_failed, host, micros};
use crate::agent::ledger::Write;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{Ask, AskError, Records, UnsealPlan, VmDisk, VmmHost, VmmProcess, World, random_array};
use crate::report::chain;
use crate::units::MIB;
use crate::wire::control::{Answer, MachineState, SavedPages, SealingKey};
use crate::wire::refusal::Refusal;

impl<W: World> Work<W> {
    pub(super) async fn hold_taps(&self) -> Result<(), Outcome> {
        let held = self.shared.world.vmm().hold_taps(&self.record).await;
        held.map_err(|error| host(format!("hold the VM's taps: {error}")))
    }

    pub(super) fn release_taps(&self) {
        self.shared.world.vmm().release_taps(&self.record.id);
    }

    pub(super) async fn page_out(&self) -> Result<(), Outcome> {
        let process = self.process.as_ref().ok_or_else(|| host("the VM has no VMM".to_owned()))?;
        process.page_out().await.map_err(|error| host(format!("move the VM's memory to swap: {error}")))
    }

    pub(super) async fn seal_machine(&mut self) -> Result<(), Outcome> {
        // A machine that runs would be sealed at two moments.
        if self.status().await?.state != MachineState::Paused {
            return Err(host("the machine to seal is not held".to_owned()));
        }
        // A key of its own for each file, also for one that is begun again.
        let key = random_array(&self.shared.world).map_err(|error| host(format!("read randomness: {error}")))?;
        let key = SealingKey(key);
        let pages = if self.record.spec.bundle.is_some() { SavedPages::Changed } else { SavedPages::All };
        let Answer::Saved(_) = self.ask(Ask::Seal { pages, key }).await? else {
            return Err(ask_failed(AskError::Unexpected));
        };
        self.writes.push(Write::SwapKey { vm: self.record.id.clone(), key });
        Ok(())
    }

    pub(super) async fn keep_sealed(&self) -> Result<(), Outcome> {
        let kept = self.shared.world.disk().keep_sealed(&self.record.id).await;
        kept.map_err(|error| host(format!("keep what was sealed of the VM: {error}")))
    }

    pub(super) async fn discard_sealed(&mut self) -> Result<(), Outcome> {
        let discarded = self.shared.world.disk().discard_sealed(&self.record.id).await;
        discarded.map_err(|error| host(format!("discard what was sealed of the VM: {error}")))?;
        self.writes.push(Write::NoSwapKey(self.record.id.clone()));
        Ok(())
    }

    pub(super) async fn unseal_machine(&mut self) -> Result<(), Outcome> {
        if self.status().await?.state != MachineState::Empty {
            return Ok(());
        }
        let id = self.record.id.clone();
        let key = self.shared.world.records().with(move |store| store.swap_key(&id)).await.map_err(Outcome::Broken)?;
        let key = key.ok_or_else(|| corrupt("the ledger has no key for what was sealed of it".to_owned()))?;
        let spec = &self.record.spec;
        let plan = UnsealPlan {
            bundle: spec.bundle.clone(),
            key,
            memory_bytes: u64::from(spec.memory_mib).saturating_mul(MIB),
            disks: spec.disks.clone(),
            network_limits: spec.network_limits,
        };
        let sent = self.now();
        // Not by `ask`: what a VMM says against a sealed file is another cause than what it says against a bundle.
        let asking = self.shared.world.vmm().ask(&self.record, self.shared.epoch, Ask::Unseal(plan));
        let answer = match &self.process {
            Some(process) => tokio::select! {
                biased;
                answer = asking => answer,
                end = process.ended() => return Err(Outcome::VmmEnded(end)),
            },
            None => asking.await,
        };
        match answer {
            Ok(Answer::Launched(_)) => {
                tracing::debug!(vm = %self.record.id, took_us = micros(self.now().since(sent)), "unsealed");
                Ok(())
            }
            Ok(
                Answer::Welcome(_)
                | Answer::Status(_)
                | Answer::Done
                | Answer::Saved(_)
                | Answer::Balloon(_)
                | Answer::Sent(_)
                | Answer::SentIn { .. }
                | Answer::Sending(_)
                | Answer::Copied(_)
                | Answer::Volumes(_)
                | Answer::Forwarded { .. }
                | Answer::Refused(_)
                | Answer::Network(_),
            ) => Err(ask_failed(AskError::Unexpected)),
            Err(AskError::Refused(Refusal::BadState { reason })) => Err(corrupt(reason)),
            Err(AskError::Sealed(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(corrupt("the file that was sealed of it is not there".to_owned()))
            }
            Err(error) => Err(host(chain(&error))),
        }
    }
}

fn corrupt(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::SwapStateCorrupt { detail })
}
