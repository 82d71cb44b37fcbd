//! What a guest with root may send, through the real tap into a real jail: none of it gets out, and it is counted for
//! what it is.

use std::cell::RefCell;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hearth::net::member::{Addressing, GATEWAY_V4, GATEWAY_V6, Member, TAP_MAC, link_local};
use hearth::sys::netns;
use hearth_guest_probe::forge::{Kind, Party, Scene, frames};
use hearth_guest_probe::frames::{Fragment, Ipv4, icmpv6, ipv6, neighbour_solicitation, protocol, udp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::host::{on_own_host, run};
use crate::sniff::{RawPackets, Sniffer, has};
use crate::tap_end::TapEnd;
use crate::world::{Vm, World, assert_done};

/// Session of the attacker.
const X: u32 = 517;

/// Session of the victims.
const Y: u32 = 518;

/// An attacker and its friends and victims, on both hosts, with everybody heard.
pub(crate) struct Scenery {
    pub(crate) world: World,
    pub(crate) attacker: (Vm, TapEnd),
    pub(crate) friends: [(Vm, TapEnd); 2],
    pub(crate) victims: [(Vm, TapEnd); 2],
    sniffers: Vec<(String, Sniffer)>,
    barriers: u32,
}

impl Scenery {
    pub(crate) fn new(addressing: Addressing) -> Self {
        let mut world = World::new();
        let mut vm = |host, session| {
            let vm = world.vm(host, session, addressing);
            let tap = world.tap(&vm);
            (vm, tap)
        };
        let attacker = vm(0, X);
        let friends = [vm(0, X), vm(1, X)];
        let victims = [vm(0, Y), vm(1, Y)];
        let sniffers = world.sniffers();
        let mut scenery = Self { world, attacker, friends, victims, sniffers, barriers: 0 };
        scenery.barrier();
        scenery
    }

    /// Waits until all that the attacker sent before has gone where it goes: what it sends now to both friends has come.
    pub(crate) fn barrier(&mut self) {
        self.barriers += 1;
        let text = format!("barrier {};", self.barriers);
        let (vm, tap) = &self.attacker;
        let from = vm.inner().v6;
        for (friend, their_tap) in &self.friends {
            let to = friend.outer().v6;
            let datagram = udp((from, 1).into(), (to, 2).into(), text.as_bytes());
            tap.send(&tap.framed(&vm.member, &ipv6(from, to, protocol::UDP, &datagram)));
            let came = their_tap.wait_for(|frame| has(frame, &text));
            assert!(came.is_some(), "a friend got no {text}");
        }
    }

    /// Who heard frames with this text, and how many.
    pub(crate) fn heard(&self, marker: &str) -> Vec<(String, usize)> {
        let taps = self.victims.iter().map(|(vm, tap)| (format!("victim {}", vm.host), tap.take_with(marker).len()));
        let sniffers = self.sniffers.iter().map(|(name, sniffer)| (name.clone(), sniffer.heard_with(marker).len()));
        taps.chain(sniffers).filter(|(_, count)| *count > 0).collect()
    }

    fn drops(&self) -> [u64; 3] {
        self.world.drops(&self.attacker.0)
    }

    fn drops_since(&self, before: [u64; 3]) -> [u64; 3] {
        let after = self.drops();
        [0, 1, 2].map(|reason| after[reason] - before[reason])
    }

    /// Sends frames as the attacker, and says what was counted when all of them are where they go.
    fn send(&mut self, frames: &[Vec<u8>]) -> [u64; 3] {
        let before = self.drops();
        frames.iter().for_each(|frame| self.attacker.1.send(frame));
        self.barrier();
        self.drops_since(before)
    }

    /// Who is who, for an attack on one of the victims in the name of the other.
    pub(crate) fn scene(&self, victim: usize, own: Party, marker: &str) -> Scene {
        Scene {
            mac: self.attacker.0.member.mac,
            gateway_mac: TAP_MAC,
            own,
            other: self.victims[1 - victim].0.outer(),
            victim: self.victims[victim].0.outer(),
            marker: marker.to_owned(),
        }
    }
}

/// What becomes of the frames of a kind: how many there are, and how many of them are counted as forged, as for another
/// session, as not allowed. The kernel refuses the others itself, or puts them together and does not get to the end.
const FATES: [(Kind, usize, [u64; 3]); 24] = [
    // From the own address: nothing forged, only to another session.
    (Kind::Honest, 6, [0, 6, 0]),
    (Kind::Source, 18, [18, 0, 0]),
    // From ::1 and from a group, IPv6 drops them before any rule.
    (Kind::OddSource, 10, [8, 0, 0]),
    (Kind::Mac, 24, [24, 0, 0]),
    (Kind::Arp, 24, [24, 0, 0]),
    // From the own address: advertisements and solicitations are read and change nothing, router advertisements and
    // redirects are not allowed.
    (Kind::Neighbour, 48, [24, 0, 12]),
    (Kind::FragmentFirst, 3, [3, 0, 0]),
    (Kind::FragmentRest, 4, [4, 0, 0]),
    // From the own address are the first fragments of packets that never get whole.
    (Kind::FragmentOverlap, 12, [10, 0, 0]),
    (Kind::HopByHop, 4, [4, 0, 0]),
    (Kind::Routing0, 6, [6, 0, 0]),
    (Kind::Routing2, 6, [6, 0, 0]),
    (Kind::Routing4, 6, [6, 0, 0]),
    (Kind::DestinationOptions, 4, [4, 0, 0]),
    (Kind::Mobility, 2, [2, 0, 0]),
    (Kind::SourceRoute, 8, [8, 0, 0]),
    (Kind::RecordRoute, 16, [16, 0, 0]),
    // To a mapped address from the own one: there is nothing that it could lead to.
    (Kind::Mapped, 4, [3, 0, 1]),
    // To the jail itself, and to the victim.
    (Kind::Tunnel, 8, [0, 4, 4]),
    (Kind::Gre, 12, [0, 6, 6]),
    // A tag of VLAN 0 is none; there is no link for any other.
    (Kind::Vlan, 48, [6, 6, 0]),
    // What goes to one host in a frame to many is not forwarded.
    (Kind::Multicast, 12, [6, 0, 3]),
    (Kind::Ethertype, 7, [0, 0, 0]),
    (Kind::Runt, 13, [0, 0, 0]),
];

fn attack(addressing: Addressing) {
    let mut scenery = Scenery::new(addressing);
    // All can hear: this was sent to a friend on either host.
    let everywhere = ["host 3", "host 4", "outside"];
    assert_eq!(scenery.heard("barrier 1;").iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), everywhere);
    let jail = scenery.world.jail(&scenery.attacker.0);
    let tables =
        || netns::in_fd(&jail, || (run("ip neigh show nud all"), run("ip -6 route"), run("ip route"))).unwrap();
    let before = tables();
    for victim in [0, 1] {
        for (kind, count, fate) in FATES {
            let marker = format!("mark{victim}");
            let scene = scenery.scene(victim, scenery.attacker.0.inner(), &marker);
            let all = frames(kind, &scene);
            assert_eq!(all.len(), count, "{kind:?}");
            let counted = scenery.send(&all);
            assert_eq!(scenery.heard(&marker), [], "{kind:?}");
            assert_eq!(counted, fate, "{kind:?}");
        }
    }
    assert_eq!(tables(), before, "neighbours and routes of the attacker's jail");
}

#[test]
fn nothing_forged_leaves_a_jail() {
    on_own_host(|| attack(Addressing::Guest));
}

#[test]
fn nothing_forged_leaves_a_jail_that_translates() {
    on_own_host(|| attack(Addressing::Invariant));
}

#[test]
fn the_address_others_know_is_forged_when_a_jail_translates() {
    on_own_host(|| {
        let mut scenery = Scenery::new(Addressing::Invariant);
        let scene = scenery.scene(0, scenery.attacker.0.outer(), "outer");
        let friend = Scene { victim: scenery.friends[0].0.outer(), ..scene.clone() };
        for scene in [scene, friend] {
            assert_eq!(scenery.send(&frames(Kind::Honest, &scene)), [6, 0, 0]);
        }
        assert_eq!(scenery.heard("outer"), []);
    });
}

#[test]
fn a_jail_without_a_session_lets_nothing_out_and_a_closed_one_hears_nothing() {
    on_own_host(|| {
        let scenery = Scenery::new(Addressing::Guest);
        let own = scenery.attacker.0.inner();
        let scene = Scene { victim: scenery.friends[0].0.outer(), ..scenery.scene(0, own, "without") };
        let (number, mac) = (scenery.attacker.0.jail, scenery.attacker.0.member.mac);
        let network = Arc::clone(&scenery.world.hosts[0].network);
        let alone = Member { mac, session: None };
        let link = Party { v4: None, v6: link_local(mac) };
        let tap = &scenery.attacker.1;

        assert_done(&network.settle_jail(number, 1, Some(alone.clone())).unwrap());
        tap.wait_for_gateway(&alone);
        let before = scenery.drops();
        frames(Kind::Honest, &scene).iter().for_each(|frame| tap.send(frame));
        assert_eq!(scenery.drops_since(before), [6, 0, 0]);
        // Nobody forwards what comes from a link-local address.
        let before = scenery.drops();
        frames(Kind::Honest, &Scene { own: link, ..scene.clone() }).iter().for_each(|frame| tap.send(frame));
        assert_eq!(scenery.drops_since(before), [0, 0, 0]);

        assert_done(&network.settle_jail(number, 1, None).unwrap());
        let before = scenery.drops();
        let solicitation = neighbour_solicitation(GATEWAY_V6, mac);
        let mut question =
            ipv6(link.v6, GATEWAY_V6, protocol::ICMPV6, &icmpv6(link.v6, GATEWAY_V6, (135, 0), &solicitation));
        question[7] = 255;
        let mut all = frames(Kind::Honest, &scene);
        all.push(tap.framed(&alone, &question));
        while tap.take().is_some() {}
        all.iter().for_each(|frame| tap.send(frame));
        assert_eq!(scenery.drops_since(before), [7, 0, 0]);
        assert_eq!(tap.take(), None);
        assert_eq!(scenery.heard("without"), []);
    });
}

#[test]
fn what_another_host_lets_through_is_stopped_at_the_victims_jail() {
    on_own_host(|| {
        let scenery = Scenery::new(Addressing::Guest);
        let (x, y) = (scenery.friends[1].0.outer(), &scenery.victims[0].0);
        let marker = "past-its-jail";
        let scene = Scene { own: x, victim: y.outer(), ..scenery.scene(0, x, marker) };
        // As if the rules of the other host's jails were gone: from the host's namespace itself.
        let raw = netns::in_fd(&scenery.world.hosts[1].namespace, RawPackets::open).unwrap();
        let before = scenery.world.drops(y);
        let all = frames(Kind::Honest, &scene);
        all.iter().for_each(|frame| raw.send(&frame[14..]));
        // What comes after it, and is allowed, comes.
        let other = Scene { own: scenery.victims[1].0.outer(), marker: "after-it".to_owned(), ..scene.clone() };
        frames(Kind::Honest, &other).iter().for_each(|frame| raw.send(&frame[14..]));
        for _ in &all {
            let next = scenery.victims[0].1.wait_for(|frame| has(frame, marker) || has(frame, "after-it"));
            assert!(has(&next.unwrap(), "after-it"));
        }
        let after = scenery.world.drops(y);
        assert_eq!([0, 1, 2].map(|reason| after[reason] - before[reason]), [0, 6, 0]);
    });
}

/// Parts of frames that mean something to somebody, in any order.
fn random_packets(scene: &Scene) -> impl Strategy<Value = Vec<Vec<u8>>> + use<> {
    let Scene { own, other, victim, .. } = scene.clone();
    let v6 = [own.v6, other.v6, victim.v6, GATEWAY_V6, "ff02::1".parse().unwrap(), Ipv6Addr::UNSPECIFIED];
    let v4 = [own.v4, other.v4, victim.v4, Some(GATEWAY_V4), Some(Ipv4Addr::BROADCAST)].map(Option::unwrap);
    let (v6, v4) = (prop::sample::select(v6.to_vec()), prop::sample::select(v4.to_vec()));
    let protocol = prop_oneof![
        prop::sample::select(vec![0_u8, 1, 4, 6, 17, 41, 43, 44, 47, 50, 51, 58, 59, 60, 132, 135, 139, 140]),
        any::<u8>()
    ];
    let payload = (prop::collection::vec(any::<u8>(), 0..64), any::<bool>()).prop_map(|(mut bytes, aligned)| {
        bytes.truncate(if aligned { bytes.len() / 8 * 8 } else { bytes.len() });
        bytes.extend_from_slice(b"random;random;random;");
        bytes
    });
    let of_v6 = (v6.clone(), v6, protocol.clone(), payload.clone())
        .prop_map(|(from, to, next, payload)| ipv6(from, to, next, &payload));
    let fragment = (0..4000_u16, any::<bool>(), any::<u32>());
    let of_v4 = (v4.clone(), v4, protocol, fragment, prop::collection::vec(any::<u8>(), 0..20), payload).prop_map(
        |(from, to, protocol, (offset, more, id), options, payload)| {
            let fragment = Fragment { offset: offset / 8 * 8, more, id };
            Ipv4 { fragment, options, ..Ipv4::new(from, to, protocol) }.packet(&payload)
        },
    );
    let damage = prop::option::weighted(0.3, (0..40_usize, any::<u8>()));
    let packet = (prop_oneof![of_v6, of_v4], damage).prop_map(|(mut packet, damage)| {
        if let Some((at, byte)) = damage.filter(|(at, _)| *at < packet.len()) {
            packet[at] = byte;
        }
        packet
    });
    // By chance or damage to somebody of the own session: that may pass.
    let allowed = move |packet: &[u8]| match packet[0] >> 4 {
        6 => packet[24..30] == own.v6.octets()[..6] && packet[32..36] == own.v6.octets()[8..12],
        _ => own.v4.is_some_and(|own| session_bits(&packet[16..20]) == session_bits(&own.octets())),
    };
    prop::collection::vec(packet.prop_filter("to others", move |packet| !allowed(packet)), 64)
}

/// 10.0.0.0/8, 8 bits of host, 10 of session, 6 of VM.
fn session_bits(address: &[u8]) -> [u8; 3] {
    [address[0], address[2], address[3] & 0b1100_0000]
}

#[test]
fn nothing_random_leaves_a_jail() {
    on_own_host(|| {
        let mut scenery = Scenery::new(Addressing::Guest);
        let scene = scenery.scene(1, scenery.attacker.0.inner(), "random");
        let mut runner = TestRunner::new(Config {
            cases: 64,
            failure_persistence: None,
            max_shrink_iters: 4096,
            ..Config::default()
        });
        let (scenery, packets) = (RefCell::new(&mut scenery), random_packets(&scene));
        let result = runner.run(&packets, |packets| {
            let mut scenery = scenery.borrow_mut();
            for packet in packets {
                let frame = scenery.attacker.1.framed(&scenery.attacker.0.member, &packet);
                let _ = scenery.attacker.1.try_send(&frame);
            }
            scenery.barrier();
            prop_assert_eq!(scenery.heard("random"), []);
            Ok(())
        });
        result.unwrap();
    });
}
