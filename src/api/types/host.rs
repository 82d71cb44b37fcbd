//! This host and its agent.

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
    /// What the probe found at the agent's start (`hearth host probe` prints the same); null before it answered.
    #[schema(value_type = Option<Object>)]
    pub probe: Option<serde_json::Value>,
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
