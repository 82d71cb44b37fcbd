//! How long the steps of a VM's network take, 200 times each in a release build; `--nocapture` shows the figures. Only
//! the goal for set elements (1 ms) is a law: the kernel's side of the others depends on what else the machine does.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use hearth::clock::{Clock, SystemClock};
use hearth::sys::netlink::{
    Address, Batch, LinkChange, LinkRef, Neighbour, Netlink, NewVeth, Route, RouteKind, VethPeer, Watch,
};
use hearth::sys::nft::{self, Element, ElementBatch, Family, Nft, Table};
use hearth::sys::{netns, tap};

use nix::poll::{PollFd, PollFlags, poll};

use crate::host::on_own_host;

const ROUNDS: u16 = if cfg!(debug_assertions) { 30 } else { 200 };

const MAC: [u8; 6] = [2, 0x68, 0x74, 0x68, 0, 2];

const UP: LinkChange = LinkChange { mac: None, mtu: None, up: Some(true), no_own_address: true };

/// What each round of `work` took, in order of length.
fn measure(what: &str, mut work: impl FnMut(u16)) -> Vec<Duration> {
    let clock = SystemClock::new();
    let mut took: Vec<Duration> = (0..ROUNDS)
        .map(|round| {
            let start = clock.monotonic();
            work(round);
            clock.monotonic().since(start)
        })
        .collect();
    took.sort();
    let at = |hundredths: usize| took[(took.len() - 1) * hundredths / 100];
    println!("{what:<44} p50 {:>10.1?}  p99 {:>10.1?}", at(50), at(99));
    took
}

/// A jail's addresses, neighbours and routes on the host's end: six requests.
fn six(link: u32, round: u16) -> Batch<'static> {
    let [high, low] = round.to_be_bytes();
    let gateway = "fe80::2".parse().unwrap();
    let v6 = std::net::Ipv6Addr::new(0xfd3c, 0x91aa, 0x7e2, 3, 0, 0x205, 0, round).into();
    let v4 = std::net::Ipv4Addr::new(10, 3, high, low).into();
    let route = |destination, prefix_len| Route {
        destination,
        prefix_len,
        kind: RouteKind::Unicast,
        via: Some(gateway),
        link: Some(link),
        onlink: true,
        protocol: 104,
        metric: 1024,
    };
    let neighbour = |address| Neighbour { link, address, mac: Some(MAC), permanent: true };
    let mut batch = Batch::new();
    batch.put_neighbour(neighbour(gateway)).put_neighbour(neighbour(v6)).put_neighbour(neighbour(v4));
    batch.put_route(route(v6, 128)).put_route(route(v4, 32));
    batch.add_address(Address { link, address: "fe80::1".parse().unwrap(), prefix_len: 64 });
    batch
}

/// As long as a jail's ruleset: 40 lines.
fn rules() -> String {
    let mut rules = String::from("table inet hearth\ndelete table inet hearth\ntable inet hearth {\n");
    for set in 0..8 {
        rules += &format!("set own6_{set} {{ type ipv6_addr; }}\ncounter drops_{set} {{ }}\n");
    }
    rules += "chain cross {\ntype filter hook forward priority filter; policy drop;\n";
    for set in 0..8 {
        rules += &format!("iifname \"tap0\" ip6 saddr != @own6_{set} counter name drops_{set} drop\n");
        rules +=
            &format!("oifname \"tap0\" ip6 daddr @own6_{set} ip6 saddr & ffff:ffff:ffff:: == fd3c:91aa:7e2:: accept\n");
    }
    rules + "}\n}\n"
}

/// Until something changes, for 30 s at most.
fn wait(watch: &Watch) {
    let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 30_000_u16).unwrap(), 1, "nothing changes any more");
    watch.drain().unwrap();
}

#[test]
fn the_steps_of_a_network_are_fast() {
    on_own_host(|| {
        let names: Vec<String> = (0..ROUNDS).map(|round| format!("hth1-{round}")).collect();
        let mut jails: Vec<OwnedFd> = Vec::new();
        measure("make a named namespace", |round| {
            jails.push(netns::create_named(&names[usize::from(round)]).unwrap());
        });
        let mut here = Netlink::open().unwrap();
        measure("make a veth with its peer in a namespace, up", |round| {
            let (name, jail) = (&names[usize::from(round)], &jails[usize::from(round)]);
            let namespace = Some(jail.as_fd());
            let peer = VethPeer { name: "up0", index: Some(2), mac: MAC, namespace };
            let mut batch = Batch::new();
            batch.make_veth(&NewVeth { name, index: None, mac: MAC, mtu: 1430, peer });
            batch.set_link(LinkRef::Name(name), UP);
            here.run(&batch).unwrap();
        });
        measure("enter a namespace, open netlink, peer up", |round| {
            let inside = || {
                let mut batch = Batch::new();
                batch.set_link(LinkRef::Index(2), UP);
                Netlink::open().unwrap().run(&batch).unwrap();
            };
            netns::in_fd(&jails[usize::from(round)], inside).unwrap();
        });
        let link = here.link(&names[0]).unwrap().unwrap().index;
        measure("six routes, neighbours and an address", |round| here.run(&six(link, round)).unwrap());
        measure("a link by its name", |round| drop(here.link(&names[usize::from(round)]).unwrap()));
        measure("list two routes per round", |_| {
            assert_eq!(here.routes(Some(104)).unwrap().len(), 2 * usize::from(ROUNDS));
        });
        measure("a persistent tap in a namespace", |round| {
            let make = || tap::set_persistent(&tap::open("tap0").unwrap(), true).unwrap();
            netns::in_fd(&jails[usize::from(round)], make).unwrap();
        });
        let rules = rules();
        assert_eq!(rules.lines().count(), 39);
        let mut jail_rules = Vec::new();
        measure("load 40 lines of rules by nft", |round| {
            let inside = || {
                nft::load(&rules).unwrap();
                Nft::open().unwrap()
            };
            jail_rules.push(netns::in_fd(&jails[usize::from(round)], inside).unwrap());
        });
        let table = Table { family: Family::Inet, name: "hearth" };
        let own = Element { key: vec![7; 16], key_end: None, value: None };
        let took = measure("one batch of elements of 4 sets", |round| {
            let mut batch = ElementBatch::new();
            batch.add(table, "own6_0", &own).add(table, "own6_1", &own);
            batch.add(table, "own6_2", &own).add(table, "own6_3", &own);
            jail_rules[usize::from(round)].run(&batch).unwrap();
        });
        assert!(took[took.len() / 2] < Duration::from_millis(1), "goal of a set update: 1 ms; median {took:?}");
        measure("counters of a table", |round| {
            assert_eq!(jail_rules[usize::from(round)].counters(table).unwrap().len(), 8);
        });
        drop((jails, jail_rules));
        let (by_link, with_namespace) = names.split_at(names.len() / 2);
        let clock = SystemClock::new();
        let start = clock.monotonic();
        for name in by_link {
            let mut batch = Batch::new();
            batch.delete_link(LinkRef::Name(name));
            here.run(&batch).unwrap();
        }
        println!("delete {} veths one by one {:?}", by_link.len(), clock.monotonic().since(start));
        let start = clock.monotonic();
        let watch = Watch::links_and_routes().unwrap();
        measure("delete a named namespace", |round| netns::delete_named(&names[usize::from(round)]).unwrap());
        // The kernel takes the rest apart by itself, veths and all.
        while with_namespace.iter().any(|name| here.link(name).unwrap().is_some()) {
            wait(&watch);
        }
        println!("delete {} with their namespaces {:?}", with_namespace.len(), clock.monotonic().since(start));
        assert_eq!(netns::list_named("").unwrap(), [""; 0]);
    });
}
