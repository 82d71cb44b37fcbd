//! Clusters and their members.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::VmState;
use crate::ids::{ClusterId, VmId};

/// `POST /v1/clusters`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterCreateRequest {
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The secret that guests register with: 8 to 256 visible ASCII characters; one is made when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Address and port of a registrar elsewhere; this host's agent when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "[2001:db8::7]:7070")]
    pub endpoint: Option<String>,
    /// Seconds a VM has for its registration, 1 to 3600; 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registration_deadline_s: Option<u32>,
}

/// What a cluster is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// VMs may join.
    Active,
    /// Its VMs are being removed; then it is.
    Draining,
}

/// A cluster: VMs that register under a name each, and are given calculations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    /// Its id.
    #[schema(value_type = String, example = "c-mzxw6ytbmzxw6ytb")]
    pub id: ClusterId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// What it is doing.
    pub state: ClusterState,
    /// The secret that guests register with: only in the answer to the request that made it, null from then on.
    pub token: Option<String>,
    /// The registrar elsewhere; null when it is this host's agent.
    pub endpoint: Option<String>,
    /// Seconds a VM has for its registration.
    pub registration_deadline_s: u32,
    /// VMs in it that live.
    pub members: u32,
    /// Those of them that have registered.
    pub registered: u32,
    /// Calculations that run in them.
    pub calculations_running: u32,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// `GET /v1/clusters`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterList {
    /// All clusters, oldest first.
    pub clusters: Vec<Cluster>,
}

/// A VM in a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterMember {
    /// The VM.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Who it is in the cluster.
    pub executor_id: String,
    /// What it does.
    pub state: VmState,
    /// 1, or 2 for one that was launched because its first did not register.
    pub attempt: u8,
    /// The VM it was launched instead of.
    #[schema(value_type = Option<String>)]
    pub replaces: Option<VmId>,
    /// When its registration was taken; null before.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub registered_at: Option<Timestamp>,
    /// The number of its registration; null before.
    pub epoch: Option<u64>,
    /// Calculations that run in it.
    pub calculations_running: u32,
    /// Its addresses, IPv6 first; none outside sessions and for a VM that ended.
    pub addresses: Vec<String>,
}

/// `GET /v1/clusters/{id}/members`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterMemberList {
    /// All members, oldest first; ended ones are there until they are removed.
    pub members: Vec<ClusterMember>,
}

/// The query of `DELETE /v1/clusters/{id}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ClusterRemoveQuery {
    /// Remove its VMs first; without it a cluster with living VMs is not removed.
    #[serde(default)]
    pub drain: bool,
    /// How long each guest may take to power off, in milliseconds: 10 s when left out, 0 kills at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
}
