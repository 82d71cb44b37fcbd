//! What is wrong below IP: hardware addresses, ARP, neighbour discovery, tags, kinds and lengths of frames.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::packets::Maker;
use super::{ALL_V6, GATEWAY_V4, GATEWAY_V6, STRANGE_MAC, Scene};
use crate::frames::{
    ARP_REPLY, ARP_REQUEST, BROADCAST, Mac, arp, checksum, ethernet, ethertype, icmpv6, ipv6, neighbour_advertisement,
    neighbour_solicitation, protocol, redirect, router_advertisement, tagged,
};

impl Maker<'_> {
    pub(super) fn macs(&self) -> Vec<Vec<u8>> {
        let Scene { own, victim, gateway_mac, .. } = *self.scene;
        let forged = [STRANGE_MAC, gateway_mac, [0; 6], BROADCAST];
        let talks = self.talks(own, victim);
        let put = |mac: Mac| talks.iter().map(move |frame| [&frame[..6], &mac, &frame[12..]].concat());
        forged.into_iter().flat_map(put).collect()
    }

    pub(super) fn arps(&self) -> Vec<Vec<u8>> {
        let Scene { mac, gateway_mac, own, other, victim, .. } = *self.scene;
        let claimed = [other.v4, victim.v4, Some(GATEWAY_V4)].into_iter().flatten();
        let messages = claimed.flat_map(|address| {
            [
                arp(ARP_REPLY, (mac, address), (gateway_mac, GATEWAY_V4)),
                arp(ARP_REPLY, (mac, address), (BROADCAST, address)),
                arp(ARP_REQUEST, (mac, address), ([0; 6], address)),
                arp(ARP_REQUEST, (STRANGE_MAC, own.v4.unwrap_or(address)), ([0; 6], GATEWAY_V4)),
            ]
        });
        // The marker comes after the message, where Ethernet has padding.
        let frame = |to, message: &[u8]| ethernet(to, mac, ethertype::ARP, &[message, &self.payload()].concat());
        messages.flat_map(|message| [frame(gateway_mac, &message), frame(BROADCAST, &message)]).collect()
    }

    pub(super) fn neighbours(&self) -> Vec<Vec<u8>> {
        let Scene { mac, own, other, victim, .. } = *self.scene;
        let mut frames = Vec::new();
        for claimed in [other.v6, victim.v6, GATEWAY_V6] {
            for from in [claimed, own.v6] {
                for to in [GATEWAY_V6, ALL_V6] {
                    frames.push(self.neighbour(from, to, 136, &neighbour_advertisement(claimed, mac)));
                    frames.push(self.neighbour(from, to, 135, &neighbour_solicitation(GATEWAY_V6, mac)));
                    frames.push(self.neighbour(from, to, 134, &router_advertisement(mac)));
                    frames.push(self.neighbour(from, to, 137, &redirect(own.v6, claimed)));
                }
            }
        }
        frames
    }

    /// Neighbour discovery is only heard with the largest hop limit. The marker is an option that nobody knows.
    pub(super) fn neighbour(&self, from: Ipv6Addr, to: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
        const NONCE: u8 = 14;
        let marked = self.payload();
        let words = u8::try_from(marked.len() / 8 + 1).unwrap_or(u8::MAX);
        let body = [body, &[NONCE, words, 0, 0, 0, 0, 0, 0], &marked].concat();
        let mut packet = ipv6(from, to, protocol::ICMPV6, &icmpv6(from, to, (kind, 0), &body));
        packet[7] = 255;
        self.v6(&packet)
    }

    pub(super) fn vlans(&self) -> Vec<Vec<u8>> {
        let Scene { own, other, victim, .. } = *self.scene;
        let plain = [self.talks(other, victim), self.talks(own, victim)].concat();
        plain
            .iter()
            .flat_map(|frame| {
                let once = tagged(ethertype::VLAN, 7, frame);
                [
                    tagged(ethertype::VLAN, 0, frame),
                    tagged(ethertype::SERVICE_VLAN, 7, &once),
                    tagged(ethertype::VLAN, 1, &once),
                    once,
                ]
            })
            .collect()
    }

    pub(super) fn multicasts(&self) -> Vec<Vec<u8>> {
        let Scene { mac, own, other, victim, .. } = *self.scene;
        const ALL_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
        let mut frames = Vec::new();
        for from in [own, other] {
            for (to, link) in
                [(ALL_V6, [0x33, 0x33, 0, 0, 0, 1]), (victim.v6, BROADCAST), (victim.v6, [1, 0, 0x5e, 0, 0, 1])]
            {
                frames.push(ethernet(link, mac, ethertype::IPV6, &self.packet_v6(from.v6, to)));
            }
            let (Some(from), Some(victim)) = (from.v4, victim.v4) else { continue };
            for (to, link) in [(ALL_V4, [1, 0, 0x5e, 0, 0, 1]), (Ipv4Addr::BROADCAST, BROADCAST), (victim, BROADCAST)] {
                frames.push(ethernet(link, mac, ethertype::IPV4, &self.packet_v4(from, to)));
            }
        }
        frames
    }

    pub(super) fn ethertypes(&self) -> Vec<Vec<u8>> {
        const PPPOE: u16 = 0x8864;
        const MPLS: u16 = 0x8847;
        const LLDP: u16 = 0x88cc;
        let Scene { mac, gateway_mac, .. } = *self.scene;
        // Below 1536 it is a length, of an 802.3 frame.
        let kinds = [ethertype::EXPERIMENT, PPPOE, MPLS, LLDP, 0xffff, 64, 0];
        kinds.iter().map(|kind| ethernet(gateway_mac, mac, *kind, &self.payload())).collect()
    }

    pub(super) fn runts(&self) -> Vec<Vec<u8>> {
        let Scene { mac, gateway_mac, other, victim, .. } = *self.scene;
        let frame = |kind, payload: &[u8]| ethernet(gateway_mac, mac, kind, payload);
        let v6 = self.packet_v6(other.v6, victim.v6);
        let mut longer = v6.clone();
        longer[4..6].copy_from_slice(&[0xff, 0xff]);
        let mut frames = vec![
            frame(ethertype::IPV6, &[]),
            frame(ethertype::IPV4, &[]),
            frame(ethertype::ARP, &[0, 1, 8]),
            // A marker instead of a header: no version that exists.
            frame(ethertype::IPV4, &self.payload()),
            frame(ethertype::IPV6, &self.payload()),
            frame(ethertype::IPV6, &v6[..30]),
            frame(ethertype::IPV6, &v6[..v6.len() - 20]),
            frame(ethertype::IPV6, &longer),
        ];
        if let (Some(from), Some(to)) = (other.v4, victim.v4) {
            let v4 = self.packet_v4(from, to);
            let with = |at: usize, byte: u8| {
                let mut packet = v4.clone();
                packet[at] = byte;
                // The checksum over the header as it is now.
                packet[10..12].copy_from_slice(&[0, 0]);
                let sum = checksum(&[&packet[..20]]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                frame(ethertype::IPV4, &packet)
            };
            frames.push(frame(ethertype::IPV4, &v4[..15]));
            frames.push(frame(ethertype::IPV4, &v4[..v4.len() - 20]));
            // A header of four words, of fifteen, and a packet of 64 KiB.
            frames.extend([with(0, 0x44), with(0, 0x4f), with(2, 0xff)]);
        }
        frames
    }
}
