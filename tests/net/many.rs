//! Many networks, set up and taken down at once: nothing is left of them, as iproute2 and nft see it.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use hearth::clock::{Clock, SystemClock};
use hearth::net::address::V4Net;
use hearth::net::member::{Addressing, EgressRule, Member, Net, PublishedPort};

use crate::host::on_own_host;
use crate::left::{assert_same, look};
use crate::world::{World, assert_done, member};

/// Sessions.
const SESSIONS: u16 = 10;

/// VMs of each session on each of two hosts, and a fifth on one of them.
const VMS: u16 = 50;

/// Networks that are worked at together on one host.
const AT_ONCE: usize = 4;

/// The VM of a number: its host, its jail's number there, and who it is. All that a session can be asked for is in one
/// or the other.
fn vm(number: u16) -> (usize, u16, Member) {
    let (session, of_session) = (number % SESSIONS, number / SESSIONS);
    let host = usize::from(of_session % 2);
    let mode = if session % 2 == 0 { Addressing::Guest } else { Addressing::Invariant };
    let mut member = member(crate::world::NUMBERS[host], 500 + u32::from(session), u32::from(of_session) + 1, mode);
    if let Some(addresses) = &mut member.session {
        let to = Net::V4(V4Net { first: [198, 51, 100, 0].into(), bits: 24 });
        addresses.egress = vec![EgressRule { to, protocol: Some(6), ports: Some((80, 90)) }];
        addresses.nat = session % 3 == 0;
        addresses.published = vec![PublishedPort { protocol: 17, host_port: 4000 + number, guest_port: 7 }];
    }
    (host, number, member)
}

/// Does `work` for every VM, in `order`, some at once; what each took, in order of length.
fn for_all(order: impl Iterator<Item = u16>, work: impl Fn(u16) + Sync) -> Vec<Duration> {
    let (clock, took) = (SystemClock::new(), Mutex::new(Vec::new()));
    let order: Vec<u16> = order.collect();
    thread::scope(|scope| {
        for part in order.chunks(order.len().div_ceil(AT_ONCE)) {
            let (work, took) = (&work, &took);
            scope.spawn(move || {
                for number in part {
                    let start = clock.monotonic();
                    work(*number);
                    took.lock().unwrap().push(clock.monotonic().since(start));
                }
            });
        }
    });
    let mut took = took.into_inner().unwrap();
    took.sort();
    took
}

#[test]
fn fifty_networks_in_ten_sessions_leave_nothing() {
    on_own_host(|| {
        let world = World::new();
        let looks = || world.hosts.iter().map(|host| look(&host.namespace)).collect::<Vec<_>>();
        let before = looks();
        let network = |host: usize| &world.hosts[host].network;
        let up = for_all(0..VMS, |number| {
            let (host, jail, member) = vm(number);
            assert_done(&network(host).settle_jail(jail, 1, None).unwrap());
            assert_done(&network(host).settle_jail(jail, 1, Some(member)).unwrap());
        });
        let there: usize = world.hosts.iter().map(|host| host.network.jails().unwrap().len()).sum();
        assert_eq!(there, usize::from(VMS));
        let with_all = looks();
        for (host, _, member) in (0..VMS).map(vm) {
            let address = member.session.expect("a member").v6.to_string();
            assert!(with_all[host].iter().any(|line| line.contains(&address)), "no route to {address}");
        }
        // In another order than they came.
        let down = for_all((0..VMS).map(|number| number * 7 % VMS), |number| {
            let (host, jail, _) = vm(number);
            assert_done(&network(host).remove_jail(jail));
        });
        let after = looks();
        for (before, after) in before.iter().zip(&after) {
            assert_same(before, after, "all are taken down");
        }
        for host in &world.hosts {
            assert_done(&host.network.clear_host());
        }
        for line in looks().iter().flatten() {
            let ours = ["hth", "fd3c:91aa:7e2", "nft"];
            assert!(!ours.iter().any(|word| line.contains(word)), "{line}");
        }
        for (what, took) in [("set up", up), ("taken down", down)] {
            println!(
                "{what}, {AT_ONCE} at once: p50 {:.1?}, longest {:.1?}",
                took[took.len() / 2],
                took[took.len() - 1]
            );
        }
    });
}
