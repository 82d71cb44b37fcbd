//! Sessions, and the fabric their addresses are made in.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ids::{SessionId, VmId};

/// `POST /v1/sessions`: answered 201 with the [`Session`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SessionCreateRequest {
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its number in the fabric, the same on every host where VMs are to join it. Left out: one is chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_network_id: Option<u32>,
    /// Whether members get IPv4 addresses. Left out or null: if the number fits IPv4 addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<bool>,
    /// What members may reach outside the fabric. Left out: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Seconds until it is drained and removed by itself, from 1 on. Left out: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u32>,
    /// What members read from the metadata service, up to 16 KiB. No answer of this API shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
}

/// What a session's VMs may reach outside the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// Give what leaves the host's address. Without it, those outside have to know the way back.
    #[serde(default)]
    pub nat: bool,
    /// What is allowed: at most 64 rules.
    #[serde(default)]
    pub allow: Vec<EgressRule>,
}

/// One thing that is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    /// Where to: a network outside the fabric.
    #[schema(example = "192.0.2.0/24")]
    pub cidr: String,
    /// By which protocol.
    #[serde(default)]
    pub protocol: EgressProtocol,
    /// To which ports, first and last; null for all. Only with `tcp` and `udp`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<u16>>, min_items = 2, max_items = 2)]
    pub ports: Option<(u16, u16)>,
}

/// A protocol of an egress rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EgressProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// Any.
    #[default]
    Any,
}

/// A session: VMs that may talk to each other, on all hosts of the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Its id.
    #[schema(value_type = String, example = "s-mzxw6ytbmzxw6ytb")]
    pub id: SessionId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its number in the fabric.
    pub session_network_id: u32,
    /// What it does.
    pub state: SessionState,
    /// Whether members get IPv4 addresses.
    pub ipv4: bool,
    /// What members may reach outside the fabric.
    pub egress: Egress,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it is drained and removed by itself; null: never.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
    /// Its VMs on this host, oldest first; ended ones that were not removed included.
    pub members: Vec<SessionMember>,
    /// Packets dropped, of all members that are there now.
    pub drops: Drops,
}

/// What a session does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// VMs may join.
    Active,
    /// Its VMs are being removed, then it is.
    Draining,
}

/// A VM in a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionMember {
    /// The VM.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// What it does.
    pub state: super::VmState,
    /// Its addresses; none for a VM that ended.
    pub addresses: Vec<String>,
    /// Packets its jail dropped.
    pub drops: Drops,
}

/// Packets that were dropped, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Drops {
    /// The source was not the VM's own, or the packet was of a kind that hides its source.
    pub spoof: u64,
    /// The other end was in the fabric, but not in the session.
    pub foreign_session: u64,
    /// The other end was outside the fabric, and not allowed.
    pub not_allowed: u64,
    /// It was for the VM, and its queue was full: the VM was out or paused, or did not take packets fast enough.
    pub queue_full: u64,
}

/// `GET /v1/sessions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionList {
    /// All sessions of this host, oldest first.
    pub sessions: Vec<Session>,
}

/// Query of `DELETE /v1/sessions/{id}`: 204 once it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct SessionRemoveQuery {
    /// Stop and remove its VMs first. Without it, a session with VMs is not removed.
    #[serde(default)]
    pub drain: bool,
    /// Milliseconds each guest has to power itself off before it is killed; 0 kills at once. Default 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
}

/// Who puts a VM's session addresses to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Addressing {
    /// The guest's interface has them.
    Guest,
    /// The guest has fixed inner addresses, the same in every VM; its jail translates one to one.
    Invariant,
}

/// `GET /v1/fabric`: what VMs' addresses are made of, and the other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fabric {
    /// The first 48 bits of all IPv6 addresses.
    #[schema(example = "fd3c:91aa:7e2::/48")]
    pub ipv6_prefix: String,
    /// This host's number: the next 16 bits.
    pub host_number: u16,
    /// This host's IPv6 subnet. Behind it are 32 bits of session network id and 32 bits of local id.
    #[schema(example = "fd3c:91aa:7e2:3::/64")]
    pub ipv6_subnet: String,
    /// How IPv4 addresses are made; null in a fabric without them.
    pub ipv4: Option<FabricIpv4>,
    /// Largest packet of a VM in bytes.
    pub mtu: u16,
    /// What carries packets between hosts: `routed` or `vxlan`.
    pub underlay: String,
    /// VXLAN network identifier; null without VXLAN.
    pub vxlan_id: Option<u32>,
    /// VXLAN's UDP port; null without VXLAN.
    pub vxlan_port: Option<u16>,
    /// Seconds an address or session network id rests after its use.
    pub quarantine_s: u32,
    /// How agents speak to each other: `tls`, `tls_or_plain` (with `fabric.plain_peers`, for the time of an upgrade), or
    /// `plain` (without a key, which leaves hello only).
    #[serde(default)]
    pub peer_transport: String,
    /// The other hosts.
    pub peers: Vec<FabricPeer>,
    /// What speaks against the fabric at the moment. While there is anything, sessions are neither made nor joined.
    pub conflicts: Vec<String>,
}

/// How IPv4 addresses are made: the network's first bits, then host number, session network id and local id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FabricIpv4 {
    /// The network of all hosts.
    #[schema(example = "10.0.0.0/8")]
    pub net: String,
    /// This host's subnet.
    #[schema(example = "10.3.0.0/16")]
    pub subnet: String,
    /// Bits of the host number.
    pub host_bits: u8,
    /// Bits of the session network id.
    pub session_bits: u8,
    /// Bits of the local id.
    pub local_bits: u8,
}

/// Another host of the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FabricPeer {
    /// Its name.
    pub name: String,
    /// Its address on the network between hosts, with the port of its agent if one is configured.
    pub address: String,
    /// Its number.
    pub host_number: u16,
    /// How it answers hellos: `unknown` (not asked yet), `reachable`, `unreachable`, `refused` (another
    /// key or number, or no TLS) or `conflict`.
    #[serde(default)]
    pub state: String,
    /// Why it is unreachable or refused; null otherwise.
    #[serde(default)]
    pub reason: Option<String>,
    /// How long ago it last answered a hello; null: it has not since the agent started.
    #[serde(default)]
    pub last_hello_ago_ms: Option<u64>,
}
