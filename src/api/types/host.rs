//! This host and its agent.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/host`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Version of the agent.
    pub version: String,
    /// Process id of the agent.
    pub agent_pid: u32,
    /// When the agent started.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Where the agent keeps its records and images.
    pub state_dir: String,
    /// Processors online.
    pub cpus: u32,
    /// Memory of the host.
    pub memory_bytes: u64,
    /// Memory available without swapping.
    pub memory_available_bytes: u64,
    /// VMs by what they do.
    pub vms: HostVms,
    /// What VMs' addresses are made of, and the other hosts; null without a fabric.
    #[serde(default)]
    pub fabric: Option<super::Fabric>,
    /// What the kernel offers to keep VMs apart.
    #[serde(default)]
    pub isolation: Option<super::HostIsolation>,
    /// VMs by state.
    #[serde(default)]
    pub vm_states: BTreeMap<String, u32>,
    /// What is left for new work.
    #[serde(default)]
    pub room: HostRoom,
    /// How pressed the host is.
    #[serde(default)]
    pub pressure: HostPressure,
    /// The agent's records; null when they cannot be asked.
    #[serde(default)]
    pub ledger: Option<HostLedger>,
    /// The last operations that failed, newest first.
    #[serde(default)]
    pub failures: Vec<HostFailure>,
    /// What to look at; empty: nothing.
    #[serde(default)]
    pub warnings: Vec<HostWarning>,
    /// What the probe found at the agent's start (`hearth host probe` prints the same); null before it answered.
    #[schema(value_type = Option<Object>)]
    pub probe: Option<serde_json::Value>,
}

/// What is left for new work, and what has to stay free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HostRoom {
    /// Whether no new work is taken because the agent will end.
    pub draining: bool,
    /// Guest memory of VMs that live.
    pub memory_promised_bytes: u64,
    /// Memory that VMs may not use up.
    pub memory_reserve_bytes: u64,
    /// Space on the state directory's file system.
    pub disk_total_bytes: u64,
    /// What of it is free.
    pub disk_free_bytes: u64,
    /// What of it new work may not use up.
    pub disk_reserve_bytes: u64,
    /// Descriptors the agent has open.
    pub descriptors_open: u64,
    /// Descriptors it may have open.
    pub descriptors_max: u64,
    /// Connections of clients that are open.
    pub connections_open: u64,
    /// Connections there may be.
    pub connections_max: u32,
}

/// Percent of the last ten seconds in which something waited; null where the kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct HostPressure {
    /// For a processor.
    pub cpu_percent: Option<f64>,
    /// For memory.
    pub memory_percent: Option<f64>,
    /// For a disk.
    pub io_percent: Option<f64>,
}

/// The agent's records.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HostLedger {
    /// Size on disk.
    pub bytes: u64,
    /// When the newest automatic backup was made.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_backup: Option<Timestamp>,
    /// How many automatic backups there are.
    pub backups: u64,
    /// Events that are kept.
    pub events: u64,
    /// The number of the oldest of them; 0 without any.
    pub oldest_event: u64,
}

/// An operation that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostFailure {
    /// Id of the operation.
    pub operation: String,
    /// What was done: `vm_launch` ...
    pub kind: String,
    /// Id of what it was done to.
    pub object: String,
    /// Code of the cause.
    pub code: String,
    /// Why.
    pub message: String,
    /// When it ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub at: Option<Timestamp>,
}

/// Something to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostWarning {
    /// What it is.
    pub what: String,
    /// What to do about it.
    pub todo: String,
}

/// `POST /v1/ledger/backup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LedgerBackupRequest {
    /// Absolute path of a file that is not there yet; among the automatic backups when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// A copy of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LedgerBackup {
    /// Where it is.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

/// `POST /v1/drain`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// How long guests may take to power off, in milliseconds; 10,000 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
}

/// One line of the answer to `POST /v1/drain`: how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drain {
    /// VMs there were to stop.
    pub vms: u64,
    /// How many of them have stopped.
    pub stopped: u64,
    /// Names or ids of those that did not; known in the end.
    pub left: Vec<String>,
    /// Whether this is the last line: the agent ends.
    pub done: bool,
}

/// How many VMs a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HostVms {
    /// Running or paused.
    pub alive: u32,
    /// On their way up, down, in or out.
    pub changing: u32,
    /// Failed.
    pub failed: u32,
    /// All that are recorded.
    pub total: u32,
}
