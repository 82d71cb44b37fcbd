//! What is set when somebody reads the metrics: how full each queue and bound is at that moment.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::agent::health::Pressure;
use crate::agent::world::HostFacts;

/// How things are at the moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gauges {
    /// VMs by state.
    pub(crate) states: BTreeMap<String, u32>,
    /// Number of the last event.
    pub(crate) last_event: u64,
    /// Events that are kept.
    pub(crate) events_kept: u64,
    /// Guest memory of VMs that live.
    pub(crate) promised_bytes: u64,
    /// Connections of clients: open, refused, left because the client did not read.
    pub(crate) connections: (usize, u64, u64),
    /// Jobs that wait for the ledger.
    pub(crate) ledger_queue: usize,
    /// Requests that wait for VMs' actors.
    pub(crate) inboxes: usize,
    /// Guests from bundles that might begin now.
    pub(crate) turns_free: usize,
    /// Machines of bundles that are to be kept ready, and those that are.
    pub(crate) pooled: (u64, u64),
    /// Whether no new work is taken.
    pub(crate) is_draining: bool,
    /// Whether the ledger can be written.
    pub(crate) is_ledger_writable: bool,
    /// How often an agent was started on this state directory.
    pub(crate) starts: u64,
    /// Peers by how they answer.
    pub(crate) peers: BTreeMap<String, u32>,
    /// What speaks against session networks.
    pub(crate) conflicts: usize,
    /// What is kept for what runs: memory and disk, in bytes.
    pub(crate) reserves: (u64, u64),
    /// How pressed the host is.
    pub(crate) pressure: Pressure,
    /// What the host has.
    pub(crate) facts: HostFacts,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: &'static str,
}

/// The same, where Prometheus finds it.
#[derive(Debug, Default)]
pub(super) struct ShownGauges {
    vms: Family<StateLabels, Gauge>,
    peers: Family<StateLabels, Gauge>,
    pressure: Family<ResourceLabels, Gauge<f64, AtomicU64>>,
    events: Gauge,
    events_kept: Gauge,
    memory: Gauge<f64, AtomicU64>,
    connections: Gauge,
    connections_refused: Gauge,
    connections_stalled: Gauge,
    ledger_queue: Gauge,
    inboxes: Gauge,
    turns_free: Gauge,
    pool_wanted: Gauge,
    pool_ready: Gauge,
    draining: Gauge,
    ledger_writable: Gauge,
    starts: Gauge,
    conflicts: Gauge,
    disk_free: Gauge<f64, AtomicU64>,
    disk_reserve: Gauge<f64, AtomicU64>,
    memory_available: Gauge<f64, AtomicU64>,
    memory_reserve: Gauge<f64, AtomicU64>,
    descriptors: Gauge,
    descriptors_max: Gauge,
}

impl ShownGauges {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register("vms", "VMs, by state", this.vms.clone());
        registry.register("peers", "Peers of the fabric, by how they answer", this.peers.clone());
        let help = "Percent of the last ten seconds in which something waited for this resource of the host";
        registry.register_with_unit("pressure", help, Unit::Other("percent".to_owned()), this.pressure.clone());
        for (name, help, gauge) in [
            ("events", "Number of the last event", &this.events),
            ("events_kept", "Events that are kept, up to limits.events_kept", &this.events_kept),
            ("connections", "Connections of clients that are open, up to limits.connections_max", &this.connections),
            ("connections_refused", "Connections beyond the bound since the agent's start", &this.connections_refused),
            ("connections_stalled", "Connections left because their client did not read", &this.connections_stalled),
            ("ledger_queue", "Jobs that wait for the ledger, up to 64", &this.ledger_queue),
            ("vm_inboxes", "Requests that wait for VMs' actors, up to 32 for each VM", &this.inboxes),
            ("launch_turns_free", "Guests from bundles that might begin at once now", &this.turns_free),
            ("pool_machines_wanted", "Machines of bundles that are to be kept ready, of all pools", &this.pool_wanted),
            ("pool_machines_ready", "Machines of bundles that are ready for a launch, of all pools", &this.pool_ready),
            ("draining", "1 while no new work is taken because the agent will end", &this.draining),
            (
                "ledger_writable",
                "1 while the agent can write its records; else new work is refused",
                &this.ledger_writable,
            ),
            ("agent_starts", "How often an agent was started on this state directory", &this.starts),
            (
                "fabric_conflicts",
                "What speaks against session networks; while there is any, sessions are refused",
                &this.conflicts,
            ),
            ("descriptors", "Descriptors the agent has open", &this.descriptors),
            ("descriptors_max", "Descriptors the agent may have open", &this.descriptors_max),
        ] {
            registry.register(name, help, gauge.clone());
        }
        for (name, help, gauge) in [
            ("memory_promised", "Guest memory of VMs that live", &this.memory),
            ("memory_available", "Memory of the host that is available without swapping", &this.memory_available),
            ("memory_reserve", "Memory kept for what runs: below it, launches are refused", &this.memory_reserve),
            ("disk_reserve", "Space kept for what runs: below it, new work is refused", &this.disk_reserve),
            ("disk_free", "Space that is free on the file system of the state directory", &this.disk_free),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        this
    }

    pub(super) fn show(&self, now: &Gauges) {
        self.vms.clear();
        for (state, count) in &now.states {
            self.vms.get_or_create(&StateLabels { state: state.clone() }).set(i64::from(*count));
        }
        self.peers.clear();
        for (state, count) in &now.peers {
            self.peers.get_or_create(&StateLabels { state: state.clone() }).set(i64::from(*count));
        }
        self.pressure.clear();
        let Pressure { cpu, memory, io } = now.pressure;
        for (resource, percent) in [("cpu", cpu), ("memory", memory), ("io", io)] {
            if let Some(percent) = percent {
                self.pressure.get_or_create(&ResourceLabels { resource }).set(percent);
            }
        }
        let (open, refused, stalled) = now.connections;
        for (gauge, value) in [
            (&self.events, now.last_event),
            (&self.events_kept, now.events_kept),
            (&self.connections, open as u64),
            (&self.connections_refused, refused),
            (&self.connections_stalled, stalled),
            (&self.ledger_queue, now.ledger_queue as u64),
            (&self.inboxes, now.inboxes as u64),
            (&self.turns_free, now.turns_free as u64),
            (&self.pool_wanted, now.pooled.0),
            (&self.pool_ready, now.pooled.1),
            (&self.draining, now.is_draining.into()),
            (&self.ledger_writable, now.is_ledger_writable.into()),
            (&self.starts, now.starts),
            (&self.conflicts, now.conflicts as u64),
            (&self.descriptors, now.facts.descriptors_open),
            (&self.descriptors_max, now.facts.descriptors_max),
        ] {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        for (gauge, bytes) in [
            (&self.memory, now.promised_bytes),
            (&self.memory_available, now.facts.memory_available_bytes),
            (&self.memory_reserve, now.reserves.0),
            (&self.disk_reserve, now.reserves.1),
            (&self.disk_free, now.facts.disk_free_bytes),
        ] {
            gauge.set(f64::from(u32::try_from(bytes >> 20).unwrap_or(u32::MAX)) * 1_048_576.0);
        }
    }
}
