//! Looks at idle VMs every few seconds and has those moved out that [`super::swap::decide`] chooses. A VM is idle while
//! its process takes next to no processor time, no packet passes its interfaces and nobody has a stream into it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Agent;
use super::ledger::Write;
use super::record::VmRecord;
use super::shared::VmHandle;
use super::swap::{HostLoad, IdleVm, Need, SwapDecision, decide};
use super::traffic;
use super::vm_actor::{SwapOrder, Verb};
use super::vm_state::VmState;
use super::world::{ProcessUsage, VmDisk, VmmHost, VmmProcess, World};
use crate::clock::{Clock, Monotonic};
use crate::ids::VmId;
use crate::units::MIB;

/// What was seen of a VM that runs.
struct Seen {
    cpu: Option<Duration>,
    frames: u64,
    at: Monotonic,
    /// Since when it has done nothing.
    idle_since: Monotonic,
    /// Since when it was seen running.
    running_since: Monotonic,
}

impl<W: World> Agent<W> {
    /// Looks again and again, for as long as the agent lives.
    pub(super) async fn watch_idle_vms(self) {
        let interval = Duration::from_secs(self.shared.config.swap.sample_s.into());
        let mut seen = BTreeMap::new();
        let mut last = None;
        loop {
            tokio::time::sleep(interval).await;
            let vms = self.look_at_vms(&mut seen).await;
            if vms.is_empty() {
                continue;
            }
            let Ok(host) = self.shared.world.disk().host().await else { continue };
            let load = HostLoad {
                available_mib: host.memory_available_bytes / MIB,
                psi_some_avg10: self.shared.world.disk().pressure().await.memory,
            };
            let decision = decide(self.shared.world.clock().wall(), load, &self.shared.config.swap, &vms);
            if let Err(error) = self.carry_out(&decision, &mut last).await {
                self.shared.declare_broken(&error);
                return;
            }
        }
    }

    /// The VMs that may be moved out, with what they did since the last look.
    async fn look_at_vms(&self, seen: &mut BTreeMap<VmId, Seen>) -> Vec<IdleVm> {
        let handles: Vec<VmHandle> = self.shared.vms().values().cloned().collect();
        let records: Vec<Arc<VmRecord>> = handles.iter().map(|vm| vm.record.borrow().clone()).collect();
        let may_go = |vm: &&Arc<VmRecord>| {
            let is_whole = self.shared.fillings.holds_back(vm).is_none();
            vm.state == VmState::Running && vm.spec.swap.mode.is_some() && is_whole
        };
        let records: Vec<Arc<VmRecord>> = records.iter().filter(may_go).cloned().collect();
        // One that was out in between begins anew.
        seen.retain(|id, _| records.iter().any(|vm| vm.id == *id));
        let mut idle = Vec::with_capacity(records.len());
        for vm in records {
            let Ok(Some(process)) = self.shared.world.vmm().find(&vm).await else { continue };
            let usage = process.usage();
            let interfaces = traffic::interfaces(&self.shared, &vm).await.unwrap_or_default();
            let frames = interfaces.iter().map(|one| one.rx.frames + one.tx.frames).sum();
            let now = self.shared.world.clock().monotonic();
            let before = seen.remove(&vm.id);
            let is_busy = self.shared.streams.any(&vm.id)
                || before.as_ref().is_none_or(|before| before.did_something(usage, frames, now, self.idle_cpu()));
            let idle_since = before.as_ref().filter(|_| !is_busy).map_or(now, |before| before.idle_since);
            let running_since = before.map_or(now, |before| before.running_since);
            seen.insert(vm.id.clone(), Seen { cpu: usage.cpu, frames, at: now, idle_since, running_since });
            idle.push(IdleVm {
                vm: vm.id.clone(),
                policy: vm.spec.swap.clone(),
                idle: now.since(idle_since),
                running: now.since(running_since),
                resident_bytes: usage.resident_bytes.unwrap_or(0),
            });
        }
        idle
    }

    fn idle_cpu(&self) -> f64 {
        self.shared.config.swap.idle_cpu_percent / 100.0
    }

    /// Writes a decision down, if it is one, and has the chosen moved out.
    async fn carry_out(
        &self,
        decision: &SwapDecision,
        last: &mut Option<SwapDecision>,
    ) -> Result<(), super::LedgerError> {
        let chosen: Vec<_> = decision.chosen().map(|(vm, mode)| (vm.clone(), mode)).collect();
        // A need that nobody can meet is said once, not every few seconds.
        let verdicts = |decision: &SwapDecision| {
            decision.vms.iter().map(|weighed| (weighed.vm.clone(), weighed.verdict)).collect::<Vec<_>>()
        };
        let is_new =
            last.as_ref().is_none_or(|last| verdicts(last) != verdicts(decision) || last.need != decision.need);
        if chosen.is_empty() && (decision.need == Need::Idleness || !is_new) {
            return Ok(());
        }
        *last = Some(decision.clone());
        self.shared.commit(vec![Write::SwapDecision(Box::new(decision.clone()))]).await?;
        for (id, mode) in chosen {
            let Some(vm) = self.shared.vms().get(&id).cloned() else { continue };
            let because = match decision.need {
                Need::LowMemory => "the host is low on memory",
                Need::Pressure => "tasks of the host wait for memory",
                Need::Idleness => "it was idle for as long as its policy says",
            };
            let order = SwapOrder { mode, wake_after: None, because: because.to_owned() };
            if let Err(error) = self.ask_actor(&vm, Verb::SwapOut(order)).await {
                let error = crate::report::chain(&error);
                tracing::warn!(vm = %id, mode = mode.name(), error, "an idle VM was not moved out");
            }
        }
        Ok(())
    }
}

impl Seen {
    fn did_something(&self, usage: ProcessUsage, frames: u64, now: Monotonic, idle_cpu: f64) -> bool {
        let elapsed = now.since(self.at).as_secs_f64();
        let used = match (self.cpu, usage.cpu) {
            (Some(before), Some(after)) => after.saturating_sub(before).as_secs_f64(),
            // A host that does not say is taken at its packets.
            (_, _) => 0.0,
        };
        frames != self.frames || used > elapsed * idle_cpu
    }
}
