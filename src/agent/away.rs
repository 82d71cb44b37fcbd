//! VMs that are on other hosts with addresses of this one: as long as they are there, their addresses are nobody else's
//! and lead to them. When they are gone there, what is here of them is forgotten. Level triggered: the hosts are asked
//! again and again, so that it does not matter whose agent was there when the VM was removed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Agent;
use super::migration_record::MigrationRecord;
use super::record::VmRecord;
use super::vm_actor::Verb;
use super::vm_state::VmState;
use super::world::World;
use crate::report::chain;

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// The way a VM went that is away.
fn away(vm: &VmRecord) -> Option<&MigrationRecord> {
    vm.migration.as_ref().filter(|_| vm.state == VmState::HandedOver)
}

impl<W: World> Agent<W> {
    /// For good: forgets VMs that are gone where they were handed to.
    pub(super) async fn look_after_those_away(self) {
        loop {
            sleep(LOOK_INTERVAL).await;
            for vm in self.records() {
                if let Some(way) = away(&vm) {
                    self.look_after(&vm, way).await;
                }
            }
        }
    }

    async fn look_after(&self, vm: &Arc<VmRecord>, way: &MigrationRecord) {
        let Some(fabric) = &self.shared.config.fabric else { return };
        let Some(peer) = fabric.peers.iter().find(|peer| u16::from(peer.host) == way.host) else { return };
        match self.shared.is_at_peer(fabric, peer, &vm.id).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::info!(vm = %vm.id, host = way.peer, "gone where it was handed to: forgotten");
                let Ok(handle) = self.find(vm.id.as_str()) else { return };
                // It may be on its way back by now, or have gone another way: then it is not forgotten.
                if let Err(error) = self.ask_actor(&handle, Verb::ForgetAway(way.id.clone())).await {
                    tracing::debug!(vm = %vm.id, error = %chain(&error), "not forgotten");
                }
            }
            // It is there as far as is known.
            Err(error) => tracing::debug!(vm = %vm.id, host = way.peer, error = %chain(&error), "cannot ask for it"),
        }
    }
}
