//! What the ledger keeps of clusters, and of a VM's place in one. These types are the schema, as those in
//! [`super::record`] are. Pure.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::clock::UnixNanos;
use crate::ids::{ClusterId, VmId};

/// Longest executor id in bytes.
pub(super) const EXECUTOR_BYTES_MAX: usize = 63;

/// Longest token in bytes.
pub(super) const TOKEN_BYTES_MAX: usize = 256;

/// Shortest token in bytes: less is guessed.
pub(super) const TOKEN_BYTES_MIN: usize = 8;

/// Seconds a VM has for its registration when nothing else is said.
pub(super) const REGISTRATION_DEADLINE_S_DEFAULT: u32 = 30;

/// Longest time a VM can be given for its registration, in seconds.
pub(super) const REGISTRATION_DEADLINE_S_MAX: u32 = 3600;

/// How often a member is launched, itself included, before it is given up.
pub(super) const ATTEMPTS_MAX: u8 = 2;

/// A cluster: VMs that register under a name each, and are given calculations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// [`super::record::SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Its id.
    pub id: ClusterId,
    /// Its name, unique on this host, if it has one.
    pub name: Option<String>,
    /// Shows its registrar that a guest may join.
    pub token: Token,
    /// The registrar, when it is not this agent.
    pub endpoint: Option<SocketAddr>,
    /// How long a VM has for its registration, in seconds.
    pub registration_deadline_s: u32,
    /// What it is doing.
    pub state: ClusterState,
    /// The number of its last registration here; the first is 1.
    pub epoch: u64,
    /// Counts the changes of this record, from 1.
    pub revision: u64,
    /// When it was asked for.
    pub created_at: UnixNanos,
}

/// What a cluster is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// VMs may join.
    Active,
    /// Its VMs are being removed; then it is. No VM may join.
    Draining,
}

impl ClusterState {
    /// The state's name, as in the ledger, events and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
        }
    }
}

/// A cluster's secret. It is shown by [`Token::secret`] only, so that it does not get into logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// The token of this text.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text.
    pub fn secret(&self) -> &str {
        &self.0
    }

    /// Whether `text` is it. Takes as long wherever the two differ, so that a guess is told nothing by time.
    pub fn is(&self, text: &str) -> bool {
        blake3::hash(self.0.as_bytes()) == blake3::hash(text.as_bytes())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Token(..)")
    }
}

/// What a VM is to its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The cluster.
    pub cluster: ClusterId,
    /// Who it is there: no two living members have the same.
    pub executor_id: String,
    /// 1, or 2 for one that was launched because its first did not register.
    pub attempt: u8,
    /// The VM it was launched instead of.
    pub replaces: Option<VmId>,
}

/// A registration that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// Its number: the registrar gives each registration the next one.
    pub epoch: u64,
    /// When.
    pub at: UnixNanos,
}

/// Whether a text may name a member: letters, digits, `.`, `_` and `-`.
pub(super) fn is_executor_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=EXECUTOR_BYTES_MAX).contains(&text.len()) && text.bytes().all(plain)
}

/// A cluster, for sentences.
pub(super) fn called(cluster: &ClusterRecord) -> String {
    match &cluster.name {
        Some(name) => format!("{name} ({})", cluster.id),
        None => cluster.id.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executor_ids_are_plain_words() {
        for good in ["e", "e-17", "A.b_c", &"x".repeat(63), "vm-aaaaaaaaaaaaaaaa"] {
            assert!(is_executor_id(good), "{good}");
        }
        for bad in ["", "a b", "a/b", "ä", "a\0", &"x".repeat(64)] {
            assert!(!is_executor_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_token_does_not_show() {
        let token = Token::new("secret-words".to_owned());
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert!(token.is("secret-words") && !token.is("secret-word") && !token.is(""));
    }
}
