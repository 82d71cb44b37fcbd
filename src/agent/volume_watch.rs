//! Looks after the volume daemon: has it run wherever there are volumes, and has no VM that ended keep a volume from others.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;

use super::Agent;
use super::record::VmRecord;
use super::shared::Shared;
use super::vm_state::VmState;
use super::volumes::{AskVolumesError, VolumeHost};
use super::world::World;
use crate::lease::{Lease, LeaseMode};
use crate::report::chain;
use crate::wire::volumed::{Answer, Ask, Attachment, AttachmentReport, Refusal};

/// First and longest time until a daemon that ended is started again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// Time between two looks for what VMs that ended have left: it is there only when something failed.
const LOOK_AGAIN: Duration = Duration::from_secs(20);

impl<W: World> Agent<W> {
    pub(super) async fn look_after_volumes(self) {
        let volumes = self.shared.world.volumes();
        let (mut wait, longest) = AGAIN;
        loop {
            while !volumes.is_used() {
                self.shared.volumes_used.notified().await;
            }
            let watching = volumes.watch();
            let looking = async {
                loop {
                    self.shared.stop_serving().await;
                    self.shared.give_back_leases().await;
                    sleep(LOOK_AGAIN).await;
                }
            };
            let ended = tokio::select! {
                biased;
                ended = watching => ended,
                () = looking => Ok(()),
            };
            if self.shared.is_leaving_volumes.load(Ordering::Relaxed) {
                return;
            }
            match ended {
                Ok(()) => {
                    tracing::warn!("the volume daemon ended; it is started again, and goes on with the VMs it served");
                    self.shared.bundle_event("volume_daemon_ended", serde_json::json!({})).await;
                    wait = AGAIN.0;
                }
                Err(error) => {
                    tracing::error!(error = %chain(&error), "volumes cannot be reached");
                    wait = longest.min(wait.saturating_mul(2));
                }
            }
            sleep(wait).await;
        }
    }

    /// Has no daemon run that nobody uses: the agent ends, and the daemon stays only for those it serves.
    pub(super) async fn end_idle_volumes(&self) {
        if !self.shared.world.volumes().is_used() {
            return;
        }
        self.shared.is_leaving_volumes.store(true, Ordering::Relaxed);
        match self.shared.ask_volumes(Ask::EndIfIdle).await {
            Ok(_) | Err(AskVolumesError::Refused(Refusal::InUse { .. })) => {}
            Err(error) => tracing::warn!(error = %chain(&error), "the volume daemon does not end"),
        }
    }
}

impl<W: World> Shared<W> {
    /// Has the daemon serve no slot but those of VMs that are here and are to have a volume there.
    async fn stop_serving(self: &Arc<Self>) {
        let Ok(Answer::Attachments { attachments }) = self.ask_volumes(Ask::Attachments).await else { return };
        for AttachmentReport { attachment, .. } in attachments {
            if self.is_wanted(&attachment) {
                continue;
            }
            tracing::info!(volume = %attachment.volume, socket = %attachment.socket.display(), "it is served no longer");
            if let Err(error) = self.ask_volumes(Ask::Detach { socket: attachment.socket }).await {
                tracing::warn!(volume = %attachment.volume, error = %chain(&error), "a volume is still served that nobody has");
            }
        }
    }

    fn is_wanted(&self, attachment: &Attachment) -> bool {
        let vms = self.vms();
        let mut records = vms.values().map(|vm| vm.record.borrow().clone());
        records.any(|vm| {
            let may_have = vm.state.holds_resources() && vm.state != VmState::HandedOver;
            let of_lease = vm.spec.volume_uses().find(|(_, used)| used.lease == attachment.lease);
            may_have && of_lease.is_some_and(|(slot, _)| self.world.volumes().socket(&vm.id, slot) == attachment.socket)
        })
    }

    /// Ends the leases of VMs of this host that ended: an agent may have been killed, or the daemon away, when that was to
    /// be done.
    async fn give_back_leases(self: &Arc<Self>) {
        let volumes = match self.all_volumes().await {
            Ok(volumes) => volumes,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the volumes cannot be listed");
                return;
            }
        };
        for volume in volumes {
            let Ok(Answer::Leases { leases, .. }) = self.ask_volumes(Ask::Leases { volume: volume.id.clone() }).await
            else {
                continue;
            };
            for lease in leases.into_iter().filter(|lease| self.is_left_over(lease)) {
                tracing::info!(volume = %volume.id, lease = %lease.id, "a lease of a VM that ended is given back");
                let release = Ask::Release { volume: volume.id.clone(), id: lease.id, only: Some(lease.mode) };
                if let Err(error) = self.ask_volumes(release).await {
                    tracing::warn!(volume = %volume.id, error = %chain(&error), "a lease is not given back");
                }
            }
        }
    }

    /// Whether a lease is of a VM that was here and is not any more. One that stands by ends by itself.
    fn is_left_over(&self, lease: &Lease) -> bool {
        let Some(vm) = lease.vm.as_ref().filter(|_| lease.host == Some(self.config.network_number())) else {
            return false;
        };
        let vms = self.vms();
        // It may be there and have given the volume up. One whose end came while it was on its way may be another host's,
        // which its leases are converted for then.
        let has_it = |vm: &VmRecord| {
            (vm.state.holds_resources() || vm.is_undecided())
                && vm.spec.volume_uses().any(|(_, used)| used.lease == lease.id)
        };
        let is_here = vms.get(vm).is_some_and(|vm| has_it(&vm.record.borrow()));
        lease.mode != LeaseMode::Standby && !is_here
    }
}
