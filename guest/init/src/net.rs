//! Interfaces: found by hardware address, set by rtnetlink.
//!
//! An interface ends with exactly the addresses it was given (and its link-local one): those of an earlier identity,
//! left by the bundle it was launched from, are removed.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use hearth_guest_wire::{Address, Interface};

use crate::identity::failed;
use crate::link::Refusal;
use crate::sys::{Errno, Netlink};

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_EXT_MASK: u16 = 29;
/// Leave the counters out of a listing.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Usable at once: nobody else can have the address, the host sees to that.
const IFA_F_NODAD: u8 = 2;
const RT_SCOPE_LINK: u8 = 253;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Bytes of `struct ifinfomsg`.
const LINK_BYTES: usize = 16;
/// Bytes of `struct ifaddrmsg`.
const ADDRESS_BYTES: usize = 8;

/// Sets every interface named.
pub(crate) fn apply(interfaces: &[Interface]) -> Result<(), Refusal> {
    let mut channel = Channel::open().map_err(failed("open rtnetlink"))?;
    let links = channel.links().map_err(failed("list interfaces"))?;
    let mut found = Vec::with_capacity(interfaces.len());
    for interface in interfaces {
        let Some(link) = links.iter().find(|link| link.mac == interface.mac) else {
            let [a, b, c, d, e, f] = interface.mac;
            return Err(Refusal {
                errno: Errno::NODEV,
                what: Some(format!("no interface is {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")),
            });
        };
        found.push((link.index, interface));
    }
    for (index, interface) in &found {
        channel.bring_up(*index, interface.mtu).map_err(failed("bring an interface up"))?;
    }
    let present = channel.addresses().map_err(failed("list addresses"))?;
    for (index, interface) in found {
        for old in present.iter().filter(|old| old.index == index && !old.link_local) {
            if !interface.addresses.contains(&old.address) {
                channel.remove_address(index, old.address).map_err(failed("remove an address"))?;
            }
        }
        for new in &interface.addresses {
            if !present.iter().any(|old| old.index == index && old.address == *new) {
                channel.add_address(index, *new).map_err(failed("add an address"))?;
            }
        }
    }
    Ok(())
}

/// An interface as listed.
struct Link {
    index: u32,
    mac: [u8; 6],
}

/// An address as listed.
struct Present {
    index: u32,
    address: Address,
    link_local: bool,
}

/// One request being written.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16, sequence: u32) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_le_bytes());
        bytes.extend_from_slice(&sequence.to_le_bytes());
        // The kernel fills in who asks.
        bytes.extend_from_slice(&[0; 4]);
        Self(bytes)
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if let Some(place) = self.0.first_chunk_mut::<4>() {
            *place = length.to_le_bytes();
        }
        self.0
    }
}

/// A conversation with the kernel.
struct Channel {
    socket: Netlink,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Channel {
    fn open() -> Result<Self, Errno> {
        // The kernel's datagrams of a listing are at most 32 KiB.
        Ok(Self { socket: Netlink::new()?, sequence: 0, buffer: vec![0; 32 * 1024] })
    }

    fn request(&mut self, kind: u16, flags: u16) -> Request {
        self.sequence += 1;
        Request::new(kind, flags, self.sequence)
    }

    /// Sends a request and hands every message of the answer to `take`, up to its end or acknowledgement.
    fn ask(&mut self, request: Request, mut take: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        self.socket.send(&request.finish())?;
        loop {
            let count = self.socket.receive(&mut self.buffer)?;
            let mut rest = self.buffer.get(..count).unwrap_or_default();
            while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
                let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
                let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
                let kind = u16::from_le_bytes([k0, k1]);
                let body = rest.get(HEADER_BYTES..length).ok_or(Errno::PROTO)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if u32::from_le_bytes([s0, s1, s2, s3]) != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.first_chunk::<4>().ok_or(Errno::PROTO)?;
                        return match i32::from_le_bytes(*code) {
                            0 => Ok(()),
                            error => Err(Errno::from_number(error.saturating_neg())),
                        };
                    }
                    other => take(other, body),
                }
            }
        }
    }

    fn links(&mut self) -> Result<Vec<Link>, Errno> {
        let request = self
            .request(RTM_GETLINK, NLM_F_DUMP)
            .raw(&[0; LINK_BYTES])
            .attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_le_bytes());
        let mut links = Vec::new();
        self.ask(request, |kind, body| {
            // struct ifinfomsg: family, type, index at byte 4, flags, change.
            if kind == RTM_NEWLINK
                && let Some(&[i0, i1, i2, i3]) = body.get(4..8)
                && let Some(mac) = attribute(body.get(LINK_BYTES..), IFLA_ADDRESS)
                && let Ok(mac) = mac.try_into()
            {
                links.push(Link { index: u32::from_le_bytes([i0, i1, i2, i3]), mac });
            }
        })?;
        Ok(links)
    }

    fn bring_up(&mut self, index: u32, mtu: u16) -> Result<(), Errno> {
        let request = self.request(RTM_NEWLINK, NLM_F_ACK).raw(&[0; 4]).raw(&index.to_le_bytes());
        let mut request = request.raw(&IFF_UP.to_le_bytes()).raw(&IFF_UP.to_le_bytes());
        if mtu != 0 {
            request = request.attribute(IFLA_MTU, &u32::from(mtu).to_le_bytes());
        }
        self.ask(request, |_, _| {})
    }

    fn addresses(&mut self) -> Result<Vec<Present>, Errno> {
        let request = self.request(RTM_GETADDR, NLM_F_DUMP).raw(&[0; ADDRESS_BYTES]);
        let mut found = Vec::new();
        self.ask(request, |kind, body| {
            // struct ifaddrmsg: family, prefix length, flags, scope, index.
            let Some(&[family, prefix, _, scope, i0, i1, i2, i3]) = body.first_chunk::<ADDRESS_BYTES>() else {
                return;
            };
            let attributes = body.get(ADDRESS_BYTES..);
            let value = attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS));
            let address = match (family, value) {
                (AF_INET, Some(value)) => value.try_into().ok().map(|octets| Address::V4(octets, prefix)),
                (AF_INET6, Some(value)) => value.try_into().ok().map(|octets| Address::V6(octets, prefix)),
                _ => None,
            };
            if kind == RTM_NEWADDR
                && let Some(address) = address
            {
                let index = u32::from_le_bytes([i0, i1, i2, i3]);
                found.push(Present { index, address, link_local: family == AF_INET6 && scope == RT_SCOPE_LINK });
            }
        })?;
        Ok(found)
    }

    fn add_address(&mut self, index: u32, address: Address) -> Result<(), Errno> {
        let request = self.request(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE);
        self.ask(with_address(request, index, address), |_, _| {})
    }

    fn remove_address(&mut self, index: u32, address: Address) -> Result<(), Errno> {
        let request = self.request(RTM_DELADDR, NLM_F_ACK);
        self.ask(with_address(request, index, address), |_, _| {})
    }
}

fn with_address(request: Request, index: u32, address: Address) -> Request {
    match address {
        Address::V4(octets, prefix) => {
            let request = request.raw(&[AF_INET, prefix, 0, 0]).raw(&index.to_le_bytes());
            let request = request.attribute(IFA_LOCAL, &octets).attribute(IFA_ADDRESS, &octets);
            // The last address of the prefix; the last two prefix lengths have none.
            if prefix < 31 {
                let last = u32::from_be_bytes(octets) | u32::MAX.unbounded_shr(u32::from(prefix));
                request.attribute(IFA_BROADCAST, &last.to_be_bytes())
            } else {
                request
            }
        }
        Address::V6(octets, prefix) => {
            let request = request.raw(&[AF_INET6, prefix, IFA_F_NODAD, 0]).raw(&index.to_le_bytes());
            request.attribute(IFA_LOCAL, &octets).attribute(IFA_ADDRESS, &octets)
        }
    }
}

/// The value of one attribute in a list of them.
fn attribute(list: Option<&[u8]>, wanted: u16) -> Option<&[u8]> {
    let mut rest = list?;
    while let Some(&[l0, l1, k0, k1]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        if u16::from_le_bytes([k0, k1]) == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}
