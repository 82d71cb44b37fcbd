//! Every wrong word is named with its key, its value and what is possible.

use crate::agent::config::tests::checked;

use super::*;

const MINIMAL: &str = "[fabric]\nhost_number = 3\nipv6_prefix = 'fd3c:91aa:7e2::/48'\n";

fn fabric(more: &str) -> FabricConfig {
    checked(&format!("{MINIMAL}{more}")).unwrap().fabric.unwrap()
}

fn wrong(text: &str) -> String {
    checked(text).unwrap_err()
}

#[test]
fn without_a_fabric_there_is_none() {
    assert_eq!(checked("").unwrap().fabric, None);
    assert!(wrong("[[peers]]\nname = 'b'\naddress = '::1'\nhost_number = 2").contains("with a [fabric] only"));
}

#[test]
fn what_is_not_said_has_its_default() {
    let config = fabric("");
    assert_eq!((config.mtu, config.quarantine_s, config.pool), (1500, 120, 4));
    assert_eq!((config.underlay, u16::from(config.host)), (Underlay::Routed, 3));
    assert_eq!(config.fabric.v4_widths(), Some(V4Widths::USUAL));
    let config = fabric("underlay = 'vxlan'");
    assert_eq!((config.mtu, config.underlay), (1430, Underlay::Vxlan { id: 0x68_7468, port: 4789 }));
    assert_eq!(fabric("ipv4 = false").fabric.v4_widths(), None);
}

#[test]
fn where_hosts_are_listened_for_and_their_key_are_said_or_absent() {
    let config = fabric("");
    assert_eq!((config.listen, config.key_file), (None, None));
    let config = fabric("listen = '[2001:db8::3]:7787'\nkey_file = '/etc/hearth/fabric.key'");
    assert_eq!(config.listen, Some("[2001:db8::3]:7787".parse().unwrap()));
    assert_eq!(config.key_file, Some("/etc/hearth/fabric.key".into()));
    assert!(!config.plain_peers);
    assert!(fabric("key_file = '/etc/hearth/fabric.key'\nplain_peers = true").plain_peers);
    for (more, named) in [
        ("listen = '2001:db8::3'", "fabric.listen is \"2001:db8::3\", an IP address with a port is possible"),
        ("listen = '192.0.2.3:0'", "fabric.listen"),
        ("listen = '[ff02::1]:7787'", "fabric.listen"),
        ("listen = 'host:7787'", "fabric.listen"),
        ("plain_peers = true", "fabric.plain_peers is true, which is possible with a fabric.key_file only"),
        ("key_file = 'fabric.key'", "fabric.key_file is \"fabric.key\", an absolute path is possible"),
    ] {
        let told = wrong(&format!("{MINIMAL}{more}"));
        assert!(told.contains(named), "{told}");
    }
}

#[test]
fn uids_follow_the_host_number_unless_they_are_told() {
    assert_eq!(checked(MINIMAL).unwrap().uids.host_number, 3);
    assert_eq!(checked(&format!("{MINIMAL}[uids]\nhost_number = 0")).unwrap().uids.host_number, 0);
    assert_eq!(checked("").unwrap().uids.host_number, 0);
    let highest = MINIMAL.replace("= 3", "= 65535") + "ipv4 = false";
    let uids = checked(&highest).unwrap().uids;
    assert!(uids.first().checked_add(crate::agent::config::UIDS_PER_HOST).is_some_and(|end| end <= 1_879_048_192));
}

#[test]
fn wrong_values_are_named_with_what_is_possible() {
    for (text, words) in [
        ("[fabric]\nhost_number = 3", &["fabric.ipv6_prefix is absent", "fd3c:91aa:7e2::/48"][..]),
        ("[fabric]\nipv6_prefix = 'fd3c:91aa:7e2::/48'", &["fabric.host_number is absent", "1 to 255"]),
        ("[fabric]\nhost = 1", &["unknown field `host`", "host_number"]),
        (&MINIMAL.replace("= 3", "= 0"), &["fabric.host_number is 0", "1 to 255"]),
        (&MINIMAL.replace("= 3", "= 256"), &["fabric.host_number is 256", "fabric.ipv4 = false"]),
        (&MINIMAL.replace("= 3", "= -1"), &["fabric.host_number is -1", "1 to 255"]),
        (&(MINIMAL.replace("= 3", "= 65536") + "ipv4 = false"), &["fabric.host_number is 65536", "1 to 65535"]),
        (&MINIMAL.replace("/48", "/64"), &["fabric.ipv6_prefix", "/64\"", "not a /48"]),
        (&MINIMAL.replace("/48", ""), &["fabric.ipv6_prefix", "not a /48"]),
        (&MINIMAL.replace("7e2::", "7e2:3::"), &["fabric.ipv6_prefix", "last 80 bits"]),
        (&MINIMAL.replace("fd3c:91aa:7e2", "fe80"), &["fabric.ipv6_prefix", "link-local"]),
        (&MINIMAL.replace("fd3c:91aa:7e2::", "10.0.0.0"), &["fabric.ipv6_prefix", "not an IPv6 prefix"]),
        (&format!("{MINIMAL}underlay = 'bridge'"), &["fabric.underlay is \"bridge\"", "\"routed\" and \"vxlan\""]),
        (&format!("{MINIMAL}vxlan_id = 5"), &["fabric.vxlan_id is 5", "\"vxlan\" only"]),
        (&format!("{MINIMAL}underlay = 'vxlan'\nvxlan_id = 16777216"), &["fabric.vxlan_id is 16777216", "16777215"]),
        (&format!("{MINIMAL}underlay = 'vxlan'\nvxlan_port = 0"), &["fabric.vxlan_port is 0", "1 to 65535"]),
        (&format!("{MINIMAL}mtu = 1279"), &["fabric.mtu is 1279", "1280 to 65521"]),
        (&format!("{MINIMAL}quarantine_s = 0"), &["fabric.quarantine_s is 0", "1 to 86400"]),
        (&format!("{MINIMAL}pool = 65"), &["fabric.pool is 65", "0 to 64"]),
    ] {
        let said = wrong(text);
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said:?}, which is about\n{text}");
        }
    }
}

fn peer_table(name: &str, address: &str, host_number: i64) -> String {
    format!("[[peers]]\nname = '{name}'\naddress = '{address}'\nhost_number = {host_number}\n")
}

#[test]
fn peers_are_told_apart() {
    let two = [peer_table("b", "2001:db8::2", 4), peer_table("c", "[2001:db8::3]:7443", 5)].concat();
    let config = fabric(&two);
    let shown: Vec<String> = config.peers.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["2001:db8::2", "[2001:db8::3]:7443"]);
    for (peers, words) in [
        (
            [peer_table("b", "2001:db8::2", 4), peer_table("b", "2001:db8::3", 5)],
            ["peers[1].name is \"b\"", "peers[0]"],
        ),
        (
            [peer_table("b", "2001:db8::2", 4), peer_table("c", "2001:db8::3", 4)],
            ["peers[1].host_number is 4", "peers[0]"],
        ),
        ([peer_table("b", "2001:db8::2", 4), peer_table("c", "2001:db8::2", 5)], ["peers[1].address", "peers[0]"]),
        (
            [peer_table("b", "2001:db8::2", 4), peer_table("c", "2001:db8::3", 3)],
            ["peers[1].host_number is 3", "this host's"],
        ),
        ([peer_table("b", "2001:db8::2", 256), String::new()], ["peers[0].host_number is 256", "1 to 255"]),
        ([peer_table("B", "2001:db8::2", 4), String::new()], ["peers[0].name is \"B\"", "a-z"]),
    ] {
        let said = wrong(&format!("{MINIMAL}{}", peers.concat()));
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said:?}");
        }
    }
    assert!(wrong(&format!("{MINIMAL}[[peers]]\nname = 'b'")).contains("peers[0].address is absent"));
}

#[test]
fn peers_have_addresses_that_packets_can_go_to() {
    let vxlan = |peers: &str| checked(&format!("{MINIMAL}underlay = 'vxlan'\n{peers}"));
    for address in ["x", "", "2001:db8::2/64", "192.0.2.1:0", "host.example"] {
        let said = wrong(&format!("{MINIMAL}{}", peer_table("b", address, 4)));
        assert!(said.contains("peers[0].address") && said.contains("192.0.2.7"), "{said}");
    }
    for address in ["::", "::1", "ff02::1", "fe80::2", "127.0.0.1", "0.0.0.0", "169.254.1.2", "::ffff:192.0.2.1"] {
        let said = vxlan(&peer_table("b", address, 4)).unwrap_err();
        assert!(said.contains("peers[0].address") && said.contains("routers know"), "{said}");
    }
    for address in ["fd3c:91aa:7e2:9::1", "10.3.0.1", "10.4.255.1"] {
        let said = vxlan(&peer_table("b", address, 4)).unwrap_err();
        assert!(said.contains("belongs to VMs"), "{said}");
    }
    assert!(vxlan(&peer_table("b", "10.200.0.1", 4)).is_ok());
    assert!(wrong(&format!("{MINIMAL}{}", peer_table("b", "192.0.2.1", 4))).contains("underlay = \"vxlan\""));
    let mixed = [peer_table("b", "192.0.2.1", 4), peer_table("c", "2001:db8::3", 5)].concat();
    assert!(vxlan(&mixed).unwrap_err().contains("one family"));
}

/// The example as it is shipped.
const EXAMPLE: &str = include_str!("../../hearth.toml");

#[test]
fn the_example_is_understood_as_it_is_and_with_everything_in_it() {
    let as_is = checked(EXAMPLE).unwrap();
    assert_eq!(as_is, checked("").unwrap(), "what is not commented out changes nothing");
    // Lines that are `#key = value` or `#[section]`: prose has a blank behind its `#`.
    let setting = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest.to_owned(),
        Some(_) | None => line.to_owned(),
    };
    let all: Vec<String> = EXAMPLE.lines().map(setting).collect();
    let all = checked(&all.join("\n")).unwrap();
    let fabric = all.fabric.unwrap();
    assert_eq!((fabric.peers.len(), fabric.underlay.name()), (2, "vxlan"));
    assert_eq!(all.limits, as_is.limits, "the example shows the defaults");
    assert_eq!(all.waits, as_is.waits, "the example shows the defaults");
}
