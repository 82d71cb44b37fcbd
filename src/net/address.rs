//! Addresses: host subnet ⊕ session network id ⊕ local id, their inverse, and the match that admits a session.
//!
//! ```text
//! IPv6   | fabric 48 | host 16 | session 32 | local 32 |       fd3c:91aa:7e2:3:0:205:0:5   = host 3, session 0x205, local 5
//!        match: daddr & ffff:ffff:ffff:0:ffff:ffff:: == fd3c:91aa:7e2::205:0:0
//! IPv4   | 10 | host 8 | session 10 | local 6 |                10.3.129.69                 = host 3, session 517, local 5
//!        match: daddr & 255.0.255.192 == 10.0.129.64
//! ```
//! The match leaves out host and local bits. So whoever has the session's bits is a member, on whatever host, and no
//! rule changes when members come and go; it keeps the fabric's prefix, so that no address outside matches by chance.
//!
//! Everything here is a function of its arguments. Which numbers are in use, and which rest, is the ledger's business.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Bits of an IPv6 address that name the fabric.
pub const FABRIC_BITS: u8 = 48;

/// Bits of an IPv6 address up to the end of the host number: a host's subnet is a /64.
pub const HOST_SUBNET_BITS: u8 = 64;

/// The IPv4 network that all hosts share.
const V4_NET: u32 = 10 << 24;

/// Bits of an IPv4 address below that network.
const V4_BITS: u8 = 24;

/// Sessions whose interface identifiers RFC 5453 reserves: 0200:5eff:fe00::/40 is the IANA's Ethernet block, and
/// fdff:ffff:ffff:ff80 to the end are subnet anycast addresses.
const SESSIONS_OF_RFC_5453: [u32; 2] = [0x0200_5eff, 0xfdff_ffff];

/// A host's number in its fabric: 1 to 65,535. Zero is nobody's, so that a forgotten setting is not a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct HostNumber(u16);

/// A session's number in its fabric: 32 bits but for the reserved ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SessionNetworkId(u32);

/// A VM's number among those of its session on its host: 1 to 2³²−2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct LocalId(u32);

/// Why a number or a prefix is not possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Host numbers start at 1.
    #[error("host number 0: 1 to 65535 are possible")]
    HostZero,
    /// The first and the last session stand for hosts and for nobody; two more make interface identifiers that others own.
    #[error("session network id {found} ({found:#x}) is reserved: not 0, 4294967295, 33578751 or 4261412863")]
    SessionReserved {
        /// What was given.
        found: u32,
    },
    /// The first and the last local id look like anycast and broadcast addresses.
    #[error("local id {found} is reserved")]
    LocalReserved {
        /// What was given.
        found: u32,
    },
    /// A fabric's prefix has its last 80 bits empty.
    #[error("{found} is not a /48: its last 80 bits are not zero")]
    Prefix {
        /// What was given.
        found: Ipv6Addr,
    },
    /// The prefix would collide with addresses that mean something else everywhere.
    #[error("{found}/48 cannot be a fabric: it holds multicast, link-local, loopback or mapped IPv4 addresses")]
    PrefixReserved {
        /// What was given.
        found: Ipv6Addr,
    },
    /// The widths do not fill what is below 10.0.0.0/8, or leave no host, session or VM.
    #[error("IPv4 widths {host}+{session}+{local}: three widths of at least 2 bits that make {V4_BITS} are possible")]
    Widths {
        /// Bits of the host number.
        host: u8,
        /// Bits of the session.
        session: u8,
        /// Bits of the local id.
        local: u8,
    },
    /// The host number does not fit.
    #[error("host number {found} has no IPv4 subnet: up to {max} fit into {bits} bits")]
    HostTooWide {
        /// What was given.
        found: u16,
        /// The highest that fits.
        max: u32,
        /// Bits there are.
        bits: u8,
    },
    /// The session does not fit.
    #[error("session network id {found} has no IPv4 addresses: up to {max} fit into {bits} bits")]
    SessionTooWide {
        /// What was given.
        found: u32,
        /// The highest that fits.
        max: u32,
        /// Bits there are.
        bits: u8,
    },
    /// The local id does not fit.
    #[error("local id {found} has no IPv4 address: up to {max} fit into {bits} bits")]
    LocalTooWide {
        /// What was given.
        found: u32,
        /// The highest that fits.
        max: u32,
        /// Bits there are.
        bits: u8,
    },
}

impl TryFrom<u16> for HostNumber {
    type Error = AddressError;

    fn try_from(number: u16) -> Result<Self, AddressError> {
        if number == 0 { Err(AddressError::HostZero) } else { Ok(Self(number)) }
    }
}

impl TryFrom<u32> for SessionNetworkId {
    type Error = AddressError;

    fn try_from(number: u32) -> Result<Self, AddressError> {
        if number == 0 || number == u32::MAX || SESSIONS_OF_RFC_5453.contains(&number) {
            return Err(AddressError::SessionReserved { found: number });
        }
        Ok(Self(number))
    }
}

impl TryFrom<u32> for LocalId {
    type Error = AddressError;

    fn try_from(number: u32) -> Result<Self, AddressError> {
        if number == 0 || number == u32::MAX {
            return Err(AddressError::LocalReserved { found: number });
        }
        Ok(Self(number))
    }
}

impl From<HostNumber> for u16 {
    fn from(number: HostNumber) -> Self {
        number.0
    }
}

impl From<SessionNetworkId> for u32 {
    fn from(number: SessionNetworkId) -> Self {
        number.0
    }
}

impl From<LocalId> for u32 {
    fn from(number: LocalId) -> Self {
        number.0
    }
}

impl std::fmt::Display for HostNumber {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(out)
    }
}

impl std::fmt::Display for SessionNetworkId {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(out)
    }
}

impl std::fmt::Display for LocalId {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(out)
    }
}

/// How the 24 bits below 10.0.0.0/8 are shared out. The same on all hosts of a fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct V4Widths {
    host: u8,
    session: u8,
    local: u8,
}

impl V4Widths {
    /// 255 hosts, 1,022 sessions, 62 VMs of a session on a host.
    pub const USUAL: Self = Self { host: 8, session: 10, local: 6 };

    /// Widths that make 24 bits, each of at least two: one bit leaves no number that is not reserved.
    pub const fn new(host: u8, session: u8, local: u8) -> Result<Self, AddressError> {
        let fits = host <= 16 && session <= V4_BITS && local <= V4_BITS && host + session + local == V4_BITS;
        if !fits || host < 2 || session < 2 || local < 2 {
            return Err(AddressError::Widths { host, session, local });
        }
        Ok(Self { host, session, local })
    }

    /// Bits of the host number.
    pub const fn host_bits(self) -> u8 {
        self.host
    }

    /// Bits of the session network id.
    pub const fn session_bits(self) -> u8 {
        self.session
    }

    /// Bits of the local id.
    pub const fn local_bits(self) -> u8 {
        self.local
    }

    /// The highest host number with IPv4.
    pub const fn host_max(self) -> u32 {
        ones(self.host)
    }

    /// The highest session network id with IPv4: all ones are reserved.
    pub const fn session_max(self) -> u32 {
        ones(self.session) - 1
    }

    /// The highest local id with IPv4: all ones are reserved.
    pub const fn local_max(self) -> u32 {
        ones(self.local) - 1
    }
}

/// A number of `bits` ones.
const fn ones(bits: u8) -> u32 {
    (1 << bits) - 1
}

/// A network of addresses that share their first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct V6Net {
    /// The first address.
    pub first: Ipv6Addr,
    /// How many bits all share.
    pub bits: u8,
}

/// A network of addresses that share their first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct V4Net {
    /// The first address.
    pub first: Ipv4Addr,
    /// How many bits all share.
    pub bits: u8,
}

impl std::fmt::Display for V6Net {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.first, self.bits)
    }
}

impl std::fmt::Display for V4Net {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.first, self.bits)
    }
}

/// The parts of a VM's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parts {
    /// The host it is on.
    pub host: HostNumber,
    /// Its session.
    pub session: SessionNetworkId,
    /// Its number there.
    pub local: LocalId,
}

/// A fabric, as all its hosts see it: what addresses are made of beside host, session and VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fabric {
    /// The first 48 bits, in place: the rest is zero.
    prefix: u128,
    v4: Option<V4Widths>,
}

impl Fabric {
    /// A fabric of a /48, with or without IPv4.
    pub fn new(prefix: Ipv6Addr, v4: Option<V4Widths>) -> Result<Self, AddressError> {
        let bits = prefix.to_bits();
        if bits << FABRIC_BITS != 0 {
            return Err(AddressError::Prefix { found: prefix });
        }
        // ::/48 holds loopback and mapped IPv4; fe80::/10 and ff00::/8 are what they say.
        let reserved = bits == 0 || prefix.is_multicast() || prefix.is_unicast_link_local();
        if reserved {
            return Err(AddressError::PrefixReserved { found: prefix });
        }
        Ok(Self { prefix: bits, v4 })
    }

    /// The network of all hosts of this fabric.
    pub const fn v6_net(&self) -> V6Net {
        V6Net { first: Ipv6Addr::from_bits(self.prefix), bits: FABRIC_BITS }
    }

    /// The network of all hosts of this fabric, if it has IPv4: 10.0.0.0/8.
    pub fn v4_net(&self) -> Option<V4Net> {
        self.v4.map(|_| V4Net { first: Ipv4Addr::from_bits(V4_NET), bits: 32 - V4_BITS })
    }

    /// How IPv4 addresses are made, if there are any.
    pub const fn v4_widths(&self) -> Option<V4Widths> {
        self.v4
    }

    /// A host's IPv6 subnet, a /64.
    pub fn v6_subnet(&self, host: HostNumber) -> V6Net {
        V6Net { first: Ipv6Addr::from_bits(self.prefix | u128::from(host.0) << 64), bits: HOST_SUBNET_BITS }
    }

    /// A host's IPv4 subnet, a /16 with the usual widths; `None` in a fabric without IPv4.
    pub fn v4_subnet(&self, host: HostNumber) -> Result<Option<V4Net>, AddressError> {
        let Some(widths) = self.v4 else { return Ok(None) };
        let host = v4_host(widths, host)?;
        Ok(Some(V4Net { first: Ipv4Addr::from_bits(V4_NET | host), bits: 32 - V4_BITS + widths.host }))
    }

    /// The IPv6 address of a VM.
    pub fn v6(&self, parts: Parts) -> Ipv6Addr {
        let Parts { host, session, local } = parts;
        let below = u128::from(host.0) << 64 | u128::from(session.0) << 32 | u128::from(local.0);
        Ipv6Addr::from_bits(self.prefix | below)
    }

    /// The IPv4 address of a VM; `None` in a fabric without IPv4.
    pub fn v4(&self, parts: Parts) -> Result<Option<Ipv4Addr>, AddressError> {
        let Some(widths) = self.v4 else { return Ok(None) };
        let host = v4_host(widths, parts.host)?;
        let session = v4_session(widths, parts.session)?;
        let local = parts.local.0;
        if local > widths.local_max() {
            return Err(AddressError::LocalTooWide { found: local, max: widths.local_max(), bits: widths.local });
        }
        Ok(Some(Ipv4Addr::from_bits(V4_NET | host | session | local)))
    }

    /// Whether a session can have IPv4 addresses.
    pub fn has_v4(&self, session: SessionNetworkId) -> bool {
        self.v4.is_some_and(|widths| v4_session(widths, session).is_ok())
    }

    /// The parts of an IPv6 address of this fabric; `None` for another's, and for what no VM can have.
    pub fn v6_parts(&self, address: Ipv6Addr) -> Option<Parts> {
        let bits = address.to_bits();
        if (bits ^ self.prefix) >> (128 - FABRIC_BITS) != 0 {
            return None;
        }
        let [.., h0, h1, s0, s1, s2, s3, l0, l1, l2, l3] = address.octets();
        Some(Parts {
            host: u16::from_be_bytes([h0, h1]).try_into().ok()?,
            session: u32::from_be_bytes([s0, s1, s2, s3]).try_into().ok()?,
            local: u32::from_be_bytes([l0, l1, l2, l3]).try_into().ok()?,
        })
    }

    /// The parts of an IPv4 address of this fabric; `None` for another's, and for what no VM can have.
    pub fn v4_parts(&self, address: Ipv4Addr) -> Option<Parts> {
        let widths = self.v4?;
        let bits = address.to_bits();
        if bits >> V4_BITS != V4_NET >> V4_BITS {
            return None;
        }
        let local = bits & ones(widths.local);
        let session = bits >> widths.local & ones(widths.session);
        let host = bits >> (widths.local + widths.session) & ones(widths.host);
        if local > widths.local_max() || session > widths.session_max() {
            return None;
        }
        Some(Parts {
            host: u16::try_from(host).ok()?.try_into().ok()?,
            session: session.try_into().ok()?,
            local: local.try_into().ok()?,
        })
    }

    /// What has to be left of an IPv6 address to see its session: all but host and local bits.
    pub const fn v6_session_mask(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0, 0xffff, 0xffff, 0, 0)
    }

    /// What is left of every IPv6 address of a session under [`Self::v6_session_mask`].
    pub fn v6_session(&self, session: SessionNetworkId) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.prefix | u128::from(session.0) << 32)
    }

    /// What has to be left of an IPv4 address to see its session.
    pub fn v4_session_mask(&self) -> Option<Ipv4Addr> {
        self.v4.map(|widths| Ipv4Addr::from_bits(0xff00_0000 | ones(widths.session) << widths.local))
    }

    /// What is left of every IPv4 address of a session under [`Self::v4_session_mask`]; `None` for a session without.
    pub fn v4_session(&self, session: SessionNetworkId) -> Option<Ipv4Addr> {
        let session = v4_session(self.v4?, session).ok()?;
        Some(Ipv4Addr::from_bits(V4_NET | session))
    }
}

/// The bits of a host in an IPv4 address.
fn v4_host(widths: V4Widths, host: HostNumber) -> Result<u32, AddressError> {
    if u32::from(host.0) > widths.host_max() {
        return Err(AddressError::HostTooWide { found: host.0, max: widths.host_max(), bits: widths.host });
    }
    Ok(u32::from(host.0) << (widths.session + widths.local))
}

/// The bits of a session in an IPv4 address.
fn v4_session(widths: V4Widths, session: SessionNetworkId) -> Result<u32, AddressError> {
    if session.0 > widths.session_max() {
        return Err(AddressError::SessionTooWide { found: session.0, max: widths.session_max(), bits: widths.session });
    }
    Ok(session.0 << widths.local)
}

#[cfg(test)]
mod tests;
