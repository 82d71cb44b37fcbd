//! What a VM's record makes of it for its jail and its guest. Pure.

use std::net::IpAddr;

use super::egress::{Egress, Protocol};
use super::host_open::mac;
use super::record::VmRecord;
use super::session_record::{Addressing, NetworkRecord};
use crate::net::address::{Fabric, V4Net, V6Net};
use crate::net::member::{self, EgressRule, Member, Net, PublishedPort, SessionAddresses};

/// IANA protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP_V6: u8 = 58;

/// What a VM is to its jail.
pub(super) fn member(vm: &VmRecord, fabric: Option<&Fabric>) -> Member {
    let session = vm.network.as_ref().zip(fabric).map(|(network, fabric)| session(network, fabric));
    Member { mac: mac(&vm.id), session }
}

fn session(network: &NetworkRecord, fabric: &Fabric) -> SessionAddresses {
    SessionAddresses {
        v6: network.ipv6,
        v4: network.ipv4,
        match_v6: fabric.v6_session(network.session_network_id),
        match_v4: network.ipv4.and_then(|_| fabric.v4_session(network.session_network_id)),
        addressing: match network.addressing {
            Addressing::Guest => member::Addressing::Guest,
            Addressing::Invariant => member::Addressing::Invariant,
        },
        egress: egress(&network.egress),
        nat: network.egress.nat,
        published: network
            .published
            .iter()
            .map(|port| PublishedPort {
                protocol: protocol(port.protocol, false).unwrap_or(TCP),
                host_port: port.host_port,
                guest_port: port.guest_port,
            })
            .collect(),
    }
}

/// Egress rules as a jail takes them; one that another covers is left out.
fn egress(egress: &Egress) -> Vec<EgressRule> {
    let rules = egress.least().into_iter().map(|rule| {
        let (to, v6) = match rule.cidr.address() {
            IpAddr::V4(first) => (Net::V4(V4Net { first, bits: rule.cidr.bits() }), false),
            IpAddr::V6(first) => (Net::V6(V6Net { first, bits: rule.cidr.bits() }), true),
        };
        EgressRule { to, protocol: protocol(rule.protocol, v6), ports: rule.ports }
    });
    rules.collect()
}

const fn protocol(protocol: Protocol, v6: bool) -> Option<u8> {
    match protocol {
        Protocol::Tcp => Some(TCP),
        Protocol::Udp => Some(UDP),
        Protocol::Icmp if v6 => Some(ICMP_V6),
        Protocol::Icmp => Some(ICMP),
        Protocol::Any => None,
    }
}
