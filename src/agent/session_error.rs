//! Why something asked of a session was not done, and which of the ledger's refusals means what.

use std::time::Duration;

use super::egress::EgressError;
use super::ledger::{LedgerError, NumberChoice, SessionRefusal};
use super::session::{TTL_S_MAX, called};
use super::session_record::{SessionRecord, USER_DATA_BYTES_MAX};
use crate::clock::Steady;
use crate::net::address::AddressError;
use crate::report::Retry;

/// Why something asked of a session was not done.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The agent has no fabric.
    #[error("this host has no fabric, so it has no sessions")]
    NoFabric,
    /// The fabric is not right.
    #[error("the fabric has a conflict: {}", .reasons.join("; "))]
    FabricConflict {
        /// What is wrong.
        reasons: Vec<String>,
    },
    /// Not a name.
    #[error("{name:?} is not a name: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// A session has this name.
    #[error("there is a session named {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The number is nobody's.
    #[error(transparent)]
    Reserved(AddressError),
    /// A session has this number.
    #[error("session network id {number} is in use")]
    NumberTaken {
        /// The number.
        number: u32,
    },
    /// A session had this number.
    #[error("session network id {number} was used a moment ago and rests for another {} s", .left.as_secs() + 1)]
    Resting {
        /// The number.
        number: u32,
        /// How long until it may be used again.
        left: Duration,
    },
    /// All numbers are in use or rest.
    #[error("all session network ids from {first} to {last} are in use or rest")]
    NoNumber {
        /// The lowest that may be chosen.
        first: u32,
        /// The highest that may be chosen.
        last: u32,
    },
    /// The number has no IPv4 addresses.
    #[error("IPv4 for a session")]
    TooWide(#[source] AddressError),
    /// No number that this host may choose has IPv4 addresses.
    #[error("IPv4 for a session whose network id is to be chosen: with peers, a host chooses ids from {first} on only")]
    ChosenTooWide {
        /// The lowest that this host chooses.
        first: u32,
    },
    /// The fabric has no IPv4.
    #[error("IPv4 for a session: this fabric has IPv6 only")]
    NoIpv4,
    /// What it may reach is not possible.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// Not a time to live.
    #[error("ttl_s {found}: 1 to {TTL_S_MAX} are possible")]
    Ttl {
        /// What was given.
        found: u32,
    },
    /// More user data than is kept.
    #[error("user_data has {found} bytes: at most {USER_DATA_BYTES_MAX} are possible")]
    UserData {
        /// How many.
        found: usize,
    },
    /// No session has this id, name or number.
    #[error("there is no session {word:?}")]
    Unknown {
        /// What was given.
        word: String,
    },
    /// Several ids start like this.
    #[error("{word:?} is the start of {count} sessions' ids; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
        /// How many it could be.
        count: usize,
    },
    /// It is being removed.
    #[error("session {session} is being drained")]
    Draining {
        /// The session.
        session: String,
    },
    /// Its time has run out.
    #[error("session {session} has expired")]
    Expired {
        /// The session.
        session: String,
    },
    /// Its VMs use all local ids.
    #[error("session {session} has no local id left on this host: all up to {max} are in use or rest")]
    NoLocal {
        /// The session.
        session: String,
        /// The highest there is.
        max: u32,
    },
    /// It has VMs.
    #[error("session {session} has {members} VMs, ended ones that were not removed included")]
    InUse {
        /// The session.
        session: String,
        /// How many.
        members: u64,
    },
    /// Its VMs could not be removed.
    #[error("drain session {session}: {left} of its VMs are left ({why})")]
    NotDrained {
        /// The session.
        session: String,
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
    /// It could not be recorded.
    #[error("record the session")]
    Ledger(#[source] LedgerError),
}

impl SessionError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoFabric
            | Self::Name { .. }
            | Self::NameTaken { .. }
            | Self::Reserved(_)
            | Self::NumberTaken { .. }
            | Self::TooWide(_)
            | Self::ChosenTooWide { .. }
            | Self::NoIpv4
            | Self::Egress(_)
            | Self::Ttl { .. }
            | Self::UserData { .. }
            | Self::Ambiguous { .. }
            | Self::Draining { .. }
            | Self::Expired { .. }
            | Self::InUse { .. }
            | Self::KeyMismatch => Retry::WithChange,
            Self::FabricConflict { .. }
            | Self::Resting { .. }
            | Self::NoNumber { .. }
            | Self::NoLocal { .. }
            | Self::NotDrained { .. }
            | Self::Ending
            | Self::Host { .. } => Retry::Later,
            Self::Unknown { .. } => Retry::Never,
            Self::Ledger(error) => error.retry(),
        }
    }
}

/// Why a session was not made.
pub(super) fn refused_number(
    error: LedgerError,
    choice: NumberChoice,
    name: Option<String>,
    now: Steady,
) -> SessionError {
    let LedgerError::Session(refusal) = error else { return SessionError::Ledger(error) };
    match (refusal, choice) {
        (SessionRefusal::NameTaken, _) => SessionError::NameTaken { name: name.unwrap_or_default() },
        (SessionRefusal::NumberTaken, NumberChoice::Exactly(number)) => {
            SessionError::NumberTaken { number: number.into() }
        }
        (SessionRefusal::Resting { until }, NumberChoice::Exactly(number)) => {
            SessionError::Resting { number: number.into(), left: now.until(until) }
        }
        (SessionRefusal::NoNumber, NumberChoice::Next { first, last }) => SessionError::NoNumber { first, last },
        (_, _) => SessionError::Ledger(error),
    }
}

/// Why a VM may not join a session.
pub(super) fn join_refused(session: &SessionRecord, max: u32, refusal: SessionRefusal) -> SessionError {
    let session = called(session);
    match refusal {
        SessionRefusal::Unknown => SessionError::Unknown { word: session },
        SessionRefusal::Draining => SessionError::Draining { session },
        SessionRefusal::Expired => SessionError::Expired { session },
        SessionRefusal::NoLocal => SessionError::NoLocal { session, max },
        SessionRefusal::InUse { members } => SessionError::InUse { session, members },
        SessionRefusal::NameTaken
        | SessionRefusal::NumberTaken
        | SessionRefusal::Resting { .. }
        | SessionRefusal::NoNumber
        | SessionRefusal::NoJail => SessionError::Ledger(refusal.into()),
    }
}
