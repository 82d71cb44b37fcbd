//! A VM's volumes: leases, the daemon that serves them, and the slots of the machine.
//!
//! Each step compares what is with what the record says is to be, so it can be done again after a crash, and one list
//! serves for attaching and taking away.

use super::{Outcome, Work, ask_failed, host};
use crate::agent::vm_state::{FailureCause, Goal, VmState};
use crate::agent::volumes::{AskVolumesError, LINES, UsePhase, VolumeHost, VolumeUse};
use crate::agent::world::{Ask, AskError, World};
use crate::lease::LeaseMode;
use crate::report::chain;
use crate::wire::control::{Answer, AttachVolumeSpec, VolumeStatus};
use crate::wire::volumed::{self, Attachment, Refusal};

impl<W: World> Work<W> {
    /// The volumes it is to have, each with its number among the block devices: none on the way to an end, and none that
    /// it gives up.
    fn wanted_volumes(&self) -> Vec<(u8, VolumeUse)> {
        if matches!(self.operation.goal, Goal::Stop | Goal::Remove | Goal::Leave) {
            return Vec::new();
        }
        let uses = self.record.spec.volume_uses().filter(|(_, used)| used.is_wanted());
        uses.map(|(index, used)| (index, used.clone())).collect()
    }

    /// Those of them that it has nothing of yet: of a VM that is there already, what it is getting.
    fn coming_volumes(&self) -> Vec<(u8, VolumeUse)> {
        let is_there = matches!(self.record.state, VmState::ChangingVolumes { .. });
        let mut wanted = self.wanted_volumes();
        wanted.retain(|(_, used)| !is_there || used.phase == UsePhase::Attaching);
        wanted
    }

    /// Those that it has, but is not to have.
    fn unwanted_volumes(&self) -> Vec<(u8, VolumeUse)> {
        let wanted = self.wanted_volumes();
        let uses = self.record.spec.volume_uses().filter(|(index, _)| wanted.iter().all(|(other, _)| other != index));
        uses.map(|(index, used)| (index, used.clone())).collect()
    }

    pub(super) async fn acquire_leases(&mut self) -> Result<(), Outcome> {
        let is_arriving = matches!(self.record.state, VmState::Arriving { .. });
        for (index, used) in self.coming_volumes() {
            let ask = volumed::Ask::Acquire {
                volume: used.volume.clone(),
                id: used.lease.clone(),
                mode: if is_arriving && used.mode() == LeaseMode::Active { LeaseMode::Standby } else { used.mode() },
                holder: format!("VM {} on host {}", self.record.hostname(), self.shared.config.network_number()),
                vm: Some(self.record.id.clone()),
                ttl_s: None,
                secret: used.secret.clone(),
                break_others: false,
            };
            let answer = self.shared.ask_home(used.home, ask).await.map_err(|error| no_volume(&used, &error))?;
            let volumed::Answer::Lease { lease } = answer else {
                return Err(no_volume(&used, &AskVolumesError::Unexpected));
            };
            let slot = usize::from(index).saturating_sub(self.record.spec.disks.len());
            if let Some(used) = self.record.spec.volumes.get_mut(slot).and_then(|slot| slot.used.as_mut()) {
                used.epoch = lease.epoch;
            }
        }
        Ok(())
    }

    pub(super) async fn connect_volumes(&self) -> Result<(), Outcome> {
        for (index, used) in self.coming_volumes() {
            let attachment = self.attachment(index, &used).await.map_err(|error| no_volume(&used, &error))?;
            let asked = self.shared.ask_volumes(volumed::Ask::Attach { attachment }).await;
            asked.map_err(|error| no_volume(&used, &error))?;
        }
        Ok(())
    }

    async fn attachment(&self, index: u8, used: &VolumeUse) -> Result<Attachment, AskVolumesError> {
        Ok(Attachment {
            socket: self.shared.world.volumes().socket(&self.record.id, index),
            volume: used.volume.clone(),
            lease: used.lease.clone(),
            epoch: used.epoch,
            read_only: used.read_only,
            lines: LINES,
            upstream: self.shared.upstream(used).await?,
        })
    }

    pub(super) async fn plug_volumes(&self) -> Result<(), Outcome> {
        let Answer::Volumes(slots) = self.ask(Ask::Volumes).await? else {
            return Err(ask_failed(AskError::Unexpected));
        };
        let wanted = self.wanted_volumes();
        let find = |index: u8| slots.iter().find(|slot| slot.index == index);
        for (index, used) in self.unwanted_volumes() {
            if find(index).is_some_and(|slot| slot.bytes > 0) {
                let force = used.phase == UsePhase::Detaching { force: true };
                self.ask(Ask::DetachVolume { index, force }).await?;
            }
        }
        for (index, used) in wanted {
            let Some(slot) = find(index) else {
                return Err(host(format!("the machine has no volume slot {index}")));
            };
            self.plug(slot, &used).await?;
        }
        Ok(())
    }

    async fn plug(&self, slot: &VolumeStatus, used: &VolumeUse) -> Result<(), Outcome> {
        let (index, bytes) = (slot.index, used.bytes);
        if slot.bytes == 0 {
            let reconnect_ms = self.shared.config.volumes.reconnect_s.saturating_mul(1000);
            let spec = AttachVolumeSpec { index, bytes, read_only: used.read_only, reconnect_ms };
            self.ask(Ask::AttachVolume(spec)).await?;
        } else if slot.bytes < bytes {
            self.ask(Ask::ResizeVolume { index, bytes }).await?;
        }
        Ok(())
    }

    pub(super) async fn disconnect_volumes(&self) -> Result<(), Outcome> {
        for (index, used) in self.unwanted_volumes() {
            self.detach(index).await.map_err(|error| no_volume(&used, &error))?;
        }
        Ok(())
    }

    pub(super) async fn reconnect_volumes(&self) -> Result<(), Outcome> {
        for (index, used) in self.wanted_volumes() {
            self.detach(index).await.map_err(|error| no_volume(&used, &error))?;
        }
        self.connect_volumes().await
    }

    async fn detach(&self, index: u8) -> Result<(), AskVolumesError> {
        let socket = self.shared.world.volumes().socket(&self.record.id, index);
        match self.shared.ask_volumes(volumed::Ask::Detach { socket }).await {
            // It was not attached.
            Err(AskVolumesError::Refused(Refusal::NotFound { .. })) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn release_leases(&self) -> Result<(), Outcome> {
        for (_, used) in self.unwanted_volumes() {
            self.shared.release(&used).await.map_err(|error| no_volume(&used, &error))?;
        }
        Ok(())
    }
}

pub(super) fn no_volume(used: &VolumeUse, error: &AskVolumesError) -> Outcome {
    let detail = format!("volume {}: {}", used.volume, chain(error));
    Outcome::Failed(FailureCause::Volume { detail })
}
