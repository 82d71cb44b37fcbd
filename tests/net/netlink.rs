//! Links, addresses, routes and neighbours: what is made is found again as it was asked for, by this crate and by
//! ip(8); making it twice and deleting it twice is no error; refusals say what and why.

use std::net::IpAddr;
use std::os::fd::AsFd;

use hearth::sys::netlink::{
    Address, Batch, Forwarding, Link, LinkChange, LinkRef, Neighbour, Netlink, NewVeth, NewVxlan, Route, RouteKind,
    RunBatchError, VethPeer,
};
use hearth::sys::{netns, tap};

use crate::host::{on_own_host, run};

const HOST_MAC: [u8; 6] = [2, 0x68, 0x74, 0x68, 0, 2];
const JAIL_MAC: [u8; 6] = [2, 0x68, 0x74, 0x68, 0, 3];
const PROTOCOL: u8 = 104;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn address(link: u32, text: &str) -> Address {
    let (address, prefix_len) = text.split_once('/').unwrap();
    Address { link, address: ip(address), prefix_len: prefix_len.parse().unwrap() }
}

fn route(destination: &str, via: Option<&str>, link: Option<u32>) -> Route {
    let Address { address, prefix_len, .. } = address(0, destination);
    let kind = if via.is_none() && link.is_none() { RouteKind::Unreachable } else { RouteKind::Unicast };
    let via = via.map(ip);
    Route { destination: address, prefix_len, kind, via, link, onlink: via.is_some(), protocol: PROTOCOL, metric: 1024 }
}

fn neighbour(link: u32, address: &str, mac: [u8; 6]) -> Neighbour {
    Neighbour { link, address: ip(address), mac: Some(mac), permanent: true }
}

/// A veth `name` here, with its peer `up0` as link 2 of `jail`.
fn veth<'a>(name: &'a str, jail: &'a impl AsFd) -> NewVeth<'a> {
    let peer = VethPeer { name: "up0", index: Some(2), mac: JAIL_MAC, namespace: Some(jail.as_fd()) };
    NewVeth { name, index: None, mac: HOST_MAC, mtu: 1430, peer }
}

const UP: LinkChange = LinkChange { mac: None, mtu: None, up: Some(true), no_own_address: true };

/// The refusals of a batch: what and errno.
fn refusals(result: Result<(), RunBatchError>) -> Vec<(String, i32)> {
    match result {
        Ok(()) => Vec::new(),
        Err(RunBatchError::Refused(refused)) => refused.into_iter().map(|one| (one.what, one.errno)).collect(),
        Err(RunBatchError::Netlink(error)) => panic!("{error}"),
    }
}

#[test]
fn a_veth_is_made_with_its_peer_in_another_namespace() {
    on_own_host(|| {
        let jail = netns::create_named("jail").unwrap();
        let mut here = Netlink::open().unwrap();
        let mut there = netns::in_fd(&jail, Netlink::open).unwrap().unwrap();
        assert_eq!(here.number_of(&jail).unwrap(), None);
        assert_eq!(here.link("hth1-0").unwrap(), None);

        let mut batch = Batch::new();
        batch.make_veth(&veth("hth1-0", &jail)).set_link(LinkRef::Name("hth1-0"), UP);
        here.run(&batch).unwrap();
        let mut inside = Batch::new();
        inside.set_link(LinkRef::Index(2), UP);
        there.run(&inside).unwrap();

        let outer = here.link("hth1-0").unwrap().unwrap();
        let inner = there.link("up0").unwrap().unwrap();
        let number = here.number_of(&jail).unwrap();
        assert!(number.is_some());
        let expected = Link {
            index: outer.index,
            name: "hth1-0".to_owned(),
            mac: Some(HOST_MAC),
            mtu: 1430,
            up: true,
            kind: Some("veth".to_owned()),
            no_own_address: Some(true),
            peer: Some(2),
            peer_namespace: number,
            vxlan: None,
        };
        assert_eq!(outer, expected);
        assert_eq!((inner.index, inner.mac, inner.mtu, inner.up), (2, Some(JAIL_MAC), 1430, true));
        assert_eq!(inner.peer, Some(outer.index));
        assert!(here.links().unwrap().contains(&outer));
        assert_eq!(there.links().unwrap().iter().map(|link| link.name.as_str()).collect::<Vec<_>>(), ["lo", "up0"]);
        // No address of its own on this end although it is up.
        assert!(!here.addresses().unwrap().iter().any(|address| address.link == outer.index));

        assert_eq!(refusals(here.run(&batch)), [("make link hth1-0".to_owned(), libc::EEXIST)]);
        let mut gone = Batch::new();
        gone.delete_link(LinkRef::Name("hth1-0"));
        here.run(&gone).unwrap();
        here.run(&gone).unwrap();
        assert_eq!((here.link("hth1-0").unwrap(), there.link("up0").unwrap()), (None, None));
    });
}

#[test]
fn links_are_changed_in_place() {
    on_own_host(|| {
        let tap = tap::open("tap0").unwrap();
        let mut netlink = Netlink::open().unwrap();
        let before = netlink.link("tap0").unwrap().unwrap();
        assert_eq!((before.kind.as_deref(), before.up, before.mtu), (Some("tun"), false, 1500));
        let change = LinkChange { mac: Some([2, 0x68, 0x74, 0x68, 0, 1]), mtu: Some(1400), ..UP };
        let mut batch = Batch::new();
        batch.set_link(LinkRef::Index(before.index), change);
        netlink.run(&batch).unwrap();
        netlink.run(&batch).unwrap();
        let after = netlink.link("tap0").unwrap().unwrap();
        let expected = Link { mac: change.mac, mtu: 1400, up: true, no_own_address: Some(true), ..before };
        assert_eq!(after, expected);
        let mut off = Batch::new();
        off.set_link(LinkRef::Name("tap0"), LinkChange { up: Some(false), ..LinkChange::default() });
        netlink.run(&off).unwrap();
        assert_eq!(netlink.link("tap0").unwrap().unwrap(), Link { up: false, ..expected });
        drop(tap);
    });
}

#[test]
fn a_jails_addresses_routes_and_neighbours_are_found_as_they_were_made() {
    on_own_host(|| {
        let jail = netns::create_named("jail").unwrap();
        let mut netlink = Netlink::open().unwrap();
        let mut batch = Batch::new();
        batch.make_veth(&veth("hth1-0", &jail)).set_link(LinkRef::Name("hth1-0"), UP);
        netlink.run(&batch).unwrap();
        let mut inside = Batch::new();
        inside.set_link(LinkRef::Index(2), UP);
        netns::in_fd(&jail, Netlink::open).unwrap().unwrap().run(&inside).unwrap();
        let link = netlink.link("hth1-0").unwrap().unwrap().index;

        let addresses = [address(link, "fe80::1/64"), address(link, "169.254.1.1/32")];
        let neighbours = [neighbour(link, "fe80::2", JAIL_MAC), neighbour(link, "10.9.9.9", JAIL_MAC)];
        let v6 = [
            route("fd3c:91aa:7e2:3:0:205:0:5/128", Some("fe80::2"), Some(link)),
            Route { onlink: false, ..route("fd3c:91aa:7e2:3::/64", None, None) },
            route("::/0", Some("fe80::2"), Some(link)),
        ];
        let v4 = [
            // IPv4 by an IPv6 next hop.
            route("10.3.129.69/32", Some("fe80::2"), Some(link)),
            Route { onlink: false, ..route("10.3.0.0/16", None, None) },
            route("0.0.0.0/0", Some("fe80::2"), Some(link)),
            Route { metric: 0, ..route("10.9.9.9/32", None, Some(link)) },
        ];
        let mut batch = Batch::new();
        addresses.iter().for_each(|address| {
            batch.add_address(*address);
        });
        neighbours.iter().for_each(|neighbour| {
            batch.put_neighbour(*neighbour);
        });
        v6.iter().chain(&v4).for_each(|route| {
            batch.put_route(*route);
        });
        assert_eq!(batch.len(), 11);
        for _ in 0..2 {
            netlink.run(&batch).unwrap();
            assert_eq!(sorted(netlink.addresses().unwrap()), sorted(addresses.to_vec()));
            assert_eq!(sorted(netlink.neighbours().unwrap()), sorted(neighbours.to_vec()));
            assert_eq!(sorted(netlink.routes(Some(PROTOCOL)).unwrap()), sorted([&v6[..], &v4[..]].concat()));
        }
        // The kernel's own route for fe80::/64 is in the list of all.
        assert!(netlink.routes(None).unwrap().iter().any(|route| route.protocol == 2));
        assert!(run("ip route show proto 104").contains("10.3.129.69 via inet6 fe80::2 dev hth1-0"));
        assert!(run("ip -6 address show dev hth1-0").contains("nodad"));

        // Another next hop replaces the route; an unreachable one, too.
        for instead in [route("10.3.129.69/32", Some("10.9.9.9"), Some(link)), route("10.3.129.69/32", None, None)] {
            let mut batch = Batch::new();
            batch.put_route(instead);
            netlink.run(&batch).unwrap();
            let to = |route: &&Route| route.destination == instead.destination;
            let found = netlink.routes(Some(PROTOCOL)).unwrap();
            assert_eq!(found.iter().filter(to).collect::<Vec<_>>(), [&instead]);
        }
        let via_other = route("fd3c:91aa:7e2:3:0:205:0:5/128", None, None);
        let mut batch = Batch::new();
        batch.put_route(via_other).put_neighbour(neighbour(link, "fe80::2", HOST_MAC));
        netlink.run(&batch).unwrap();
        let found = netlink.routes(Some(PROTOCOL)).unwrap();
        let to: Vec<&Route> = found.iter().filter(|route| route.destination == via_other.destination).collect();
        assert_eq!(to, [&via_other]);
        assert!(netlink.neighbours().unwrap().contains(&neighbour(link, "fe80::2", HOST_MAC)));

        let mut batch = Batch::new();
        found.iter().for_each(|route| {
            batch.delete_route(*route);
        });
        neighbours.iter().for_each(|neighbour| {
            batch.delete_neighbour(*neighbour);
        });
        addresses.iter().for_each(|address| {
            batch.delete_address(*address);
        });
        for _ in 0..2 {
            netlink.run(&batch).unwrap();
            assert_eq!(netlink.routes(Some(PROTOCOL)).unwrap(), []);
            assert_eq!(netlink.neighbours().unwrap(), []);
            assert_eq!(netlink.addresses().unwrap(), []);
        }
        // Also when the link is gone.
        let mut gone = Batch::new();
        gone.delete_link(LinkRef::Index(link));
        netlink.run(&gone).unwrap();
        netlink.run(&batch).unwrap();
    });
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort();
    list
}

#[test]
fn a_vxlan_device_sends_where_it_is_told() {
    on_own_host(|| {
        let mut netlink = Netlink::open().unwrap();
        for (name, local, far) in [("vx4", "10.0.0.1", "10.0.0.2"), ("vx6", "fd00::1", "fd00::2")] {
            let port = if name == "vx4" { 4789 } else { 8472 };
            let new = NewVxlan { name, index: None, mac: HOST_MAC, mtu: 1430, id: 77, local: ip(local), port };
            let mut batch = Batch::new();
            batch.make_vxlan(&new).set_link(LinkRef::Name(name), UP);
            netlink.run(&batch).unwrap();
            let link = netlink.link(name).unwrap().unwrap();
            let facts = link.vxlan.unwrap();
            assert_eq!((facts.id, facts.local, facts.port, facts.learning), (77, Some(ip(local)), port, false));
            assert_eq!(
                (link.kind.as_deref(), link.mtu, link.mac, link.up),
                (Some("vxlan"), 1430, Some(HOST_MAC), true)
            );

            let to = Forwarding { link: link.index, mac: JAIL_MAC, to: ip(far), permanent: true };
            let mut batch = Batch::new();
            batch.put_forwarding(to);
            netlink.run(&batch).unwrap();
            netlink.run(&batch).unwrap();
            let mine =
                |list: Vec<Forwarding>| list.into_iter().filter(|one| one.link == link.index).collect::<Vec<_>>();
            assert_eq!(mine(netlink.forwardings().unwrap()), [to]);
            let elsewhere = Forwarding { to: ip(local), ..to };
            let mut batch = Batch::new();
            batch.put_forwarding(elsewhere);
            netlink.run(&batch).unwrap();
            assert_eq!(mine(netlink.forwardings().unwrap()), [elsewhere]);
            let mut batch = Batch::new();
            batch.delete_forwarding(elsewhere);
            netlink.run(&batch).unwrap();
            netlink.run(&batch).unwrap();
            assert_eq!(mine(netlink.forwardings().unwrap()), []);
        }
    });
}

#[test]
fn every_refusal_is_told_and_the_rest_is_done() {
    on_own_host(|| {
        let mut netlink = Netlink::open().unwrap();
        let mut batch = Batch::new();
        batch
            .add_address(address(99, "10.0.0.1/32"))
            .add_address(address(1, "10.0.0.1/32"))
            .put_route(route("10.9.0.0/16", Some("10.1.1.1"), Some(99)))
            .put_route(Route { onlink: false, ..route("10.8.0.0/16", None, None) });
        let error = netlink.run(&batch).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("2 changes of the network refused, first: add address 10.0.0.1/32 to link 99"), "{text}");
        let whats = refusals(Err(error));
        assert_eq!(whats[0].1, libc::ENODEV);
        assert!(whats[1].0.starts_with("make route 10.9.0.0/16 via 10.1.1.1 on link 99"), "{whats:?}");
        assert_eq!(whats.len(), 2);
        assert!(netlink.addresses().unwrap().contains(&address(1, "10.0.0.1/32")));
        assert_eq!(netlink.routes(Some(PROTOCOL)).unwrap().len(), 1);

        // More than goes into one send; the kernel's words are passed on.
        let mut batch = Batch::new();
        (0..300).for_each(|_| {
            batch.put_route(route("10.7.0.0/16", Some("10.1.1.1"), Some(99)));
        });
        let Err(RunBatchError::Refused(refused)) = netlink.run(&batch) else { panic!("refused") };
        assert_eq!(refused.len(), 300);
        assert!(refused[299].source.to_string().contains("Nexthop"), "{}", refused[299].source);
        netlink.run(&Batch::new()).unwrap();
    });
}

#[test]
fn long_lists_are_read_whole() {
    on_own_host(|| {
        let mut netlink = Netlink::open().unwrap();
        let mut up = Batch::new();
        up.set_link(LinkRef::Name("lo"), LinkChange { up: Some(true), ..LinkChange::default() });
        netlink.run(&up).unwrap();
        let routes: Vec<Route> = (0..3000_u32)
            .map(|n| {
                let destination = std::net::Ipv6Addr::from(0xfd00 << 112 | u128::from(n)).into();
                Route { destination, onlink: false, ..route("::/128", None, Some(1)) }
            })
            .collect();
        let mut batch = Batch::new();
        routes.iter().for_each(|route| {
            batch.put_route(*route);
        });
        netlink.run(&batch).unwrap();
        assert_eq!(sorted(netlink.routes(Some(PROTOCOL)).unwrap()), routes);
    });
}
