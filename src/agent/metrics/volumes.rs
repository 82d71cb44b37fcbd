//! What passed the VMs' volumes. The VMMs count; here it is only shown, and gone with the VM.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::ids::VmId;
use crate::wire::control::{LATENCY_BUCKETS, VolumeFlow, VolumeStatus};

/// How many of the VMMs' buckets make one here: each bound is four times the one before.
const MERGED: usize = 2;

/// The VMMs' buckets that make the first one here, all below 64 µs.
const FIRST: usize = 7;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DiskLabels {
    vm: String,
    disk: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    vm: String,
    disk: u8,
    request: &'static str,
}

/// The last sample, where Prometheus finds it. The VMMs' histograms are shown as they are: they cannot be put into one of
/// the registry's own.
#[derive(Debug, Default)]
pub(super) struct VolumeCounters(Mutex<Vec<(VmId, VolumeStatus)>>);

impl VolumeCounters {
    pub(super) fn new(registry: &mut Registry) -> Arc<Self> {
        let this = Arc::new(Self::default());
        registry.register_collector(Box::new(Arc::clone(&this)));
        this
    }

    pub(super) fn show<'a>(&self, volumes: impl Iterator<Item = (&'a VmId, &'a VolumeStatus)>) {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *shown = volumes.map(|(vm, status)| (vm.clone(), status.clone())).collect();
    }
}

impl Collector for VolumeCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.is_empty() {
            return Ok(());
        }
        let labels = |vm: &VmId, status: &VolumeStatus| DiskLabels { vm: vm.to_string(), disk: status.index };
        for (name, help, of) in COUNTERS {
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (vm, status) in &*shown {
                encoder.encode_family(&labels(vm, status))?.encode_counter::<NoLabelSet, _, u64>(&of(status), None)?;
            }
        }
        for (name, help, of) in GAUGES {
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (vm, status) in &*shown {
                encoder.encode_family(&labels(vm, status))?.encode_gauge(&of(status))?;
            }
        }
        let flows = || {
            shown.iter().flat_map(|(vm, status)| {
                let kinds = [("read", &status.read), ("write", &status.write), ("flush", &status.flush)];
                let of = move |request| RequestLabels { vm: vm.to_string(), disk: status.index, request };
                kinds.map(|(request, flow)| (of(request), flow))
            })
        };
        let help = "Bytes that a VM read from a volume or wrote to it";
        let mut bytes = encoder.encode_descriptor("vm_volume", help, Some(&Unit::Bytes), MetricType::Counter)?;
        for (labels, flow) in flows().filter(|(labels, _)| labels.request != "flush") {
            bytes.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&flow.bytes, None)?;
        }
        let help = "How long a volume's requests took that succeeded, from when the guest asked";
        let mut took =
            encoder.encode_descriptor("vm_volume_request", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (labels, flow) in flows() {
            let (sum, buckets) = (seconds(flow.took_us), buckets(flow));
            took.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, flow.requests, &buckets, None)?;
        }
        Ok(())
    }
}

/// A counter of a slot: its name, what it is, and its value.
type Shown<T> = (&'static str, &'static str, fn(&VolumeStatus) -> T);

const COUNTERS: [Shown<u64>; 2] = [
    ("vm_volume_reconnects", "Connections of a VM to a volume's server that broke", |status| status.reconnects),
    ("vm_volume_errors", "Requests of a VM to a volume that failed", |status| status.errors),
];

const GAUGES: [Shown<i64>; 3] = [
    ("vm_volume_waiting", "Requests of a VM to a volume that are not finished", |status| status.waiting.into()),
    ("vm_volume_connections", "Connections of a VM to a volume's server", |status| status.connections.into()),
    (
        "vm_volume_fenced",
        "1 while a volume's server refuses a VM, as its lease is not the active one any more",
        |status| status.fenced.into(),
    ),
];

/// Upper bounds in seconds and how many are in each bucket; the last one takes what is longer.
fn buckets(flow: &VolumeFlow) -> Vec<(f64, u64)> {
    let mut buckets = vec![(seconds(1 << (FIRST - 1)), flow.latency_us[..FIRST].iter().sum())];
    let mut begin = FIRST;
    while begin + MERGED < LATENCY_BUCKETS {
        let count = flow.latency_us[begin..begin + MERGED].iter().sum();
        begin += MERGED;
        buckets.push((seconds(1 << (begin - 1)), count));
    }
    buckets.push((f64::INFINITY, flow.latency_us[begin..].iter().sum()));
    buckets
}

#[expect(clippy::cast_precision_loss, reason = "of a sum, more than Prometheus keeps")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_merged_and_none_is_lost() {
        let mut flow = VolumeFlow::default();
        flow.latency_us.iter_mut().zip(1..).for_each(|(bucket, count)| *bucket = count);
        let merged = buckets(&flow);
        assert_eq!(merged[0], (0.000_064, 28));
        assert_eq!(merged[1], (0.000_256, 8 + 9));
        assert_eq!(merged.iter().map(|bucket| bucket.1).sum::<u64>(), flow.latency_us.iter().sum::<u64>());
        assert!(merged.windows(2).all(|pair| pair[0].0 < pair[1].0) && merged.last().unwrap().0.is_infinite());
    }
}
