//! Routes of the main table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::{family, ip};
use super::connection::{attributes, u16_at, u32_at};

/// Bytes of `struct rtmsg`.
const HEADER_BYTES: usize = 12;

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// First address it is for. The unspecified address with a length of 0 is the default route.
    pub destination: IpAddr,
    /// How many bits of it have to match.
    pub prefix_len: u8,
    /// What becomes of packets.
    pub kind: RouteKind,
    /// Next hop; IPv4 routes may have an IPv6 one. `None`: the destination is on the link.
    pub via: Option<IpAddr>,
    /// Index of the link they leave by. For a new route, `None` has the kernel find it by the next hop.
    pub link: Option<u32>,
    /// The next hop is on the link even if no address of it says so.
    pub onlink: bool,
    /// Who made it (`RTPROT_...`, linux/rtnetlink.h).
    pub protocol: u8,
    /// Of routes to the same destination the lowest is taken. A new IPv6 route with 0 gets 1024.
    pub metric: u32,
}

/// What becomes of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// They are sent on.
    Unicast,
    /// They are dropped, and the sender is told.
    Unreachable,
    /// Another (`RTN_...`, linux/rtnetlink.h).
    Other(u8),
}

impl RouteKind {
    fn number(self) -> u8 {
        match self {
            Self::Unicast => RouteType::Unicast.into(),
            Self::Unreachable => RouteType::Unreachable.into(),
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u8) -> Self {
        let known = [Self::Unicast, Self::Unreachable];
        known.into_iter().find(|kind| kind.number() == number).unwrap_or(Self::Other(number))
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            RouteKind::Unicast => {}
            RouteKind::Unreachable => write!(out, "unreachable ")?,
            RouteKind::Other(number) => write!(out, "type {number} ")?,
        }
        write!(out, "{}/{}", self.destination, self.prefix_len)?;
        self.via.map_or(Ok(()), |via| write!(out, " via {via}"))?;
        self.link.map_or(Ok(()), |link| write!(out, " on link {link}"))
    }
}

fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    // An IPv4 address is on the link, or behind a router.
    let scope = match (route.kind, route.via, route.destination) {
        (RouteKind::Unicast, None, IpAddr::V4(_)) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    message.header = RouteHeader {
        address_family: family(route.destination),
        destination_prefix_length: route.prefix_len,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::from(route.protocol),
        scope,
        kind: route.kind.number().into(),
        flags: if route.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
        ..RouteHeader::default()
    };
    if route.prefix_len > 0 {
        message.attributes.push(RouteAttribute::Destination(route.destination.into()));
    }
    message.attributes.extend(route.via.map(|via| match (route.destination, via) {
        (IpAddr::V4(_), IpAddr::V6(via)) => RouteAttribute::Via(RouteVia::Inet6(via)),
        (IpAddr::V4(_) | IpAddr::V6(_), via) => RouteAttribute::Gateway(RouteAddress::from(via)),
    }));
    message.attributes.extend(route.link.map(RouteAttribute::Oif));
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

pub(super) fn put(route: &Route) -> RouteMessage {
    message(route)
}

/// The message that finds the route to delete it.
pub(super) fn delete(route: &Route) -> RouteMessage {
    let mut message = message(route);
    // Whichever scope the kernel gave it.
    message.header.scope = RouteScope::NoWhere;
    message.header.flags = RouteFlags::empty();
    message
}

pub(super) fn all(family: AddressFamily, protocol: Option<u8>) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.protocol = protocol.map_or(RouteProtocol::Unspec, RouteProtocol::from);
    RouteNetlinkMessage::GetRoute(message)
}

/// `None` for other tables than the main one.
pub(super) fn read(body: &[u8]) -> Option<Route> {
    let v6 = *body.first()? == u8::from(AddressFamily::Inet6);
    let anywhere = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let mut table = u32::from(*body.get(4)?);
    let flags = u32_at(body, 8)?;
    let mut route = Route {
        destination: anywhere,
        prefix_len: *body.get(1)?,
        kind: RouteKind::from_number(*body.get(7)?),
        via: None,
        link: None,
        onlink: flags & RouteFlags::Onlink.bits() != 0,
        protocol: *body.get(5)?,
        metric: 0,
    };
    for (kind, value) in attributes(body.get(HEADER_BYTES..)?) {
        match kind {
            libc::RTA_DST => route.destination = ip(value)?,
            libc::RTA_GATEWAY => route.via = ip(value),
            libc::RTA_VIA => route.via = via(value),
            libc::RTA_OIF => route.link = u32_at(value, 0),
            libc::RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            libc::RTA_TABLE => table = u32_at(value, 0)?,
            _ => {}
        }
    }
    if route.kind == RouteKind::Unreachable {
        // IPv6 says that they leave by the loopback.
        route.link = None;
    }
    (table == u32::from(RouteHeader::RT_TABLE_MAIN)).then_some(route)
}

/// `struct rtvia`: a family and an address of it.
fn via(value: &[u8]) -> Option<IpAddr> {
    let family = u16_at(value, 0)?;
    let known = [AddressFamily::Inet, AddressFamily::Inet6].map(|family| u16::from(u8::from(family)));
    known.contains(&family).then(|| ip(&value[2..])).flatten()
}
