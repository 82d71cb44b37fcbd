//! What VMs use.

use std::time::Duration;

use super::state;
use crate::agent;
use crate::api::types::{NetworkUsage, ProcessUsage, UsageList, VmUsage};

pub(in crate::api) fn usage(found: &agent::Usages) -> UsageList {
    let vms = found.vms.iter().map(|(vm, usage)| VmUsage {
        id: vm.id.clone(),
        name: vm.name.clone(),
        state: state(&vm.state),
        vcpus: vm.spec.vcpus.into(),
        memory_mib: vm.spec.memory_mib.into(),
        process: usage.process.map(|(pid, usage)| process(pid, usage)),
        network: usage.network.as_deref().map(network),
    });
    UsageList { at_ms: Duration::from_nanos(found.at.0).as_secs_f64() * 1000.0, vms: vms.collect() }
}

fn process(pid: i32, usage: agent::ProcessUsage) -> ProcessUsage {
    let agent::ProcessUsage { resident_bytes, swapped_bytes, cpu, faults } = usage;
    ProcessUsage {
        pid: pid.cast_unsigned(),
        cpu_ms: cpu.map(|cpu| cpu.as_secs_f64() * 1000.0),
        resident_bytes,
        swapped_bytes,
        faults: faults.map(|(all, _)| all),
        major_faults: faults.map(|(_, major)| major),
    }
}

/// All interfaces together.
fn network(interfaces: &[agent::InterfaceStatus]) -> NetworkUsage {
    interfaces.iter().fold(NetworkUsage::default(), |sum, interface| NetworkUsage {
        rx_bytes: sum.rx_bytes.saturating_add(interface.rx.bytes),
        tx_bytes: sum.tx_bytes.saturating_add(interface.tx.bytes),
        rx_packets: sum.rx_packets.saturating_add(interface.rx.frames),
        tx_packets: sum.tx_packets.saturating_add(interface.tx.frames),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_added_up() {
        let flow = |bytes, frames| agent::FlowStatus { bytes, frames, dropped: 0, throttled: 0 };
        let interface = |index| agent::InterfaceStatus { index, link_up: true, rx: flow(10, 1), tx: flow(u64::MAX, 2) };
        let sum = NetworkUsage { rx_bytes: 20, tx_bytes: u64::MAX, rx_packets: 2, tx_packets: 4 };
        assert_eq!(network(&[interface(0), interface(1)]), sum);
        assert_eq!(network(&[]), NetworkUsage::default());
    }
}
