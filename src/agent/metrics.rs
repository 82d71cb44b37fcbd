//! Counters and durations for Prometheus. Gauges are set when somebody reads them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::migration_record::MoveRecord;
use super::record::{OperationState, Timings};
use super::traffic::Passed;
use super::vm_state::Goal;
use crate::ids::VmId;
use gauges::ShownGauges;

use volumes::VolumeCounters;

pub(crate) use gauges::Gauges;

mod gauges;
#[cfg(test)]
mod packaged;
mod volumes;

/// Upper bounds of launch durations in seconds: milliseconds from bundles to minutes of emulated boot.
const LAUNCH_BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

/// Upper bounds of pauses in seconds: a millisecond to what a guest gets that never stops writing.
const PAUSE_BUCKETS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    goal: String,
    result: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    vm: String,
    interface: u8,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MoveLabels {
    way: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EffectLabels {
    effect: &'static str,
}

/// What passed the VMs' network interfaces. The VMMs count; here it is only shown, and gone with the VM.
#[derive(Debug, Default)]
struct NetworkCounters {
    bytes: Family<FlowLabels, Counter>,
    packets: Family<FlowLabels, Counter>,
    dropped: Family<FlowLabels, Counter>,
    throttled: Family<FlowLabels, Counter>,
}

impl NetworkCounters {
    fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        for (name, help, family) in [
            ("vm_network_bytes", "Bytes that passed a VM's network interface", &this.bytes),
            ("vm_network_packets", "Packets that passed a VM's network interface", &this.packets),
            ("vm_network_dropped", "Packets that a VM's network interface threw away", &this.dropped),
            ("vm_network_throttled", "Times a packet of a VM waited for a limit", &this.throttled),
        ] {
            registry.register(name, help, family.clone());
        }
        this
    }

    fn show(&self, traffic: &[(VmId, Passed)]) {
        let Self { bytes, packets, dropped, throttled } = self;
        [bytes, packets, dropped, throttled].into_iter().for_each(Family::clear);
        for (vm, interface) in traffic.iter().flat_map(|(vm, all)| all.interfaces.iter().map(move |one| (vm, one))) {
            for (direction, flow) in [("rx", interface.rx), ("tx", interface.tx)] {
                let labels = FlowLabels { vm: vm.to_string(), interface: interface.index, direction };
                for (family, value) in
                    [(bytes, flow.bytes), (packets, flow.frames), (dropped, flow.dropped), (throttled, flow.throttled)]
                {
                    family.get_or_create(&labels).inner().store(value, Ordering::Relaxed);
                }
            }
        }
    }
}

/// What is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    operations: Family<OperationLabels, Counter>,
    failures: Family<CodeLabels, Counter>,
    effects: Family<EffectLabels, Histogram, fn() -> Histogram>,
    requests: Family<RequestLabels, Counter>,
    refusals: Family<CodeLabels, Counter>,
    peer_refusals: Family<RefusalLabels, Counter>,
    launch_seconds: Histogram,
    pauses: Family<MoveLabels, Histogram, fn() -> Histogram>,
    moved_bytes: Family<MoveLabels, Counter>,
    fetched_bytes: Counter,
    fetch_failures: Counter,
    gauges: ShownGauges,
    network: NetworkCounters,
    volumes: Arc<VolumeCounters>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("hearth");
        let (operations, failures) = (Family::default(), Family::default());
        let effects: Family<EffectLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(LAUNCH_BUCKETS));
        let (requests, refusals, peer_refusals) = (Family::default(), Family::default(), Family::default());
        let launch_seconds = Histogram::new(LAUNCH_BUCKETS);
        registry.register("operations", "Operations that ended, by goal and result", operations.clone());
        registry.register("operation_failures", "Operations that failed, by the code of their cause", failures.clone());
        let help = "Time that one effect of an operation took, failed ones included";
        registry.register_with_unit("effect", help, Unit::Seconds, effects.clone());
        registry.register("api_requests", "API requests, by route and status", requests.clone());
        registry.register(
            "api_refusals",
            "API requests that were answered with an error, by its code",
            refusals.clone(),
        );
        let help = "Requests of other agents that were not taken, by reason";
        registry.register("peer_refusals", help, peer_refusals.clone());
        let help = "From the request until the VM was running";
        registry.register_with_unit("launch", help, Unit::Seconds, launch_seconds.clone());
        let pauses: Family<MoveLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(PAUSE_BUCKETS));
        let moved_bytes = Family::default();
        let help = "Time in which no vCPU of a VM ran while it moved to another process, here or on another host";
        registry.register_with_unit("move_pause", help, Unit::Seconds, pauses.clone());
        let help = "Bytes that were sent for VMs that moved to another process";
        registry.register("move_sent_bytes", help, moved_bytes.clone());
        let (fetched_bytes, fetch_failures) = (Counter::default(), Counter::default());
        let help = "Bytes of bundles' memory that came from elsewhere";
        registry.register("bundle_fetched_bytes", help, fetched_bytes.clone());
        let help =
            "Parts of bundles' memory that did not come when they were asked for, or were not what they have to be";
        registry.register("bundle_fetch_failures", help, fetch_failures.clone());
        let gauges = ShownGauges::new(&mut registry);
        let network = NetworkCounters::new(&mut registry);
        let volumes = VolumeCounters::new(&mut registry);
        Self {
            registry,
            operations,
            failures,
            effects,
            requests,
            refusals,
            peer_refusals,
            launch_seconds,
            pauses,
            moved_bytes,
            fetched_bytes,
            fetch_failures,
            gauges,
            network,
            volumes,
        }
    }

    pub(crate) fn operation_ended(&self, goal: Goal, state: OperationState) {
        let labels = OperationLabels { goal: format!("{goal:?}").to_lowercase(), result: state.name().to_owned() };
        self.operations.get_or_create(&labels).inc();
    }

    pub(crate) fn launched(&self, timings: &Timings) {
        if let Some(total) = timings.total_us {
            self.launch_seconds.observe(Duration::from_micros(total).as_secs_f64());
        }
    }

    /// Counts a machine that moved to another process, here or on another host.
    pub(crate) fn moved(&self, goal: Goal, moved: &MoveRecord) {
        let labels = MoveLabels { way: if goal == Goal::HandOver { "hand_over" } else { "migration" } };
        if let Some(pause) = moved.pause_us {
            self.pauses.get_or_create(&labels).observe(Duration::from_micros(pause).as_secs_f64());
        }
        self.moved_bytes.get_or_create(&labels).inc_by(moved.bytes);
    }

    /// Counts a part of a bundle's memory that came.
    pub(crate) fn fetched(&self, bytes: u64) {
        self.fetched_bytes.inc_by(bytes);
    }

    /// Counts one that did not.
    pub(crate) fn fetch_failed(&self) {
        self.fetch_failures.inc();
    }

    /// Counts a request. `route` is the route's pattern, so labels stay few.
    pub(crate) fn request(&self, route: &str, status: u16) {
        self.requests.get_or_create(&RequestLabels { route: route.to_owned(), status }).inc();
    }

    /// Counts a request that was answered with an error. Codes are the API's own, so labels stay few.
    pub(crate) fn refused(&self, code: &str) {
        self.refusals.get_or_create(&CodeLabels { code: code.to_owned() }).inc();
    }

    /// Counts a request of another agent that was not taken.
    pub(crate) fn peer_refused(&self, reason: &str) {
        self.peer_refusals.get_or_create(&RefusalLabels { reason: reason.to_owned() }).inc();
    }

    /// Counts one effect of an operation and how long it took.
    pub(crate) fn effect_ended(&self, effect: &'static str, took: Duration) {
        let labels = EffectLabels { effect };
        self.effects.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts an operation that failed, by the code of its cause.
    pub(crate) fn operation_failed(&self, code: &str) {
        self.failures.get_or_create(&CodeLabels { code: code.to_owned() }).inc();
    }

    /// The text for Prometheus.
    pub(crate) fn text(&self, now: &Gauges, traffic: &[(VmId, Passed)]) -> String {
        self.network.show(traffic);
        self.volumes.show(traffic.iter().flat_map(|(vm, all)| all.volumes.iter().map(move |one| (vm, one))));
        self.gauges.show(now);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{FlowStatus, InterfaceStatus};

    #[test]
    fn a_vms_traffic_is_shown_while_it_lives() {
        let metrics = Metrics::new();
        let vm = VmId::from_random([1; 10]);
        let flow = |bytes| FlowStatus { frames: 3, bytes, dropped: 1, throttled: 2 };
        let interface = InterfaceStatus { index: 0, link_up: true, rx: flow(70), tx: flow(90) };
        let text = metrics
            .text(&Gauges::default(), &[(vm.clone(), Passed { interfaces: vec![interface], ..Passed::default() })]);
        for (name, direction, value) in
            [("bytes", "rx", 70), ("bytes", "tx", 90), ("packets", "rx", 3), ("dropped", "tx", 1)]
        {
            let line = format!(
                "hearth_vm_network_{name}_total{{vm=\"{vm}\",interface=\"0\",direction=\"{direction}\"}} {value}\n"
            );
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(!metrics.text(&Gauges::default(), &[]).contains(vm.as_str()));
    }
}
