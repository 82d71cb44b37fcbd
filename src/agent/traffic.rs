//! What passed the VMs' network interfaces and volumes, for whoever reads the metrics.
//!
//! The VMMs have the numbers, and asking them takes time. So reading the metrics never asks: it shows the last sample,
//! and keeps one task alive that takes samples for as long as somebody goes on reading. A VMM that does not answer costs
//! its own numbers, nobody else's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;

use super::record::VmRecord;
use super::shared::Shared;
use super::world::{Ask, VmmHost, World};
use crate::clock::{Clock, Monotonic};
use crate::ids::VmId;
use crate::wire::control::{Answer, InterfaceStatus, VolumeStatus};

/// Time between two samples: numbers are this much older than what reads them, at most.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long samples are taken after the last reader: readers come every minute at least.
const INTEREST: Duration = Duration::from_secs(150);

/// How long a VMM may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// VMMs asked at once.
const ASKED_AT_ONCE: usize = 8;

/// What passed a VM's devices.
#[derive(Debug, Clone, Default)]
pub(crate) struct Passed {
    /// Its network interfaces.
    pub(crate) interfaces: Vec<InterfaceStatus>,
    /// Its volume slots that have a volume.
    pub(crate) volumes: Vec<VolumeStatus>,
}

/// The last sample and who wants the next.
#[derive(Debug, Default)]
pub(crate) struct Traffic(Mutex<Samples>);

#[derive(Debug, Default)]
struct Samples {
    by_vm: BTreeMap<VmId, Passed>,
    /// When interest ends; `None` while no task takes samples.
    wanted_until: Option<Monotonic>,
}

impl Traffic {
    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last sample of these VMs. Never waits; sees to it that there will be a next sample. Call inside the runtime.
pub(crate) fn last<W: World>(shared: &Arc<Shared<W>>, vms: &[Arc<VmRecord>]) -> Vec<(VmId, Passed)> {
    let until = shared.world.clock().monotonic().after(INTEREST);
    let mut samples = shared.traffic.samples();
    if samples.wanted_until.replace(until).is_none() {
        tokio::spawn(take_samples(Arc::clone(shared)));
    }
    let living = vms.iter().filter(|vm| vm.state.holds_resources());
    living.filter_map(|vm| Some((vm.id.clone(), samples.by_vm.get(&vm.id)?.clone()))).collect()
}

async fn take_samples<W: World>(shared: Arc<Shared<W>>) {
    loop {
        let by_vm = sample(&shared).await;
        {
            let mut samples = shared.traffic.samples();
            let now = shared.world.clock().monotonic();
            if samples.wanted_until.is_none_or(|until| until < now) {
                *samples = Samples::default();
                return;
            }
            samples.by_vm = by_vm;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn sample<W: World>(shared: &Arc<Shared<W>>) -> BTreeMap<VmId, Passed> {
    let vms: Vec<Arc<VmRecord>> = shared.vms().values().map(|vm| vm.record.borrow().clone()).collect();
    let living = vms.into_iter().filter(|vm| vm.state.holds_resources() && vm.process.is_some());
    let asked = stream::iter(living).map(|vm| async move {
        let interfaces = interfaces(shared, &vm).await?;
        Some((vm.id.clone(), Passed { interfaces, volumes: volumes(shared, &vm).await }))
    });
    asked.buffer_unordered(ASKED_AT_ONCE).filter_map(std::future::ready).collect().await
}

/// What passed a VM's interfaces, if its VMM says.
pub(crate) async fn interfaces<W: World>(shared: &Shared<W>, vm: &VmRecord) -> Option<Vec<InterfaceStatus>> {
    let asked = shared.world.vmm().ask(vm, shared.epoch, Ask::Network);
    match tokio::time::timeout(ANSWER_LIMIT, asked).await {
        Ok(Ok(Answer::Network(interfaces))) => Some(interfaces),
        Ok(Ok(_) | Err(_)) | Err(_) => None,
    }
}

/// What passed the volumes that a VM has now, if its VMM says.
async fn volumes<W: World>(shared: &Shared<W>, vm: &VmRecord) -> Vec<VolumeStatus> {
    if vm.spec.volumes.iter().all(|slot| slot.used.is_none()) {
        return Vec::new();
    }
    let asked = shared.world.vmm().ask(vm, shared.epoch, Ask::Volumes);
    match tokio::time::timeout(ANSWER_LIMIT, asked).await {
        Ok(Ok(Answer::Volumes(slots))) => slots.into_iter().filter(|slot| slot.bytes > 0).collect(),
        Ok(Ok(_) | Err(_)) | Err(_) => Vec::new(),
    }
}
