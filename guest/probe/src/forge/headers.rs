//! Packets with headers and options on the way, and packets within packets.

use std::net::Ipv4Addr;

use super::packets::Maker;
use super::{GATEWAY_V4, GATEWAY_V6, Scene};
use crate::frames::{Ipv4, ethertype, gre, ipv6, protocol, routing_header};

impl Maker<'_> {
    /// IPv6 packets from a forged and from the own address, with headers before their datagram.
    pub(super) fn extended(&self, first: u8, headers: impl Fn(u8, &[u8]) -> Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let from = [other.v6, own.v6].into_iter();
        let packets = from.flat_map(|from| {
            let payloads = headers(protocol::UDP, &self.datagram_v6(from, victim.v6));
            payloads.into_iter().map(move |payload| ipv6(from, victim.v6, first, &payload))
        });
        packets.map(|packet| self.v6(&packet)).collect()
    }

    pub(super) fn routings(&self, kind: u8) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let mut frames = Vec::new();
        for from in [other.v6, own.v6] {
            let datagram = self.datagram_v6(from, victim.v6);
            // To the gateway, which would send it on, and to the victim, which would.
            for (to, left, via) in [(GATEWAY_V6, 1, victim.v6), (own.v6, 1, victim.v6), (victim.v6, 0, own.v6)] {
                let header = routing_header(protocol::UDP, kind, left, &[via], &datagram);
                frames.push(self.v6(&ipv6(from, to, protocol::ROUTING, &header)));
            }
        }
        frames
    }

    pub(super) fn source_routes(&self) -> Vec<Vec<u8>> {
        const LOOSE: u8 = 131;
        const STRICT: u8 = 137;
        self.with_options(|victim| {
            let [a, b, c, d] = victim.octets();
            vec![vec![LOOSE, 7, 4, a, b, c, d], vec![STRICT, 7, 4, a, b, c, d]]
        })
    }

    pub(super) fn record_routes(&self) -> Vec<Vec<u8>> {
        let record = [&[7, 39, 4][..], &[0; 36]].concat();
        let stamp = [&[68, 36, 5, 1][..], &[0; 32]].concat();
        // Router alert, and an option that does not end.
        self.with_options(|_| vec![record.clone(), stamp.clone(), vec![148, 4, 0, 0], vec![7, 200, 4]])
    }

    /// IPv4 packets with options: from a forged and the own address, to the gateway and to the victim.
    pub(super) fn with_options(&self, options: impl Fn(Ipv4Addr) -> Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let Some(victim) = victim.v4 else { return Vec::new() };
        let mut frames = Vec::new();
        for from in [other.v4, own.v4].into_iter().flatten() {
            for to in [GATEWAY_V4, victim] {
                for options in options(victim) {
                    let header = Ipv4 { options, ..Ipv4::new(from, to, protocol::UDP) };
                    frames.push(self.v4(&header.packet(&self.datagram_v4(from, to))));
                }
            }
        }
        frames
    }

    /// Packets to the victim from a forged address, with the Ethernet kind of each.
    pub(super) fn cargo(&self) -> Vec<(u16, u8, Vec<u8>)> {
        const IPV4_IN_IP: u8 = 4;
        let Scene { other, victim, .. } = *self.scene;
        let mut cargo = vec![(ethertype::IPV6, protocol::IPV6, self.packet_v6(other.v6, victim.v6))];
        if let (Some(from), Some(to)) = (other.v4, victim.v4) {
            cargo.push((ethertype::IPV4, IPV4_IN_IP, self.packet_v4(from, to)));
        }
        cargo
    }

    /// From the own address to gateway and victim, over both families, with a payload of `protocol`.
    pub(super) fn carried(&self, protocol: u8, payload: &[u8]) -> Vec<Vec<u8>> {
        let Scene { own, victim, .. } = *self.scene;
        let over_v6 = [GATEWAY_V6, victim.v6].map(|to| self.v6(&ipv6(own.v6, to, protocol, payload)));
        let over_v4 = own.v4.into_iter().flat_map(|from| {
            let to = [Some(GATEWAY_V4), victim.v4].into_iter().flatten();
            to.map(move |to| self.v4(&Ipv4::new(from, to, protocol).packet(payload)))
        });
        over_v6.into_iter().chain(over_v4).collect()
    }

    pub(super) fn tunnels(&self) -> Vec<Vec<u8>> {
        self.cargo().iter().flat_map(|(_, protocol, packet)| self.carried(*protocol, packet)).collect()
    }

    pub(super) fn gres(&self) -> Vec<Vec<u8>> {
        const ETHERNET_IN_GRE: u16 = 0x6558;
        let mut cargo: Vec<_> = self.cargo().iter().map(|(kind, _, packet)| gre(*kind, packet)).collect();
        cargo.push(gre(ETHERNET_IN_GRE, &self.v6(&self.packet_v6(self.scene.other.v6, self.scene.victim.v6))));
        cargo.iter().flat_map(|payload| self.carried(protocol::GRE, payload)).collect()
    }
}
