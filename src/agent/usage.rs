//! What all VMs use at a moment, for whoever looks again and again. The host and the VMMs are asked and no guest, so that
//! looking disturbs none.

use std::sync::Arc;

use futures_util::{StreamExt as _, stream};

use super::record::VmRecord;
use super::shared::Shared;
use super::traffic;
use super::vm_state::VmState;
use super::world::{ProcessUsage, VmmHost, VmmProcess, World};
use crate::clock::Steady;
use crate::wire::control::InterfaceStatus;

/// VMs looked at at once.
const LOOKED_AT_ONCE: usize = 8;

/// What VMs use.
#[derive(Debug)]
pub struct Usages {
    /// When this was.
    pub at: Steady,
    /// Each VM with what it uses, in the order they were asked for.
    pub vms: Vec<(Arc<VmRecord>, VmUsage)>,
}

/// What a VM uses.
#[derive(Debug, Default)]
pub struct VmUsage {
    /// Its VMM's process id and what that uses; `None` while there is none.
    pub process: Option<(i32, ProcessUsage)>,
    /// What passed its network interfaces; `None` while no VMM says.
    pub network: Option<Vec<InterfaceStatus>>,
}

/// Looks at these VMs. A VMM that does not answer costs its own numbers, nobody else's.
pub(super) async fn of<W: World>(shared: &Shared<W>, vms: Vec<Arc<VmRecord>>) -> Usages {
    let at = shared.steady();
    let looked = stream::iter(vms).map(|vm| async move {
        let usage = one(shared, &vm).await;
        (vm, usage)
    });
    Usages { at, vms: looked.buffered(LOOKED_AT_ONCE).collect().await }
}

async fn one<W: World>(shared: &Shared<W>, vm: &VmRecord) -> VmUsage {
    if !vm.state.holds_resources() || vm.process.is_none() {
        return VmUsage::default();
    }
    let Ok(Some(process)) = shared.world.vmm().find(vm).await else { return VmUsage::default() };
    // A VMM whose memory is out would have to come back to answer.
    let is_out = matches!(vm.state, VmState::SwappedOut { .. });
    let network = if is_out { None } else { traffic::interfaces(shared, vm).await };
    VmUsage { process: Some((process.record().pid, process.usage())), network }
}
