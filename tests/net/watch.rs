//! Notices of changes: one comes for every kind of change, none without one, and more than fits is a change too.

use std::os::fd::AsFd;

use hearth::sys::netlink::{Address, Batch, LinkChange, LinkRef, Neighbour, Netlink, Route, RouteKind, Watch};
use hearth::sys::netns;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::host::on_own_host;

fn is_readable(watch: &Watch) -> bool {
    let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

#[test]
fn every_kind_of_change_is_noticed_in_its_namespace_only() {
    on_own_host(|| {
        let (watch, mut netlink) = (Watch::links_and_routes().unwrap(), Netlink::open().unwrap());
        let elsewhere = netns::in_new(|| Watch::links_and_routes().unwrap()).unwrap();
        assert!(!watch.drain().unwrap());
        let (v4, v6) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let route = |destination, prefix_len| Route {
            destination,
            prefix_len,
            kind: RouteKind::Unicast,
            via: None,
            link: Some(1),
            onlink: false,
            protocol: 104,
            metric: 7,
        };
        let neighbour = Neighbour { link: 1, address: v6, mac: Some([2; 6]), permanent: true };
        let changes: [&dyn Fn(&mut Batch<'_>); 9] = [
            &|batch| {
                batch.set_link(LinkRef::Name("lo"), LinkChange { up: Some(true), ..LinkChange::default() });
            },
            &|batch| {
                batch.add_address(Address { link: 1, address: v4, prefix_len: 32 });
            },
            &|batch| {
                batch.add_address(Address { link: 1, address: v6, prefix_len: 128 });
            },
            &|batch| {
                batch.put_route(route("10.2.0.0".parse().unwrap(), 16));
            },
            &|batch| {
                batch.put_route(route("fd01::".parse().unwrap(), 64));
            },
            &|batch| {
                batch.put_neighbour(neighbour);
            },
            &|batch| {
                batch.delete_neighbour(neighbour);
            },
            &|batch| {
                batch.delete_route(route("fd01::".parse().unwrap(), 64));
            },
            &|batch| {
                batch.delete_address(Address { link: 1, address: v4, prefix_len: 32 });
            },
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut batch = Batch::new();
            change(&mut batch);
            netlink.run(&batch).unwrap();
            // The kernel tells before it acknowledges.
            assert!(is_readable(&watch), "change {number}");
            assert!(watch.drain().unwrap(), "change {number}");
        }
        assert!(!watch.drain().unwrap());
        assert!(!elsewhere.drain().unwrap());
    });
}

#[test]
fn more_than_the_socket_holds_is_a_change_and_not_an_error() {
    on_own_host(|| {
        let (watch, mut netlink) = (Watch::links_and_routes().unwrap(), Netlink::open().unwrap());
        let mut batch = Batch::new();
        for n in 0..2000_u32 {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + n).into();
            batch.add_address(Address { link: 1, address, prefix_len: 32 });
        }
        netlink.run(&batch).unwrap();
        assert!(watch.drain().unwrap());
        while watch.drain().unwrap() {}
        assert!(!is_readable(&watch));
    });
}
