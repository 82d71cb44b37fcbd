//! Calculations: programs that run in some member of a cluster.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Captured;
use crate::ids::{CalculationId, ClusterId, VmId};

/// `POST /v1/clusters/{id}/calculations`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CalculationCreateRequest {
    /// Program and arguments. A program without a slash is searched in the `PATH` of its environment.
    #[schema(min_items = 1, example = json!(["uname", "-a"]))]
    pub argv: Vec<String>,
    /// `NAME=value` words added to the environment of the guest's agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What it reads from its standard input, in base64 (RFC 4648 section 4): at most 64 KiB of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Seconds it has from now to its end, the wait for a member included: 300 when left out, at most 86400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
    /// The member that is to run it, by executor id; it has to be registered. Whichever has least to do when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executor_id: Option<String>,
    /// The same by the VM's id, a unique start of it, or its name. Not together with `executor_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
}

/// How far a calculation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CalculationState {
    /// No member has it yet.
    Queued,
    /// A member runs it.
    Running,
    /// It ended with code 0.
    Succeeded,
    /// It ended otherwise, or did not start: see its cause.
    Failed,
    /// Its member or the agent ended while it ran. It is not begun again.
    Lost,
}

impl CalculationState {
    /// Whether nothing changes it any more.
    pub const fn is_final(self) -> bool {
        match self {
            Self::Queued | Self::Running => false,
            Self::Succeeded | Self::Failed | Self::Lost => true,
        }
    }
}

/// A calculation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Calculation {
    /// Its id.
    #[schema(value_type = String, example = "calc-mzxw6ytbmzxw6ytb")]
    pub id: CalculationId,
    /// The cluster it is for.
    #[schema(value_type = String)]
    pub cluster_id: ClusterId,
    /// How far it is.
    pub state: CalculationState,
    /// Why it failed: `exit_code`, `signal`, `timed_out`, `nobody_took_it`, `member_gone` or `not_started`; null else.
    pub cause: Option<String>,
    /// What is known beyond that, or why it is lost.
    pub detail: Option<String>,
    /// The VM it was given to; null while it waits.
    #[schema(value_type = Option<String>)]
    pub member: Option<VmId>,
    /// Who that is in the cluster.
    pub executor_id: Option<String>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Words added to the environment.
    pub env: Vec<String>,
    /// Seconds it has from its request to its end.
    pub timeout_s: u32,
    /// Its exit code, if it exited.
    pub exit_code: Option<u8>,
    /// The signal that ended it, if one did.
    pub signal: Option<u8>,
    /// What it wrote to standard output, at most 64 KiB; null in lists and until it is over.
    pub stdout: Option<Captured>,
    /// What it wrote to standard error, at most 64 KiB; null in lists and until it is over.
    pub stderr: Option<Captured>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was given to its member.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it was over.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
}

/// `GET /v1/clusters/{id}/calculations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CalculationList {
    /// Those that are kept, newest first: all that are not over, and the last 256 that are.
    pub calculations: Vec<Calculation>,
}

/// The query of `GET /v1/clusters/{id}/calculations/{calculation}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CalculationQuery {
    /// Answer once it is over, or after this many milliseconds: at most 60000; at once when left out.
    #[serde(default)]
    pub wait_ms: u32,
}
