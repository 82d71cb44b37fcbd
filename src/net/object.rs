//! What makes up a network: links, addresses, neighbours, routes and rules, as values that can be compared. A host's
//! and a jail's wanted and present states are sets of these; the order of the variants is the order of building.

use std::net::IpAddr;

use super::member::Net;
use super::rules::Element;

/// A namespace an object is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The jail's.
    Jail,
    /// The host's own.
    Host,
}

/// A destination, as routes have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// The first address.
    pub first: IpAddr,
    /// How many bits all share.
    pub bits: u8,
}

impl Prefix {
    /// One address.
    pub const fn one(address: IpAddr) -> Self {
        let bits = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        Self { first: address, bits }
    }
}

impl Prefix {
    /// Whether an address is in both.
    pub fn meets(&self, other: &Self) -> bool {
        let shared = u32::from(self.bits.min(other.bits));
        match (self.first, other.first) {
            (IpAddr::V4(one), IpAddr::V4(other)) => {
                (one.to_bits() ^ other.to_bits()).checked_shr(32 - shared).unwrap_or(0) == 0
            }
            (IpAddr::V6(one), IpAddr::V6(other)) => {
                (one.to_bits() ^ other.to_bits()).checked_shr(128 - shared).unwrap_or(0) == 0
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl From<Net> for Prefix {
    fn from(net: Net) -> Self {
        match net {
            Net::V6(net) => Self { first: net.first.into(), bits: net.bits },
            Net::V4(net) => Self { first: net.first.into(), bits: net.bits },
        }
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.first, self.bits)
    }
}

/// Something that is in a network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A link, with its settings; always up.
    Link {
        /// Where.
        place: Place,
        /// Its name.
        name: String,
        /// How it is made.
        kind: LinkKind,
        /// Hardware address.
        mac: [u8; 6],
        /// Bytes per packet above the link layer.
        mtu: u32,
    },
    /// An address of a link.
    Address {
        /// Where.
        place: Place,
        /// The link.
        link: String,
        /// The address, with the length of its prefix.
        address: Prefix,
    },
    /// A permanent neighbour.
    Neighbour {
        /// Where.
        place: Place,
        /// The link.
        link: String,
        /// Its address.
        address: IpAddr,
        /// Its hardware address.
        mac: [u8; 6],
    },
    /// Where a vxlan device sends frames for a hardware address.
    Forwarding {
        /// The device, in the host's namespace.
        link: String,
        /// The hardware address.
        mac: [u8; 6],
        /// The underlay's address.
        to: IpAddr,
    },
    /// A route of ours.
    Route {
        /// Where.
        place: Place,
        /// What it is for.
        to: Prefix,
        /// The next hop; IPv4 goes by IPv6 next hops as well.
        via: Option<IpAddr>,
        /// The link; `None`: unreachable.
        link: Option<String>,
    },
    /// The rules are as they were loaded: nobody changed them since.
    Rules {
        /// Where.
        place: Place,
    },
    /// An element of a set of the rules.
    Element {
        /// Where.
        place: Place,
        /// The element.
        element: Element,
    },
}

/// How a link is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkKind {
    /// A persistent tap.
    Tap,
    /// The host's end of a jail's veth: its peer is `up0` in the jail.
    VethHostEnd,
    /// The jail's end.
    VethJailEnd,
    /// Frames in UDP between hosts (RFC 7348).
    Vxlan {
        /// Network identifier.
        id: u32,
        /// UDP port.
        port: u16,
        /// This host's address on the underlay.
        local: IpAddr,
    },
}

impl LinkKind {
    /// Whether it is an end of a veth.
    pub const fn is_veth(self) -> bool {
        matches!(self, Self::VethHostEnd | Self::VethJailEnd)
    }
}

impl Object {
    /// The link it is, is on, or leads by; empty where the kernel chooses one.
    pub fn link(&self) -> Option<&str> {
        match self {
            Self::Link { name, .. } => Some(name),
            Self::Address { link, .. }
            | Self::Neighbour { link, .. }
            | Self::Forwarding { link, .. }
            | Self::Route { link: Some(link), .. } => Some(link),
            Self::Route { link: None, .. } | Self::Rules { .. } | Self::Element { .. } => None,
        }
    }

    /// Where it is.
    pub const fn place(&self) -> Place {
        match self {
            Self::Link { place, .. }
            | Self::Address { place, .. }
            | Self::Neighbour { place, .. }
            | Self::Route { place, .. }
            | Self::Rules { place }
            | Self::Element { place, .. } => *place,
            Self::Forwarding { .. } => Place::Host,
        }
    }
}

impl std::fmt::Display for Object {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Link { name, .. } => write!(out, "link {name}"),
            Self::Address { link, address, .. } => write!(out, "address {address} on {link}"),
            Self::Neighbour { link, address, .. } => write!(out, "neighbour {address} on {link}"),
            Self::Forwarding { link, to, .. } => write!(out, "forwarding on {link} to {to}"),
            Self::Route { to, link: Some(link), .. } => write!(out, "route to {to} by {link}"),
            Self::Route { to, link: None, .. } => write!(out, "unreachable {to}"),
            Self::Rules { place: Place::Jail } => out.write_str("rules of the jail"),
            Self::Rules { place: Place::Host } => out.write_str("rules of the host"),
            Self::Element { element, .. } => write!(out, "element of set {}", element.set),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Prefix;

    #[test]
    fn networks_meet_when_one_holds_the_other() {
        let prefix = |text: &str| {
            let (first, bits) = text.split_once('/').unwrap();
            Prefix { first: first.parse().unwrap(), bits: bits.parse().unwrap() }
        };
        for (one, other, meet) in [
            ("10.3.0.0/16", "10.0.0.0/8", true),
            ("10.0.0.0/8", "10.3.7.0/24", true),
            ("10.3.0.0/16", "10.4.0.0/16", false),
            ("10.3.0.0/16", "0.0.0.0/0", true),
            ("10.3.0.1/32", "10.3.0.1/32", true),
            ("fd00:1::/64", "fd00:1::/48", true),
            ("fd00:1::/64", "fd00:1:0:1::/64", false),
            ("::/0", "10.0.0.0/8", false),
        ] {
            assert_eq!(prefix(one).meets(&prefix(other)), meet, "{one} {other}");
        }
    }
}
