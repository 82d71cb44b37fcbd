//! What a session's VMs may reach outside the fabric: networks, protocols, ports. Pure: words to checked values. The
//! rules themselves are in the jails.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::net::address::Fabric;

/// Most rules of a session. Each is an element of a set in each member's jail.
pub const EGRESS_RULES_MAX: usize = 64;

/// What a session's VMs may reach outside the fabric. Nothing, unless something is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Egress {
    /// Whether what leaves gets the host's address: without it, those outside have to know the way back.
    pub nat: bool,
    /// What is allowed.
    pub allow: Vec<EgressRule>,
}

/// One thing that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRule {
    /// Where to.
    pub cidr: Cidr,
    /// By which protocol.
    pub protocol: Protocol,
    /// To which ports, first and last; `None` for all. Only with TCP and UDP.
    pub ports: Option<(u16, u16)>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and, to IPv6 networks, ICMPv6.
    Icmp,
    /// Whatever the network layer carries.
    Any,
}

impl Protocol {
    const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

/// A network in CIDR notation, its host bits zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// Why a text is not a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// Not an address, a slash and a number.
    #[error("{text:?} is not a network: ADDRESS/BITS such as 192.0.2.0/24 or 2001:db8::/32 is expected")]
    Syntax {
        /// What was given.
        text: String,
    },
    /// More bits than the address has.
    #[error("{text:?} has too many bits: 0 to {max} are possible")]
    Bits {
        /// What was given.
        text: String,
        /// How many the address has.
        max: u8,
    },
    /// The address is not the network's first.
    #[error("{text:?} has bits set behind the network's: is {meant} meant?")]
    HostBits {
        /// What was given.
        text: String,
        /// The network that address is in.
        meant: Cidr,
    },
}

impl Cidr {
    /// The network's first address.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits all its addresses share.
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// The network of `bits` bits that `address` is in; `None` for more bits than there are.
    pub fn of(address: IpAddr, bits: u8) -> Option<Self> {
        Some(Self { address: first(address, bits)?, bits })
    }

    /// Whether all of `other` lies in this network.
    pub fn covers(self, other: Self) -> bool {
        self.bits <= other.bits && self.holds(other.address)
    }

    /// Whether `address` lies in this network.
    pub fn holds(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && first(address, self.bits) == Some(self.address)
    }

    const fn new(address: IpAddr, bits: u8) -> Self {
        Self { address, bits }
    }
}

/// The first address of the network of `bits` bits that `address` is in; `None` for more bits than there are.
fn first(address: IpAddr, bits: u8) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => {
            let rest = 32_u32.checked_sub(bits.into())?;
            IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & u32::MAX.checked_shl(rest).unwrap_or(0)))
        }
        IpAddr::V6(address) => {
            let rest = 128_u32.checked_sub(bits.into())?;
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & u128::MAX.checked_shl(rest).unwrap_or(0)))
        }
    })
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let syntax = || CidrError::Syntax { text: text.to_owned() };
        let (address, bits) = text.split_once('/').ok_or_else(syntax)?;
        let address: IpAddr = address.parse().map_err(|_| syntax())?;
        let plain = !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit());
        let bits: u8 = if plain { bits.parse().map_err(|_| syntax())? } else { return Err(syntax()) };
        let max = if address.is_ipv4() { 32 } else { 128 };
        let start = first(address, bits).ok_or_else(|| CidrError::Bits { text: text.to_owned(), max })?;
        if start != address {
            return Err(CidrError::HostBits { text: text.to_owned(), meant: Self::new(start, bits) });
        }
        Ok(Self { address, bits })
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;
    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.address, self.bits)
    }
}

/// Networks that are on no other side of any router, with what they are.
const NEVER_OUTSIDE: [(Cidr, &str); 6] = [
    (Cidr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8), "loopback addresses"),
    (Cidr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16), "link-local addresses"),
    (Cidr::new(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4), "multicast addresses"),
    (Cidr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 128), "the loopback address"),
    (Cidr::new(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10), "link-local addresses"),
    (Cidr::new(IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8), "multicast addresses"),
];

/// Why an egress is not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// A network that is none.
    #[error("egress.allow[{index}].cidr")]
    Cidr {
        /// Which rule, from 0.
        index: usize,
        /// What is wrong.
        #[source]
        source: CidrError,
    },
    /// A network that nothing outside can have.
    #[error("egress.allow[{index}].cidr {cidr} holds {what}, which are not outside")]
    NotOutside {
        /// Which rule, from 0.
        index: usize,
        /// The network.
        cidr: Cidr,
        /// What it holds.
        what: &'static str,
    },
    /// Ports that are none, or of a protocol without ports.
    #[error("egress.allow[{index}].ports: {what}")]
    Ports {
        /// Which rule, from 0.
        index: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Too many rules.
    #[error("egress.allow has {found} rules: at most {EGRESS_RULES_MAX} are possible")]
    TooMany {
        /// How many.
        found: usize,
    },
    /// Two rules that say partly the same.
    #[error(
        "egress.allow[{index}] and egress.allow[{other}] overlap without one holding the other: split or join them"
    )]
    Overlap {
        /// One.
        index: usize,
        /// The other.
        other: usize,
    },
    /// NAT for nothing.
    #[error("egress.nat without egress.allow lets nothing out: allow 0.0.0.0/0 and ::/0 for everything")]
    NatForNothing,
}

impl EgressRule {
    /// Whether all that `other` allows is allowed by this.
    pub fn covers(&self, other: &Self) -> bool {
        self.cidr.covers(other.cidr)
            && (self.protocol == Protocol::Any || self.protocol == other.protocol)
            && self.ports.is_none_or(|(from, to)| other.ports.is_some_and(|ports| from <= ports.0 && ports.1 <= to))
    }

    /// Whether something is allowed by both.
    fn meets(&self, other: &Self) -> bool {
        let protocols = self.protocol == other.protocol || [self.protocol, other.protocol].contains(&Protocol::Any);
        let ports = match (self.ports, other.ports) {
            (Some(one), Some(other)) => one.0 <= other.1 && other.0 <= one.1,
            (None, _) | (_, None) => true,
        };
        (self.cidr.covers(other.cidr) || other.cidr.covers(self.cidr)) && protocols && ports
    }
}

impl Egress {
    /// The rules without those that another covers: sets of rules take no overlaps.
    pub fn least(&self) -> Vec<EgressRule> {
        let rules = &self.allow;
        let is_covered = |index: usize, rule: &EgressRule| {
            let covers = |(at, other): (usize, &EgressRule)| {
                // Of two that are equal the first stays.
                at != index && other.covers(rule) && (!rule.covers(other) || at < index)
            };
            rules.iter().enumerate().any(covers)
        };
        rules.iter().enumerate().filter(|(index, rule)| !is_covered(*index, rule)).map(|(_, rule)| *rule).collect()
    }
}

/// Checks what of an egress its types do not say.
pub(super) fn check(egress: &Egress, fabric: &Fabric) -> Result<(), EgressError> {
    if egress.allow.len() > EGRESS_RULES_MAX {
        return Err(EgressError::TooMany { found: egress.allow.len() });
    }
    if egress.nat && egress.allow.is_empty() {
        return Err(EgressError::NatForNothing);
    }
    let v6 = fabric.v6_net();
    let v6 = Cidr::new(IpAddr::V6(v6.first), v6.bits);
    for (index, rule) in egress.allow.iter().enumerate() {
        let not_outside = |what| EgressError::NotOutside { index, cidr: rule.cidr, what };
        if let Some((_, what)) = NEVER_OUTSIDE.iter().find(|(net, _)| net.covers(rule.cidr)) {
            return Err(not_outside(what));
        }
        if v6.covers(rule.cidr) {
            return Err(not_outside("addresses of the fabric"));
        }
        let what = match rule.ports {
            Some(_) if !rule.protocol.has_ports() => "only TCP and UDP have ports",
            Some((0, _)) => "port 0 is none: 1 to 65535 are possible",
            Some((from, to)) if from > to => "the first port is above the last",
            Some(_) | None => continue,
        };
        return Err(EgressError::Ports { index, what });
    }
    for (index, rule) in egress.allow.iter().enumerate() {
        let crosses = |other: &EgressRule| rule.meets(other) && !rule.covers(other) && !other.covers(rule);
        if let Some(other) = egress.allow[..index].iter().position(crosses) {
            return Err(EgressError::Overlap { index, other });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fabric() -> Fabric {
        Fabric::new("fd3c:91aa:7e2::".parse().unwrap(), None).unwrap()
    }

    fn rule(cidr: &str, protocol: Protocol, ports: Option<(u16, u16)>) -> Egress {
        Egress { nat: true, allow: vec![EgressRule { cidr: cidr.parse().unwrap(), protocol, ports }] }
    }

    #[test]
    fn networks_parse_and_say_what_is_wrong() {
        for good in ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.1/32", "::/0", "2001:db8::/32", "::1/128"] {
            assert_eq!(good.parse::<Cidr>().map(|cidr| cidr.to_string()), Ok(good.to_owned()));
        }
        for bad in
            ["", "/", "1.2.3.4", "1.2.3.4/", "1.2.3.4/+8", "1.2.3/8", "x/8", "1.2.3.4/300", "::/1/2", "fe80::1%1/8"]
        {
            assert!(matches!(bad.parse::<Cidr>(), Err(CidrError::Syntax { .. })), "{bad}");
        }
        assert_eq!("1.2.3.4/33".parse::<Cidr>(), Err(CidrError::Bits { text: "1.2.3.4/33".to_owned(), max: 32 }));
        let meant = "10.0.0.0/8".parse().unwrap();
        assert_eq!("10.1.0.0/8".parse::<Cidr>(), Err(CidrError::HostBits { text: "10.1.0.0/8".to_owned(), meant }));
    }

    #[test]
    fn what_cannot_be_outside_is_refused() {
        let refused = |egress: &Egress| check(egress, &fabric()).is_err();
        for cidr in
            ["127.0.0.0/8", "127.0.0.1/32", "169.254.169.254/32", "fe80::/64", "ff02::/16", "fd3c:91aa:7e2:3::/64"]
        {
            assert!(refused(&rule(cidr, Protocol::Any, None)), "{cidr}");
        }
        for cidr in ["0.0.0.0/0", "::/0", "fd00::/8", "fd3c:91aa:7e3::/48", "192.0.2.0/24"] {
            assert!(!refused(&rule(cidr, Protocol::Any, None)), "{cidr}");
        }
    }

    #[test]
    fn rules_may_hold_each_other_but_not_cross() {
        let both = |one: Egress, other: Egress| Egress { nat: false, allow: [one.allow, other.allow].concat() };
        let tcp = |cidr, ports| rule(cidr, Protocol::Tcp, ports);
        let inside = both(tcp("10.0.0.0/8", None), tcp("10.1.0.0/16", Some((80, 80))));
        assert_eq!(check(&inside, &fabric()), Ok(()));
        assert_eq!(inside.least(), tcp("10.0.0.0/8", None).allow);
        let twice = both(tcp("::/0", None), tcp("::/0", None));
        assert_eq!(twice.least().len(), 1);
        let crossed = both(tcp("10.0.0.0/8", Some((80, 100))), tcp("10.1.0.0/16", Some((90, 110))));
        assert_eq!(check(&crossed, &fabric()), Err(EgressError::Overlap { index: 1, other: 0 }));
        let wider = both(rule("10.1.0.0/16", Protocol::Any, None), tcp("10.0.0.0/8", None));
        assert_eq!(check(&wider, &fabric()), Err(EgressError::Overlap { index: 1, other: 0 }));
        let apart = both(tcp("10.1.0.0/16", Some((80, 80))), rule("10.1.0.0/16", Protocol::Udp, Some((80, 80))));
        assert_eq!((check(&apart, &fabric()), apart.least().len()), (Ok(()), 2));
    }

    #[test]
    fn ports_need_a_protocol_that_has_them() {
        for (protocol, ports, fits) in [
            (Protocol::Tcp, Some((443, 443)), true),
            (Protocol::Udp, Some((1, u16::MAX)), true),
            (Protocol::Tcp, Some((0, 5)), false),
            (Protocol::Tcp, Some((5, 4)), false),
            (Protocol::Icmp, Some((1, 2)), false),
            (Protocol::Any, Some((1, 2)), false),
            (Protocol::Any, None, true),
        ] {
            assert_eq!(check(&rule("::/0", protocol, ports), &fabric()).is_ok(), fits, "{protocol:?} {ports:?}");
        }
        let many = Egress { nat: false, allow: vec![rule("::/0", Protocol::Any, None).allow[0]; EGRESS_RULES_MAX + 1] };
        assert_eq!(check(&many, &fabric()), Err(EgressError::TooMany { found: EGRESS_RULES_MAX + 1 }));
        let empty = Egress { nat: true, allow: Vec::new() };
        assert_eq!(check(&empty, &fabric()), Err(EgressError::NatForNothing));
        assert_eq!(check(&Egress::default(), &fabric()), Ok(()));
    }

    proptest! {
        #[test]
        fn networks_parse_back(address: u128, bits in 0..=128_u8) {
            let first = first(IpAddr::V6(Ipv6Addr::from_bits(address)), bits).unwrap();
            let cidr = Cidr::new(first, bits);
            prop_assert_eq!(cidr.to_string().parse::<Cidr>(), Ok(cidr));
            let one = Cidr::new(IpAddr::V6(Ipv6Addr::from_bits(address)), 128);
            prop_assert!(cidr.covers(one) && cidr.covers(cidr));
        }

        #[test]
        fn any_text_is_a_network_or_refused(text in ".{0,40}") {
            let _ = text.parse::<Cidr>();
        }
    }
}
