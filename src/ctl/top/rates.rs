//! Two looks at what VMs use → what they use per second. Pure.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Serialize;

use crate::api::types::{NetworkUsage, ProcessUsage, UsageList, VmState, VmUsage};
use crate::cli::SortWord;
use crate::ids::VmId;

/// What is shown of one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Look {
    /// Time since the look before; `None` where the two cannot be compared.
    pub(super) interval_ms: Option<f64>,
    /// All VMs.
    pub(super) vms: Vec<Row>,
}

/// What a VM uses. A rate is `None` where two looks at it cannot be compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) id: VmId,
    pub(super) name: Option<String>,
    pub(super) state: VmState,
    pub(super) vcpus: u32,
    pub(super) memory_bytes: u64,
    pub(super) resident_bytes: Option<u64>,
    pub(super) swapped_bytes: Option<u64>,
    /// Of one processor.
    pub(super) cpu_percent: Option<f64>,
    pub(super) faults_per_s: Option<f64>,
    pub(super) major_faults_per_s: Option<f64>,
    pub(super) rx_bytes_per_s: Option<f64>,
    pub(super) tx_bytes_per_s: Option<f64>,
    pub(super) rx_packets_per_s: Option<f64>,
    pub(super) tx_packets_per_s: Option<f64>,
}

/// What `now` says, with rates where `before` saw the same process of the same VM.
pub(super) fn look(before: Option<&UsageList>, now: &UsageList) -> Look {
    let interval_ms = before.map(|before| now.at_ms - before.at_ms).filter(|ms| ms.is_finite() && *ms > 0.0);
    let known: BTreeMap<&VmId, &VmUsage> = match (before, interval_ms) {
        (Some(before), Some(_)) => before.vms.iter().map(|vm| (&vm.id, vm)).collect(),
        (Some(_) | None, _) => BTreeMap::new(),
    };
    let vms = now.vms.iter().map(|vm| row(known.get(&vm.id).copied(), vm, interval_ms.unwrap_or(0.0))).collect();
    Look { interval_ms, vms }
}

fn row(before: Option<&VmUsage>, now: &VmUsage, interval_ms: f64) -> Row {
    let seconds = interval_ms / 1000.0;
    // Counters begin anew with another process, the network's among them.
    let same = before.filter(|before| before.process.zip(now.process).is_some_and(|(old, new)| old.pid == new.pid));
    let of_process = |count: fn(&ProcessUsage) -> Option<u64>| {
        let old = same?.process.as_ref().and_then(count)?;
        rate(old, now.process.as_ref().and_then(count)?, seconds)
    };
    let of_network = |count: fn(&NetworkUsage) -> u64| rate(count(&same?.network?), count(&now.network?), seconds);
    let cpu_ms = |vm: &VmUsage| vm.process.and_then(|process| process.cpu_ms);
    let used_ms = same.and_then(cpu_ms).zip(cpu_ms(now)).map(|(old, new)| new - old).filter(|used| *used >= 0.0);
    Row {
        id: now.id.clone(),
        name: now.name.clone(),
        state: now.state,
        vcpus: now.vcpus,
        memory_bytes: now.memory_mib.saturating_mul(1 << 20),
        resident_bytes: now.process.and_then(|process| process.resident_bytes),
        swapped_bytes: now.process.and_then(|process| process.swapped_bytes),
        cpu_percent: used_ms.map(|used| used / interval_ms * 100.0),
        faults_per_s: of_process(|process| process.faults),
        major_faults_per_s: of_process(|process| process.major_faults),
        rx_bytes_per_s: of_network(|network| network.rx_bytes),
        tx_bytes_per_s: of_network(|network| network.tx_bytes),
        rx_packets_per_s: of_network(|network| network.rx_packets),
        tx_packets_per_s: of_network(|network| network.tx_packets),
    }
}

/// How fast a counter went; `None` for one that went back: it is not the same one.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn rate(before: u64, now: u64, seconds: f64) -> Option<f64> {
    let more = now.checked_sub(before)?;
    (seconds > 0.0).then(|| more as f64 / seconds)
}

/// Sorts rows: the most of a quantity first, unknown ones last, and by name among equals.
pub(super) fn sort(rows: &mut [Row], by: SortWord) {
    rows.sort_by(|a, b| compare(a, b, by).then_with(|| called(a).cmp(called(b))).then_with(|| a.id.cmp(&b.id)));
}

fn compare(a: &Row, b: &Row, by: SortWord) -> Ordering {
    let most = |quantity: fn(&Row) -> Option<f64>| {
        let of = |row| quantity(row).unwrap_or(-1.0);
        of(b).total_cmp(&of(a))
    };
    match by {
        SortWord::Name => Ordering::Equal,
        SortWord::Memory => b.resident_bytes.cmp(&a.resident_bytes),
        SortWord::Cpu => most(|row| row.cpu_percent),
        SortWord::Faults => most(|row| row.faults_per_s),
        SortWord::Network => most(|row| row.rx_bytes_per_s.zip(row.tx_bytes_per_s).map(|(rx, tx)| rx + tx)),
    }
}

/// The name, or the id of a VM without one.
pub(super) fn called(row: &Row) -> &str {
    row.name.as_deref().unwrap_or(row.id.as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vm(number: u8, pid: u32, count: u64) -> VmUsage {
        let process = ProcessUsage {
            pid,
            cpu_ms: Some(count as f64),
            resident_bytes: Some(count),
            swapped_bytes: None,
            faults: Some(count),
            major_faults: Some(0),
        };
        let network = NetworkUsage { rx_bytes: count, tx_bytes: 2 * count, rx_packets: 0, tx_packets: count };
        VmUsage {
            id: VmId::from_random([number; 10]),
            name: Some(format!("vm{number}")),
            state: VmState::Running,
            vcpus: 1,
            memory_mib: 128,
            process: Some(process),
            network: Some(network),
        }
    }

    fn list(at_ms: f64, vms: Vec<VmUsage>) -> UsageList {
        UsageList { at_ms, vms }
    }

    fn rates(row: &Row) -> [Option<f64>; 5] {
        [row.cpu_percent, row.faults_per_s, row.rx_bytes_per_s, row.tx_bytes_per_s, row.tx_packets_per_s]
    }

    #[test]
    fn rates_are_differences_by_time() {
        let (before, now) = (list(1000.0, vec![vm(1, 7, 100)]), list(3000.0, vec![vm(1, 7, 1100)]));
        let look = look(Some(&before), &now);
        assert_eq!(look.interval_ms, Some(2000.0));
        let [row] = look.vms.as_slice() else { panic!("a VM") };
        assert_eq!(rates(row), [Some(50.0), Some(500.0), Some(500.0), Some(1000.0), Some(500.0)]);
        assert_eq!((row.memory_bytes, row.resident_bytes), (128 << 20, Some(1100)));
        assert_eq!((row.major_faults_per_s, row.rx_packets_per_s), (Some(0.0), Some(0.0)));
    }

    #[test]
    fn what_cannot_be_compared_has_no_rates() {
        let now = list(3000.0, vec![vm(1, 7, 1100)]);
        let none = [None; 5];
        let stopped = VmUsage { process: None, network: None, ..vm(1, 7, 0) };
        for (what, before) in [
            ("the first look", None),
            ("a VM that came", Some(list(1000.0, vec![vm(2, 7, 100)]))),
            ("another process", Some(list(1000.0, vec![vm(1, 8, 100)]))),
            ("a VM that was stopped", Some(list(1000.0, vec![stopped.clone()]))),
            ("counters that went back", Some(list(1000.0, vec![vm(1, 7, 2000)]))),
            ("no time between", Some(list(3000.0, vec![vm(1, 7, 100)]))),
            ("time that went back", Some(list(9000.0, vec![vm(1, 7, 100)]))),
            ("no time at all", Some(list(f64::NAN, vec![vm(1, 7, 100)]))),
        ] {
            assert_eq!(rates(&look(before.as_ref(), &now).vms[0]), none, "{what}");
        }
        // A VM that went is not shown, and one that stopped uses nothing.
        let gone = look(Some(&now), &list(5000.0, vec![stopped]));
        assert_eq!((gone.vms.len(), rates(&gone.vms[0]), gone.vms[0].resident_bytes), (1, none, None));
        assert_eq!(look(Some(&now), &list(5000.0, Vec::new())).vms, []);
    }

    #[test]
    fn a_network_that_is_not_told_of_costs_nothing_else() {
        let silent = VmUsage { network: None, ..vm(1, 7, 1100) };
        let look = look(Some(&list(0.0, vec![vm(1, 7, 100)])), &list(1000.0, vec![silent]));
        assert_eq!(rates(&look.vms[0]), [Some(100.0), Some(1000.0), None, None, None]);
    }

    #[test]
    fn the_most_comes_first_and_unknown_last() {
        let before = list(0.0, vec![vm(1, 7, 0), vm(2, 7, 0), vm(3, 7, 0)]);
        let now = list(1000.0, vec![vm(4, 7, 900), vm(1, 7, 10), vm(3, 7, 30), vm(2, 7, 30)]);
        let order = |by| {
            let mut rows = look(Some(&before), &now).vms;
            sort(&mut rows, by);
            rows.iter().map(|row| called(row).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(order(SortWord::Name), ["vm1", "vm2", "vm3", "vm4"]);
        for by in [SortWord::Cpu, SortWord::Faults, SortWord::Network] {
            assert_eq!(order(by), ["vm2", "vm3", "vm1", "vm4"], "{by:?}");
        }
        assert_eq!(order(SortWord::Memory), ["vm4", "vm2", "vm3", "vm1"]);
    }

    proptest! {
        #[test]
        fn no_rate_is_nonsense(
            times in (0.0..1e12_f64, 0.0..1e12_f64), counts in any::<(u64, u64)>(), pids in (1..3_u32, 1..3_u32),
        ) {
            let half = |count: u64| count / 2;
            let before = list(times.0, vec![vm(1, pids.0, half(counts.0))]);
            let now = list(times.1, vec![vm(1, pids.1, half(counts.1))]);
            for rate in rates(&look(Some(&before), &now).vms[0]).into_iter().flatten() {
                prop_assert!(rate.is_finite() && rate >= 0.0);
            }
        }
    }
}
