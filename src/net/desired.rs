//! What should be there: of a jail, closed or with its member, and of a host. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::address::{AddressError, Fabric, HostNumber};
use super::member::{
    GATEWAY_V4, GATEWAY_V6, HOST_END_MAC, JAIL_END_MAC, JAIL_END_V6, METADATA_V4, METADATA_V6, Member, Net, TAP_MAC,
    link_local,
};
use super::object::{LinkKind, Object, Place, Prefix};
use super::rules::{host_elements, host_tag, jail_elements};

/// The jail's end of its veth.
pub const JAIL_END: &str = "up0";

/// Most network interfaces of a VM: the slots of the machine.
pub const TAPS_MAX: u8 = 8;

/// A tap's name in its jail.
pub fn tap(slot: u8) -> String {
    format!("tap{slot}")
}

/// A jail's name: of its namespace, and of the host's end of its veth.
pub fn jail_name(host: u16, jail: u16) -> String {
    format!("{}-{jail}", host_tag(host))
}

/// A host's vxlan device.
pub fn vxlan_name(host: u16) -> String {
    format!("{}-vx", host_tag(host))
}

/// A jail as it can be made ahead: closed, for whatever VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jail {
    /// [`jail_name`].
    pub name: String,
    /// How many taps it has, from 1.
    pub taps: u8,
    /// Bytes per packet.
    pub mtu: u32,
}

const fn prefix(address: IpAddr, bits: u8) -> Prefix {
    Prefix { first: address, bits }
}

impl Jail {
    /// What a closed jail is.
    pub fn closed(&self) -> BTreeSet<Object> {
        let mut all = BTreeSet::new();
        let link =
            |place, name: &str, kind, mac| Object::Link { place, name: name.to_owned(), kind, mac, mtu: self.mtu };
        for slot in 0..self.taps {
            all.insert(link(Place::Jail, &tap(slot), LinkKind::Tap, TAP_MAC));
        }
        all.insert(link(Place::Host, &self.name, LinkKind::VethHostEnd, HOST_END_MAC));
        all.insert(link(Place::Jail, JAIL_END, LinkKind::VethJailEnd, JAIL_END_MAC));
        let address = |place, link: &str, address, bits| Object::Address {
            place,
            link: link.to_owned(),
            address: prefix(address, bits),
        };
        all.insert(address(Place::Host, &self.name, GATEWAY_V6.into(), 64));
        all.insert(address(Place::Jail, JAIL_END, JAIL_END_V6.into(), 64));
        for (gateway, bits) in [
            (IpAddr::V6(GATEWAY_V6), 64),
            (IpAddr::V6(METADATA_V6), 128),
            (IpAddr::V4(GATEWAY_V4), 32),
            (IpAddr::V4(METADATA_V4), 32),
        ] {
            all.insert(address(Place::Jail, &tap(0), gateway, bits));
        }
        let neighbour =
            |place, link: &str, address, mac| Object::Neighbour { place, link: link.to_owned(), address, mac };
        all.insert(neighbour(Place::Host, &self.name, JAIL_END_V6.into(), JAIL_END_MAC));
        all.insert(neighbour(Place::Jail, JAIL_END, GATEWAY_V6.into(), HOST_END_MAC));
        for everywhere in [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)] {
            let (to, link) = (prefix(everywhere, 0), Some(JAIL_END.to_owned()));
            all.insert(Object::Route { place: Place::Jail, to, via: Some(GATEWAY_V6.into()), link });
        }
        all.insert(Object::Rules { place: Place::Jail });
        all
    }

    /// What a jail is with its VM in it.
    pub fn with(&self, member: &Member) -> BTreeSet<Object> {
        let mut all = self.closed();
        let elements = jail_elements(member).into_iter();
        all.extend(elements.map(|element| Object::Element { place: Place::Jail, element }));
        let tap = tap(0);
        let neighbour = |address| Object::Neighbour { place: Place::Jail, link: tap.clone(), address, mac: member.mac };
        all.insert(neighbour(link_local(member.mac).into()));
        let Some(session) = &member.session else { return all };
        let inner = [Some(IpAddr::V6(session.inner_v6())), session.inner_v4().map(IpAddr::V4)];
        for address in inner.into_iter().flatten() {
            all.insert(neighbour(address));
            let to = Prefix::one(address);
            all.insert(Object::Route { place: Place::Jail, to, via: None, link: Some(tap.clone()) });
        }
        for address in [Some(IpAddr::V6(session.v6)), session.v4.map(IpAddr::V4)].into_iter().flatten() {
            let (to, via, link) = (Prefix::one(address), Some(JAIL_END_V6.into()), Some(self.name.clone()));
            all.insert(Object::Route { place: Place::Host, to, via, link });
        }
        all
    }
}

/// Another host of the fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub number: HostNumber,
    /// Its address on the underlay.
    pub address: IpAddr,
}

/// How hosts reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// The network between hosts carries the VMs' packets as they are: a peer is a next hop.
    Routed,
    /// The VMs' packets are carried in UDP.
    Vxlan {
        /// Network identifier, 24 bits.
        id: u32,
        /// UDP port.
        port: u16,
        /// This host's address on the underlay.
        local: IpAddr,
    },
}

/// A host of a fabric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The fabric.
    pub fabric: Fabric,
    /// Its number.
    pub number: HostNumber,
    /// The other hosts.
    pub peers: Vec<Peer>,
    /// How they are reached.
    pub underlay: Underlay,
    /// Bytes per packet of VMs.
    pub mtu: u32,
}

/// Hardware address of a host's vxlan device.
const fn vxlan_mac(number: u16) -> [u8; 6] {
    let [high, low] = number.to_be_bytes();
    [0x02, 0x68, 0x74, 0x78, high, low]
}

/// Link-local address of a host's vxlan device.
fn vxlan_address(number: HostNumber) -> IpAddr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x7678, number.into()).into()
}

impl Host {
    /// The subnets of all hosts: nobody else may have routes there.
    pub fn all_subnets(&self) -> Result<Vec<Prefix>, AddressError> {
        let hosts = std::iter::once(self.number).chain(self.peers.iter().map(|peer| peer.number));
        let subnets: Vec<_> = hosts.map(|number| self.subnets(number)).collect::<Result<_, _>>()?;
        Ok(subnets.concat())
    }

    /// The subnets of a host: what its peers route to it, and what it answers for.
    fn subnets(&self, number: HostNumber) -> Result<Vec<Prefix>, AddressError> {
        let v6 = Some(Net::V6(self.fabric.v6_subnet(number)));
        let v4 = self.fabric.v4_subnet(number)?.map(Net::V4);
        Ok([v6, v4].into_iter().flatten().map(Prefix::from).collect())
    }

    /// What a host is, beside its jails' routes: its own subnets are unreachable but for VMs that are there, its peers'
    /// lead to them.
    pub fn objects(&self) -> Result<BTreeSet<Object>, AddressError> {
        let mut all = BTreeSet::from([Object::Rules { place: Place::Host }]);
        for to in self.subnets(self.number)? {
            all.insert(Object::Route { place: Place::Host, to, via: None, link: None });
        }
        let own = vxlan_name(self.number.into());
        if let Underlay::Vxlan { id, port, local } = self.underlay {
            let (name, kind) = (own.clone(), LinkKind::Vxlan { id, port, local });
            let mac = vxlan_mac(self.number.into());
            all.insert(Object::Link { place: Place::Host, name, kind, mac, mtu: self.mtu });
            let address = prefix(vxlan_address(self.number), 64);
            all.insert(Object::Address { place: Place::Host, link: own.clone(), address });
        }
        for peer in &self.peers {
            let (via, link) = self.way_to(peer);
            if let Underlay::Vxlan { .. } = self.underlay {
                let (link, mac) = (own.clone(), vxlan_mac(peer.number.into()));
                all.insert(Object::Forwarding { link: link.clone(), mac, to: peer.address });
                all.insert(Object::Neighbour { place: Place::Host, link, address: via, mac });
            }
            for to in self.subnets(peer.number)? {
                // IPv6 has no IPv4 next hops.
                if to.first.is_ipv6() && via.is_ipv4() {
                    continue;
                }
                all.insert(Object::Route { place: Place::Host, to, via: Some(via), link: Some(link.clone()) });
            }
        }
        Ok(all)
    }

    /// What a host has for a VM of its own subnets that is on another host now: routes to there. Packets of all hosts come
    /// here first, as the subnet is this host's. `None` if that host is no peer.
    pub fn elsewhere(&self, addresses: &[IpAddr], at: HostNumber) -> Option<BTreeSet<Object>> {
        let peer = self.peers.iter().find(|peer| peer.number == at)?;
        let (via, link) = self.way_to(peer);
        // IPv6 has no IPv4 next hops.
        let reached = addresses.iter().filter(|address| !(address.is_ipv6() && via.is_ipv4()));
        let route = |address: &IpAddr| Object::Route {
            place: Place::Host,
            to: Prefix::one(*address),
            via: Some(via),
            link: Some(link.clone()),
        };
        Some(reached.map(route).collect())
    }

    /// Next hop and link to a peer.
    fn way_to(&self, peer: &Peer) -> (IpAddr, String) {
        match self.underlay {
            // The kernel finds the link by the address.
            Underlay::Routed => (peer.address, String::new()),
            Underlay::Vxlan { .. } => (vxlan_address(peer.number), vxlan_name(self.number.into())),
        }
    }

    /// What a host has for a member: elements of its own rules.
    pub fn for_member(member: &Member) -> BTreeSet<Object> {
        let elements = host_elements(member).into_iter();
        elements.map(|element| Object::Element { place: Place::Host, element }).collect()
    }
}
