//! Why something asked of a cluster, or of its members, was not done.

use super::calculation_record::{INPUT_BYTES_MAX, TIMEOUT_S_MAX, WORDS_BYTES_MAX};
use super::cluster_record::{ClusterRecord, REGISTRATION_DEADLINE_S_MAX, TOKEN_BYTES_MAX, TOKEN_BYTES_MIN, called};
use super::exec::ExecError;
use super::ledger::{ClusterRefusal, LedgerError};
use crate::report::Retry;

/// Why something asked of a cluster was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Not a name.
    #[error("{name:?} is not a name: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// A cluster has this name.
    #[error("there is a cluster named {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Not a token.
    #[error(
        "the token has {found} bytes: {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} visible ASCII characters are possible"
    )]
    Token {
        /// How many bytes were given.
        found: usize,
    },
    /// Guests cannot connect there.
    #[error("endpoint {endpoint}: {reason}")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Not a deadline.
    #[error("registration_deadline_s {found}: 1 to {REGISTRATION_DEADLINE_S_MAX} are possible")]
    Deadline {
        /// What was given.
        found: u32,
    },
    /// There are as many as can be.
    #[error("this host has {max} clusters, which is the most there can be; remove some")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// No cluster has this id or name.
    #[error("there is no cluster {word:?}")]
    Unknown {
        /// What was given.
        word: String,
    },
    /// Several ids start like this.
    #[error("{word:?} is the start of {count} clusters' ids; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
        /// How many it could be.
        count: usize,
    },
    /// It is being removed.
    #[error("cluster {cluster} is being drained")]
    Draining {
        /// The cluster.
        cluster: String,
    },
    /// It has VMs that live.
    #[error("cluster {cluster} has {members} living VMs")]
    InUse {
        /// The cluster.
        cluster: String,
        /// How many.
        members: u64,
    },
    /// Its VMs could not be removed.
    #[error("drain cluster {cluster}: {left} of its VMs are left ({why})")]
    NotDrained {
        /// The cluster.
        cluster: String,
        /// How many are left.
        left: u64,
        /// Why the first of them is.
        why: String,
    },
    /// The key was used for something else.
    #[error("the idempotency key was used with another body")]
    KeyMismatch,
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It could not be read or recorded.
    #[error("record the cluster")]
    Ledger(#[source] LedgerError),
}

impl ClusterError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Name { .. }
            | Self::NameTaken { .. }
            | Self::Token { .. }
            | Self::Endpoint { .. }
            | Self::Deadline { .. }
            | Self::TooMany { .. }
            | Self::Ambiguous { .. }
            | Self::Draining { .. }
            | Self::InUse { .. }
            | Self::KeyMismatch => Retry::WithChange,
            Self::NotDrained { .. } | Self::Ending | Self::Host { .. } => Retry::Later,
            Self::Unknown { .. } => Retry::Never,
            Self::Ledger(error) => error.retry(),
        }
    }

    /// What the ledger's refusal means for this cluster.
    pub(super) fn refused(cluster: &ClusterRecord, error: LedgerError) -> Self {
        let LedgerError::Cluster(refusal) = error else { return Self::Ledger(error) };
        match refusal {
            ClusterRefusal::NameTaken => Self::NameTaken { name: cluster.name.clone().unwrap_or_default() },
            ClusterRefusal::Unknown => Self::Unknown { word: cluster.id.to_string() },
            ClusterRefusal::InUse { members } => Self::InUse { cluster: called(cluster), members },
            ClusterRefusal::TooManyCalculations { .. } => Self::Ledger(error),
        }
    }
}

/// Why a calculation was not taken, or is not shown.
#[derive(Debug, thiserror::Error)]
pub enum CalculationError {
    /// It is not clear of which cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// No guest could run it.
    #[error(transparent)]
    Program(#[from] ExecError),
    /// More words than are kept.
    #[error("argv and env have {found} bytes: at most {WORDS_BYTES_MAX} are possible")]
    Words {
        /// How many bytes.
        found: usize,
    },
    /// More input than is kept.
    #[error("standard input has {found} bytes: at most {INPUT_BYTES_MAX} are possible")]
    Input {
        /// How many.
        found: usize,
    },
    /// Not a time.
    #[error("timeout_s {found}: 1 to {TIMEOUT_S_MAX} are possible")]
    Timeout {
        /// What was given.
        found: u32,
    },
    /// A member is named twice over.
    #[error("member and executor_id together: one of them names the member")]
    MemberAndExecutor,
    /// The cluster has no such member.
    #[error("cluster {cluster} has no living member {word:?}")]
    NoMember {
        /// The cluster.
        cluster: String,
        /// What was given.
        word: String,
    },
    /// The member has not registered.
    #[error("member {executor_id:?} of cluster {cluster} is not registered: its VM is {state}")]
    NotRegistered {
        /// The cluster.
        cluster: String,
        /// Who it is in the cluster.
        executor_id: String,
        /// What its VM is doing.
        state: &'static str,
    },
    /// As many wait as can.
    #[error("{waiting} calculations wait for members of cluster {cluster}, which is the most that can")]
    TooMany {
        /// The cluster.
        cluster: String,
        /// How many.
        waiting: u64,
    },
    /// No calculation has this id.
    #[error("cluster {cluster} has no calculation {word:?}")]
    Unknown {
        /// The cluster.
        cluster: String,
        /// What was given.
        word: String,
    },
    /// Several ids start like this.
    #[error("{word:?} is the start of several calculations' ids; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
    },
}

impl CalculationError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Cluster(error) => error.retry(),
            Self::Program(error) => error.retry(),
            Self::Words { .. }
            | Self::Input { .. }
            | Self::Timeout { .. }
            | Self::MemberAndExecutor
            | Self::NoMember { .. }
            | Self::Ambiguous { .. } => Retry::WithChange,
            Self::NotRegistered { .. } | Self::TooMany { .. } => Retry::Later,
            Self::Unknown { .. } => Retry::Never,
        }
    }
}
