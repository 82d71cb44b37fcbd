//! A VM's volumes: leases, the daemon that serves them, and the slots of the machine.
//!
//! Each step compares what is with what the record says is to be, so it can be done again after a crash, and one list
//! serves for attaching and taking away.

use std::time::Duration;

use hearth_guest_wire::{Exec, Exit, FromGuest, ToGuest};
use tokio::time::{sleep, timeout};

use super::{Outcome, Work, ask_failed, host};
use crate::agent::guest::{self, GuestError};
use crate::agent::vm_state::{FailureCause, Goal, VmState};
use crate::agent::volumes::{AskVolumesError, LINES, UsePhase, VolumeHost, VolumeLimits, VolumeUse};
use crate::agent::world::{Ask, AskError, World};
use crate::lease::LeaseMode;
use crate::report::chain;
use crate::wire::control::{Answer, AttachVolumeSpec, VolumeStatus};
use crate::wire::volumed::{self, Attachment, Refusal};

/// The guest's agent, wherever it lies: it also mounts, as a program of its own.
const GUEST_AGENT: &str = "/proc/1/exe";

/// Seconds that a lease stands by for a machine on its way here: a large one takes long over a slow link, and one that does
/// not come gives it back.
const STANDBY_S: u32 = 3600;

/// Its exit code for a disk that is empty as yet.
const NOT_YET: i32 = 75;

/// How often, and how long apart, a guest is asked to mount a disk whose size it has not noticed.
const MOUNT_TRIES: u32 = 40;
const MOUNT_AGAIN: Duration = Duration::from_millis(250);

/// How long a mount may take: a journal is replayed first.
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

/// Bytes that are kept of what a guest says about a mount.
const SAID_BYTES_MAX: usize = 512;

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
                host: Some(self.shared.config.network_number()),
                ttl_s: is_arriving.then_some(STANDBY_S),
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
        let VolumeLimits { iops, bytes_per_s } = used.limits;
        // They are the machine's, which may be another one now.
        if used.limits != VolumeLimits::default() {
            self.ask(Ask::LimitVolume { index, iops, bytes_per_s }).await?;
        }
        Ok(())
    }

    pub(super) async fn mount_volumes(&mut self) -> Result<(), Outcome> {
        for (index, used) in self.coming_volumes() {
            // The root is there since before the guest was greeted.
            let Some(mount) = used.mount.clone().filter(|_| !used.is_root()) else { continue };
            if self.record.state == (VmState::ChangingVolumes { then_running: false }) {
                let detail = format!("volume {}: a guest that is paused mounts nothing", used.volume);
                return Err(Outcome::Failed(FailureCause::Volume { detail }));
            }
            let disk = disk_name(index);
            let mut words = vec![GUEST_AGENT, "mount", disk.as_str(), mount.as_str()];
            words.extend(used.read_only.then_some("ro"));
            let failed = |what: String| {
                let detail = format!("volume {}: mount it at {mount}: {what}", used.volume);
                Outcome::Failed(FailureCause::Volume { detail })
            };
            for tries_left in (0..MOUNT_TRIES).rev() {
                match self.run_in_guest(&words).await.map_err(failed)? {
                    (0, _) => break,
                    // It has not taken note of the disk's size yet.
                    (NOT_YET, _) if tries_left > 0 => sleep(MOUNT_AGAIN).await,
                    (_, said) => return Err(failed(said)),
                }
            }
        }
        Ok(())
    }

    pub(super) async fn unmount_volumes(&mut self) -> Result<(), Outcome> {
        for (_, used) in self.unwanted_volumes() {
            // Whoever gives up the root, ends.
            let Some(mount) = used.mount.clone().filter(|_| !used.is_root()) else { continue };
            let force = used.phase == UsePhase::Detaching { force: true };
            let said = match self.run_in_guest(&[GUEST_AGENT, "unmount", &mount]).await {
                Ok((0, _)) => continue,
                Ok((_, said)) => said,
                Err(error) => error,
            };
            if !force {
                let detail = format!("volume {}: unmount {mount}: {said}", used.volume);
                return Err(Outcome::Failed(FailureCause::Volume { detail }));
            }
            tracing::warn!(vm = %self.record.id, volume = %used.volume, said, "it is taken while it is mounted");
        }
        Ok(())
    }

    /// Runs a program in the guest; its exit code, and the last it said.
    async fn run_in_guest(&self, argv: &[&str]) -> Result<(i32, String), String> {
        let running = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            let argv = argv.iter().map(|word| (*word).to_owned()).collect();
            link.writer.send(&ToGuest::Exec(Exec { argv, ..Exec::default() })).await?;
            let mut said = Vec::new();
            loop {
                match link.reader.next().await?.ok_or(GuestError::HungUp)? {
                    FromGuest::Stdout(bytes) | FromGuest::Stderr(bytes) => {
                        said.extend(bytes);
                        said.truncate(SAID_BYTES_MAX);
                    }
                    FromGuest::Exited(Exit::Code(code)) => return Ok((i32::from(code), said)),
                    FromGuest::Exited(Exit::Signal(signal)) => return Ok((i32::from(signal) + 128, said)),
                    // It was given no time-out.
                    FromGuest::Exited(Exit::TimedOut) => return Err(GuestError::Unexpected),
                    FromGuest::Failed { errno, what } => {
                        return Err(GuestError::Failed { errno, what: guest::printable(&what) });
                    }
                    FromGuest::Started { .. } => {}
                    FromGuest::Hello { .. }
                    | FromGuest::Done
                    | FromGuest::Quiesced { .. }
                    | FromGuest::Stats(_)
                    | FromGuest::HooksRan(_)
                    | FromGuest::Secrets(_)
                    | FromGuest::Register(_)
                    | FromGuest::Joined { .. } => return Err(GuestError::Unexpected),
                }
            }
        };
        match timeout(MOUNT_LIMIT, running).await {
            Ok(Ok((code, said))) => Ok((code, guest::printable(String::from_utf8_lossy(&said).trim()))),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(format!("the guest did not do it within {} s", MOUNT_LIMIT.as_secs())),
        }
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

/// What a guest calls one of its block devices.
pub(super) fn disk_name(index: u8) -> String {
    format!("/dev/vd{}", char::from(b'a'.saturating_add(index)))
}

pub(super) fn no_volume(used: &VolumeUse, error: &AskVolumesError) -> Outcome {
    let detail = format!("volume {}: {}", used.volume, chain(error));
    Outcome::Failed(FailureCause::Volume { detail })
}
