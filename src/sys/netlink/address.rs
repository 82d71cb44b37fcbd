//! Addresses of links.

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeader, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::connection::{attributes, u32_at};

/// Bytes of `struct ifaddrmsg`.
const HEADER_BYTES: usize = 8;

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Index of the link.
    pub link: u32,
    /// The address.
    pub address: IpAddr,
    /// How many of its bits are shared on the link.
    pub prefix_len: u8,
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

/// An IPv4 or IPv6 address of exactly this length.
pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(v6)
}

/// The message that names `address`: for adding, no duplicate is looked for (the address is usable at once).
pub(super) fn message(address: &Address) -> AddressMessage {
    let scope = match address.address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => AddressScope::Link,
        IpAddr::V4(v4) if v4.is_link_local() => AddressScope::Link,
        IpAddr::V4(_) | IpAddr::V6(_) => AddressScope::Universe,
    };
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family: family(address.address),
        prefix_len: address.prefix_len,
        scope,
        index: address.link,
        ..AddressHeader::default()
    };
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.address),
        AddressAttribute::Flags(AddressFlags::Nodad),
    ];
    message
}

pub(super) fn all() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

pub(super) fn read(body: &[u8]) -> Option<Address> {
    let (prefix_len, link) = (*body.get(1)?, u32_at(body, 4)?);
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(body.get(HEADER_BYTES..)?) {
        match kind {
            libc::IFA_ADDRESS => address = ip(value),
            libc::IFA_LOCAL => local = ip(value),
            _ => {}
        }
    }
    // IPv4 has the other end's address in IFA_ADDRESS on point-to-point links.
    Some(Address { link, address: local.or(address)?, prefix_len })
}
