//! What agents tell each other, as JSON. Pure.

use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::agent::config::{FabricConfig, Peer};
use crate::agent::egress::Egress;
use crate::agent::record::VmRecord;
use crate::agent::session_record::Addressing;
use crate::ids::VmId;
use crate::units::NetLimits;

/// `POST /peer/v1/hello`: who an agent is. Answered by the same of the other one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The fabric's first 48 bits.
    pub ipv6_prefix: Ipv6Addr,
    /// Bits of host number, session network id and local id in IPv4 addresses; absent without IPv4.
    pub ipv4_bits: Option<[u8; 3]>,
    /// The sender's number.
    pub host_number: u16,
    /// 16 hexadecimal digits that differ for every state directory.
    pub instance: String,
    /// 16 hexadecimal digits that differ for every start of an agent: a copied state directory is another agent too.
    pub life: String,
    /// The sender's name.
    pub name: String,
    /// The sender's program version.
    pub version: String,
    /// The number the receiver has in the sender's configuration; absent in answers to strangers.
    pub peer_host_number: Option<u16>,
}

/// What speaks against two hosts being of one fabric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// The other one is this one.
    Oneself,
    /// They have different prefixes or widths.
    OtherFabric {
        /// What the other host has.
        theirs: String,
        /// What this host has.
        ours: String,
    },
    /// They have one number.
    SameNumber {
        /// Which.
        number: u16,
    },
    /// The other host has another number than this one's configuration says.
    OtherNumber {
        /// What it says.
        says: u16,
        /// What the configuration says.
        configured: u16,
    },
    /// This host has another number than the other's configuration says.
    ExpectedOther {
        /// What the other host takes this one for.
        expected: u16,
        /// What this host is.
        number: u16,
    },
}

impl Conflict {
    /// What is wrong with `who`, and what to do.
    pub fn told(&self, who: &str) -> String {
        match self {
            Self::Oneself => format!("the address of {who} is this host's own: correct [[peers]] here"),
            Self::OtherFabric { theirs, ours } => format!(
                "{who} is of another fabric: it has {theirs}, this host has {ours}: make [fabric] the same on both"
            ),
            Self::SameNumber { number } => format!(
                "this host and {who} both have fabric.host_number {number}: give one of them another number and \
                 restart its agent"
            ),
            Self::OtherNumber { says, configured } => format!(
                "{who} says its host_number is {says}, [[peers]] here says {configured}: correct one of the two"
            ),
            Self::ExpectedOther { expected, number } => format!(
                "{who} takes this host for number {expected}, but it is {number}: correct [[peers]] there or \
                 fabric.host_number here"
            ),
        }
    }
}

impl Hello {
    /// The fabric, for sentences.
    fn fabric(&self) -> String {
        let ipv4 = match self.ipv4_bits {
            Some([host, session, local]) => format!("IPv4 {host}+{session}+{local} bits"),
            None => "no IPv4".to_owned(),
        };
        format!("{}/48 and {ipv4}", self.ipv6_prefix)
    }

    /// What speaks against this host (`self`) and another one being of one fabric. `configured` is the number that the
    /// other one has in this host's configuration.
    pub fn conflict_with(&self, other: &Self, configured: Option<u16>) -> Option<Conflict> {
        if self.instance == other.instance && self.life == other.life {
            return Some(Conflict::Oneself);
        }
        if (self.ipv6_prefix, self.ipv4_bits) != (other.ipv6_prefix, other.ipv4_bits) {
            return Some(Conflict::OtherFabric { theirs: other.fabric(), ours: self.fabric() });
        }
        if self.host_number == other.host_number {
            return Some(Conflict::SameNumber { number: self.host_number });
        }
        if let Some(configured) = configured.filter(|configured| *configured != other.host_number) {
            return Some(Conflict::OtherNumber { says: other.host_number, configured });
        }
        let expected = other.peer_host_number.filter(|expected| *expected != self.host_number)?;
        Some(Conflict::ExpectedOther { expected, number: self.host_number })
    }
}

/// `POST /peer/v1/vms`: VMs to launch into a session, all or none. The session is made when it is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerLaunch {
    /// The session's number in the fabric.
    pub session_network_id: u32,
    /// Whether its members get IPv4 addresses.
    pub ipv4: bool,
    /// What its members may reach outside the fabric.
    pub egress: Egress,
    /// Seconds until it ends by itself.
    pub ttl_s: Option<u32>,
    /// What its members read from the metadata service.
    pub user_data: Option<String>,
    /// The VMs.
    pub order: MemberOrder,
}

/// VMs for a session, all alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberOrder {
    /// What they are in the session.
    pub role: Option<String>,
    /// How many.
    pub count: u8,
    /// Image to boot.
    pub image: String,
    /// Number of vCPUs of each.
    pub vcpus: u32,
    /// Guest memory of each in MiB.
    pub memory_mib: u64,
    /// Who puts their addresses to use.
    pub addressing: Addressing,
    /// What may pass the network interface of each.
    pub network_limits: NetLimits,
}

/// A VM in a session, as other members and other hosts see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberBody {
    /// The VM.
    pub id: VmId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its addresses, IPv6 first; none for one that ended.
    pub addresses: Vec<IpAddr>,
    /// The host it is on.
    pub host: String,
    /// What it is in the session.
    pub role: Option<String>,
    /// What it does.
    pub state: String,
}

impl MemberBody {
    /// What others see of a VM of this host.
    pub fn of(vm: &VmRecord, host: &str) -> Self {
        Self {
            id: vm.id.clone(),
            name: vm.name.clone(),
            addresses: vm.addresses(),
            host: host.to_owned(),
            role: vm.spec.role.clone(),
            state: vm.state.name().to_owned(),
        }
    }
}

/// Answer to `POST /peer/v1/vms` and to `POST /v1/self/launch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchedBody {
    /// The VMs. They are recorded; their launches go on.
    pub vms: Vec<MemberBody>,
}

/// Answer to `GET /peer/v1/sessions/{session network id}/members` and to `GET /v1/self/members`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembersBody {
    /// The members.
    pub members: Vec<MemberBody>,
}

/// What an agent says of itself; `to` is whom it says it to.
pub(super) fn hello(fabric: &FabricConfig, identity: &super::Identity, name: &str, to: Option<&Peer>) -> Hello {
    let bits = fabric.fabric.v4_widths();
    Hello {
        ipv6_prefix: fabric.fabric.v6_net().first,
        ipv4_bits: bits.map(|widths| [widths.host_bits(), widths.session_bits(), widths.local_bits()]),
        host_number: fabric.host.into(),
        instance: format!("{:016x}", identity.instance),
        life: format!("{:016x}", identity.life),
        name: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        peer_host_number: to.map(|peer| peer.host.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(host_number: u16, life: &str, peer_host_number: Option<u16>) -> Hello {
        Hello {
            ipv6_prefix: "fd3c:91aa:7e2::".parse().unwrap(),
            ipv4_bits: Some([8, 10, 6]),
            host_number,
            instance: life.to_owned(),
            life: life.to_owned(),
            name: format!("host{host_number}"),
            version: "1".to_owned(),
            peer_host_number,
        }
    }

    #[test]
    fn hosts_of_one_fabric_have_no_conflict() {
        let (a, b) = (of(1, "a", Some(2)), of(2, "b", Some(1)));
        assert_eq!(a.conflict_with(&b, Some(2)), None);
        assert_eq!(b.conflict_with(&a, Some(1)), None);
        assert_eq!(a.conflict_with(&of(3, "c", None), None), None);
    }

    #[test]
    fn each_conflict_is_seen_from_both_sides() {
        let a = of(1, "a", Some(2));
        assert_eq!(a.conflict_with(&a, Some(2)), Some(Conflict::Oneself));
        // The second of two with the same state directory is another agent.
        let copy = Hello { instance: "a".to_owned(), ..of(1, "b", None) };
        let same = Some(Conflict::SameNumber { number: 1 });
        assert_eq!((a.conflict_with(&copy, None), copy.conflict_with(&a, None)), (same.clone(), same));
        let b = of(5, "b", None);
        let other = Some(Conflict::OtherNumber { says: 5, configured: 2 });
        assert_eq!(a.conflict_with(&b, Some(2)), other);
        assert_eq!(b.conflict_with(&a, None), Some(Conflict::ExpectedOther { expected: 2, number: 5 }));
        for far in [
            Hello { ipv6_prefix: "fd3c:91aa:7e3::".parse().unwrap(), ..of(2, "b", None) },
            Hello { ipv4_bits: None, ..of(2, "b", None) },
            Hello { ipv4_bits: Some([8, 8, 8]), ..of(2, "b", None) },
        ] {
            assert!(matches!(a.conflict_with(&far, Some(2)), Some(Conflict::OtherFabric { .. })), "{far:?}");
            assert!(matches!(far.conflict_with(&a, None), Some(Conflict::OtherFabric { .. })), "{far:?}");
        }
    }

    #[test]
    fn a_hello_of_a_newer_program_is_understood() {
        let mut value = serde_json::to_value(of(1, "a", None)).unwrap();
        value["more"] = true.into();
        assert_eq!(serde_json::from_value::<Hello>(value).unwrap(), of(1, "a", None));
    }
}
