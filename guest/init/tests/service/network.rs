//! A guest's network, in a network namespace of the agent's own.

use hearth_guest_wire::{Address, FromGuest, Gateway, GatewayAddress, NetworkInterface, ToGuest};

use super::agent::{Agent, Host, program};

const FIRST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SECOND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GATEWAY_V4: GatewayAddress = GatewayAddress::V4([169, 254, 1, 1]);
const GATEWAY_V6: GatewayAddress = GatewayAddress::V6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// `fd00:1::LAST`, alone in its prefix.
fn v6(last: u8) -> Address {
    Address::V6([0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last], 128)
}

/// An agent with a network of its own, which has two interfaces that are down, and a name of its own. `None` without
/// the right to make namespaces.
fn agent_with_network() -> Option<Agent> {
    let agent = Agent::start_guest()?;
    agent.must(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far address 02:00:00:00:00:09 \
         && ip link add eth1 address 02:00:00:00:00:02 type veth peer name away && ip link set away up",
    );
    Some(agent)
}

fn interface(mac: [u8; 6], addresses: &[Address], gateways: &[GatewayAddress]) -> NetworkInterface {
    let gateways = gateways.iter().map(|address| Gateway { address: *address, mac: GATEWAY_MAC }).collect();
    NetworkInterface { mac, mtu: 0, addresses: addresses.to_vec(), gateways }
}

fn apply(host: &mut Host, interfaces: &[NetworkInterface]) {
    host.say(&ToGuest::Network(interfaces.to_vec()));
    assert_eq!(host.hear(), FromGuest::Done);
}

#[test]
fn a_guest_reaches_beyond_its_gateway() {
    let Some(agent) = agent_with_network() else { return };
    // The gateway lives in a namespace of its own as long as the connection of its program.
    let (mut gateway, pid) = agent.exec(program(&["unshare", "--net", "sh"]));
    let begun = "ip link set lo up; echo begun\n".as_bytes().to_vec();
    gateway.say(&ToGuest::Stdin(begun));
    assert_eq!(gateway.hear(), FromGuest::Stdout(b"begun\n".to_vec()));
    agent.must(&format!("ip link set far netns {pid}"));
    let script = "set -e; ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad
        ip addr add 169.254.1.1/32 dev far; ip addr add fe80::1/64 dev far nodad
        ip link set far arp off up
        ip route add 10.9.8.7/32 dev far; ip route add fd00:1::5/128 dev far
        ip neigh replace 10.9.8.7 lladdr 02:00:00:00:00:01 dev far
        ip neigh replace fd00:1::5 lladdr 02:00:00:00:00:01 dev far; echo made\n";
    gateway.say(&ToGuest::Stdin(script.as_bytes().to_vec()));
    assert_eq!(gateway.hear(), FromGuest::Stdout(b"made\n".to_vec()));

    let mut host = agent.greeted();
    let addresses = [Address::V4([10, 9, 8, 7], 32), v6(5)];
    apply(&mut host, &[interface(FIRST_MAC, &addresses, &[GATEWAY_V4, GATEWAY_V6])]);
    // The far side answers no ARP and no neighbour solicitation for itself: what is not permanent gets nowhere.
    let seen = agent.must("ping -c 1 -W 5 192.0.2.1; ping -c 1 -W 5 2001:db8::1; ping -c 1 -W 5 127.0.0.1");
    assert_eq!(seen.matches("1 received").count(), 3, "{seen}");
}

#[test]
fn a_network_is_applied_and_another_replaces_it() {
    let Some(agent) = agent_with_network() else { return };
    agent.must("ip link set far up");
    let mut host = agent.greeted();
    let mut first = interface(FIRST_MAC, &[Address::V4([10, 9, 8, 7], 32), v6(5)], &[GATEWAY_V4, GATEWAY_V6]);
    first.mtu = 1400;
    let second = interface(SECOND_MAC, &[], &[GATEWAY_V4]);
    let look = "ip -o addr; ip -o link; ip route; ip -6 route; ip neigh show nud permanent; \
                cd /proc/sys/net/ipv6/conf/eth0; echo ra $(cat accept_ra)";
    // Twice: the second time nothing is left to change.
    for _ in 0..2 {
        apply(&mut host, &[first.clone(), second.clone()]);
        let seen = agent.must(look);
        for part in [
            "inet 10.9.8.7/32 scope global eth0",
            "inet6 fd00:1::5/128 scope global nodad",
            "lo    inet 127.0.0.1/8",
            "mtu 1400",
            "default via 169.254.1.1 dev eth0 proto 104 onlink",
            "default via fe80::1 dev eth0 proto 104 metric 1024 onlink",
            "169.254.1.1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT",
            "fe80::1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT",
            "169.254.1.1 dev eth1 lladdr 02:00:00:00:00:09 PERMANENT",
            "ra 0",
        ] {
            assert_eq!(seen.matches(part).count(), 1, "{part} in {seen}");
        }
        // Up, with nothing but the address it gives itself, which is usable at once.
        assert!(seen.contains("eth1    inet6 fe80::ff:fe00:2/64 scope link nodad "), "{seen}");
        assert_eq!(seen.matches("default via").count(), 2, "one default route for each family: {seen}");
    }

    // Other addresses, the way out by the other interface and for IPv4 only.
    let first = interface(FIRST_MAC, &[v6(6), v6(7)], &[]);
    apply(&mut host, &[first, second]);
    let seen = agent.must(look);
    assert!(seen.contains("fd00:1::6/128") && seen.contains("fd00:1::7/128"), "{seen}");
    assert!(!seen.contains("10.9.8.7") && !seen.contains("fd00:1::5"), "{seen}");
    assert!(seen.contains("default via 169.254.1.1 dev eth1 proto 104 onlink"), "{seen}");
    assert_eq!(seen.matches("default via").count(), 1, "{seen}");
    assert!(seen.contains("fe80::ff:fe00:1/64"), "a link-local address stays: {seen}");

    apply(&mut host, &[interface(FIRST_MAC, &[], &[]), interface(SECOND_MAC, &[], &[])]);
    let seen = agent.must(look);
    assert!(!seen.contains("default via") && !seen.contains("fd00:1"), "{seen}");
}

#[test]
fn an_address_stays_when_an_older_one_of_its_subnet_goes() {
    let Some(agent) = agent_with_network() else { return };
    agent.must("ip link set far up");
    let mut host = agent.greeted();
    let (old, kept) = (Address::V4([10, 9, 8, 1], 24), Address::V4([10, 9, 8, 2], 24));
    apply(&mut host, &[interface(FIRST_MAC, &[old, kept], &[])]);
    apply(&mut host, &[interface(FIRST_MAC, &[kept], &[])]);
    let seen = agent.must("ip -o -4 addr show eth0");
    assert!(seen.contains("10.9.8.2/24 brd 10.9.8.255") && !seen.contains("10.9.8.1/"), "{seen}");
}

#[test]
fn default_routes_of_others_stay() {
    let Some(agent) = agent_with_network() else { return };
    agent.must("ip link set eth1 up; ip link set far up; ip route add default dev eth1 metric 50");
    let mut host = agent.greeted();
    let addresses = [Address::V4([10, 9, 8, 7], 32)];
    apply(&mut host, &[interface(FIRST_MAC, &addresses, &[GATEWAY_V4])]);
    let seen = agent.must("ip route");
    assert!(seen.contains("default via 169.254.1.1 dev eth0") && seen.contains("default dev eth1"), "{seen}");
    apply(&mut host, &[interface(FIRST_MAC, &addresses, &[])]);
    let seen = agent.must("ip route");
    assert!(!seen.contains("169.254.1.1") && seen.contains("default dev eth1 scope link metric 50"), "{seen}");
}

#[test]
fn what_cannot_be_applied_is_named() {
    let Some(agent) = agent_with_network() else { return };
    let mut host = agent.greeted();
    let multicast = GatewayAddress::V4([224, 0, 0, 1]);
    let small = NetworkInterface { mtu: 1, ..interface(FIRST_MAC, &[], &[]) };
    let cases = [
        (interface([2, 0, 0, 0, 0, 0xab], &[], &[]), 19, "no interface is 02:00:00:00:00:ab"),
        (interface([0; 6], &[], &[]), 19, "no interface is 00:00:00:00:00:00"),
        (interface(FIRST_MAC, &[Address::V4([10, 0, 0, 1], 33)], &[]), 22, "add an address"),
        (interface(FIRST_MAC, &[], &[multicast]), 22, "set a default route"),
        (small, 22, "bring an interface up"),
    ];
    for (interface, errno, what) in cases {
        host.say(&ToGuest::Network(vec![interface]));
        assert_eq!(host.hear(), FromGuest::Failed { errno, what: what.to_owned() });
    }
    // The connection goes on, and so does the network.
    apply(&mut host, &[interface(FIRST_MAC, &[v6(1)], &[GATEWAY_V6])]);
}

#[test]
fn a_service_has_no_network_of_its_own() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    host.say(&ToGuest::Network(Vec::new()));
    let answer = host.hear();
    assert!(matches!(answer, FromGuest::Failed { errno: 1, .. }), "{answer:?}");
}
