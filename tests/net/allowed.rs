//! What may pass, passes: members of a session on one host and on two, both families, whole and in fragments, in both
//! addressing modes, with nothing but hop limits and translated addresses changed; gateways and metadata answer.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use hearth::net::member::{Addressing, GATEWAY_V4, GATEWAY_V6, METADATA_V4, METADATA_V6, TAP_MAC};
use hearth::sys::netns;
use hearth_guest_probe::frames::{
    ARP_REQUEST, BROADCAST, Ipv4, arp, echo, ethernet, ethertype, icmp, icmpv6, ipv6, ipv6_fragments,
    neighbour_solicitation, protocol, tcp_syn, udp,
};
use nix::net::if_::if_nametoindex;

use crate::guest::{Guest, succeeds};
use crate::host::{on_own_host, run};
use crate::sniff::has;
use crate::tap_end::TapEnd;
use crate::world::{Vm, World, assert_done};

const X: u32 = 517;

/// Longest wait of a socket.
const WAIT: Duration = Duration::from_secs(5);

/// An IP packet as it is after some hops, and with the addresses of another: all but what routers change.
fn rewritten(packet: &[u8], hops: u8, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut packet = packet.to_vec();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[8] -= hops;
            packet[10..12].fill(0);
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
            let sum = hearth_guest_probe::frames::checksum(&[&packet[..20]]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[7] -= hops;
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        _ => panic!("two families"),
    }
    packet
}

/// Packets of both families, from an address to another as given; whole, of 1,400 bytes, and in fragments.
fn packets((from4, to4): (Ipv4Addr, Ipv4Addr), (from6, to6): (Ipv6Addr, Ipv6Addr)) -> Vec<Vec<u8>> {
    let sockets4 = (SocketAddr::from((from4, 1000)), SocketAddr::from((to4, 2000)));
    let sockets6 = (SocketAddr::from((from6, 1000)), SocketAddr::from((to6, 2000)));
    let (short, long) = (b"untouched;".to_vec(), b"untouched;".repeat(140));
    let huge = b"untouched;".repeat(400);
    let v4 = |number| Ipv4::new(from4, to4, number);
    let mut all = vec![
        v4(protocol::UDP).packet(&udp(sockets4.0, sockets4.1, &short)),
        v4(protocol::UDP).packet(&udp(sockets4.0, sockets4.1, &long)),
        v4(protocol::TCP).packet(&tcp_syn(sockets4.0, sockets4.1, &short)),
        v4(protocol::ICMP).packet(&icmp(8, 0, &echo(1, 2, &long))),
        ipv6(from6, to6, protocol::UDP, &udp(sockets6.0, sockets6.1, &short)),
        ipv6(from6, to6, protocol::UDP, &udp(sockets6.0, sockets6.1, &long)),
        ipv6(from6, to6, protocol::TCP, &tcp_syn(sockets6.0, sockets6.1, &short)),
        ipv6(from6, to6, protocol::ICMPV6, &icmpv6(from6, to6, (128, 0), &echo(1, 2, &long))),
    ];
    all.extend(v4(protocol::UDP).fragments(0x77, &udp(sockets4.0, sockets4.1, &huge), 1400));
    all.extend(ipv6_fragments(from6, to6, protocol::UDP, (0x77, &udp(sockets6.0, sockets6.1, &huge)), 1400));
    all
}

/// What is sent by one arrives at the other: with both as they see themselves, although sent to where others see them.
fn assert_passes(from: &(Vm, TapEnd), to: &(Vm, TapEnd), hops: u8) {
    let (sender, receiver) = (from.0.inner(), to.0.outer());
    let sent = packets((sender.v4.unwrap(), receiver.v4.unwrap()), (sender.v6, receiver.v6));
    let (seen, own) = (from.0.outer(), to.0.inner());
    // Built with the addresses as they arrive: checksums included, translation is by the book.
    let arriving = packets((seen.v4.unwrap(), own.v4.unwrap()), (seen.v6, own.v6));
    for (packet, arriving) in sent.iter().zip(arriving) {
        from.1.send(&from.1.framed(&from.0.member, packet));
        let came = to.1.wait_for(|frame| has(frame, "untouched;")).expect("it arrives");
        let (from, to): (IpAddr, IpAddr) = match packet[0] >> 4 {
            4 => (seen.v4.unwrap().into(), own.v4.unwrap().into()),
            _ => (seen.v6.into(), own.v6.into()),
        };
        let expected = rewritten(&arriving, hops, from, to);
        assert_eq!(came, ethernet(came[..6].try_into().unwrap(), TAP_MAC, kind(packet), &expected));
    }
}

fn kind(packet: &[u8]) -> u16 {
    if packet[0] >> 4 == 4 { ethertype::IPV4 } else { ethertype::IPV6 }
}

fn session_passes(vxlan: bool, modes: [Addressing; 3]) {
    let mut world = World::over(vxlan);
    let mut vm = |host, mode| {
        let vm = world.vm(host, X, mode);
        let tap = world.tap(&vm);
        (vm, tap)
    };
    let (one, near, far) = (vm(0, modes[0]), vm(0, modes[1]), vm(1, modes[2]));
    // Jail, host, jail; and a host more.
    for (from, to, hops) in [(&one, &near, 3), (&near, &one, 3), (&one, &far, 4), (&far, &one, 4)] {
        assert_passes(from, to, hops);
        assert_eq!(to.1.take_with("untouched;"), [[0; 0]; 0], "once each");
    }
    for vm in [&one.0, &near.0, &far.0] {
        assert_eq!(world.drops(vm), [0; 3]);
    }
}

#[test]
fn a_session_talks_within_a_host_and_between_hosts() {
    on_own_host(|| session_passes(false, [Addressing::Guest; 3]));
}

#[test]
fn a_session_talks_whatever_its_members_call_themselves() {
    on_own_host(|| session_passes(false, [Addressing::Invariant, Addressing::Invariant, Addressing::Guest]));
}

#[test]
fn a_session_talks_over_vxlan() {
    on_own_host(|| session_passes(true, [Addressing::Guest, Addressing::Guest, Addressing::Invariant]));
}

/// On another host with the addresses it has: all who reached it reach it, and it reaches them; and so they do when it is
/// back.
fn who_moves_is_reached(vxlan: bool, mode: Addressing) {
    let mut world = World::over(vxlan);
    let mut vm = |host, mode| {
        let vm = world.vm(host, X, mode);
        let tap = world.tap(&vm);
        (vm, tap)
    };
    let (mover, near, far) = (vm(0, mode), vm(0, Addressing::Guest), vm(1, Addressing::Guest));
    assert_passes(&near, &mover, 3);
    let (home, tap) = mover;
    drop(tap);
    for round in 0..2 {
        let there = world.move_to(1, &home);
        let moved = (there.clone(), world.tap(&there));
        for (from, to, hops) in [(&near, &moved, 4), (&moved, &near, 4), (&far, &moved, 3), (&moved, &far, 3)] {
            assert_passes(from, to, hops);
        }
        assert_eq!(world.drops(&moved.0), [0; 3], "round {round}");
        // What others do to the host's routes is put right, as everything of ours is.
        run(&format!("ip -n host3 -6 route del {}/128", home.outer().v6));
        let healed = world.hosts[0].network.settle_host();
        assert_done(&healed);
        assert_passes(&near, &moved, 4);
        drop(moved);
        world.back_to(&home, &there);
        let back = (home.clone(), world.tap(&home));
        for (from, to, hops) in [(&near, &back, 3), (&back, &near, 3), (&far, &back, 4), (&back, &far, 4)] {
            assert_passes(from, to, hops);
        }
    }
    // Forgotten while it is away: nothing leads anywhere.
    let there = world.move_to(1, &home);
    assert_done(&world.hosts[0].network.remove_jail(home.jail));
    assert_eq!(run(&format!("ip -n host3 -6 route show {}/128", home.outer().v6)), "");
    assert_done(&world.hosts[1].network.remove_jail(there.jail));
}

#[test]
fn who_moves_to_another_host_is_reached_there() {
    on_own_host(|| who_moves_is_reached(false, Addressing::Guest));
}

#[test]
fn who_moves_to_another_host_is_reached_there_over_vxlan() {
    on_own_host(|| who_moves_is_reached(true, Addressing::Invariant));
}

/// Numbers of the packets that wait in a tap, in their order.
fn numbers(tap: &TapEnd) -> Vec<u32> {
    let number = |frame: Vec<u8>| {
        let text = String::from_utf8_lossy(&frame).into_owned();
        text.split("number;").nth(1)?.split(';').next()?.parse().ok()
    };
    std::iter::from_fn(|| tap.take()).filter_map(number).collect()
}

/// While a VM moves, packets to it come all the time. Each of them waits where it was, or where it is.
fn none_is_lost_to_who_moves(vxlan: bool) {
    let mut world = World::over(vxlan);
    let (home, near) = (world.vm(0, X, Addressing::Guest), world.vm(0, X, Addressing::Guest));
    let (tap, sender) = (world.tap(&home), world.tap(&near));
    // The hosts know each other, as those do whose agents speak.
    let far = world.vm(1, X, Addressing::Guest);
    let (near, far) = ((near, sender), (far.clone(), world.tap(&far)));
    assert_passes(&near, &far, 4);
    let (near, sender) = near;
    let there = world.vm_of(1, home.member.clone());
    let there_tap = world.tap(&there);
    let (from, to) = (near.inner().v6, home.outer().v6);
    let member = near.member.clone();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let network = &world.hosts[0].network;
    let addresses = [home.outer().v6.into(), home.outer().v4.unwrap().into()];
    let (sent, mut came) = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut number = 0_u32;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                let text = format!("number;{number};");
                let datagram = udp(SocketAddr::from((from, 7000)), SocketAddr::from((to, 7000)), text.as_bytes());
                sender.send(&sender.framed(&member, &ipv6(from, to, protocol::UDP, &datagram)));
                number += 1;
                thread::sleep(Duration::from_micros(100));
            }
            number
        });
        tap.wait_for(|frame| has(frame, "number;20;")).expect("they come");
        let mut came = numbers(&tap);
        assert_done(&network.lead_elsewhere(home.jail, 1, &addresses, world.hosts[1].number.try_into().unwrap()));
        // As the VMM sends them after it: none comes any more.
        came.extend(numbers(&tap));
        assert_done(&network.leave_jail(home.jail));
        thread::sleep(Duration::from_millis(20));
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        (sending.join().unwrap(), came)
    });
    for _ in 0..500 {
        came.extend(numbers(&there_tap));
        if came.last() == Some(&(sent - 1)) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    // The twenty that were waited for were taken out one by one.
    let first = came.first().copied().unwrap();
    assert!(first <= 21, "{first}");
    assert_eq!(came, (first..sent).collect::<Vec<_>>(), "each once, in order");
    assert_done(&world.hosts[0].network.remove_jail(home.jail));
}

#[test]
fn no_packet_is_lost_to_who_moves() {
    on_own_host(|| none_is_lost_to_who_moves(false));
}

#[test]
fn no_packet_is_lost_to_who_moves_over_vxlan() {
    on_own_host(|| none_is_lost_to_who_moves(true));
}

#[test]
fn a_vm_is_led_to_no_stranger() {
    on_own_host(|| {
        let mut world = World::new();
        let vm = world.vm(0, X, Addressing::Guest);
        let stranger = 99_u16.try_into().unwrap();
        let settled = world.hosts[0].network.lead_elsewhere(vm.jail, 1, &[vm.outer().v6.into()], stranger);
        assert!(settled.failures[0].what.contains("no peer"), "{settled:?}");
        // It is where it was.
        assert!(world.hosts[0].network.jails().unwrap().contains(&vm.jail));
    });
}

#[test]
fn the_gateways_answer_who_they_are_and_nobody_else_does() {
    on_own_host(|| {
        let mut world = World::new();
        let (vm, other) = (world.vm(0, X, Addressing::Guest), world.vm(0, X, Addressing::Guest));
        let tap = world.tap(&vm);
        let (own, mac) = (vm.inner(), vm.member.mac);
        // To the group of the target, as a kernel asks that knows nothing yet (RFC 4291 section 2.7.1).
        let solicit = |target: Ipv6Addr| {
            let [.., a, b, c] = target.octets();
            let [ab, cd] = [[0xff, a], [b, c]].map(u16::from_be_bytes);
            let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, ab, cd);
            let body = neighbour_solicitation(target, mac);
            let mut packet = ipv6(own.v6, to, protocol::ICMPV6, &icmpv6(own.v6, to, (135, 0), &body));
            packet[7] = 255;
            ethernet([0x33, 0x33, 0xff, a, b, c], mac, ethertype::IPV6, &packet)
        };
        let who_has = |target: Ipv4Addr| {
            let question = arp(ARP_REQUEST, (mac, own.v4.unwrap()), ([0; 6], target));
            ethernet(BROADCAST, mac, ethertype::ARP, &question)
        };
        let is_answer = |frame: &[u8]| match u16::from_be_bytes([frame[12], frame[13]]) {
            ethertype::ARP => frame[21] == 2,
            ethertype::IPV6 => frame[20] == protocol::ICMPV6 && frame[54] == 136,
            _ => false,
        };
        for question in
            [who_has(other.outer().v4.unwrap()), who_has([198, 51, 100, 1].into()), who_has(own.v4.unwrap())]
        {
            tap.send(&question);
        }
        for question in [other.outer().v6, own.v6, "2001:db8:51::1".parse().unwrap()] {
            tap.send(&solicit(question));
        }
        // In order: were there an answer to one of those, it would come first.
        for (question, target) in [(who_has(GATEWAY_V4), GATEWAY_V4), (who_has(METADATA_V4), METADATA_V4)] {
            tap.send(&question);
            let answer = tap.wait_for(is_answer).expect("an answer");
            assert_eq!(answer[22..32], [&TAP_MAC[..], &target.octets()].concat());
        }
        for target in [GATEWAY_V6, METADATA_V6] {
            tap.send(&solicit(target));
            let answer = tap.wait_for(is_answer).expect("an answer");
            assert_eq!(answer[62..78], target.octets());
            assert_eq!(answer[80..86], TAP_MAC);
        }
        assert_eq!(world.drops(&vm), [0; 3]);
    });
}

/// Sends what comes back to where it came from, until the other end is closed.
fn echo_once(listener: &TcpListener) -> SocketAddr {
    let (mut stream, from) = listener.accept().unwrap();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    let mut came = Vec::new();
    stream.read_to_end(&mut came).unwrap();
    stream.write_all(&came).unwrap();
    from
}

/// Whether what is sent comes back.
fn comes_back(to: SocketAddr, text: &[u8]) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&to, WAIT) else { return false };
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.write_all(text).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).is_ok() && back == text
}

/// A UDP socket of the family of an address.
fn any_socket(to: IpAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).unwrap()
}

/// TCP, UDP and ICMP between two kernels.
fn talk(from: &Guest, to: &Guest) {
    let addresses: [IpAddr; 2] = [to.vm.outer().v6.into(), to.vm.outer().v4.unwrap().into()];
    let own: [IpAddr; 2] = [to.vm.inner().v6.into(), to.vm.inner().v4.unwrap().into()];
    let seen: [IpAddr; 2] = [from.vm.outer().v6.into(), from.vm.outer().v4.unwrap().into()];
    for ((address, own), seen) in addresses.into_iter().zip(own).zip(seen) {
        let (listener, receiver) =
            to.within(|| (TcpListener::bind((own, 7)).unwrap(), UdpSocket::bind((own, 9)).unwrap()));
        let text = b"a stream of text ".repeat(20_000);
        thread::scope(|scope| {
            let server = scope.spawn(|| echo_once(&listener));
            assert!(from.within(|| comes_back((address, 7).into(), &text)), "TCP to {address}");
            assert_eq!(server.join().unwrap().ip(), seen);
        });
        receiver.set_read_timeout(Some(WAIT)).unwrap();
        // Whole, as long as a frame takes, and in fragments.
        for bytes in [10, 1400, 4000] {
            let sent: Vec<u8> = (0_u32..bytes).map(|n| n.to_le_bytes()[0]).collect();
            from.within(|| {
                any_socket(address).send_to(&sent, (address, 9)).unwrap();
            });
            let mut came = [0; 8192];
            let (length, sender) = receiver.recv_from(&mut came).unwrap();
            assert_eq!((&came[..length], sender.ip()), (&sent[..], seen), "{bytes} bytes to {address}");
        }
        for bytes in ["56", "4000"] {
            let words = format!("ping -c 1 -W 5 -s {bytes} {address}");
            assert!(from.within(|| succeeds(&words)), "{words}");
        }
    }
}

fn kernels_talk(modes: [Addressing; 3]) {
    let mut world = World::new();
    let [one, near, far] = [(0, modes[0]), (0, modes[1]), (1, modes[2])].map(|(host, mode)| {
        let vm = world.vm(host, X, mode);
        Guest::start(&world, vm)
    });
    for (from, to) in [(&one, &near), (&one, &far), (&far, &one)] {
        talk(from, to);
    }
    // Session traffic owes nothing to connection tracking, in jails and hosts.
    let places = world.hosts.iter().map(|host| host.namespace.try_clone().unwrap());
    let jails = [&one, &near, &far].map(|guest| world.jail(&guest.vm));
    for place in places.chain(jails) {
        let tracked = netns::in_fd(&place, || std::fs::read_to_string("/proc/thread-self/net/nf_conntrack")).unwrap();
        // The gateway's own answers to the first pings are tracked.
        let tracked = tracked.unwrap();
        let others: Vec<&str> = tracked.lines().filter(|line| !line.contains("type=129")).collect();
        assert_eq!(others, [""; 0]);
    }
}

#[test]
fn kernels_talk_as_guests_of_a_session() {
    on_own_host(|| kernels_talk([Addressing::Guest; 3]));
}

#[test]
fn kernels_talk_as_guests_with_translated_addresses() {
    on_own_host(|| kernels_talk([Addressing::Invariant, Addressing::Guest, Addressing::Invariant]));
}

fn metadata_answers(mode: Addressing) {
    let mut world = World::new();
    let vm = world.vm(0, X, mode);
    let jail = world.jail(&vm);
    let guest = Guest::start(&world, vm);
    let (v4, v6, _other) = netns::in_fd(&jail, || {
        let v6 = SocketAddrV6::new(METADATA_V6, 80, 0, if_nametoindex("tap0").unwrap());
        let all = UdpSocket::bind("[::]:81").unwrap();
        (TcpListener::bind((METADATA_V4, 80)).unwrap(), TcpListener::bind(v6).unwrap(), all)
    })
    .unwrap();
    thread::scope(|scope| {
        scope.spawn(|| echo_once(&v4));
        scope.spawn(|| echo_once(&v6));
        guest.within(|| {
            assert!(comes_back((METADATA_V4, 80).into(), b"who am I?"));
            let v6 = SocketAddrV6::new(METADATA_V6, 80, 0, if_nametoindex("eth0").unwrap());
            assert!(comes_back(v6.into(), b"who am I?"));
        });
    });
    let before = world.drops(&guest.vm);
    // One packet each: other ports of the jail, and its host's own addresses.
    let number = world.hosts[0].number;
    let elsewhere: [(IpAddr, u16); 5] = [
        (METADATA_V4.into(), 81),
        (GATEWAY_V4.into(), 80),
        ([198, 51, 100, 3].into(), 22),
        (format!("2001:db8:51::{number}").parse().unwrap(), 22),
        (format!("fd00:f::{number}").parse().unwrap(), 22),
    ];
    guest.within(|| {
        for to in elsewhere {
            any_socket(to.0).send_to(b"?", to).unwrap();
        }
    });
    // It comes after them, and is answered.
    assert!(guest.within(|| succeeds(&format!("ping -c 1 -W 5 {GATEWAY_V4}"))));
    let after = world.drops(&guest.vm);
    assert_eq!([0, 1, 2].map(|reason| after[reason] - before[reason]), [0, 0, 5]);
}

#[test]
fn a_guest_reaches_metadata_and_not_its_host() {
    on_own_host(|| metadata_answers(Addressing::Guest));
}

#[test]
fn a_guest_with_translated_addresses_reaches_metadata_and_not_its_host() {
    on_own_host(|| metadata_answers(Addressing::Invariant));
}

/// The kernel of a jail tells a link which groups it listens to, whenever that comes up, within a second (RFC 3810,
/// section 9.11). A VM that sleeps until its first packet would be woken by whoever opens its tap.
#[test]
fn whoever_opens_a_tap_hears_nothing_of_the_jail_itself() {
    /// More than a second.
    const WITHIN_MS: u16 = 1_500;
    on_own_host(|| {
        let mut world = World::new();
        let vm = world.vm(0, 517, Addressing::Guest);
        for time in 0..3 {
            let tap = TapEnd::attach(&world.jail(&vm), "tap0");
            let heard = tap.wait_within(WITHIN_MS, |_| true);
            assert_eq!(heard, None, "the {time}. time");
        }
    });
}
