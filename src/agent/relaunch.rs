//! Members that did not register: each is launched anew once, as another VM with the same executor id, and given up
//! when that does not register either. Level triggered: what counts is which failed members nobody has replaced or
//! given up, in the ledger, so an agent that ends in the middle of it is followed by one that sees the same.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Agent;
use super::cluster_record::{ATTEMPTS_MAX, Membership};
use super::launch::LaunchRequest;
use super::launch_error::LaunchError;
use super::ledger::{LedgerError, Taken, Write};
use super::record::VmRecord;
use super::register::member_event;
use super::vm_state::{FailureCause, VmState};
use super::world::{Records, World};
use crate::clock::Clock;
use crate::ids::VmId;
use crate::report::{Retry, chain};

/// Longest time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Time until a launch that this host could not do at the moment is tried again.
const LAUNCH_AGAIN: Duration = Duration::from_secs(5);

/// What a member is to its cluster, if it did not register and its VM is gone: while its VMM may live, it is not
/// replaced.
fn unregistered(vm: &VmRecord) -> Option<&Membership> {
    let failed = matches!(&vm.state, VmState::Failed { cause: FailureCause::NotRegistered { .. } });
    vm.spec.cluster.as_ref().filter(|_| failed && vm.process.is_none())
}

impl<W: World> Agent<W> {
    /// For good: launches members anew that did not register, and goes on with clusters that are being drained.
    pub(super) async fn look_after_clusters(self) {
        let mut changed = self.shared.vms_changed.subscribe();
        let mut seen = BTreeSet::new();
        let mut drain_at = Instant::now();
        loop {
            changed.mark_unchanged();
            if drain_at <= Instant::now() {
                drain_at = Instant::now() + LOOK_INTERVAL;
                if let Err(error) = self.go_on_draining().await {
                    tracing::warn!(error = %chain(&error), "cannot look for clusters that are being drained");
                }
            }
            let wait = match self.look_after_members(&mut seen).await {
                Ok(wait) => wait,
                Err(error) => {
                    self.shared.declare_broken(&error);
                    return;
                }
            };
            let _ = timeout(wait, changed.changed()).await;
        }
    }

    /// One look at all members; how long until the next. `seen` are those that need not be looked at again.
    async fn look_after_members(&self, seen: &mut BTreeSet<VmId>) -> Result<Duration, LedgerError> {
        let mut failed = self.records();
        seen.retain(|id| failed.iter().any(|vm| vm.id == *id));
        failed.retain(|vm| unregistered(vm).is_some() && !seen.contains(&vm.id));
        if failed.is_empty() {
            return Ok(LOOK_INTERVAL);
        }
        seen.append(&mut self.shared.world.records().with(|store| store.relaunched()).await?);
        failed.retain(|vm| !seen.contains(&vm.id));
        let mut wait = LOOK_INTERVAL;
        for vm in failed {
            let Some(member) = unregistered(&vm) else { continue };
            let lost = if member.attempt >= ATTEMPTS_MAX {
                Some("it did not register when it was launched anew either".to_owned())
            } else {
                match self.launch_anew(&vm, member).await {
                    Ok(()) => None,
                    Err(LaunchError::Ending) => return Ok(LOOK_INTERVAL),
                    // Somebody else was faster.
                    Err(LaunchError::Ledger(LedgerError::Taken { what: Taken::Relaunch })) => None,
                    Err(error) if error.retry() == Retry::Later => {
                        tracing::warn!(vm = %vm.id, error = %chain(&error), "cannot launch a member anew yet");
                        wait = LAUNCH_AGAIN;
                        continue;
                    }
                    Err(error) => Some(format!("it cannot be launched anew: {}", chain(&error))),
                }
            };
            if let Some(reason) = lost {
                self.give_up(&vm, &reason).await?;
            }
            seen.insert(vm.id.clone());
        }
        Ok(wait)
    }

    /// Launches a member anew: the same VM with another id.
    async fn launch_anew(&self, vm: &Arc<VmRecord>, member: &Membership) -> Result<(), LaunchError> {
        let network = vm.network.as_ref();
        let spec = &vm.spec;
        let shape = spec.bundle.is_none();
        let request = LaunchRequest {
            // Its name is its own until it is removed.
            name: None,
            image: spec.image.clone(),
            bundle: spec.bundle.as_ref().map(ToString::to_string),
            vcpus: shape.then(|| spec.vcpus.into()),
            memory_mib: shape.then(|| spec.memory_mib.into()),
            build: None,
            disks: spec.disks.clone(),
            // What the one before had is given back when that has ended.
            volumes: Vec::new(),
            spare_disks: u8::try_from(spec.volumes.len()).unwrap_or(u8::MAX),
            lazy: spec.lazy,
            network_limits: spec.network_limits,
            session: network.map(|network| network.session.to_string()),
            addressing: network.map(|network| network.addressing),
            role: spec.role.clone(),
            published: network.map(|network| network.published.clone()).unwrap_or_default(),
            interfaces: Some(spec.interfaces),
            swap: spec.swap.clone(),
            cluster: Some(member.cluster.to_string()),
            executor_id: Some(member.executor_id.clone()),
            replaces: Some((vm.id.clone(), member.attempt)),
            key: None,
        };
        // On a task of its own, as every launch.
        let agent = self.clone();
        let launching = tokio::spawn(async move { agent.launch_vm(request).await.map(drop) });
        launching.await.unwrap_or(Err(LaunchError::Ending))
    }

    /// Nobody takes this member's place.
    async fn give_up(&self, vm: &VmRecord, reason: &str) -> Result<(), LedgerError> {
        tracing::warn!(vm = %vm.id, reason, "a member is lost");
        let now = self.shared.world.clock().wall();
        let event = member_event(now, "member_lost", vm, serde_json::json!({ "reason": reason }));
        let given_up = Write::Relaunched { vm: vm.id.clone(), successor: None };
        match self.shared.commit(vec![given_up, event]).await {
            Err(LedgerError::Taken { what: Taken::Relaunch }) => Ok(()),
            other => other,
        }
    }
}
