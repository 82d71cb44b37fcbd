//! Neighbours: which hardware address an address has on a link; and where a vxlan device sends frames for a hardware
//! address.

use std::net::IpAddr;

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteType;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::{family, ip};
use super::connection::{attributes, u16_at, u32_at};
use super::link::MacAddress;

/// Bytes of `struct ndmsg`.
const HEADER_BYTES: usize = 12;

/// A neighbour on a link. Those that are made are permanent: never asked for, never forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Neighbour {
    /// Index of the link.
    pub link: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address; `None` while the kernel is asking for it.
    pub mac: Option<MacAddress>,
    /// Whether it was made, not learnt.
    pub permanent: bool,
}

/// Where a vxlan device sends frames for a hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Forwarding {
    /// Index of the device.
    pub link: u32,
    /// The hardware address.
    pub mac: MacAddress,
    /// Address on the underlay.
    pub to: IpAddr,
    /// Whether it was made, not learnt.
    pub permanent: bool,
}

fn header(family: AddressFamily, link: u32) -> NeighbourHeader {
    NeighbourHeader {
        family,
        ifindex: link,
        state: NeighbourState::Permanent,
        flags: NeighbourFlags::empty(),
        kind: RouteType::Unspec,
    }
}

/// The message that names a neighbour; for deleting, the hardware address is not looked at.
pub(super) fn message(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = header(family(neighbour.address), neighbour.link);
    message.attributes.push(NeighbourAttribute::Destination(neighbour.address.into()));
    message.attributes.extend(neighbour.mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
    message
}

pub(super) fn forwarding_message(forwarding: &Forwarding) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = header(AddressFamily::Bridge, forwarding.link);
    // The device's own table, not that of a bridge it is in.
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(forwarding.mac.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(forwarding.to)));
    message
}

pub(super) fn all(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    RouteNetlinkMessage::GetNeighbour(message)
}

struct Entry {
    link: u32,
    permanent: bool,
    address: Option<IpAddr>,
    mac: Option<MacAddress>,
}

fn read_entry(body: &[u8]) -> Option<Entry> {
    let state = u16_at(body, 8)?;
    let permanent = state & u16::from(NeighbourState::Permanent) != 0;
    let mut entry = Entry { link: u32_at(body, 4)?, permanent, address: None, mac: None };
    for (kind, value) in attributes(body.get(HEADER_BYTES..)?) {
        match kind {
            libc::NDA_DST => entry.address = ip(value),
            libc::NDA_LLADDR => entry.mac = value.try_into().ok(),
            _ => {}
        }
    }
    Some(entry)
}

/// `None` also for what the kernel keeps for itself: multicast addresses and loopback, which need no asking (NOARP).
pub(super) fn read(body: &[u8]) -> Option<Neighbour> {
    let Entry { link, permanent, address, mac } = read_entry(body)?;
    let own = u16_at(body, 8)? & u16::from(NeighbourState::Noarp) != 0;
    (!own).then_some(Neighbour { link, address: address?, mac, permanent })
}

/// `None` also for entries that lead nowhere: those of bridges and of the device itself.
pub(super) fn read_forwarding(body: &[u8]) -> Option<Forwarding> {
    let Entry { link, permanent, address, mac } = read_entry(body)?;
    Some(Forwarding { link, mac: mac?, to: address?, permanent })
}
