//! What a jail is told of its VM: plain addresses and permissions. Whoever makes one knows what sessions are; from here
//! on they are values to match.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::address::{V4Net, V6Net};

/// The address every guest has inside, when its jail translates ([`Addressing::Invariant`]).
pub const INNER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 2);

/// The address every guest has inside, when its jail translates: a unique local address (RFC 4193) of our own, never
/// seen outside of a jail.
pub const INNER_V6: Ipv6Addr = Ipv6Addr::new(0xfd68, 0x7468, 0, 0, 0, 0, 0, 2);

/// A guest's way out (RFC 4291 link-local), answered by its jail.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A guest's way out (RFC 3927 link-local), answered by its jail.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Where guests ask about themselves.
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe);

/// Where guests ask about themselves.
pub const METADATA_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// TCP port of the metadata service.
pub const METADATA_PORT: u16 = 80;

/// Hardware address of a jail on its taps. The same in every jail, so that what a guest remembers of its gateway is
/// still right on another host and after a restore.
pub const TAP_MAC: [u8; 6] = [0x02, 0x68, 0x74, 0x68, 0x00, 0x01];

/// Hardware address of the host's end of a jail's veth.
pub const HOST_END_MAC: [u8; 6] = [0x02, 0x68, 0x74, 0x68, 0x00, 0x02];

/// Hardware address of the jail's end of its veth.
pub const JAIL_END_MAC: [u8; 6] = [0x02, 0x68, 0x74, 0x68, 0x00, 0x03];

/// Link-local address of the jail's end of its veth; the host's end is [`GATEWAY_V6`].
pub const JAIL_END_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Which addresses a guest configures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// Its own: the guest's agent sets them.
    Guest,
    /// The same in every guest; the jail translates one to one, without state.
    Invariant,
}

/// A VM as its jail and host see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Hardware address of its first interface.
    pub mac: [u8; 6],
    /// What it has in its session; `None`: it may ask for metadata, and nothing else.
    pub session: Option<SessionAddresses>,
}

/// A VM's addresses, and what to match to know its session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionAddresses {
    /// Its address.
    pub v6: Ipv6Addr,
    /// Its other address, if the session has IPv4.
    pub v4: Option<Ipv4Addr>,
    /// What is left of every member's address under the session's mask.
    pub match_v6: Ipv6Addr,
    /// What is left of every member's IPv4 address under the session's mask.
    pub match_v4: Option<Ipv4Addr>,
    /// Which addresses the guest has inside.
    pub addressing: Addressing,
    /// Where it may go outside of the fabric.
    pub egress: Vec<EgressRule>,
    /// Whether the host puts its own address on what goes there.
    pub nat: bool,
    /// Ports of the host that lead to it.
    pub published: Vec<PublishedPort>,
}

impl SessionAddresses {
    /// The address the guest has inside.
    pub const fn inner_v6(&self) -> Ipv6Addr {
        match self.addressing {
            Addressing::Guest => self.v6,
            Addressing::Invariant => INNER_V6,
        }
    }

    /// The IPv4 address the guest has inside, if it has one.
    pub fn inner_v4(&self) -> Option<Ipv4Addr> {
        self.v4.map(|v4| match self.addressing {
            Addressing::Guest => v4,
            Addressing::Invariant => INNER_V4,
        })
    }
}

/// Somewhere outside a VM may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EgressRule {
    /// Where.
    pub to: Net,
    /// By which protocol (IANA number); `None`: any.
    pub protocol: Option<u8>,
    /// To which ports, first and last; `None`: any, also of protocols without ports.
    pub ports: Option<(u16, u16)>,
}

/// A network of either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Net {
    /// IPv6.
    V6(V6Net),
    /// IPv4.
    V4(V4Net),
}

impl Net {
    /// The first and the last address.
    pub fn range(self) -> (IpAddr, IpAddr) {
        match self {
            Self::V6(net) => {
                let last = net.first.to_bits() | u128::MAX.checked_shr(net.bits.into()).unwrap_or(0);
                (net.first.into(), Ipv6Addr::from_bits(last).into())
            }
            Self::V4(net) => {
                let last = net.first.to_bits() | u32::MAX.checked_shr(net.bits.into()).unwrap_or(0);
                (net.first.into(), Ipv4Addr::from_bits(last).into())
            }
        }
    }
}

impl std::fmt::Display for Net {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::V6(net) => net.fmt(out),
            Self::V4(net) => net.fmt(out),
        }
    }
}

/// A port of the host that leads to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// TCP or UDP (IANA number).
    pub protocol: u8,
    /// The host's port.
    pub host_port: u16,
    /// The VM's port.
    pub guest_port: u16,
}

/// The link-local address a Linux guest gives an interface by itself: the modified EUI-64 of its hardware address
/// (RFC 4291 appendix A).
pub const fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from_octets([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_makes_the_link_local_one_linux_makes() {
        // RFC 4291 appendix A's example: 34-56-78-9A-BC-DE → 36-56-78-FF-FE-9A-BC-DE.
        let address = link_local([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(address.to_string(), "fe80::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn a_network_knows_its_ends() {
        let net = Net::V4(V4Net { first: Ipv4Addr::new(192, 0, 2, 0), bits: 24 });
        assert_eq!(net.range().1.to_string(), "192.0.2.255");
        let all = Net::V6(V6Net { first: Ipv6Addr::UNSPECIFIED, bits: 0 });
        assert_eq!(all.range().1, IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)));
        let one = Net::V4(V4Net { first: Ipv4Addr::new(192, 0, 2, 1), bits: 32 });
        assert_eq!(one.range().0, one.range().1);
    }
}
