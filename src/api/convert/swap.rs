//! VMs whose memory is out.

use super::timestamp;
use crate::agent;
use crate::api::types::{
    SwapChoice, SwapDecision, SwapMode, SwapNeed, SwapPolicy, SwapVerdict, SwapWeighed, Swapped, WakeCause,
};

/// Where memory goes.
pub(in crate::api) const fn swap_mode(mode: SwapMode) -> agent::SwapMode {
    match mode {
        SwapMode::Page => agent::SwapMode::Page,
        SwapMode::Hibernate => agent::SwapMode::Hibernate,
    }
}

const fn shown_mode(mode: agent::SwapMode) -> SwapMode {
    match mode {
        agent::SwapMode::Page => SwapMode::Page,
        agent::SwapMode::Hibernate => SwapMode::Hibernate,
    }
}

/// What a client says about a VM.
pub(in crate::api) fn swap_policy(asked: SwapPolicy) -> agent::SwapPolicy {
    let default = agent::SwapPolicy::default();
    let SwapPolicy { mode, idle_s, min_resident_s, priority, wake } = asked;
    agent::SwapPolicy {
        mode: match mode {
            SwapChoice::Never => None,
            SwapChoice::Page => Some(agent::SwapMode::Page),
            SwapChoice::Hibernate => Some(agent::SwapMode::Hibernate),
        },
        idle_s: idle_s.unwrap_or(default.idle_s),
        min_resident_s: min_resident_s.unwrap_or(default.min_resident_s),
        priority: priority.unwrap_or(default.priority),
        wake: wake.map_or(default.wake, |wake| wake.into_iter().map(wake_cause).collect()),
    }
}

const fn wake_cause(cause: WakeCause) -> agent::WakeCause {
    match cause {
        WakeCause::Api => agent::WakeCause::Api,
        WakeCause::Packet => agent::WakeCause::Packet,
        WakeCause::Timer => agent::WakeCause::Timer,
        WakeCause::Vsock => agent::WakeCause::Vsock,
    }
}

const fn shown_wake_cause(cause: agent::WakeCause) -> WakeCause {
    match cause {
        agent::WakeCause::Api => WakeCause::Api,
        agent::WakeCause::Packet => WakeCause::Packet,
        agent::WakeCause::Timer => WakeCause::Timer,
        agent::WakeCause::Vsock => WakeCause::Vsock,
    }
}

/// What holds for a VM, all of it.
pub(super) fn shown_policy(policy: &agent::SwapPolicy) -> SwapPolicy {
    SwapPolicy {
        mode: match policy.mode {
            None => SwapChoice::Never,
            Some(agent::SwapMode::Page) => SwapChoice::Page,
            Some(agent::SwapMode::Hibernate) => SwapChoice::Hibernate,
        },
        idle_s: Some(policy.idle_s),
        min_resident_s: Some(policy.min_resident_s),
        priority: Some(policy.priority),
        wake: Some(policy.wake.iter().map(|cause| shown_wake_cause(*cause)).collect()),
    }
}

/// Where a VM's memory is, if it is out.
pub(super) fn swapped(vm: &agent::VmRecord) -> Option<Swapped> {
    let swap = vm.swap.as_ref()?;
    Some(Swapped {
        mode: vm.swap_mode().map(shown_mode),
        since: timestamp(swap.at),
        because: swap.because.clone(),
        wake_at: swap.wake_at.map(timestamp),
    })
}

/// A decision about idle VMs.
pub(in crate::api) fn swap_decision(decision: agent::SwapDecision) -> SwapDecision {
    let agent::SwapDecision { at, need, host, low_free_mib, target_free_mib, vms } = decision;
    let agent::HostLoad { available_mib, psi_some_avg10 } = host;
    SwapDecision {
        at: timestamp(at),
        need: match need {
            agent::Need::LowMemory => SwapNeed::LowMemory,
            agent::Need::Pressure => SwapNeed::Pressure,
            agent::Need::Idleness => SwapNeed::Idleness,
        },
        available_mib,
        psi_some_avg10,
        low_free_mib,
        target_free_mib,
        vms: vms.into_iter().map(weighed).collect(),
    }
}

fn weighed(weighed: agent::Weighed) -> SwapWeighed {
    let agent::Weighed { vm, idle_s, resident_mib, priority, verdict } = weighed;
    let verdict = match verdict {
        agent::Verdict::Page => SwapVerdict::Page,
        agent::Verdict::Hibernate => SwapVerdict::Hibernate,
        agent::Verdict::Busy => SwapVerdict::Busy,
        agent::Verdict::JustWoke => SwapVerdict::JustWoke,
        agent::Verdict::Spared => SwapVerdict::Spared,
    };
    SwapWeighed { vm, idle_s, resident_mib, priority, verdict }
}
