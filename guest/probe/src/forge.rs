//! What a guest with root might send to reach, or to be taken for, somebody it must not: frames by kind, each carrying
//! a marker so that whoever sees one knows where it came from.
//!
//! Pure. A test sends them by a packet socket inside a guest (`probe forge`) or writes them into the guest's tap.

mod headers;
mod links;
mod packets;

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::frames::{Mac, mobility_header, options_header, protocol};
use packets::Maker;

/// A guest by its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Party {
    /// Its IPv4 address, if it has one.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// Who is who.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    /// Hardware address of the sender's interface.
    pub mac: Mac,
    /// Hardware address of its gateway.
    pub gateway_mac: Mac,
    /// The sender.
    pub own: Party,
    /// Whom it pretends to be: one the victim listens to.
    pub other: Party,
    /// Whom it must not reach.
    pub victim: Party,
    /// What every frame carries: some letters and digits, at most 32.
    pub marker: String,
}

/// A kind of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// None forged: own address to the victim. Passes only where the two may talk.
    Honest,
    /// Somebody else's source address: UDP, TCP and ICMP.
    Source,
    /// A source address that nobody has: unspecified, loopback, the gateway's, link-local, multicast.
    OddSource,
    /// A source hardware address that is not the interface's.
    Mac,
    /// ARP that gives other's addresses to the sender.
    Arp,
    /// Neighbour and router advertisements, solicitations and redirects that do the same in IPv6.
    Neighbour,
    /// First fragments with a forged source.
    FragmentFirst,
    /// Later fragments with a forged source, which have no ports to look at.
    FragmentRest,
    /// Fragments that overlap each other, first with the own and then with a forged source.
    FragmentOverlap,
    /// IPv6 hop-by-hop options, router alert among them.
    HopByHop,
    /// IPv6 routing header type 0: by way of the gateway to the victim.
    Routing0,
    /// IPv6 routing header type 2 (mobile IPv6).
    Routing2,
    /// IPv6 routing header type 4 (segment routing).
    Routing4,
    /// IPv6 destination options, a home address (which is a source address) among them.
    DestinationOptions,
    /// An IPv6 mobility header.
    Mobility,
    /// IPv4 loose and strict source routes by way of the gateway to the victim.
    SourceRoute,
    /// IPv4 record route and time stamp options.
    RecordRoute,
    /// IPv4-mapped IPv6 addresses.
    Mapped,
    /// IPv6 and IPv4 within IPv4 and IPv6.
    Tunnel,
    /// IPv6, IPv4 and Ethernet within GRE.
    Gre,
    /// Frames with one or two VLAN tags.
    Vlan,
    /// Multicast and broadcast, of the link and of IP.
    Multicast,
    /// Ethernet kinds that nobody speaks, and 802.3 lengths instead of one.
    Ethertype,
    /// Frames that end before, or are longer than, their headers say.
    Runt,
}

impl Kind {
    /// Every kind but [`Kind::Honest`].
    pub const FORGED: [Self; 23] = [
        Self::Source,
        Self::OddSource,
        Self::Mac,
        Self::Arp,
        Self::Neighbour,
        Self::FragmentFirst,
        Self::FragmentRest,
        Self::FragmentOverlap,
        Self::HopByHop,
        Self::Routing0,
        Self::Routing2,
        Self::Routing4,
        Self::DestinationOptions,
        Self::Mobility,
        Self::SourceRoute,
        Self::RecordRoute,
        Self::Mapped,
        Self::Tunnel,
        Self::Gre,
        Self::Vlan,
        Self::Multicast,
        Self::Ethertype,
        Self::Runt,
    ];

    /// The kind's name: what frames carry after their marker.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Honest => "honest",
            Self::Source => "source",
            Self::OddSource => "odd-source",
            Self::Mac => "mac",
            Self::Arp => "arp",
            Self::Neighbour => "neighbour",
            Self::FragmentFirst => "fragment-first",
            Self::FragmentRest => "fragment-rest",
            Self::FragmentOverlap => "fragment-overlap",
            Self::HopByHop => "hop-by-hop",
            Self::Routing0 => "routing-0",
            Self::Routing2 => "routing-2",
            Self::Routing4 => "routing-4",
            Self::DestinationOptions => "destination-options",
            Self::Mobility => "mobility",
            Self::SourceRoute => "source-route",
            Self::RecordRoute => "record-route",
            Self::Mapped => "mapped",
            Self::Tunnel => "tunnel",
            Self::Gre => "gre",
            Self::Vlan => "vlan",
            Self::Multicast => "multicast",
            Self::Ethertype => "ethertype",
            Self::Runt => "runt",
        }
    }

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Honest].into_iter().chain(Self::FORGED).find(|kind| kind.name() == name)
    }
}

/// The frames of one kind. Without IPv4 addresses those of IPv4 are left out.
pub fn frames(kind: Kind, scene: &Scene) -> Vec<Vec<u8>> {
    let Scene { own, other, victim, .. } = scene;
    let maker = Maker { kind, scene };
    match kind {
        Kind::Honest => maker.talks(*own, *victim),
        Kind::Source => {
            [maker.talks(*other, *victim), maker.talks(*victim, *own), maker.talks(*victim, *victim)].concat()
        }
        Kind::OddSource => maker.odd_sources(),
        Kind::Mac => maker.macs(),
        Kind::Arp => maker.arps(),
        Kind::Neighbour => maker.neighbours(),
        Kind::FragmentFirst => maker.fragments(|number| number == 0),
        Kind::FragmentRest => maker.fragments(|number| number > 0),
        Kind::FragmentOverlap => maker.overlaps(),
        Kind::HopByHop => maker.extended(protocol::HOP_BY_HOP, |next, payload| {
            const ROUTER_ALERT: [u8; 4] = [5, 2, 0, 0];
            vec![options_header(next, &[], payload), options_header(next, &ROUTER_ALERT, payload)]
        }),
        Kind::Routing0 => maker.routings(0),
        Kind::Routing2 => maker.routings(2),
        Kind::Routing4 => maker.routings(4),
        Kind::DestinationOptions => maker.extended(protocol::DESTINATION, |next, payload| {
            let home_address = [&[0xc9, 16], &other.v6.octets()[..]].concat();
            vec![options_header(next, &[], payload), options_header(next, &home_address, payload)]
        }),
        Kind::Mobility => maker.extended(protocol::MOBILITY, |next, payload| vec![mobility_header(next, payload)]),
        Kind::SourceRoute => maker.source_routes(),
        Kind::RecordRoute => maker.record_routes(),
        Kind::Mapped => maker.mapped(),
        Kind::Tunnel => maker.tunnels(),
        Kind::Gre => maker.gres(),
        Kind::Vlan => maker.vlans(),
        Kind::Multicast => maker.multicasts(),
        Kind::Ethertype => maker.ethertypes(),
        Kind::Runt => maker.runts(),
    }
}

/// The IPv6 address of every gateway.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The IPv4 address of every gateway.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// All systems on a link.
const ALL_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A hardware address of nobody.
const STRANGE_MAC: Mac = [0x02, 0xba, 0xd0, 0xba, 0xd0, 0x01];

#[cfg(test)]
mod tests;
