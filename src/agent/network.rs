//! What others do to this host's network, and what becomes of it: each change that was put right is an event, and a VM
//! whose tap was deleted gets the new one. Also the sweep of jails that no VM has.

use std::sync::Arc;

use super::ledger::{LedgerError, NewEvent, Write};
use super::record::{Subject, VmRecord};
use super::shared::Shared;
use super::vm_state::VmState;
use super::world::{Ask, NetworkChange, VmNetworks, VmmHost, World};
use crate::clock::Clock;
use crate::report::chain;

/// Has the host's own part of the network as it should be. What fails is said and tried again with the next change.
pub(super) async fn start<W: World>(shared: &Arc<Shared<W>>) {
    if let Err(error) = shared.world.networks().start().await {
        tracing::error!(error = %chain(&error), "this host's network is not as it should be");
    }
    if let Err(error) = look_for_conflicts(shared).await {
        shared.declare_broken(&error);
    }
    tokio::spawn(follow(Arc::clone(shared)));
}

/// Looks whether others have routes to addresses of this fabric; while they do, sessions are refused.
pub(super) async fn look_for_conflicts<W: World>(shared: &Arc<Shared<W>>) -> Result<(), LedgerError> {
    let reason = match shared.world.networks().conflicts().await {
        Ok(routes) if routes.is_empty() => None,
        Ok(routes) => Some(format!(
            "this host has routes of others to addresses of the fabric ({}): remove them, or choose another \
             host_number or ipv6_prefix in [fabric], or ipv4 = false",
            routes.join(", ")
        )),
        Err(error) => Some(format!("this host's routes are not known: {}", chain(&error))),
    };
    shared.set_conflict("routes", reason).await
}

/// Writes down what was changed by others, as long as the network tells of it.
async fn follow<W: World>(shared: Arc<Shared<W>>) {
    let Some(mut changes) = shared.world.networks().changes() else { return };
    while let Some(change) = changes.recv().await {
        let vm = change.jail.and_then(|jail| of_jail(&shared, jail));
        let subject = vm.as_ref().map_or(Subject::Host, |vm| Subject::Vm(vm.id.clone()));
        let NetworkChange { jail, steps, failures } = change;
        let kind = if failures.is_empty() {
            tracing::warn!(%subject, ?steps, "the network was changed by somebody else, and is as it should be");
            "network_healed"
        } else {
            tracing::warn!(%subject, ?steps, ?failures, "the network is not as it should be");
            "network_failed"
        };
        let event = NewEvent {
            at: shared.world.clock().wall(),
            kind,
            subject,
            operation: None,
            body: serde_json::json!({ "jail": jail, "steps": steps, "failures": failures }),
        };
        if let Err(error) = shared.commit(vec![Write::Event(event)]).await {
            shared.declare_broken(&error);
            return;
        }
        if let Some(vm) = vm {
            replace_taps(&shared, &vm, &steps).await;
        }
    }
}

fn of_jail<W: World>(shared: &Arc<Shared<W>>, jail: u16) -> Option<Arc<VmRecord>> {
    let vms = shared.vms();
    let records = vms.values().map(|vm| vm.record.borrow().clone());
    records.into_iter().find(|vm| vm.jail == jail && vm.state.holds_resources())
}

/// Hands taps that were made anew to the machine they belong to.
async fn replace_taps<W: World>(shared: &Arc<Shared<W>>, vm: &VmRecord, steps: &[String]) {
    let is_out = matches!(vm.state, VmState::SwappedOut { .. });
    if !is_out && !matches!(vm.state, VmState::Running | VmState::Paused | VmState::Sending) {
        return;
    }
    for index in 0..vm.spec.interfaces {
        let made = format!("make link {}", crate::net::desired::tap(index));
        if !steps.contains(&made) {
            continue;
        }
        if is_out {
            // Those that are held are the deleted ones. A VMM that is there gets the new ones when they are held.
            shared.world.vmm().release_taps(&vm.id);
            if vm.is_paged() {
                let _ = shared.world.vmm().ask(vm, shared.epoch, Ask::ReplaceTap { index }).await;
            }
            if let Err(error) = shared.world.vmm().hold_taps(vm).await {
                tracing::error!(vm = %vm.id, index, %error, "no packet will wake this VM: its tap cannot be held");
            }
            continue;
        }
        match shared.world.vmm().ask(vm, shared.epoch, Ask::ReplaceTap { index }).await {
            Ok(_) => {
                tracing::info!(vm = %vm.id, index, "the VM has its new tap");
                if index == 0 {
                    // The sockets were the old tap's.
                    shared.serve_metadata(vm);
                }
            }
            Err(error) => tracing::error!(vm = %vm.id, index, error = %chain(&error), "the VM is without its tap"),
        }
    }
}

/// Removes the jails that belong to no VM: what an earlier agent left half-made.
pub(super) async fn sweep<W: World>(shared: &Arc<Shared<W>>) {
    // In this order: what is kept ready becomes a VM.
    let mut known = shared.pools.jails_beside(&[]);
    {
        let vms = shared.vms();
        let records = vms.values().map(|vm| vm.record.borrow().clone());
        known.extend(records.filter(|vm| vm.state.holds_resources()).map(|vm| vm.jail));
    }
    match shared.world.networks().sweep(known).await {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => tracing::warn!(?removed, "removed jails that belong to no VM"),
        Err(error) => tracing::warn!(error = %chain(&error), "cannot remove jails that belong to no VM"),
    }
}
