//! Counters and durations for Prometheus. Gauges are set when somebody reads them.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::record::{OperationState, Timings};
use super::vm_state::Goal;

/// Upper bounds of launch durations in seconds: milliseconds from bundles to minutes of emulated boot.
const LAUNCH_BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    goal: String,
    result: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: String,
}

/// What is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    operations: Family<OperationLabels, Counter>,
    vms: Family<StateLabels, Gauge>,
    requests: Family<RequestLabels, Counter>,
    peer_refusals: Family<RefusalLabels, Counter>,
    launch_seconds: Histogram,
    events: Gauge<i64>,
    memory: Gauge<f64, AtomicU64>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("hearth");
        let operations = Family::default();
        let vms = Family::default();
        let requests = Family::default();
        let peer_refusals = Family::default();
        let launch_seconds = Histogram::new(LAUNCH_BUCKETS);
        let events = Gauge::default();
        let memory = Gauge::default();
        registry.register("operations", "Operations that ended, by goal and result", operations.clone());
        registry.register("vms", "VMs, by state", vms.clone());
        registry.register("api_requests", "API requests, by route and status", requests.clone());
        registry.register(
            "peer_refusals",
            "Requests of other agents that were not taken, by reason",
            peer_refusals.clone(),
        );
        registry.register_with_unit(
            "launch",
            "From the request until the VM was running",
            Unit::Seconds,
            launch_seconds.clone(),
        );
        registry.register("events", "Number of the last event", events.clone());
        registry.register_with_unit("memory_promised", "Guest memory of VMs that live", Unit::Bytes, memory.clone());
        Self { registry, operations, vms, requests, peer_refusals, launch_seconds, events, memory }
    }

    pub(crate) fn operation_ended(&self, goal: Goal, state: OperationState) {
        let labels = OperationLabels { goal: format!("{goal:?}").to_lowercase(), result: state.name().to_owned() };
        self.operations.get_or_create(&labels).inc();
    }

    pub(crate) fn launched(&self, timings: &Timings) {
        if let Some(total) = timings.total_us {
            self.launch_seconds.observe(std::time::Duration::from_micros(total).as_secs_f64());
        }
    }

    /// Counts a request. `route` is the route's pattern, so labels stay few.
    pub(crate) fn request(&self, route: &str, status: u16) {
        self.requests.get_or_create(&RequestLabels { route: route.to_owned(), status }).inc();
    }

    /// Counts a request of another agent that was not taken.
    pub(crate) fn peer_refused(&self, reason: &str) {
        self.peer_refusals.get_or_create(&RefusalLabels { reason: reason.to_owned() }).inc();
    }

    /// The text for Prometheus.
    pub(crate) fn text(&self, states: &[(&'static str, i64)], last_event: u64, promised_bytes: u64) -> String {
        self.vms.clear();
        for (state, count) in states {
            self.vms.get_or_create(&StateLabels { state: (*state).to_owned() }).set(*count);
        }
        self.events.set(i64::try_from(last_event).unwrap_or(i64::MAX));
        self.memory.set(f64::from(u32::try_from(promised_bytes >> 20).unwrap_or(u32::MAX)) * 1_048_576.0);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
