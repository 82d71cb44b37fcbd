//! Links: network interfaces, real and made.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::ip;
use super::connection::{attributes, i32_at, string, u32_at};

/// An Ethernet hardware address.
pub type MacAddress = [u8; 6];

/// A link that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name there.
    pub name: String,
    /// Its hardware address; `None` for links that have none, or not one of six bytes.
    pub mac: Option<MacAddress>,
    /// Bytes per packet above the link layer.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
    /// The driver's name for made links: `veth`, `vxlan`, `tun` (also taps); `None` for loopback and hardware.
    pub kind: Option<String>,
    /// Whether the kernel gives it no IPv6 link-local address by itself; `None` if IPv6 is off.
    pub no_own_address: Option<bool>,
    /// Index of the link it belongs to, in the namespace [`Self::peer_namespace`]: the peer of a veth.
    pub peer: Option<u32>,
    /// The namespace its peer is in, by the number this one knows it by; `None`: this one.
    pub peer_namespace: Option<i32>,
    /// Of a vxlan device: how it was made.
    pub vxlan: Option<VxlanFacts>,
}

/// How a vxlan device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanFacts {
    /// Network identifier.
    pub id: u32,
    /// Address of the underlay that it sends from.
    pub local: Option<IpAddr>,
    /// UDP port that it sends to and listens on.
    pub port: u16,
    /// Whether it learns where hardware addresses are from what comes in.
    pub learning: bool,
}

/// A link, by what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkRef<'a> {
    /// Its index.
    Index(u32),
    /// Its name.
    Name(&'a str),
}

impl std::fmt::Display for LinkRef<'_> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Index(index) => write!(out, "number {index}"),
            Self::Name(name) => write!(out, "{name}"),
        }
    }
}

/// What to change of a link; `None` and `false` leave it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// Hardware address.
    pub mac: Option<MacAddress>,
    /// Bytes per packet above the link layer.
    pub mtu: Option<u32>,
    /// Switched on or off.
    pub up: Option<bool>,
    /// Give it no IPv6 link-local address by itself. Done before it is switched on.
    pub no_own_address: bool,
}

/// A veth pair to make. Both ends are off, since the kernel switches on none before both are there;
/// [`Batch::set_link`](super::Batch::set_link) in the same batch may switch on this one.
#[derive(Debug, Clone, Copy)]
pub struct NewVeth<'a> {
    /// Name of this end.
    pub name: &'a str,
    /// Index it is to have; `None`: whatever is free.
    pub index: Option<u32>,
    /// Hardware address.
    pub mac: MacAddress,
    /// Bytes per packet, of both ends.
    pub mtu: u32,
    /// The other end.
    pub peer: VethPeer<'a>,
}

/// The other end of a veth pair to make.
#[derive(Debug, Clone, Copy)]
pub struct VethPeer<'a> {
    /// Its name.
    pub name: &'a str,
    /// Index it is to have; `None`: whatever is free.
    pub index: Option<u32>,
    /// Its hardware address.
    pub mac: MacAddress,
    /// The namespace it is made in; `None`: this one.
    pub namespace: Option<BorrowedFd<'a>>,
}

/// A vxlan device to make (RFC 7348): off, without learning, checksums of the outer UDP on.
#[derive(Debug, Clone, Copy)]
pub struct NewVxlan<'a> {
    /// Its name.
    pub name: &'a str,
    /// Index it is to have; `None`: whatever is free.
    pub index: Option<u32>,
    /// Hardware address.
    pub mac: MacAddress,
    /// Bytes per packet inside.
    pub mtu: u32,
    /// Network identifier, 24 bits.
    pub id: u32,
    /// Address of the underlay that it sends from.
    pub local: IpAddr,
    /// UDP port that it sends to and listens on.
    pub port: u16,
}

fn message(link: LinkRef<'_>) -> LinkMessage {
    let mut message = LinkMessage::default();
    match link {
        LinkRef::Index(index) => message.header.index = index,
        LinkRef::Name(name) => message.attributes.push(LinkAttribute::IfName(name.to_owned())),
    }
    message
}

fn named(name: &str, index: Option<u32>, mac: MacAddress, mtu: u32) -> LinkMessage {
    let mut message = message(LinkRef::Name(name));
    message.header.index = index.unwrap_or(0);
    message.attributes.extend([LinkAttribute::Address(mac.to_vec()), LinkAttribute::Mtu(mtu)]);
    message
}

fn switch(message: &mut LinkMessage, up: bool) {
    message.header.change_mask = LinkFlags::Up;
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
}

pub(super) fn new_veth(new: &NewVeth<'_>) -> LinkMessage {
    let mut peer = named(new.peer.name, new.peer.index, new.peer.mac, new.mtu);
    peer.attributes.extend(new.peer.namespace.map(|namespace| LinkAttribute::NetNsFd(namespace.as_raw_fd())));
    let data = LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)));
    let mut message = named(new.name, new.index, new.mac, new.mtu);
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), data]));
    message
}

pub(super) fn new_vxlan(new: &NewVxlan<'_>) -> LinkMessage {
    let local = match new.local {
        IpAddr::V4(local) => InfoVxlan::Local(local),
        IpAddr::V6(local) => InfoVxlan::Local6(local),
    };
    let options = vec![InfoVxlan::Id(new.id), local, InfoVxlan::Port(new.port), InfoVxlan::Learning(false)];
    let data = LinkInfo::Data(InfoData::Vxlan(options));
    let mut message = named(new.name, new.index, new.mac, new.mtu);
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), data]));
    message
}

/// The requests for a change: the kernel switches on before it looks at address generation, so that goes first alone.
pub(super) fn change(link: LinkRef<'_>, change: LinkChange) -> Vec<LinkMessage> {
    let mut messages = Vec::new();
    if change.no_own_address {
        let mut first = message(link);
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        first.attributes.push(LinkAttribute::AfSpecUnspec(vec![mode]));
        messages.push(first);
    }
    if change.mac.is_some() || change.mtu.is_some() || change.up.is_some() {
        let mut rest = message(link);
        rest.attributes.extend(change.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        rest.attributes.extend(change.mtu.map(LinkAttribute::Mtu));
        if let Some(up) = change.up {
            switch(&mut rest, up);
        }
        messages.push(rest);
    }
    messages
}

pub(super) fn delete(link: LinkRef<'_>) -> LinkMessage {
    message(link)
}

pub(super) fn all() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

pub(super) fn by_name(name: &str) -> RouteNetlinkMessage {
    let mut message = message(LinkRef::Name(name));
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

pub(super) fn with_statistics(name: &str) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(message(LinkRef::Name(name)))
}

/// Packets the link was given to send and dropped (linux/if_link.h: `tx_dropped`, the eighth number of
/// `struct rtnl_link_stats64`).
pub(super) fn read_unsent(body: &[u8]) -> Option<u64> {
    let (_, numbers) = attributes(body.get(HEADER_BYTES..)?).find(|(kind, _)| *kind == attribute::STATS64)?;
    let number = numbers.get(7 * 8..8 * 8)?;
    Some(u64::from_ne_bytes(number.try_into().ok()?))
}

/// Bytes of `struct ifinfomsg`.
const HEADER_BYTES: usize = 16;

/// linux/if_link.h.
mod attribute {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const IFNAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const LINK: u16 = 5;
    pub(super) const LINKINFO: u16 = 18;
    pub(super) const STATS64: u16 = 23;
    pub(super) const AF_SPEC: u16 = 26;
    pub(super) const LINK_NETNSID: u16 = 37;
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const INFO_DATA: u16 = 2;
    pub(super) const INET6_ADDR_GEN_MODE: u16 = 8;
    pub(super) const VXLAN_ID: u16 = 1;
    pub(super) const VXLAN_LOCAL: u16 = 4;
    pub(super) const VXLAN_LEARNING: u16 = 7;
    pub(super) const VXLAN_PORT: u16 = 15;
    pub(super) const VXLAN_LOCAL6: u16 = 17;
}

pub(super) fn read(body: &[u8]) -> Option<Link> {
    let flags = u32_at(body, 8)?;
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags & LinkFlags::Up.bits() != 0,
        kind: None,
        no_own_address: None,
        peer: None,
        peer_namespace: None,
        vxlan: None,
    };
    for (kind, value) in attributes(body.get(HEADER_BYTES..)?) {
        match kind {
            attribute::ADDRESS => link.mac = value.try_into().ok(),
            attribute::IFNAME => link.name = string(value),
            attribute::MTU => link.mtu = u32_at(value, 0)?,
            attribute::LINK => link.peer = u32_at(value, 0).filter(|index| *index != 0),
            attribute::LINK_NETNSID => link.peer_namespace = i32_at(value, 0),
            attribute::LINKINFO => read_info(value, &mut link),
            attribute::AF_SPEC => link.no_own_address = no_own_address(value),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn read_info(info: &[u8], link: &mut Link) {
    let find = |wanted| attributes(info).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    link.kind = find(attribute::INFO_KIND).map(string);
    if link.kind.as_deref() != Some("vxlan") {
        return;
    }
    let mut vxlan = VxlanFacts { id: 0, local: None, port: 0, learning: false };
    for (kind, value) in attributes(find(attribute::INFO_DATA).unwrap_or_default()) {
        match kind {
            attribute::VXLAN_ID => vxlan.id = u32_at(value, 0).unwrap_or(0),
            attribute::VXLAN_LOCAL | attribute::VXLAN_LOCAL6 => vxlan.local = ip(value),
            attribute::VXLAN_LEARNING => vxlan.learning = value.first() == Some(&1),
            attribute::VXLAN_PORT => vxlan.port = value.try_into().map_or(0, u16::from_be_bytes),
            _ => {}
        }
    }
    link.vxlan = Some(vxlan);
}

fn no_own_address(families: &[u8]) -> Option<bool> {
    let inet6 = u16::from(u8::from(AddressFamily::Inet6));
    let (_, of_inet6) = attributes(families).find(|(family, _)| *family == inet6)?;
    let (_, mode) = attributes(of_inet6).find(|(kind, _)| *kind == attribute::INET6_ADDR_GEN_MODE)?;
    Some(mode.first() == Some(&u8::from(&In6AddrGenMode::None)))
}
