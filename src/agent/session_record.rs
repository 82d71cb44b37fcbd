//! What the ledger keeps of sessions, and of a VM's place in one. These types are the schema, as those in
//! [`super::record`] are. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::egress::{Egress, Protocol};
use super::session::TTL_S_MAX;
use crate::clock::{Steady, UnixNanos};
use crate::ids::SessionId;
use crate::net::address::{LocalId, SessionNetworkId};

/// How many jails a host can have: as many as VMs, which is as many as user ids.
pub(crate) const JAILS_MAX: u16 = 4096;

/// Longest user data of a session in bytes.
pub const USER_DATA_BYTES_MAX: usize = 16 * 1024;

/// A session: VMs that may talk to each other, on all hosts of the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// [`super::record::SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Its id.
    pub id: SessionId,
    /// Its name, unique on this host, if it has one.
    pub name: Option<String>,
    /// Its number in the fabric: part of each member's addresses.
    pub session_network_id: SessionNetworkId,
    /// Whether members get IPv4 addresses beside IPv6 ones.
    pub ipv4: bool,
    /// What members may reach outside the fabric.
    pub egress: Egress,
    /// When it was asked for.
    pub created_at: UnixNanos,
    /// When it ends by itself, if it does.
    pub expires_at: Option<Steady>,
    /// What it is doing.
    pub state: SessionState,
}

impl SessionRecord {
    /// Whether its time has run out.
    pub fn is_expired(&self, now: Steady) -> bool {
        self.expires_at.is_some_and(|expires| expires <= now)
    }

    /// Seconds until it ends by itself, at least one; nothing if it does not.
    pub(super) fn left_s(&self, now: Steady) -> Option<u32> {
        let left = |expires| u32::try_from(now.until(expires).as_secs()).unwrap_or(TTL_S_MAX).clamp(1, TTL_S_MAX);
        self.expires_at.map(left)
    }
}

/// What a session is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// VMs may join.
    Active,
    /// Its VMs are being removed; then it is. No VM may join.
    Draining,
}

impl SessionState {
    /// The state's name, as in the ledger, events and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
        }
    }
}

/// A VM's place in its session. The addresses are the VM's own until its user id is released; the record keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The session.
    pub session: SessionId,
    /// The session's number in the fabric.
    pub session_network_id: SessionNetworkId,
    /// The VM's number among those of its session on the host whose subnet its addresses are of.
    pub local_id: LocalId,
    /// That host's number, if it is another one: the VM came from there.
    #[serde(default)]
    pub home: Option<u16>,
    /// Its IPv6 address.
    pub ipv6: Ipv6Addr,
    /// Its IPv4 address, if the session has IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// Who puts the address to use.
    pub addressing: Addressing,
    /// Where it may go outside of the fabric: its session's when it joined.
    #[serde(default)]
    pub egress: Egress,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub published: Vec<PublishedPort>,
}

/// A port of the host that leads to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The host's port.
    pub host_port: u16,
    /// The VM's port.
    pub guest_port: u16,
}

/// Who puts a VM's session addresses to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Addressing {
    /// The guest's interface has them.
    #[default]
    Guest,
    /// The guest has fixed inner addresses, the same in every VM; its jail translates one to one.
    Invariant,
}
