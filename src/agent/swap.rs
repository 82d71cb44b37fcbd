//! Which idle VMs' memory is moved out: a pure decision from what the host has free and what its VMs do. Each decision
//! is kept with its inputs, so that somebody who wonders later can see why.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::SwapPolicy;
use super::vm_state::SwapMode;
use crate::clock::UnixNanos;
use crate::ids::VmId;
use crate::units::MIB;

/// When the host is short of memory, and what a VM has to be to count as idle.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwapConfig {
    /// Below this much available memory, in MiB, idle VMs are moved out; 0: never for that reason.
    pub low_free_mib: u64,
    /// Until this much is available, in MiB.
    pub target_free_mib: u64,
    /// The same when some task waited for memory for more than this part of the last ten seconds, in percent
    /// (`Documentation/accounting/psi.rst`); 0: never for that reason.
    pub psi_some_avg10: f64,
    /// Seconds a VM has to be idle to be moved out for need of memory.
    pub idle_s: u32,
    /// A VM that uses more of one processor than this, in percent, is busy.
    pub idle_cpu_percent: f64,
    /// Seconds between two looks.
    pub sample_s: u32,
}

impl Default for SwapConfig {
    fn default() -> Self {
        // A guest that waits for its timers only takes a thousandth of a processor, on a host that emulates its kernel
        // two hundredths. What counts as little memory is for the host's owner to say: 512 MiB is where an ordinary
        // server begins to throw out its page cache in earnest.
        Self {
            low_free_mib: 512,
            target_free_mib: 1024,
            psi_some_avg10: 10.0,
            idle_s: 10,
            idle_cpu_percent: 5.0,
            sample_s: 5,
        }
    }
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HostLoad {
    /// Memory available without swapping, in MiB.
    pub available_mib: u64,
    /// Part of the last ten seconds in which some task waited for memory, in percent; `None`: the host does not say.
    pub psi_some_avg10: Option<f64>,
}

/// A VM that runs and may be moved out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdleVm {
    /// Which.
    pub vm: VmId,
    /// What was said about it.
    pub policy: SwapPolicy,
    /// How long it has done nothing.
    pub idle: Duration,
    /// How long it has been running.
    pub running: Duration,
    /// What it has in memory.
    pub resident_bytes: u64,
}

/// What was decided about one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// To the host's swap.
    Page,
    /// To a file.
    Hibernate,
    /// It does something.
    Busy,
    /// It has not been running for long.
    JustWoke,
    /// There is no need to.
    Spared,
}

/// A VM with what was known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weighed {
    /// Which.
    pub vm: VmId,
    /// Seconds it has done nothing.
    pub idle_s: u64,
    /// What it has in memory, in MiB.
    pub resident_mib: u64,
    /// Its policy's priority.
    pub priority: u8,
    /// What was decided.
    pub verdict: Verdict,
}

/// Why a look at idle VMs was more than a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    /// Less memory is available than there is to be.
    LowMemory,
    /// Tasks wait for memory.
    Pressure,
    /// There is enough; a VM was idle for as long as its policy says.
    Idleness,
}

/// What was decided at one moment, with what it was decided by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SwapDecision {
    /// When.
    pub at: UnixNanos,
    /// Why.
    pub need: Need,
    /// What the host had.
    pub host: HostLoad,
    /// Below how much available memory VMs are moved out, in MiB.
    pub low_free_mib: u64,
    /// Until how much, in MiB.
    pub target_free_mib: u64,
    /// The VMs that may be moved out, in the order they were looked at.
    pub vms: Vec<Weighed>,
}

impl SwapDecision {
    /// The VMs to move out, and where to.
    pub fn chosen(&self) -> impl Iterator<Item = (&VmId, SwapMode)> {
        self.vms.iter().filter_map(|weighed| match weighed.verdict {
            Verdict::Page => Some((&weighed.vm, SwapMode::Page)),
            Verdict::Hibernate => Some((&weighed.vm, SwapMode::Hibernate)),
            Verdict::Busy | Verdict::JustWoke | Verdict::Spared => None,
        })
    }
}

/// Decides. VMs whose policy has no mode are not looked at. Those with the least priority go first, among them those
/// that have been idle the longest with the most memory; for need of memory only until there is enough.
pub(super) fn decide(at: UnixNanos, host: HostLoad, config: &SwapConfig, vms: &[IdleVm]) -> SwapDecision {
    let pressed = config.psi_some_avg10 > 0.0 && host.psi_some_avg10.is_some_and(|psi| psi > config.psi_some_avg10);
    let need = if host.available_mib < config.low_free_mib {
        Need::LowMemory
    } else if pressed {
        Need::Pressure
    } else {
        Need::Idleness
    };
    let mut candidates: Vec<(&IdleVm, SwapMode)> =
        vms.iter().filter_map(|vm| vm.policy.mode.map(|mode| (vm, mode))).collect();
    candidates.sort_by_key(|(vm, _)| {
        let weight = u128::from(vm.idle.as_secs()) * u128::from(vm.resident_bytes);
        (vm.policy.priority, std::cmp::Reverse(weight), vm.vm.clone())
    });
    let mut missing = match need {
        Need::LowMemory => config.target_free_mib.max(config.low_free_mib).saturating_sub(host.available_mib) * MIB,
        // How much would help is not known: the next look shows. At least one.
        Need::Pressure => config.target_free_mib.saturating_sub(host.available_mib).max(1) * MIB,
        Need::Idleness => 0,
    };
    let mut verdict = |vm: &IdleVm, mode: SwapMode| {
        let seconds = |count: u32| Duration::from_secs(count.into());
        let long_enough = vm.policy.idle_s > 0 && vm.idle >= seconds(vm.policy.idle_s);
        if vm.running < seconds(vm.policy.min_resident_s) {
            return Verdict::JustWoke;
        }
        if vm.idle < seconds(config.idle_s) && !long_enough {
            return Verdict::Busy;
        }
        if missing == 0 && !long_enough {
            return Verdict::Spared;
        }
        missing = missing.saturating_sub(vm.resident_bytes);
        match mode {
            SwapMode::Page => Verdict::Page,
            SwapMode::Hibernate => Verdict::Hibernate,
        }
    };
    let vms = candidates
        .into_iter()
        .map(|(vm, mode)| Weighed {
            vm: vm.vm.clone(),
            idle_s: vm.idle.as_secs(),
            resident_mib: vm.resident_bytes / MIB,
            priority: vm.policy.priority,
            verdict: verdict(vm, mode),
        })
        .collect();
    let SwapConfig { low_free_mib, target_free_mib, .. } = *config;
    SwapDecision { at, need, host, low_free_mib, target_free_mib, vms }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(number: u8, mode: Option<SwapMode>, idle_s: u64, resident_mib: u64) -> IdleVm {
        IdleVm {
            vm: VmId::from_random([number; 10]),
            policy: SwapPolicy { mode, ..SwapPolicy::default() },
            idle: Duration::from_secs(idle_s),
            running: Duration::from_secs(600),
            resident_bytes: resident_mib * MIB,
        }
    }

    fn load(available_mib: u64) -> HostLoad {
        HostLoad { available_mib, psi_some_avg10: Some(0.0) }
    }

    fn verdicts(host: HostLoad, vms: &[IdleVm]) -> Vec<(u8, Verdict)> {
        let decision = decide(UnixNanos(1), host, &SwapConfig::default(), vms);
        let number = |id: &VmId| vms.iter().position(|vm| vm.vm == *id).unwrap();
        decision.vms.iter().map(|weighed| (u8::try_from(number(&weighed.vm)).unwrap(), weighed.verdict)).collect()
    }

    #[test]
    fn only_as_many_go_as_are_needed_and_only_idle_ones() {
        let page = Some(SwapMode::Page);
        let vms = [vm(0, page, 100, 300), vm(1, page, 200, 300), vm(2, page, 0, 900), vm(3, None, 900, 900)];
        // 624 MiB are missing: both idle ones go, the longer idle one first; the busy one stays.
        let both = [(1, Verdict::Page), (0, Verdict::Page), (2, Verdict::Busy)];
        assert_eq!(verdicts(load(400), &vms), both);
        let one = [(1, Verdict::Page), (0, Verdict::Spared), (2, Verdict::Busy)];
        let config = SwapConfig { target_free_mib: 600, ..SwapConfig::default() };
        let decision = decide(UnixNanos(1), load(400), &config, &vms);
        assert_eq!(decision.vms.iter().map(|weighed| weighed.verdict).collect::<Vec<_>>(), one.map(|(_, is)| is));
        assert_eq!((decision.need, decision.chosen().count()), (Need::LowMemory, 1));
        assert!(verdicts(load(5000), &vms).iter().all(|(_, is)| matches!(is, Verdict::Spared | Verdict::Busy)));
    }

    #[test]
    fn priority_goes_before_idleness_and_a_woken_vm_stays() {
        let mut vms = [vm(0, Some(SwapMode::Page), 100, 300), vm(1, Some(SwapMode::Hibernate), 50, 300)];
        vms[1].policy.priority = 1;
        assert_eq!(verdicts(load(500), &vms), [(1, Verdict::Hibernate), (0, Verdict::Page)]);
        vms[1].running = Duration::from_secs(59);
        assert_eq!(verdicts(load(500), &vms), [(1, Verdict::JustWoke), (0, Verdict::Page)]);
    }

    #[test]
    fn waiting_tasks_are_a_need_as_well_and_so_is_a_policy() {
        let vms = [vm(0, Some(SwapMode::Page), 100, 10), vm(1, Some(SwapMode::Page), 90, 10)];
        let pressed = HostLoad { available_mib: 9000, psi_some_avg10: Some(11.0) };
        assert_eq!(verdicts(pressed, &vms), [(0, Verdict::Page), (1, Verdict::Spared)]);
        let mut patient = vms.clone();
        patient[1].policy.idle_s = 90;
        assert_eq!(verdicts(load(9000), &patient), [(0, Verdict::Spared), (1, Verdict::Page)]);
        let unknown = HostLoad { available_mib: 9000, psi_some_avg10: None };
        assert_eq!(decide(UnixNanos(1), unknown, &SwapConfig::default(), &vms).need, Need::Idleness);
    }

    fn any_vm() -> impl Strategy<Value = IdleVm> {
        let mode = prop_oneof![Just(None), Just(Some(SwapMode::Page)), Just(Some(SwapMode::Hibernate))];
        (any::<[u8; 10]>(), mode, 0..200_u64, 0..200_u64, 0..2000_u64, 0..3_u8, 0..2_u32).prop_map(
            |(id, mode, idle, running, resident, priority, own_idle)| IdleVm {
                vm: VmId::from_random(id),
                policy: SwapPolicy { mode, priority, idle_s: own_idle * 100, ..SwapPolicy::default() },
                idle: Duration::from_secs(idle),
                running: Duration::from_secs(running),
                resident_bytes: resident * MIB,
            },
        )
    }

    proptest! {
        #[test]
        fn nobody_goes_who_is_busy_or_just_woke_or_not_to_go_or_not_needed(
            available in 0..2000_u64, vms in proptest::collection::vec(any_vm(), 0..12)
        ) {
            let config = SwapConfig::default();
            let decision = decide(UnixNanos(1), load(available), &config, &vms);
            let of = |id: &VmId| vms.iter().find(|vm| vm.vm == *id).unwrap();
            let mut freed = available;
            for (id, mode) in decision.chosen() {
                let vm = of(id);
                prop_assert_eq!(vm.policy.mode, Some(mode));
                prop_assert!(vm.idle.as_secs() >= 10 && vm.running.as_secs() >= 60);
                let own_wish = vm.policy.idle_s > 0 && vm.idle.as_secs() >= vm.policy.idle_s.into();
                prop_assert!(own_wish || available < config.low_free_mib && freed < config.target_free_mib);
                freed += vm.resident_bytes / MIB;
            }
            // Who stays although there is need is busy, just woke, or there is enough without it.
            for weighed in decision.vms.iter().filter(|weighed| weighed.verdict == Verdict::Spared) {
                prop_assert!(available >= config.low_free_mib || freed >= config.target_free_mib, "{:?}", weighed);
            }
        }
    }
}
