//! Whole packets and fragments with wrong addresses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{ALL_V6, GATEWAY_V4, GATEWAY_V6, Kind, Party, Scene};
use crate::frames::{
    Fragment, Ipv4, echo, ethernet, ethertype, fragment_header, icmp, icmpv6, ipv6, ipv6_fragments, protocol, tcp_syn,
    udp,
};

/// The port that forged datagrams come from.
const PORT_FROM: u16 = 40_000;

/// The port that forged datagrams go to: discard, where nobody answers.
const PORT_TO: u16 = 9;

/// Makes the frames of one kind.
pub(super) struct Maker<'a> {
    pub(super) kind: Kind,
    pub(super) scene: &'a Scene,
}

impl Maker<'_> {
    /// The marker and the kind, again and again: a datagram that makes three whole fragments.
    pub(super) fn payload(&self) -> Vec<u8> {
        let unit = self.marked();
        unit.iter().copied().cycle().take(usize::from(self.fragment_bytes()) * 3 - 8).collect()
    }

    /// What is repeated, filled up to a multiple of eight bytes.
    pub(super) fn marked(&self) -> Vec<u8> {
        let mut marked = format!("{}:{};", self.scene.marker, self.kind.name()).into_bytes();
        marked.resize(marked.len().next_multiple_of(8), b'.');
        marked
    }

    /// Bytes of a fragment: wherever it begins, there is a whole marker in it.
    pub(super) fn fragment_bytes(&self) -> u16 {
        u16::try_from(self.marked().len() * 2).unwrap_or(u16::MAX / 8)
    }

    pub(super) fn v4(&self, packet: &[u8]) -> Vec<u8> {
        ethernet(self.scene.gateway_mac, self.scene.mac, ethertype::IPV4, packet)
    }

    pub(super) fn v6(&self, packet: &[u8]) -> Vec<u8> {
        ethernet(self.scene.gateway_mac, self.scene.mac, ethertype::IPV6, packet)
    }

    pub(super) fn datagram_v4(&self, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let (from, to) = (SocketAddr::from((from, PORT_FROM)), SocketAddr::from((to, PORT_TO)));
        udp(from, to, &self.payload())
    }

    pub(super) fn datagram_v6(&self, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
        let (from, to) = (SocketAddr::from((from, PORT_FROM)), SocketAddr::from((to, PORT_TO)));
        udp(from, to, &self.payload())
    }

    pub(super) fn packet_v4(&self, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        Ipv4::new(from, to, protocol::UDP).packet(&self.datagram_v4(from, to))
    }

    pub(super) fn packet_v6(&self, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
        ipv6(from, to, protocol::UDP, &self.datagram_v6(from, to))
    }

    /// UDP, TCP and ICMP of both families.
    pub(super) fn talks(&self, from: Party, to: Party) -> Vec<Vec<u8>> {
        let echo = echo(1, 1, &self.payload());
        let tcp = |from, to| tcp_syn(SocketAddr::new(from, PORT_FROM), SocketAddr::new(to, PORT_TO), &self.payload());
        let mut frames = vec![
            self.v6(&self.packet_v6(from.v6, to.v6)),
            self.v6(&ipv6(from.v6, to.v6, protocol::TCP, &tcp(from.v6.into(), to.v6.into()))),
            self.v6(&ipv6(from.v6, to.v6, protocol::ICMPV6, &icmpv6(from.v6, to.v6, (128, 0), &echo))),
        ];
        if let (Some(from), Some(to)) = (from.v4, to.v4) {
            frames.push(self.v4(&self.packet_v4(from, to)));
            frames.push(self.v4(&Ipv4::new(from, to, protocol::TCP).packet(&tcp(from.into(), to.into()))));
            frames.push(self.v4(&Ipv4::new(from, to, protocol::ICMP).packet(&icmp(8, 0, &echo))));
        }
        frames
    }

    pub(super) fn odd_sources(&self) -> Vec<Vec<u8>> {
        let victim = self.scene.victim;
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xbad, 0xbad);
        let sources = [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST, GATEWAY_V6, link_local, ALL_V6];
        let mut frames: Vec<_> = sources.iter().map(|from| self.v6(&self.packet_v6(*from, victim.v6))).collect();
        if let Some(to) = victim.v4 {
            let sources = [
                Ipv4Addr::UNSPECIFIED,
                Ipv4Addr::LOCALHOST,
                GATEWAY_V4,
                Ipv4Addr::BROADCAST,
                Ipv4Addr::new(224, 0, 0, 1),
            ];
            frames.extend(sources.iter().map(|from| self.v4(&self.packet_v4(*from, to))));
        }
        frames
    }

    /// Those of the fragments of forged datagrams whose number `takes` wants.
    pub(super) fn fragments(&self, takes: impl Fn(usize) -> bool) -> Vec<Vec<u8>> {
        let Scene { other, victim, .. } = *self.scene;
        let wanted = |packets: Vec<Vec<u8>>| {
            packets.into_iter().enumerate().filter(|(number, _)| takes(*number)).map(|(_, packet)| packet)
        };
        let size = self.fragment_bytes();
        let datagram = self.datagram_v6(other.v6, victim.v6);
        let v6 = ipv6_fragments(other.v6, victim.v6, protocol::UDP, (0xbad1, &datagram), size);
        let mut frames: Vec<_> = wanted(v6).map(|packet| self.v6(&packet)).collect();
        if takes(0) {
            // A fragment that is the whole packet.
            let whole = fragment_header(protocol::UDP, Fragment { id: 0xbad2, ..Fragment::default() }, &datagram);
            frames.push(self.v6(&ipv6(other.v6, victim.v6, protocol::FRAGMENT, &whole)));
        }
        if let (Some(from), Some(to)) = (other.v4, victim.v4) {
            let v4 = Ipv4::new(from, to, protocol::UDP).fragments(0xbad3, &self.datagram_v4(from, to), size);
            frames.extend(wanted(v4).map(|packet| self.v4(&packet)));
        }
        frames
    }

    pub(super) fn overlaps(&self) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let payload = self.payload();
        let mut frames = Vec::new();
        let pieces = |from_v6: Ipv6Addr, offset: u16, more: bool, part: &[u8]| {
            let header = fragment_header(protocol::UDP, Fragment { offset, more, id: 0xbad4 }, part);
            self.v6(&ipv6(from_v6, victim.v6, protocol::FRAGMENT, &header))
        };
        for from in [own, other] {
            let datagram = self.datagram_v6(from.v6, victim.v6);
            frames.push(pieces(from.v6, 0, true, &datagram[..datagram.len() / 8 * 8]));
            frames.push(pieces(other.v6, 8, true, &payload));
            frames.push(pieces(other.v6, 0, false, &datagram));
            if let (Some(from), Some(other), Some(to)) = (from.v4, other.v4, victim.v4) {
                let piece = |from, offset, more, part: &[u8]| {
                    let fragment = Fragment { offset, more, id: 0xbad5 };
                    self.v4(&Ipv4 { fragment, ..Ipv4::new(from, to, protocol::UDP) }.packet(part))
                };
                let datagram = self.datagram_v4(from, to);
                frames.push(piece(from, 0, true, &datagram[..datagram.len() / 8 * 8]));
                frames.push(piece(other, 8, true, &payload));
                frames.push(piece(other, 0, false, &datagram));
            }
        }
        frames
    }

    pub(super) fn mapped(&self) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let mapped = |address: Option<Ipv4Addr>| address.map(|address| address.to_ipv6_mapped());
        let pairs = [
            (mapped(other.v4), mapped(victim.v4)),
            (mapped(own.v4), mapped(victim.v4)),
            (Some(own.v6), mapped(victim.v4)),
            (mapped(other.v4), Some(victim.v6)),
        ];
        let packets = pairs.into_iter().filter_map(|(from, to)| Some(self.packet_v6(from?, to?)));
        packets.map(|packet| self.v6(&packet)).collect()
    }
}
