//! Other hardware addresses for interfaces, as a restored guest's devices have them.

use hearth_guest_wire::{Address, Gateway, GatewayAddress, HardwareAddress, NetworkInterface, ToGuest};

use super::agent::{Agent, Host};

const fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

fn change(from: u8, to: u8) -> HardwareAddress {
    HardwareAddress { from: mac(from), to: mac(to) }
}

fn change_all(host: &mut Host, changes: &[HardwareAddress]) {
    host.has_done(&ToGuest::Hardware(changes.to_vec()));
}

/// A guest with two interfaces that are up, each with an address and its link-local one.
fn agent_with_interfaces() -> Option<(Agent, Host)> {
    let agent = Agent::start_guest()?;
    agent.must(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far0 && ip link set far0 up \
         && ip link add eth1 address 02:00:00:00:00:02 type veth peer name far1 && ip link set far1 up",
    );
    let mut host = agent.greeted();
    host.has_done(&ToGuest::Network(vec![interface(1, 1), interface(2, 2)]));
    Some((agent, host))
}

fn interface(mac_last: u8, address_last: u8) -> NetworkInterface {
    let gateway = Gateway { address: GatewayAddress::V4([169, 254, 1, 1]), mac: mac(9) };
    let addresses = vec![Address::V4([10, 9, 8, address_last], 32)];
    NetworkInterface { mac: mac(mac_last), mtu: 0, addresses, gateways: vec![gateway] }
}

/// Hardware addresses and IPv6 addresses of both, as `eth0 MAC eth1 MAC, eth0 ADDRESS ...`.
fn seen(agent: &Agent) -> String {
    let text = agent.must(
        "for i in eth0 eth1; do echo $i $(cat /sys/class/net/$i/address); done
         ip -o -6 addr show | grep -v ' lo ' | while read n i f a rest; do echo $i $a; done",
    );
    text.replace("02:00:00:00:00:", "")
}

/// What [`seen`] is when the interfaces have these hardware addresses.
fn expected(first: u8, second: u8) -> String {
    format!("eth0 {first:02x}\neth1 {second:02x}\neth0 fe80::ff:fe00:{first:x}/64\neth1 fe80::ff:fe00:{second:x}/64\n")
}

#[test]
fn hardware_addresses_change_and_the_network_follows() {
    let Some((agent, mut host)) = agent_with_interfaces() else { return };
    // /sys of another network shows other interfaces.
    agent.must("mount -t sysfs sysfs /sys");
    assert_eq!(ordered(&seen(&agent)), ordered(&expected(1, 2)));
    // Twice: it is harmless when the interface has its address already.
    for _ in 0..2 {
        change_all(&mut host, &[change(1, 0x11)]);
        assert_eq!(ordered(&seen(&agent)), ordered(&expected(0x11, 2)));
    }
    let all = agent.must("ip -o addr show eth0; ip -o link show eth0");
    assert!(all.contains("10.9.8.1/32") && all.contains(",UP"), "addresses stay: {all}");
    assert!(!all.contains("tentative"), "usable at once: {all}");

    // The next network finds them by what they have now.
    host.has_done(&ToGuest::Network(vec![interface(0x11, 3), interface(2, 4)]));
    let all = agent.must("ip -o addr show eth0; ip neigh show nud permanent");
    assert!(all.contains("10.9.8.3/32") && !all.contains("10.9.8.1/32"), "{all}");
    assert!(all.contains("169.254.1.1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT"), "{all}");
    assert_eq!(ordered(&seen(&agent)), ordered(&expected(0x11, 2)));
}

#[test]
fn two_interfaces_swap_and_pass_on_their_addresses() {
    let Some((agent, mut host)) = agent_with_interfaces() else { return };
    agent.must("mount -t sysfs sysfs /sys");
    change_all(&mut host, &[change(1, 2), change(2, 1)]);
    assert_eq!(ordered(&seen(&agent)), ordered(&expected(2, 1)));
    // A permutation tells nothing of which state it found.
    change_all(&mut host, &[change(2, 1), change(1, 2)]);
    assert_eq!(ordered(&seen(&agent)), ordered(&expected(1, 2)));
    // One gets what the other had; the second time all is as it is to be.
    for _ in 0..2 {
        change_all(&mut host, &[change(1, 2), change(2, 3)]);
        assert_eq!(ordered(&seen(&agent)), ordered(&expected(2, 3)));
    }
}

#[test]
fn an_interface_that_is_missing_changes_nothing() {
    let Some((agent, mut host)) = agent_with_interfaces() else { return };
    agent.must("mount -t sysfs sysfs /sys");
    let missing = ToGuest::Hardware(vec![change(1, 0x11), change(0xab, 0xac)]);
    assert_eq!(host.has_failed(&missing), (19, String::from("no interface is 02:00:00:00:00:ab")));
    assert_eq!(ordered(&seen(&agent)), ordered(&expected(1, 2)));
    // What the kernel takes for no hardware address: one of a group.
    let group = ToGuest::Hardware(vec![HardwareAddress { from: mac(1), to: [1, 0, 0, 0, 0, 1] }]);
    assert_eq!(host.has_failed(&group), (99, String::from("change a hardware address")));
    change_all(&mut host, &[]);
}

#[test]
fn an_interface_that_is_down_gets_its_link_local_address_later() {
    let Some(agent) = Agent::start_guest() else { return };
    agent.must("ip link add eth0 address 02:00:00:00:00:01 type veth peer name far && ip link set far up");
    let mut host = agent.greeted();
    change_all(&mut host, &[change(1, 0x11)]);
    assert!(!agent.must("ip -o addr show eth0").contains("fe80:"));
    host.has_done(&ToGuest::Network(vec![interface(0x11, 1)]));
    let all = agent.must("ip -o addr show eth0");
    assert!(all.contains("fe80::ff:fe00:11/64") && all.matches("fe80:").count() == 1, "{all}");
}

/// The lines in an order of their own: `ip` lists interfaces as they were made.
fn ordered(lines: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = lines.lines().filter(|line| !line.starts_with("far")).collect();
    lines.sort_unstable();
    lines
}
