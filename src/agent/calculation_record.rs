//! What the ledger keeps of calculations. These types are the schema, as those in [`super::record`] are. Pure.
//!
//! ```text
//! queued ─a member is free─▶ running ─▶ succeeded
//!    │                          ├─────▶ failed: it ended otherwise, or did not start
//!    ▼                          └─────▶ lost: its member or its agent ended, and nobody knows how far it came
//! failed: nobody took it in time
//! ```
//! A calculation runs at most once: what was running when an agent ended is lost, not begun again.

use serde::{Deserialize, Serialize};

use crate::clock::UnixNanos;
use crate::ids::{CalculationId, ClusterId, VmId};

/// Most bytes of standard input of a calculation.
pub(super) const INPUT_BYTES_MAX: usize = 64 * 1024;

/// Most bytes that are kept of each of a calculation's standard output and error.
pub(super) const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// Most bytes of all words of a calculation.
pub(super) const WORDS_BYTES_MAX: usize = 64 * 1024;

/// How long a calculation has from its request to its end when nothing else is said, in seconds.
pub(super) const TIMEOUT_S_DEFAULT: u32 = 300;

/// The longest a calculation can be given, in seconds.
pub(super) const TIMEOUT_S_MAX: u32 = 24 * 3600;

/// A program that runs in some member of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalculationRecord {
    /// [`super::record::SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Its id.
    pub id: CalculationId,
    /// The cluster it is for.
    pub cluster: ClusterId,
    /// The member it was asked of; `None`: whichever has least to do.
    pub wanted: Option<VmId>,
    /// The member it was given to.
    pub member: Option<VmId>,
    /// Who that is in the cluster.
    pub executor_id: Option<String>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `NAME=value` words added to the environment.
    pub env: Vec<String>,
    /// How long it has from its request to its end, in seconds.
    pub timeout_s: u32,
    /// How far it is.
    pub state: CalculationState,
    /// Whether more was written to standard output than is kept.
    pub stdout_truncated: bool,
    /// Whether more was written to standard error than is kept.
    pub stderr_truncated: bool,
    /// When it was asked for.
    pub created_at: UnixNanos,
    /// When it was given to its member.
    pub started_at: Option<UnixNanos>,
    /// When it was over.
    pub ended_at: Option<UnixNanos>,
}

impl CalculationRecord {
    /// When its time is up.
    pub fn deadline(&self) -> UnixNanos {
        UnixNanos(self.created_at.0.saturating_add(u64::from(self.timeout_s).saturating_mul(1_000_000_000)))
    }
}

/// How far a calculation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum CalculationState {
    /// No member has it yet.
    Queued,
    /// A member has it.
    Running,
    /// It ended with code 0.
    Succeeded,
    /// It ended otherwise, or did not start.
    Failed {
        /// Why.
        #[serde(flatten)]
        cause: CalculationCause,
    },
    /// Its member or its agent ended while it ran.
    Lost {
        /// Which, and how.
        detail: String,
    },
}

impl CalculationState {
    /// The state's name, as in the ledger, events and answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed { .. } => "failed",
            Self::Lost { .. } => "lost",
        }
    }

    /// Whether nothing changes it any more.
    pub const fn is_over(&self) -> bool {
        match self {
            Self::Queued | Self::Running => false,
            Self::Succeeded | Self::Failed { .. } | Self::Lost { .. } => true,
        }
    }
}

/// Why a calculation failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum CalculationCause {
    /// It exited with another code than 0.
    ExitCode {
        /// The code.
        code: u8,
    },
    /// A signal ended it.
    Signal {
        /// Linux signal number.
        number: u8,
    },
    /// Its time was up while it ran.
    TimedOut,
    /// Its time was up before a member could take it.
    NobodyTookIt,
    /// The member it was asked of ended before it took it.
    MemberGone,
    /// Its program could not be started.
    NotStarted {
        /// Why.
        detail: String,
    },
}

impl CalculationCause {
    /// The cause's name, as in answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ExitCode { .. } => "exit_code",
            Self::Signal { .. } => "signal",
            Self::TimedOut => "timed_out",
            Self::NobodyTookIt => "nobody_took_it",
            Self::MemberGone => "member_gone",
            Self::NotStarted { .. } => "not_started",
        }
    }
}

/// What a calculation wrote, as far as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CalculationOutput {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_kept_with_their_cause() {
        let state = CalculationState::Failed { cause: CalculationCause::ExitCode { code: 3 } };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(text, r#"{"state":"failed","cause":"exit_code","code":3}"#);
        assert_eq!(serde_json::from_str::<CalculationState>(&text).unwrap(), state);
    }
}
