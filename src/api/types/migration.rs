//! VMs on their way from host to host.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ErrorDetail, Step};
use crate::ids::{MigrationId, VmId};

/// `POST /v1/vms/{id}/migrate`, and `.../migrate/estimate`. What is left out is as the agent has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Name of the peer it moves to, as `[[peers]]` of the agent's configuration has it; `auto` for the one with the most
    /// free memory among those that take it.
    pub to: String,
    /// Whether to answer when it runs there (the default), or when its migration has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<bool>,
    /// Number of connections, 1 to 8. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u8>,
    /// Longest pause that is aimed at. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms_max: Option<u32>,
    /// Rounds after which no other begins. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds_max: Option<u32>,
    /// Seconds after which no other round begins. Default 600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u32>,
    /// Most bytes of its memory a second while it runs, compressed or not, at least 65536. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_max: Option<u64>,
    /// Whether it may be slowed down when it writes faster than its memory is copied. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<bool>,
    /// What is done when that does not help. Default `force`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_nonconverge: Option<OnNonconverge>,
    /// Whether its memory is compressed on its way, if both hosts can; if one cannot, it goes as it is, and `moved` of the
    /// migration says why. Default `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<Compress>,
}

/// Whether a VM's memory is compressed on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compress {
    /// It goes as it is.
    #[default]
    None,
    /// By lz4.
    Lz4,
}

/// Why a VM's memory was not compressed although that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Uncompressed {
    /// The other host's agent is of an earlier version.
    OlderHost,
    /// The VM's process is of an earlier version: `POST /v1/vms/{id}/hand-over` renews it.
    OlderVmm,
}

/// What is done with a VM that writes faster than its memory is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonconverge {
    /// It is moved all the same, with a pause as long as it takes.
    Force,
    /// It stays where it is.
    Abort,
}

/// What moving a machine from one process to another took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// How long it stood still until it was whole in the other process; `pause_ms` counts until it ran there.
    pub held_ms: f64,
    /// How long its memory was copied before that, while it ran.
    #[serde(default)]
    pub running_ms: f64,
    /// Rounds in which memory was copied while it ran.
    pub rounds: u32,
    /// Pages of guest memory that were copied, compressed or not.
    pub pages: u64,
    /// Whether pages were compressed.
    #[serde(default)]
    pub compress: Compress,
    /// Why they were not; null if they were, or if that was not asked for.
    #[serde(default)]
    pub uncompressed: Option<Uncompressed>,
    /// Those of `pages` that became shorter: they were 4096 bytes each.
    #[serde(default)]
    pub packed_pages: u64,
    /// Bytes that `packed_pages` went over as, which `bytes` has in it.
    #[serde(default)]
    pub packed_bytes: u64,
    /// Pages that were only named, being all zeroes.
    #[serde(default)]
    pub zero_pages: u64,
    /// Pages that were sent while it stood still.
    #[serde(default)]
    pub last_pages: u64,
    /// Bytes that went over.
    pub bytes: u64,
    /// Packets that waited for it and followed it.
    #[serde(default)]
    pub packets: u64,
    /// Longest that a packet for it can have waited: from the pause until all that waited had followed it to the other host,
    /// and others were led there. Null when it was not measured.
    #[serde(default)]
    pub network_ms: Option<f64>,
    /// Where the pause went.
    #[serde(default)]
    pub steps: PauseSteps,
}

/// Where a pause went, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct PauseSteps {
    /// Taking its vCPUs out and its devices to rest.
    pub stop_ms: f64,
    /// Sending the last pages; its state is collected meanwhile.
    pub last_pages_ms: f64,
    /// Sending the state, until the other process had made a machine of it.
    pub ready_ms: f64,
    /// Recording whose it is.
    pub decide_ms: f64,
    /// Until it ran there, as far as the other host says, and the way of its answer.
    pub start_ms: f64,
}

/// Which way a migration goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationDirection {
    /// From this host.
    Out,
    /// To this host.
    In,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// The other host makes a place for the VM.
    Preparing,
    /// Its memory is copied while it runs.
    Copying,
    /// It stands still for the rest.
    Critical,
    /// It is the other host's; what is here is taken away.
    HandedOver,
    /// The migration did not come about; the VM goes on here.
    RollingBack,
    /// It is coming from the other host.
    Receiving,
    /// It is here, and stands still until the other host has decided.
    Ready,
    /// It is this host's, and about to run.
    Starting,
    /// It runs where it was to go.
    Completed,
    /// Given up by request.
    Cancelled,
    /// It did not come about: see `error`.
    Failed,
}

impl MigrationState {
    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Failed)
    }
}

/// How far the copying of a VM's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgress {
    /// Rounds that are over.
    pub rounds: u32,
    /// Bytes of guest memory that were to be sent when this round began.
    pub round_bytes: u64,
    /// Those of them that were sent.
    pub round_sent_bytes: u64,
    /// Bytes of guest memory that were sent in all.
    pub sent_bytes: u64,
    /// Bytes a second over the rounds so far; 0 before the first is over.
    pub rate_bytes: u64,
    /// Bytes a second that the guest wrote in the last round.
    pub dirty_rate_bytes: u64,
    /// How long it would stand still if it did now; 0 before the first round is over.
    pub expected_pause_ms: f64,
    /// Share of the time in which it may run, in percent: less than 100 while it is slowed down.
    pub vcpu_share: u8,
}

/// `GET /v1/migrations/{id}`: a VM's way from host to host, as this host knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Its id, the same on both hosts.
    #[schema(value_type = String, example = "m-mzxw6ytbmzxw6ytb")]
    pub id: MigrationId,
    /// The VM's id.
    #[schema(value_type = String)]
    pub vm_id: VmId,
    /// The VM's name, if it is known here and has one.
    pub vm_name: Option<String>,
    /// Which way it goes.
    pub direction: MigrationDirection,
    /// The other host's name.
    pub peer: String,
    /// How far it is.
    pub state: MigrationState,
    /// Whether its memory was to be compressed, if both hosts can; at the host it comes to always `none`.
    #[serde(default)]
    pub compress: Compress,
    /// How far the copying is; null but while memory is copied from here.
    pub progress: Option<MigrationProgress>,
    /// How long no vCPU ran; null until that is known, and at the host it came to.
    pub pause_ms: Option<f64>,
    /// What it took; null until that is known, and at the host it came to.
    pub moved: Option<Moved>,
    /// All that was done for it on this host, in order.
    pub steps: Vec<Step>,
    /// Why it did not come about; null in other states.
    pub error: Option<ErrorDetail>,
    /// When it began here.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When all was done here; null before.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
}

/// `GET /v1/migrations`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationList {
    /// The migrations that are kept, newest first.
    pub migrations: Vec<Migration>,
}

/// `POST /v1/vms/{id}/migrate/estimate`: what a migration is likely to be like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationEstimate {
    /// The host it would go to, which would take it.
    pub to: String,
    /// Whether the bundle it was launched from is there: then only what differs from it is copied.
    pub has_base: bool,
    /// Memory that host could give to guests.
    pub memory_available_bytes: u64,
    /// Bytes of guest memory to copy once, at most: what the VM has touched.
    pub copy_bytes: u64,
    /// Whether its memory would be compressed.
    #[serde(default)]
    pub compress: Compress,
    /// Why not, if that was asked for; else null.
    #[serde(default)]
    pub uncompressed: Option<Uncompressed>,
    /// Bytes a second, by the last migrations to that host and the limit asked for; null without any.
    pub rate_bytes: Option<u64>,
    /// How long copying takes, by these two.
    pub copy_ms: Option<f64>,
    /// How long no vCPU will run, by the last migrations to that host; null without any.
    pub pause_ms: Option<f64>,
    /// How many migrations this is based on.
    pub based_on: usize,
}
