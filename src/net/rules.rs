//! The rules of jails and hosts as text for nft, and what fills their sets. The text is the same for every VM of a
//! fabric: what differs between VMs is in sets. So a jail can be made ahead, with empty sets, which is closed; a VM
//! joins by set elements; and no rule on any host changes when a session gains or loses a member.
//!
//! A packet from the VM passes `arrive` (who sent it?), then `cross` and `leave` (may it go there?) or `here` (for the
//! jail itself: its gateway addresses and metadata). A packet to the VM passes `translate_in`, `cross` and `enter`.
//! Session traffic is matched by addresses alone, fragments and all, and is exempt from connection tracking before
//! anything is reassembled (priority −450, tracking begins at −400): it owes nothing to state that a move would lose.
//! Only what goes outside of the fabric, or comes from there, is tracked.

use super::address::Fabric;
use super::member::{
    Addressing, EgressRule, GATEWAY_V4, GATEWAY_V6, INNER_V4, INNER_V6, METADATA_PORT, METADATA_V4, METADATA_V6,
    Member, Net, link_local,
};
use crate::sys::nft;
use std::fmt::Write;

/// Name of the tables in a jail.
pub const JAIL_TABLE: &str = "hearth";

/// Why packets were dropped, as the rules count them.
pub const DROP_REASONS: [&str; 3] = ["spoof", "foreign_session", "not_allowed"];

/// Counts packets of VMs for the host itself.
pub const TO_HOST: &str = "to_host";

/// Name of the table in a host's own namespace, and start of the names of all its links.
pub fn host_tag(host: u16) -> String {
    format!("hth{host}")
}

/// A table of a jail or host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Of the family inet.
    Inet,
    /// Of the family arp.
    Arp,
}

/// An element of a set or map of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The table it is in.
    pub table: Table,
    /// The set.
    pub set: &'static str,
    /// Key and value.
    pub content: nft::Element,
}

const JAIL_SETS: &str = "\
	counter spoof { }
	counter foreign_session { }
	counter not_allowed { }
	set mac { type ether_addr; }
	set link6 { type ipv6_addr; }
	set own6 { type ipv6_addr; }
	set own4 { type ipv4_addr; }
	set session6 { type ipv6_addr; }
	set session4 { type ipv4_addr; }
	set egress6 { type ipv6_addr . inet_proto . inet_service; flags interval; }
	set egress4 { type ipv4_addr . inet_proto . inet_service; flags interval; }
	set egress6_all { type ipv6_addr . inet_proto; flags interval; }
	set egress4_all { type ipv4_addr . inet_proto; flags interval; }
	set published { type inet_proto . inet_service; }
	map inner6 { type ipv6_addr : ipv6_addr; }
	map inner4 { type ipv4_addr : ipv4_addr; }
	map outer6 { type ipv6_addr : ipv6_addr; }
	map outer4 { type ipv4_addr : ipv4_addr; }
	chain translate_in {
		type filter hook prerouting priority -460; policy accept;
		iifname \"up0\" ip6 daddr set ip6 daddr map @inner6
		iifname \"up0\" ip daddr set ip daddr map @inner4
	}
	chain arrive {
		type filter hook prerouting priority -450; policy drop;
		iifname \"lo\" accept
		iifname { \"tap0\", \"up0\" } goto known
		counter name not_allowed drop
	}
";

const FROM_VM: &str = "\
	chain from_vm {
		ether saddr != @mac counter name spoof drop
		ip saddr != @own4 counter name spoof drop
		ip hdrlength != 5 counter name spoof drop
		meta protocol ip return
		ip6 saddr :: icmpv6 type { nd-neighbor-solicit, nd-router-solicit, mld2-listener-report } drop
		ip6 saddr != @own6 ip6 saddr != @link6 counter name spoof drop
		icmpv6 type { mld-listener-report, mld-listener-done, mld2-listener-report } drop
		exthdr hbh exists counter name spoof drop
		exthdr rt exists counter name spoof drop
		exthdr dst exists counter name spoof drop
		exthdr mh exists counter name spoof drop
	}
	chain cross {
		type filter hook forward priority filter; policy drop;
		iifname \"tap0\" oifname \"up0\" goto leave
		iifname \"up0\" oifname \"tap0\" goto enter
		counter name not_allowed drop
	}
";

/// What the jail's own kernel says to the VM. Whenever somebody opens the tap it tells the link which groups it listens
/// to (RFC 3810): nobody asked, and it would wake a VM that waits for its first packet.
const TO_VM: &str = "\
	chain to_vm {
		type filter hook output priority filter; policy accept;
		oifname \"tap0\" icmpv6 type { mld-listener-report, mld-listener-done, mld2-listener-report } drop
	}
";

const EGRESS: &str = "\
		ct state established accept
		ip6 daddr . meta l4proto . th dport @egress6 accept
		ip daddr . meta l4proto . th dport @egress4 accept
		ip6 daddr . meta l4proto @egress6_all accept
		ip daddr . meta l4proto @egress4_all accept
		counter name not_allowed drop
";

const INGRESS: &str = "\
		ct state established,related accept
		ip6 daddr @own6 ct state new meta l4proto . th dport @published accept
		ip daddr @own4 ct state new meta l4proto . th dport @published accept
		counter name not_allowed drop
";

const ARP: &str = "\
table arp hearth {
	counter spoof { }
	set mac { type ether_addr; }
	set own4 { type ipv4_addr; }
	chain here {
		type filter hook input priority filter; policy drop;
		iifname != \"tap0\" drop
		ether saddr @mac arp saddr ether @mac arp saddr ip @own4 accept
		ether saddr @mac arp saddr ether @mac arp saddr ip 0.0.0.0 accept
		counter name spoof drop
	}
}
";

/// The rules of a jail: two tables, whole. Loading them replaces what was there, in one transaction.
pub fn jail(fabric: Option<&Fabric>) -> String {
    let admit = |own: &str, other: &str| {
        session(fabric, |family, size, net| format!("{family} {own} @own{size} {family} {other} {net} accept"))
    };
    let deny = |other: &str| {
        networks(fabric, |family, net| format!("{family} {other} {net} counter name foreign_session drop"))
    };
    // A jail that translates has the guest's inner address here: so by what is its own, and not by two members' bits.
    let untracked = |own: &str, other: &str| {
        session(fabric, |family, size, net| format!("{family} {own} @own{size} {family} {other} {net} notrack accept"))
    };
    let mut text =
        String::from("table inet hearth\ndelete table inet hearth\ntable arp hearth\ndelete table arp hearth\n");
    text += "table inet hearth {\n";
    text += JAIL_SETS;
    chain(
        &mut text,
        "known",
        &[
            "\t\tiifname \"tap0\" jump from_vm\n",
            &untracked("saddr", "daddr"),
            &untracked("daddr", "saddr"),
            "\t\taccept\n",
        ],
    );
    text += FROM_VM;
    chain(&mut text, "leave", &[&admit("saddr", "daddr"), &deny("daddr"), EGRESS]);
    chain(&mut text, "enter", &[&admit("daddr", "saddr"), &deny("saddr"), INGRESS]);
    here(&mut text);
    text += TO_VM;
    let base = "\t\ttype filter hook postrouting priority 300; policy accept;\n";
    let outer6 = "\t\toifname \"up0\" ip6 saddr set ip6 saddr map @outer6\n";
    let outer4 = "\t\toifname \"up0\" ip saddr set ip saddr map @outer4\n";
    chain(&mut text, "translate_out", &[base, outer6, outer4]);
    text += "}\n";
    text += ARP;
    text
}

/// The rules of a host's own namespace: one table, whole. VMs never reach the host itself; the host's address goes on
/// what leaves the fabric, and never on what stays in it (it would erase the session's bits).
pub fn host(host: u16, fabric: Option<&Fabric>) -> String {
    let tag = host_tag(host);
    let inside = networks(fabric, |family, net| format!("{family} saddr {net} {family} daddr {net} notrack"));
    let stays = networks(fabric, |family, net| format!("{family} daddr {net} accept"));
    format!(
        "\
table inet {tag}
delete table inet {tag}
table inet {tag} {{
	counter {TO_HOST} {{ }}
	set egress6 {{ type ipv6_addr; }}
	set egress4 {{ type ipv4_addr; }}
	map published6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
	map published4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
	chain stateless {{
		type filter hook prerouting priority -450; policy accept;
{inside}	}}
	chain publish {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname \"{tag}-*\" accept
		fib daddr type local dnat ip6 to meta l4proto . th dport map @published6
		fib daddr type local dnat ip to meta l4proto . th dport map @published4
	}}
	chain here {{
		type filter hook input priority filter - 10; policy accept;
		iifname \"{tag}-*\" counter name {TO_HOST} drop
	}}
	chain translate {{
		type nat hook postrouting priority srcnat; policy accept;
{stays}		ip6 saddr @egress6 masquerade
		ip saddr @egress4 masquerade
	}}
}}
"
    )
}

fn chain(text: &mut String, name: &str, parts: &[&str]) {
    let _ = writeln!(text, "\tchain {name} {{");
    parts.iter().for_each(|part| *text += part);
    *text += "\t}\n";
}

/// A rule for each family that has sessions; it is given the family, the 6 or 4 in sets' names, and the masked match.
fn session(fabric: Option<&Fabric>, rule: impl Fn(&str, u8, &str) -> String) -> String {
    let Some(fabric) = fabric else { return String::new() };
    let v6 = format!("& {} @session6", fabric.v6_session_mask());
    let mut rules = vec![session_rule("ip6", 6, &v6, &rule)];
    if let Some(mask) = fabric.v4_session_mask() {
        rules.push(session_rule("ip", 4, &format!("& {mask} @session4"), &rule));
    }
    rules.concat()
}

fn session_rule(family: &str, size: u8, net: &str, rule: &impl Fn(&str, u8, &str) -> String) -> String {
    format!("\t\t{}\n", rule(family, size, net))
}

/// A rule for each network of the fabric.
fn networks(fabric: Option<&Fabric>, rule: impl Fn(&str, &str) -> String) -> String {
    let Some(fabric) = fabric else { return String::new() };
    let mut rules = format!("\t\t{}\n", rule("ip6", &fabric.v6_net().to_string()));
    if let Some(net) = fabric.v4_net() {
        let _ = writeln!(rules, "\t\t{}", rule("ip", &net.to_string()));
    }
    rules
}

/// What a VM may ask of its jail. What the host's end of the veth says to groups on the link is no VM's doing and not
/// counted.
fn here(text: &mut String) {
    let _ = write!(
        text,
        "\
	chain here {{
		type filter hook input priority filter; policy drop;
		iifname \"lo\" accept
		iifname \"up0\" ip6 daddr ff02::/16 drop
		iifname \"tap0\" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
		iifname \"tap0\" icmpv6 type nd-router-solicit drop
		iifname \"tap0\" ip6 daddr {METADATA_V6} tcp dport {METADATA_PORT} accept
		iifname \"tap0\" ip daddr {METADATA_V4} tcp dport {METADATA_PORT} accept
		iifname \"tap0\" ip6 daddr {{ {GATEWAY_V6}, {METADATA_V6} }} icmpv6 type {{ echo-request, echo-reply }} accept
		iifname \"tap0\" ip daddr {{ {GATEWAY_V4}, {METADATA_V4} }} icmp type {{ echo-request, echo-reply }} accept
		counter name not_allowed drop
	}}
"
    );
}

/// What is in the sets of a member's jail.
pub fn jail_elements(member: &Member) -> Vec<Element> {
    let mut elements = Elements(Vec::new());
    elements.add(Table::Inet, "mac", member.mac.to_vec());
    elements.add(Table::Arp, "mac", member.mac.to_vec());
    elements.add(Table::Inet, "link6", link_local(member.mac).octets().to_vec());
    let Some(session) = &member.session else { return elements.0 };
    elements.add(Table::Inet, "own6", session.inner_v6().octets().to_vec());
    elements.add(Table::Inet, "session6", session.match_v6.octets().to_vec());
    if let Some(inner) = session.inner_v4() {
        elements.add(Table::Inet, "own4", inner.octets().to_vec());
        elements.add(Table::Arp, "own4", inner.octets().to_vec());
    }
    if let Some(session4) = session.match_v4 {
        elements.add(Table::Inet, "session4", session4.octets().to_vec());
    }
    if session.addressing == Addressing::Invariant {
        elements.map("inner6", session.v6.octets().to_vec(), INNER_V6.octets().to_vec());
        elements.map("outer6", INNER_V6.octets().to_vec(), session.v6.octets().to_vec());
        if let Some(v4) = session.v4 {
            elements.map("inner4", v4.octets().to_vec(), INNER_V4.octets().to_vec());
            elements.map("outer4", INNER_V4.octets().to_vec(), v4.octets().to_vec());
        }
    }
    session.egress.iter().for_each(|rule| elements.egress(rule));
    for port in &session.published {
        elements.add(Table::Inet, "published", concatenated(&[&[port.protocol], &port.guest_port.to_be_bytes()]));
    }
    elements.0
}

/// What is in the sets of a host's own table for a member.
pub fn host_elements(member: &Member) -> Vec<Element> {
    let mut elements = Elements(Vec::new());
    let Some(session) = &member.session else { return elements.0 };
    if session.nat && !session.egress.is_empty() {
        elements.add(Table::Inet, "egress6", session.v6.octets().to_vec());
        if let Some(v4) = session.v4 {
            elements.add(Table::Inet, "egress4", v4.octets().to_vec());
        }
    }
    for port in &session.published {
        let key = concatenated(&[&[port.protocol], &port.host_port.to_be_bytes()]);
        let guest = port.guest_port.to_be_bytes();
        elements.map("published6", key.clone(), concatenated(&[&session.v6.octets(), &guest]));
        if let Some(v4) = session.v4 {
            elements.map("published4", key, concatenated(&[&v4.octets(), &guest]));
        }
    }
    elements.0
}

struct Elements(Vec<Element>);

impl Elements {
    fn add(&mut self, table: Table, set: &'static str, key: Vec<u8>) {
        self.0.push(Element { table, set, content: nft::Element { key, key_end: None, value: None } });
    }

    fn map(&mut self, set: &'static str, key: Vec<u8>, value: Vec<u8>) {
        let content = nft::Element { key, key_end: None, value: Some(value) };
        self.0.push(Element { table: Table::Inet, set, content });
    }

    fn egress(&mut self, rule: &EgressRule) {
        let (first, last) = rule.to.range();
        let bytes = |address: std::net::IpAddr| match address {
            std::net::IpAddr::V6(address) => address.octets().to_vec(),
            std::net::IpAddr::V4(address) => address.octets().to_vec(),
        };
        let (first, last) = (bytes(first), bytes(last));
        let protocols = rule.protocol.map_or((0, u8::MAX), |one| (one, one));
        let v6 = matches!(rule.to, Net::V6(_));
        let (set, key, key_end) = match rule.ports {
            Some((from, to)) => (
                if v6 { "egress6" } else { "egress4" },
                concatenated(&[&first, &[protocols.0], &from.to_be_bytes()]),
                concatenated(&[&last, &[protocols.1], &to.to_be_bytes()]),
            ),
            None => (
                if v6 { "egress6_all" } else { "egress4_all" },
                concatenated(&[&first, &[protocols.0]]),
                concatenated(&[&last, &[protocols.1]]),
            ),
        };
        let content = nft::Element { key, key_end: Some(key_end), value: None };
        self.0.push(Element { table: Table::Inet, set, content });
    }
}

/// The parts of a concatenation, each padded to four bytes.
fn concatenated(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| pad(part)).collect()
}

fn pad(part: &[u8]) -> Vec<u8> {
    let mut padded = part.to_vec();
    padded.resize(part.len().next_multiple_of(4), 0);
    padded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::address::V4Widths;
    use std::path::Path;

    fn fabric(v4: bool) -> Fabric {
        Fabric::new("fd3c:91aa:7e2::".parse().unwrap(), v4.then_some(V4Widths::USUAL)).unwrap()
    }

    /// What the rules are is checked in; `HEARTH_BLESS=1` writes it anew.
    fn golden(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/net").join(name);
        if std::env::var_os("HEARTH_BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            crate::sys::file::replace(&path, text.as_bytes()).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(golden == text, "{name} is not as checked in; if it should be: HEARTH_BLESS=1\n{text}");
    }

    #[test]
    fn the_rules_are_as_in_the_golden_files() {
        golden("jail.nft", &jail(Some(&fabric(true))));
        golden("jail_v6.nft", &jail(Some(&fabric(false))));
        golden("jail_alone.nft", &jail(None));
        golden("host.nft", &host(3, Some(&fabric(true))));
        golden("host_alone.nft", &host(3, None));
    }

    #[test]
    fn a_vm_without_a_session_may_only_be_known() {
        let elements = jail_elements(&Member { mac: [2, 0, 0, 0, 0, 1], session: None });
        let sets: Vec<&str> = elements.iter().map(|element| element.set).collect();
        assert_eq!(sets, ["mac", "mac", "link6"]);
    }
}
