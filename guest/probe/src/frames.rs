//! Builders of Ethernet, ARP, IPv4, IPv6, ICMP, UDP and TCP, from the inside out: each takes what it carries as bytes
//! and gives bytes. Lengths and checksums are right; everything else is what the caller says, so that what no kernel
//! would send can be sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A hardware address.
pub type Mac = [u8; 6];

/// The hardware address of everybody on a link.
pub const BROADCAST: Mac = [0xff; 6];

/// Kinds of Ethernet payload (IEEE registry).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// A tag of 802.1Q.
    pub const VLAN: u16 = 0x8100;
    /// A service tag of 802.1ad.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// For experiments within one site: no system speaks it.
    pub const EXPERIMENT: u16 = 0x88b5;
}

/// Protocols above IP, and IPv6 extension headers (IANA registry).
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 in IP.
    pub const IPV6: u8 = 41;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Generic routing encapsulation.
    pub const GRE: u8 = 47;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
}

/// An Ethernet frame, without its check sequence.
pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to, &from, &kind.to_be_bytes()[..], payload].concat()
}

/// A frame with a tag of this kind put in after its hardware addresses.
pub fn tagged(kind: u16, vlan: u16, frame: &[u8]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(frame.len().min(12));
    [addresses, &kind.to_be_bytes(), &vlan.to_be_bytes(), rest].concat()
}

/// The checksum of the Internet protocols (RFC 1071) over several pieces, each of them of even length but the last.
pub fn checksum(pieces: &[&[u8]]) -> u16 {
    let words = pieces.iter().flat_map(|piece| piece.chunks(2));
    let sum: u64 = words.map(|word| u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    !u16::try_from(folded).unwrap_or(0)
}

/// Which part of a packet a fragment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fragment {
    /// Where it begins in the packet's payload, in bytes; a multiple of eight.
    pub offset: u16,
    /// Whether others follow.
    pub more: bool,
    /// What all fragments of a packet have in common. IPv4 keeps the lower half.
    pub id: u32,
}

/// An IPv4 header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source.
    pub from: Ipv4Addr,
    /// Destination.
    pub to: Ipv4Addr,
    /// What it carries.
    pub protocol: u8,
    /// Hops it may make.
    pub ttl: u8,
    /// Which part of a packet it is; the default is a whole one.
    pub fragment: Fragment,
    /// Options, at most 40 bytes; made a multiple of four by end-of-list.
    pub options: Vec<u8>,
}

impl Ipv4 {
    /// The header of a whole packet.
    pub const fn new(from: Ipv4Addr, to: Ipv4Addr, protocol: u8) -> Self {
        let fragment = Fragment { offset: 0, more: false, id: 0 };
        Self { from, to, protocol, ttl: 64, fragment, options: Vec::new() }
    }

    /// The packet.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut options = self.options.clone();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        let header_bytes = 20 + options.len();
        let Fragment { offset, more, id } = self.fragment;
        let [_, _, id @ ..] = id.to_be_bytes();
        let part = (offset / 8) | (u16::from(more) << 13);
        let mut header = vec![0x40 | low_byte(header_bytes / 4), 0];
        header.extend(length16(header_bytes + payload.len()));
        header.extend(id);
        header.extend(part.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(self.from.octets());
        header.extend(self.to.octets());
        header.extend(options);
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend_from_slice(payload);
        header
    }

    /// The packet as fragments with at most `size` bytes of payload each (a multiple of eight).
    pub fn fragments(&self, id: u32, payload: &[u8], size: u16) -> Vec<Vec<u8>> {
        let parts = parts(id, payload, size);
        parts.map(|(fragment, part)| Self { fragment, ..self.clone() }.packet(part)).collect()
    }
}

/// An IPv6 packet, whose payload begins with a header of kind `next`.
pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length16(payload.len()));
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend_from_slice(payload);
    packet
}

/// An IPv6 packet as fragments with at most `size` bytes of payload each (a multiple of eight).
pub fn ipv6_fragments(from: Ipv6Addr, to: Ipv6Addr, next: u8, (id, payload): (u32, &[u8]), size: u16) -> Vec<Vec<u8>> {
    let parts = parts(id, payload, size);
    parts.map(|(fragment, part)| ipv6(from, to, protocol::FRAGMENT, &fragment_header(next, fragment, part))).collect()
}

fn parts(id: u32, payload: &[u8], size: u16) -> impl Iterator<Item = (Fragment, &[u8])> {
    let size = usize::from(size.max(8) / 8 * 8);
    payload.chunks(size).enumerate().map(move |(number, part)| {
        let offset = u16::try_from(number * size).unwrap_or(u16::MAX);
        (Fragment { offset, more: number * size + part.len() < payload.len(), id }, part)
    })
}

/// An IPv6 fragment header and the part it carries.
pub fn fragment_header(next: u8, fragment: Fragment, part: &[u8]) -> Vec<u8> {
    let place = (fragment.offset & !7) | u16::from(fragment.more);
    [&[next, 0], &place.to_be_bytes()[..], &fragment.id.to_be_bytes(), part].concat()
}

/// IPv6 hop-by-hop or destination options (which of them, the header before says), and what follows. Padded to a
/// multiple of eight bytes.
pub fn options_header(next: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut header = vec![next, 0];
    header.extend_from_slice(options);
    // Pad1 and PadN.
    match header.len().next_multiple_of(8) - header.len() {
        0 => {}
        1 => header.push(0),
        more => {
            header.extend([1, low_byte(more - 2)]);
            header.resize(header.len().next_multiple_of(8), 0);
        }
    }
    header[1] = low_byte(header.len() / 8 - 1);
    header.extend_from_slice(payload);
    header
}

/// An IPv6 routing header of this type, and what follows.
pub fn routing_header(next: u8, kind: u8, segments_left: u8, via: &[Ipv6Addr], payload: &[u8]) -> Vec<u8> {
    let mut header = vec![next, low_byte(via.len() * 2), kind, segments_left];
    // Type 4 (segment routing) has the last entry, flags and a tag where the others have zeros.
    header.extend(if kind == 4 { [low_byte(via.len().saturating_sub(1)), 0, 0, 0] } else { [0; 4] });
    for address in via {
        header.extend(address.octets());
    }
    header.extend_from_slice(payload);
    header
}

/// An IPv6 mobility header (a binding refresh request), and what follows.
pub fn mobility_header(next: u8, payload: &[u8]) -> Vec<u8> {
    [&[next, 0, 0, 0, 0, 0, 0, 0], payload].concat()
}

/// A UDP datagram.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut datagram = ports(from, to);
    datagram.extend(length16(8 + payload.len()));
    datagram.extend([0, 0]);
    datagram.extend_from_slice(payload);
    let sum = match checksum_between(from.ip(), to.ip(), protocol::UDP, &datagram) {
        // Zero says that there is none.
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// A TCP segment that opens a connection.
pub fn tcp_syn(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    const SYN: u8 = 2;
    let mut segment = ports(from, to);
    segment.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0, 5 << 4, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(payload);
    let sum = checksum_between(from.ip(), to.ip(), protocol::TCP, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

fn ports(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    [from.port().to_be_bytes(), to.port().to_be_bytes()].concat()
}

/// An ICMP message; `rest` is what follows type, code and checksum.
pub fn icmp(kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0], rest].concat();
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An ICMPv6 message; `rest` is what follows type, code and checksum.
pub fn icmpv6(from: Ipv6Addr, to: Ipv6Addr, (kind, code): (u8, u8), rest: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0], rest].concat();
    let sum = checksum_between(from.into(), to.into(), protocol::ICMPV6, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// The checksum of what is above IP, which covers the addresses below.
fn checksum_between(from: IpAddr, to: IpAddr, protocol: u8, message: &[u8]) -> u16 {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    checksum(&[&octets(from), &octets(to), &length, &[0, protocol], message])
}

/// Bytes after type, code and checksum of an echo, request or reply.
pub fn echo(id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    [&id.to_be_bytes()[..], &sequence.to_be_bytes(), payload].concat()
}

/// An ARP message: who says what about which address.
pub fn arp(operation: u16, (sender_mac, sender): (Mac, Ipv4Addr), (target_mac, target): (Mac, Ipv4Addr)) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4];
    let operation = operation.to_be_bytes();
    [&head[..], &operation, &sender_mac, &sender.octets(), &target_mac, &target.octets()].concat()
}

/// Who has `target`, in ARP.
pub const ARP_REQUEST: u16 = 1;

/// Here `target` is, in ARP.
pub const ARP_REPLY: u16 = 2;

/// The body of a neighbour advertisement (type 136): `target` is at `mac`, unasked and instead of what was known.
pub fn neighbour_advertisement(target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    const TARGET_MAC: u8 = 2;
    [&[OVERRIDE, 0, 0, 0], &target.octets()[..], &[TARGET_MAC, 1], &mac].concat()
}

/// The body of a neighbour solicitation (type 135): who has `target`, asks `mac`.
pub fn neighbour_solicitation(target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    const SOURCE_MAC: u8 = 1;
    [&[0; 4], &target.octets()[..], &[SOURCE_MAC, 1], &mac].concat()
}

/// The body of a router advertisement (type 134): a default router for half an hour, known by `mac`.
pub fn router_advertisement(mac: Mac) -> Vec<u8> {
    const SOURCE_MAC: u8 = 1;
    let lifetime_s = 1800_u16.to_be_bytes();
    [&[64, 0], &lifetime_s[..], &[0; 8], &[SOURCE_MAC, 1], &mac].concat()
}

/// The body of a redirect (type 137): to `destination` by `target`.
pub fn redirect(target: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    [&[0; 4], &target.octets()[..], &destination.octets()].concat()
}

/// A GRE header (RFC 2784) and what it carries, named by its Ethernet kind.
pub fn gre(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0, 0], &kind.to_be_bytes()[..], payload].concat()
}

fn length16(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// A small number as the header has it; larger ones are cut off, as no field holds them.
fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FROM_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
    const TO_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 199);
    const FROM_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    const TO_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

    #[test]
    fn an_ipv4_header_has_the_checksum_everybody_knows() {
        // 4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7, but for "do not fragment".
        let packet = Ipv4::new(FROM_V4, TO_V4, protocol::UDP).packet(&[0; 0x73 - 20]);
        assert_eq!(packet[..10], [0x45, 0, 0, 0x73, 0, 0, 0, 0, 0x40, 0x11]);
        assert_eq!(packet[10..12], [0xf8, 0x61]);
        assert_eq!(packet[12..20], [0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7]);
    }

    #[test]
    fn datagrams_and_messages_have_the_checksums_a_capture_showed() {
        // `ping -6 -c1 -s0` from ::1 to ::1: type 128, id 1, sequence 1.
        let localhost = Ipv6Addr::LOCALHOST;
        assert_eq!(icmpv6(localhost, localhost, (128, 0), &echo(1, 1, b"")), [128, 0, 0x7f, 0xb9, 0, 1, 0, 1]);
        // RFC 1071 section 3's words in an ICMP message would be: ones' complement of their sum.
        assert_eq!(icmp(8, 0, &echo(0, 1, b"")), [8, 0, 0xf7, 0xfe, 0, 0, 0, 1]);
        let (from, to) = (SocketAddr::from((FROM_V4, 1)), SocketAddr::from((TO_V4, 2)));
        assert_eq!(udp(from, to, b"ab"), [0, 1, 0, 2, 0, 10, 0x1c, 0x5c, b'a', b'b']);
    }

    #[test]
    fn options_are_padded_to_whole_words() {
        for count in 0..20 {
            let header = options_header(59, &vec![0; count], b"");
            assert_eq!(header.len() % 8, 0);
            assert_eq!(usize::from(header[1]), header.len() / 8 - 1);
            assert_eq!(header[0], 59);
        }
        assert_eq!(options_header(17, &[5, 2, 0, 0], b"x"), [17, 0, 5, 2, 0, 0, 1, 0, b'x']);
        let options = Ipv4 { options: vec![7, 3, 4], ..Ipv4::new(FROM_V4, TO_V4, 17) }.packet(b"");
        assert_eq!((options[0], options.len(), &options[20..]), (0x46, 24, &[7, 3, 4, 0][..]));
    }

    #[test]
    fn routing_headers_say_how_long_they_are() {
        let header = routing_header(17, 0, 1, &[TO_V6, FROM_V6], b"y");
        assert_eq!((&header[..8], header.len()), (&[17, 4, 0, 1, 0, 0, 0, 0][..], 8 + 32 + 1));
        assert_eq!(routing_header(17, 4, 1, &[TO_V6, FROM_V6], b"")[4], 1);
    }

    #[test]
    fn a_tag_is_between_addresses_and_kind() {
        let frame = tagged(ethertype::VLAN, 5, &ethernet([1; 6], [2; 6], ethertype::ARP, b"z"));
        assert_eq!(frame, [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0x81, 0, 0, 5, 8, 6, b'z']);
    }

    proptest! {
        #[test]
        fn what_has_a_checksum_sums_to_nothing(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (from, to) = (SocketAddr::from((FROM_V6, 7)), SocketAddr::from((TO_V6, 9)));
            for (number, message) in [(protocol::UDP, udp(from, to, &payload)), (protocol::TCP, tcp_syn(from, to, &payload))] {
                prop_assert_eq!(checksum_between(from.ip(), to.ip(), number, &message), 0);
            }
            let message = icmpv6(FROM_V6, TO_V6, (128, 0), &payload);
            prop_assert_eq!(checksum_between(FROM_V6.into(), TO_V6.into(), protocol::ICMPV6, &message), 0);
            prop_assert_eq!(checksum(&[&icmp(8, 0, &payload)]), 0);
            prop_assert_eq!(checksum(&[&Ipv4::new(FROM_V4, TO_V4, 1).packet(&payload)[..20]]), 0);
        }

        #[test]
        fn fragments_are_the_packet(payload in proptest::collection::vec(any::<u8>(), 1..3000), size in 1..500_u16) {
            let size = size * 8;
            let (mut v4, mut v6) = (Vec::<u8>::new(), Vec::<u8>::new());
            for packet in Ipv4::new(FROM_V4, TO_V4, 17).fragments(0x1_0007, &payload, size) {
                let place = u16::from_be_bytes([packet[6], packet[7]]);
                prop_assert_eq!(usize::from(place & 0x1fff) * 8, v4.len());
                v4.extend(&packet[20..]);
                prop_assert_eq!(place & 0x2000 != 0, v4.len() < payload.len());
                prop_assert_eq!(&packet[4..6], &[0, 7]);
            }
            for packet in ipv6_fragments(FROM_V6, TO_V6, 17, (7, &payload), size) {
                let place = u16::from_be_bytes([packet[42], packet[43]]);
                prop_assert_eq!(usize::from(place & !7), v6.len());
                v6.extend(&packet[48..]);
                prop_assert_eq!(place & 1 != 0, v6.len() < payload.len());
                prop_assert_eq!((packet[6], packet[40]), (protocol::FRAGMENT, 17));
            }
            prop_assert_eq!(&v4, &payload);
            prop_assert_eq!(&v6, &payload);
        }
    }
}
