//! Draining: no new work, all VMs stopped but those that are hibernated, then the agent's end. Begun once, by request or
//! by a signal; nobody who watches is needed for it to go on. What did not stop within the bound is named, and left to
//! the next agent.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::timeout;

use super::Agent;
use super::shared::VmHandle;
use super::vm_actor::Verb;
use super::vm_state::{SwapMode, VmState};
use super::world::World;
use crate::report::chain;

/// How long a guest may take to power off when nothing else is asked for.
pub const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// What stopping takes beside the guest's own time: a VMM's end, its network and its records.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How much longer for each VM: they stop at once, and share the processors.
const STOP_LIMIT_EACH: Duration = Duration::from_secs(2);

/// How far draining is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Draining {
    /// Whether it has begun: no new work is taken.
    pub has_begun: bool,
    /// VMs there were to stop.
    pub vms: usize,
    /// How many of them have stopped.
    pub stopped: usize,
    /// Those that did not: names or ids, known in the end.
    pub left: Vec<String>,
    /// Whether nothing more will happen.
    pub is_over: bool,
}

/// Whether a VM has to be stopped. One that was handed over runs on another host. What is hibernated is a file, which would be lost by that, and keeps nobody from
/// anything.
fn runs_here(vm: &VmHandle) -> bool {
    let state = &vm.record.borrow().state;
    let is_elsewhere = matches!(state, VmState::SwappedOut { mode: SwapMode::Hibernate } | VmState::HandedOver);
    state.holds_resources() && !is_elsewhere
}

impl<W: World> Agent<W> {
    /// Begins to drain, unless that has begun.
    pub(super) fn begin_draining(&self, grace: Duration) -> watch::Receiver<Draining> {
        let is_first = self.shared.draining.send_if_modified(|draining| {
            let is_first = !draining.has_begun;
            draining.has_begun = true;
            is_first
        });
        if is_first {
            tokio::spawn(self.clone().drain_all(grace));
        }
        self.shared.draining.subscribe()
    }

    async fn drain_all(self, grace: Duration) {
        // Whoever was admitted before draining began has a record once the admission is free.
        drop(self.shared.admission.lock().await);
        let vms: Vec<VmHandle> = self.shared.vms().values().cloned().collect();
        let living: Vec<_> = vms.into_iter().filter(runs_here).collect();
        let count = living.len();
        tracing::info!(vms = count, grace_s = grace.as_secs(), "draining: no new work is taken");
        self.shared.draining.send_modify(|draining| draining.vms = count);
        let mut stops: FuturesUnordered<_> = living.iter().map(|vm| self.stop_to_drain(vm, grace)).collect();
        let each = STOP_LIMIT_EACH.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let limit = grace.saturating_add(STOP_LIMIT).saturating_add(each);
        let all = async { while stops.next().await.is_some() {} };
        if timeout(limit, all).await.is_err() {
            tracing::error!(limit_s = limit.as_secs(), "some VMs did not stop in time");
        }
        drop(stops);
        let left = living.iter().filter(|vm| runs_here(vm));
        let left: Vec<_> = left.map(|vm| vm.name.clone().unwrap_or_else(|| vm.id.to_string())).collect();
        tracing::info!(left = left.len(), "drained");
        self.shared.draining.send_modify(|draining| {
            draining.left = left;
            draining.is_over = true;
        });
    }

    async fn stop_to_drain(&self, vm: &VmHandle, grace: Duration) {
        match self.ask_actor(vm, Verb::Stop { grace }).await {
            Ok(_) => {}
            Err(error) => tracing::warn!(vm = %vm.id, error = %chain(&error), "cannot stop it"),
        }
        if !runs_here(vm) {
            self.shared.draining.send_modify(|draining| draining.stopped += 1);
        }
    }

    /// How far draining is, to wait on.
    pub(super) fn draining(&self) -> watch::Receiver<Draining> {
        self.shared.draining.subscribe()
    }
}
