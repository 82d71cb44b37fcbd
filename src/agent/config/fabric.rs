//! `[fabric]` and `[[peers]]`: what addresses are made of, and where other hosts' are. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, in_range};
use crate::agent::egress::Cidr;
use crate::agent::images::is_name;
use crate::net::address::{FABRIC_BITS, Fabric, HostNumber, V4Widths};

/// Most peers: host numbers of fabrics with IPv4 go to 255, and larger fabrics have other ways to tell hosts.
const PEERS_MAX: usize = 255;

/// Bytes of a VM's packet on the usual Ethernet.
const MTU_ROUTED: u16 = 1500;

/// The same less what VXLAN over IPv6 puts around it: 40 + 8 + 8 + 14 bytes.
const MTU_VXLAN: u16 = 1430;

/// Smallest MTU that IPv6 works with.
const MTU_MIN: u16 = 1280;

/// Largest that a tap takes: 65,535 bytes less an Ethernet header.
const MTU_MAX: u16 = 65_521;

/// Largest VXLAN network identifier: 24 bits.
const VXLAN_ID_MAX: u32 = 0xff_ffff;

/// "hth" in ASCII: not a number that somebody else is likely to have chosen.
const VXLAN_ID_DEFAULT: u32 = 0x68_7468;

/// The IANA's port for VXLAN.
const VXLAN_PORT_DEFAULT: u16 = 4789;

/// Longer than conntrack remembers UDP and ICMP by default.
const QUARANTINE_S_DEFAULT: u32 = 120;

/// Jails that are made ahead.
const POOL_DEFAULT: u32 = 4;

/// A checked fabric: what this host and its peers have to know to reach each other's VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FabricConfig {
    /// What addresses are made of.
    pub fabric: Fabric,
    /// This host's number.
    pub host: HostNumber,
    /// What carries packets between hosts.
    pub underlay: Underlay,
    /// Largest packet of a VM in bytes.
    pub mtu: u16,
    /// Seconds a local id or session network id rests after its use.
    pub quarantine_s: u32,
    /// Jails that are made ahead.
    pub pool: u32,
    /// Where this agent listens for other hosts' agents; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// The file with the key that the hosts share. With it, they speak TLS; without it, they only say hello.
    pub key_file: Option<PathBuf>,
    /// Whether hosts whose agents speak without TLS are spoken with, as those of the version before this one do.
    pub plain_peers: bool,
    /// The other hosts.
    pub peers: Vec<Peer>,
}

impl FabricConfig {
    /// How long a local id or session network id rests after its use.
    pub fn quarantine(&self) -> Duration {
        Duration::from_secs(self.quarantine_s.into())
    }

    /// How agents speak to each other, as in answers.
    pub const fn peer_transport(&self) -> &'static str {
        match (&self.key_file, self.plain_peers) {
            (Some(_), false) => "tls",
            (Some(_), true) => "tls_or_plain",
            (None, _) => "plain",
        }
    }
}

/// What carries packets between hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// Routes to each peer's subnets via the peer's address.
    Routed,
    /// A VXLAN device with a static table.
    Vxlan {
        /// VXLAN network identifier.
        id: u32,
        /// UDP port.
        port: u16,
    },
}

impl Underlay {
    /// The underlay's name, as in the configuration and in answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::Vxlan { .. } => "vxlan",
        }
    }
}

/// Another host of the fabric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Where it is on the network between hosts.
    pub address: IpAddr,
    /// The port of its agent, if one was given.
    pub port: Option<u16>,
    /// Its number.
    pub host: HostNumber,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some(port) => write!(out, "{}", SocketAddr::new(self.address, port)),
            None => write!(out, "{}", self.address),
        }
    }
}

/// `[fabric]` as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenFabric {
    host_number: Option<i64>,
    ipv6_prefix: Option<String>,
    #[serde(default = "yes")]
    ipv4: bool,
    underlay: Option<String>,
    vxlan_id: Option<i64>,
    vxlan_port: Option<i64>,
    mtu: Option<i64>,
    quarantine_s: Option<i64>,
    pool: Option<i64>,
    listen: Option<String>,
    key_file: Option<String>,
    #[serde(default)]
    plain_peers: bool,
}

/// One of `[[peers]]` as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenPeer {
    name: Option<String>,
    address: Option<String>,
    host_number: Option<i64>,
}

const fn yes() -> bool {
    true
}

fn range(what: impl Into<String>, found: impl Into<String>, wanted: impl Into<String>) -> ConfigError {
    ConfigError::Range { what: what.into(), found: found.into(), wanted: wanted.into() }
}

/// A number in its range, or what is taken when it is not there.
fn number(key: &str, found: Option<i64>, default: Option<u32>, from: u32, to: u32) -> Result<u32, ConfigError> {
    match (found, default) {
        (Some(found), _) => match u32::try_from(found) {
            Ok(number) => in_range(key, number.into(), from.into(), to.into()).map(|()| number),
            Err(_) => Err(range(key, found.to_string(), format!("{from} to {to} are possible"))),
        },
        (None, Some(default)) => Ok(default),
        (None, None) => Err(range(key, "absent", format!("{from} to {to} are possible"))),
    }
}

fn word(key: &str, found: Option<String>, wanted: &str) -> Result<String, ConfigError> {
    found.ok_or_else(|| range(key, "absent", wanted))
}

/// [`number`] for what has 16 bits.
fn short(key: &str, found: Option<i64>, default: u16, from: u16, to: u16) -> Result<u16, ConfigError> {
    let number = number(key, found, Some(default.into()), from.into(), to.into())?;
    // In range, so it fits.
    Ok(u16::try_from(number).unwrap_or(default))
}

fn host_number(key: &str, found: Option<i64>, ipv4: bool) -> Result<HostNumber, ConfigError> {
    let max = if ipv4 { V4Widths::USUAL.host_max() } else { u16::MAX.into() };
    let found = match number(key, found, None, 1, max) {
        Err(ConfigError::Range { what, found, wanted }) if ipv4 => {
            return Err(range(what, found, format!("{wanted} (up to 65535 with fabric.ipv4 = false)")));
        }
        other => other?,
    };
    let number = u16::try_from(found).ok().and_then(|number| HostNumber::try_from(number).ok());
    number.ok_or_else(|| range(key, found.to_string(), format!("1 to {max} are possible")))
}

const PREFIX_WANTED: &str = "a /48 is possible, such as fd3c:91aa:7e2::/48 with 40 random bits behind fd";

fn prefix(found: Option<String>, ipv4: bool) -> Result<Fabric, ConfigError> {
    const KEY: &str = "fabric.ipv6_prefix";
    let text = word(KEY, found, PREFIX_WANTED)?;
    let wrong = |why: String| range(KEY, format!("{text:?}"), format!("{why}; {PREFIX_WANTED}"));
    let (address, bits) = text.split_once('/').unwrap_or((&text, ""));
    let address: Ipv6Addr = address.parse().map_err(|_| wrong("which is not an IPv6 prefix".to_owned()))?;
    if bits != FABRIC_BITS.to_string() {
        return Err(wrong(format!("which is not a /{FABRIC_BITS}")));
    }
    Fabric::new(address, ipv4.then_some(V4Widths::USUAL)).map_err(|error| wrong(error.to_string()))
}

fn underlay(written: &WrittenFabric) -> Result<Underlay, ConfigError> {
    match written.underlay.as_deref() {
        None | Some("routed") => {
            for (key, found) in [("fabric.vxlan_id", written.vxlan_id), ("fabric.vxlan_port", written.vxlan_port)] {
                if let Some(found) = found {
                    return Err(range(
                        key,
                        found.to_string(),
                        "which is possible with fabric.underlay = \"vxlan\" only",
                    ));
                }
            }
            Ok(Underlay::Routed)
        }
        Some("vxlan") => Ok(Underlay::Vxlan {
            id: number("fabric.vxlan_id", written.vxlan_id, Some(VXLAN_ID_DEFAULT), 1, VXLAN_ID_MAX)?,
            port: short("fabric.vxlan_port", written.vxlan_port, VXLAN_PORT_DEFAULT, 1, u16::MAX)?,
        }),
        Some(other) => Err(range("fabric.underlay", format!("{other:?}"), "\"routed\" and \"vxlan\" are possible")),
    }
}

/// Checks `[fabric]` and `[[peers]]`.
pub(super) fn check(
    written: Option<WrittenFabric>,
    peers: Vec<WrittenPeer>,
) -> Result<Option<FabricConfig>, ConfigError> {
    let Some(written) = written else {
        if peers.is_empty() {
            return Ok(None);
        }
        let found = format!("given {} times", peers.len());
        return Err(range("[[peers]]", found, "which is possible with a [fabric] only"));
    };
    let fabric = prefix(written.ipv6_prefix.clone(), written.ipv4)?;
    let host = host_number("fabric.host_number", written.host_number, written.ipv4)?;
    let underlay = underlay(&written)?;
    let mtu = match underlay {
        Underlay::Routed => MTU_ROUTED,
        Underlay::Vxlan { .. } => MTU_VXLAN,
    };
    if peers.len() > PEERS_MAX {
        return Err(range(
            "[[peers]]",
            format!("given {} times", peers.len()),
            format!("up to {PEERS_MAX} are possible"),
        ));
    }
    let peers: Vec<Peer> = peers
        .into_iter()
        .enumerate()
        .map(|(index, written_peer)| peer(index, written_peer, written.ipv4))
        .collect::<Result<_, _>>()?;
    if written.plain_peers && written.key_file.is_none() {
        return Err(range(
            "fabric.plain_peers",
            "true",
            "which is possible with a fabric.key_file only: without, no host speaks TLS",
        ));
    }
    let config = FabricConfig {
        fabric,
        host,
        underlay,
        mtu: short("fabric.mtu", written.mtu, mtu, MTU_MIN, MTU_MAX)?,
        quarantine_s: number("fabric.quarantine_s", written.quarantine_s, Some(QUARANTINE_S_DEFAULT), 1, 86_400)?,
        pool: number("fabric.pool", written.pool, Some(POOL_DEFAULT), 0, 64)?,
        listen: listen(written.listen)?,
        key_file: key_file(written.key_file)?,
        plain_peers: written.plain_peers,
        peers,
    };
    check_peers(&config)?;
    Ok(Some(config))
}

fn listen(found: Option<String>) -> Result<Option<SocketAddr>, ConfigError> {
    let Some(text) = found else { return Ok(None) };
    let wanted = "an IP address with a port is possible: 192.0.2.7:7787, [2001:db8::7]:7787";
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 && !address.ip().is_multicast() => Ok(Some(address)),
        Ok(_) | Err(_) => Err(range("fabric.listen", format!("{text:?}"), wanted)),
    }
}

fn key_file(found: Option<String>) -> Result<Option<PathBuf>, ConfigError> {
    let Some(text) = found else { return Ok(None) };
    if !text.starts_with('/') {
        return Err(range("fabric.key_file", format!("{text:?}"), "an absolute path is possible"));
    }
    Ok(Some(text.into()))
}

fn peer(index: usize, written: WrittenPeer, ipv4: bool) -> Result<Peer, ConfigError> {
    let key = |field: &str| format!("peers[{index}].{field}");
    let name = word(&key("name"), written.name, "1 to 63 of a-z, 0-9 and - are possible")?;
    if !is_name(&name) {
        let wanted = "1 to 63 of a-z, 0-9 and -, starting with a letter, are possible";
        return Err(range(key("name"), format!("{name:?}"), wanted));
    }
    let wanted = "an IP address is possible, or one with a port: 192.0.2.7, 2001:db8::7, [2001:db8::7]:7443";
    let text = word(&key("address"), written.address, wanted)?;
    let (address, port) = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
        (Ok(address), _) => (address, None),
        (_, Ok(socket)) if socket.port() != 0 => (socket.ip(), Some(socket.port())),
        (Err(_), _) => return Err(range(key("address"), format!("{text:?}"), wanted)),
    };
    let host = host_number(&key("host_number"), written.host_number, ipv4)?;
    Ok(Peer { name, address, port, host })
}

/// What of the peers depends on each other, on this host and on the underlay.
fn check_peers(config: &FabricConfig) -> Result<(), ConfigError> {
    let mut names = BTreeMap::new();
    let mut numbers = BTreeMap::from([(config.host, "this host's".to_owned())]);
    let mut addresses = BTreeMap::new();
    for (index, peer) in config.peers.iter().enumerate() {
        let key = |field: &str| format!("peers[{index}].{field}");
        let mine = format!("that of peers[{index}]");
        if let Some(other) = names.insert(&peer.name, mine.clone()) {
            return Err(range(
                key("name"),
                format!("{:?}", peer.name),
                format!("which is {other} already; each peer needs its own"),
            ));
        }
        if let Some(other) = numbers.insert(peer.host, mine.clone()) {
            let wanted = format!("which is {other} already; each host needs its own");
            return Err(range(key("host_number"), peer.host.to_string(), wanted));
        }
        if let Some(other) = addresses.insert(peer.address, mine) {
            return Err(range(key("address"), peer.address.to_string(), format!("which is {other} already")));
        }
        check_address(config, peer).map_err(|why| range(key("address"), peer.address.to_string(), why))?;
    }
    let v4 = |peer: &&Peer| peer.address.is_ipv4();
    let (four, six): (Vec<&Peer>, Vec<&Peer>) = config.peers.iter().partition(v4);
    if let (Underlay::Vxlan { .. }, Some(first), Some(other)) = (config.underlay, four.first(), six.first()) {
        let wanted = format!("but {} of {} is IPv6: one VXLAN device speaks one family", other.address, other.name);
        return Err(range(format!("the address of peer {}", first.name), first.address.to_string(), wanted));
    }
    Ok(())
}

fn check_address(config: &FabricConfig, peer: &Peer) -> Result<(), String> {
    let address = peer.address;
    let local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || local {
        return Err(
            "an address that routers know is possible: not unspecified, loopback, link-local or multicast".to_owned()
        );
    }
    // Linux sends IPv4 via IPv6 gateways, but not the other way round.
    if config.underlay == Underlay::Routed && address.is_ipv4() {
        return Err("an IPv6 address is possible with fabric.underlay = \"routed\", because IPv6 subnets cannot be \
                    routed via an IPv4 address; or use fabric.underlay = \"vxlan\""
            .to_owned());
    }
    // The route to it would lead through itself.
    let hosts = config.peers.iter().map(|peer| peer.host).chain([config.host]);
    let inside = match address {
        IpAddr::V6(v6) => {
            let net = config.fabric.v6_net();
            Cidr::of(IpAddr::V6(net.first), net.bits).is_some_and(|net| net.holds(IpAddr::V6(v6)))
        }
        IpAddr::V4(v4) => hosts
            .filter_map(|host| config.fabric.v4_subnet(host).ok().flatten())
            .any(|subnet| Cidr::of(IpAddr::V4(subnet.first), subnet.bits).is_some_and(|net| net.holds(IpAddr::V4(v4)))),
    };
    if inside {
        return Err("an address outside the fabric's own is possible: this one belongs to VMs".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
