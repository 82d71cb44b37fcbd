//! Long work, and what happened.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{ErrorDetail, Moved};
use crate::ids::{BundleId, OperationId};

/// `GET /v1/operations/{id}`: a long piece of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    #[schema(value_type = String, example = "op-mzxw6ytbmzxw6ytb")]
    pub id: OperationId,
    /// What is done: `vm_launch`, `vm_stop`, `vm_remove` ...
    pub kind: String,
    /// Id of what it is done to.
    pub object: String,
    /// How far it is.
    pub state: OperationState,
    /// Its steps in order, those to come included where they are known.
    pub steps: Vec<Step>,
    /// The bundle that a build or snapshot made; null before, and for other operations.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub bundle_id: Option<BundleId>,
    /// How long no vCPU ran for a snapshot or hand-over.
    #[serde(default)]
    pub pause_ms: Option<f64>,
    /// Bytes of guest memory that were written for a build or snapshot, each as often as it was.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Rounds in which memory was copied while the VM ran; null without `live`.
    #[serde(default)]
    pub copy_rounds: Option<u32>,
    /// Whether the guest's file systems were at rest when it was saved.
    #[serde(default)]
    pub quiesced: Option<bool>,
    /// What moving the machine to another process took; null for other operations.
    #[serde(default)]
    pub moved: Option<Moved>,
    /// Why it failed; null in other states.
    pub error: Option<ErrorDetail>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it ended; null before.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
}

/// `GET /v1/operations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OperationList {
    /// The operations that are kept, newest first.
    pub operations: Vec<Operation>,
}

/// How far an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Accepted.
    Pending,
    /// Being worked on.
    Running,
    /// Done.
    Succeeded,
    /// Not done, and undone as far as it went: see `error`.
    Failed,
    /// Given up by request.
    Cancelled,
}

impl OperationState {
    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        match self {
            Self::Pending | Self::Running => false,
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
        }
    }
}

/// One step of an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// Short snake_case name: `spawn_vmm`, `build_machine` ...
    pub name: String,
    /// How far it is.
    pub state: StepState,
    /// How long it took; null until it ended.
    pub took_ms: Option<f64>,
}

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Not begun.
    Pending,
    /// Begun.
    Running,
    /// Done.
    Done,
    /// Failed.
    Failed,
    /// Undone after a later step failed.
    Undone,
}

/// One line of `GET /v1/events`: newline-delimited JSON in the order of `seq`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Number, without gaps, from 1.
    pub seq: u64,
    /// When it happened.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// What happened: `vm_state`, `operation_state` ...
    pub kind: String,
    /// Id of what it happened to.
    pub object: String,
    /// More about it, by kind.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
}

/// Query of `GET /v1/events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Only events with a greater `seq`.
    #[serde(default)]
    pub since: u64,
    /// Keep the answer open and send events as they happen.
    #[serde(default)]
    pub follow: bool,
}
