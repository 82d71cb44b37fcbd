//! VMs whose memory is out.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::VmId;

/// Where an idle VM's memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwapMode {
    /// To the host's swap; its process stays, and it is back within milliseconds.
    Page,
    /// To an encrypted file, with all of its state; its process ends, its addresses stay.
    Hibernate,
}

/// When the agent may move a VM's memory out by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwapChoice {
    /// Never: only when somebody asks for it.
    #[default]
    Never,
    /// To the host's swap.
    Page,
    /// To an encrypted file.
    Hibernate,
}

/// What brings a VM's memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WakeCause {
    /// `POST /v1/vms/{id}/wake`. Always possible, named or not.
    Api,
    /// A packet for it.
    Packet,
    /// The time that was given with the swap-out.
    Timer,
    /// Somebody runs a program in its guest, or looks at its console.
    Vsock,
}

/// When the agent moves a VM's memory out by itself, and what brings it back. What is left out is as by default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SwapPolicy {
    /// Where to.
    pub mode: SwapChoice,
    /// Seconds of idleness after which it is moved out even if the host has enough memory; 0, the default: it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_s: Option<u32>,
    /// Seconds it runs at least between two times; 60 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_resident_s: Option<u32>,
    /// Those with less go first; 100 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// What wakes it; everything by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake: Option<Vec<WakeCause>>,
}

/// A VM whose memory is out, or on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Swapped {
    /// Where its memory is; null while that is being decided.
    pub mode: Option<SwapMode>,
    /// Since when it stands still.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Who wanted it.
    pub because: String,
    /// When it wakes by itself; null: it does not.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub wake_at: Option<Timestamp>,
}

/// `POST /v1/vms/{id}/swap-out`: answered with the VM once its memory is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SwapOutRequest {
    /// Where to.
    pub mode: SwapMode,
    /// Seconds after which it wakes by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake_after_s: Option<u32>,
}

/// What was decided about one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwapVerdict {
    /// To the host's swap.
    Page,
    /// To a file.
    Hibernate,
    /// It stays: it does something.
    Busy,
    /// It stays: it has not been running for long.
    JustWoke,
    /// It stays: there is no need.
    Spared,
}

/// A VM that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwapWeighed {
    /// The VM.
    #[schema(value_type = String)]
    pub vm: VmId,
    /// Seconds it had done nothing.
    pub idle_s: u64,
    /// Memory it had, in MiB.
    pub resident_mib: u64,
    /// Its priority.
    pub priority: u8,
    /// What was decided.
    pub verdict: SwapVerdict,
}

/// Why idle VMs were looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwapNeed {
    /// Less memory was available than there is to be.
    LowMemory,
    /// Tasks of the host waited for memory.
    Pressure,
    /// A VM was idle for as long as its policy says.
    Idleness,
}

/// What was decided at one moment, with what it was decided by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SwapDecision {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Why.
    pub need: SwapNeed,
    /// Memory that was available without swapping, in MiB.
    pub available_mib: u64,
    /// Part of the last ten seconds in which some task waited for memory, in percent.
    pub psi_some_avg10: Option<f64>,
    /// Below how much available memory VMs are moved out, in MiB.
    pub low_free_mib: u64,
    /// Until how much, in MiB.
    pub target_free_mib: u64,
    /// The VMs that could go, in the order they were looked at.
    pub vms: Vec<SwapWeighed>,
}

/// `GET /v1/swap-decisions`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SwapDecisionList {
    /// The newest decisions, newest first.
    pub decisions: Vec<SwapDecision>,
}
