//! What is listed and changed: links, addresses, neighbours, default routes, as rtnetlink has them.

use alloc::vec::Vec;

use hearth_guest_wire::{Address, Gateway, GatewayAddress};

use super::netlink::{Batch, Channel, attribute};
use crate::sys::{Errno, InterfaceFacts};

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
/// What IFLA_AF_SPEC holds: of AF_INET6 (10) IFLA_INET6_ADDR_GEN_MODE (8): none (1).
const NO_GENERATED_ADDRESSES: [u8; 12] = [12, 0, AF_INET6, 0, 5, 0, 8, 0, 1, 0, 0, 0];
/// Leave the counters out of a listing.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Usable at once: nobody else can have the address, the host sees to that.
const IFA_F_NODAD: u8 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_NOWHERE: u8 = 255;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNSPECIFIED: u8 = 0;
const RTN_UNICAST: u8 = 1;
/// The gateway is on the link although no address says so.
const RTNH_F_ONLINK: u32 = 4;

/// Who made a route: this number marks ours, in guests and on hosts.
const ROUTE_PROTOCOL: u8 = 104;

/// What the kernel says when it has no IPv6, or none on an interface.
const NO_IPV6: [Errno; 3] = [Errno::ACCES, Errno::NOTSUPP, Errno::AFNOSUPPORT];

pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;

/// Bytes of `struct ifinfomsg`: family, kind, index, flags, flags to change.
const LINK_BYTES: usize = 16;
/// Bytes of `struct ifaddrmsg`: family, prefix length, flags, scope, index.
const ADDRESS_BYTES: usize = 8;

/// An interface with a hardware address, as listed.
pub(super) struct Link {
    pub(super) index: u32,
    /// Without the null.
    pub(super) name: Vec<u8>,
    pub(super) mac: [u8; 6],
    pub(super) up: bool,
    pub(super) loopback: bool,
}

impl Link {
    /// An interface that was asked for by its index.
    pub(super) fn from_facts(index: u32, facts: &InterfaceFacts) -> Self {
        let flags = u32::from(facts.flags);
        Self {
            index,
            name: facts.name().to_vec(),
            mac: facts.mac,
            up: flags & IFF_UP != 0,
            loopback: flags & IFF_LOOPBACK != 0,
        }
    }
}

/// An address as listed.
pub(super) struct Present {
    pub(super) index: u32,
    pub(super) address: Address,
}

/// All interfaces.
pub(super) fn links(channel: &mut Channel) -> Result<Vec<Link>, Errno> {
    let mask = RTEXT_FILTER_SKIP_STATS.to_le_bytes();
    let mut links = Vec::new();
    channel.list(RTM_GETLINK, &[0; LINK_BYTES], &[(IFLA_EXT_MASK, &mask)], |kind, body| {
        let attributes = body.get(LINK_BYTES..);
        if kind == RTM_NEWLINK
            && let Some(&[i0, i1, i2, i3, f0, f1, f2, f3]) = body.get(4..12)
            && let Some(Ok(mac)) = attribute(attributes, IFLA_ADDRESS).map(<[u8; 6]>::try_from)
            && let Some([name @ .., 0]) = attribute(attributes, IFLA_IFNAME)
        {
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            links.push(Link {
                index: u32::from_le_bytes([i0, i1, i2, i3]),
                name: name.to_vec(),
                mac,
                up: flags & IFF_UP != 0,
                loopback: flags & IFF_LOOPBACK != 0,
            });
        }
    })?;
    Ok(links)
}

/// All addresses.
pub(super) fn addresses(channel: &mut Channel) -> Result<Vec<Present>, Errno> {
    let mut found = Vec::new();
    channel.list(RTM_GETADDR, &[0; ADDRESS_BYTES], &[], |kind, body| {
        let Some(&[family, prefix, _, _, i0, i1, i2, i3]) = body.first_chunk::<ADDRESS_BYTES>() else {
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
            found.push(Present { index, address });
        }
    })?;
    Ok(found)
}

/// Keeps the kernel from giving an interface an IPv6 address by itself.
pub(super) fn make_no_addresses(batch: &mut Batch, index: u32) {
    batch.request(RTM_NEWLINK, 0, "turn automatic addresses off", &NO_IPV6);
    batch.raw(&[0; 4]).raw(&index.to_le_bytes()).raw(&[0; 8]);
    batch.attribute(IFLA_AF_SPEC, &NO_GENERATED_ADDRESSES);
}

/// Brings an interface up; an `mtu` of 0 leaves that alone.
pub(super) fn bring_up(batch: &mut Batch, index: u32, mtu: u16) {
    let up = IFF_UP.to_le_bytes();
    batch.request(RTM_NEWLINK, 0, "bring an interface up", &[]);
    batch.raw(&[0; 4]).raw(&index.to_le_bytes()).raw(&up).raw(&up);
    if mtu != 0 {
        batch.attribute(IFLA_MTU, &u32::from(mtu).to_le_bytes());
    }
}

/// Gives an interface an address; fine when it has it.
pub(super) fn set_address(batch: &mut Batch, index: u32, address: Address) {
    batch.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, "add an address", &[]);
    with_address(batch, index, address);
}

/// Gives an interface its link-local address, if there is IPv6 at all.
pub(super) fn set_link_local(batch: &mut Batch, index: u32, address: Address) {
    batch.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, "add the link-local address", &NO_IPV6);
    with_address(batch, index, address);
}

/// Takes an interface's link-local address from it; fine when it has none.
pub(super) fn remove_link_local(batch: &mut Batch, index: u32, address: Address) {
    const NOTHING_TO_REMOVE: [Errno; 5] = {
        let [access, unsupported, family] = NO_IPV6;
        [access, unsupported, family, Errno::NXIO, Errno::ADDRNOTAVAIL]
    };
    batch.request(RTM_DELADDR, 0, "remove the link-local address", &NOTHING_TO_REMOVE);
    with_address(batch, index, address);
}

/// Takes an address from an interface; fine when it went with another one.
pub(super) fn remove_address(batch: &mut Batch, index: u32, address: Address) {
    batch.request(RTM_DELADDR, 0, "remove an address", &[Errno::ADDRNOTAVAIL]);
    with_address(batch, index, address);
}

fn with_address(batch: &mut Batch, index: u32, address: Address) {
    match address {
        Address::V4(octets, prefix) => {
            batch.raw(&[AF_INET, prefix, 0, RT_SCOPE_UNIVERSE]).raw(&index.to_le_bytes());
            batch.attribute(IFA_LOCAL, &octets).attribute(IFA_ADDRESS, &octets);
            // The last address of the prefix; the last two prefix lengths have none.
            if prefix < 31 {
                let last = u32::from_be_bytes(octets) | u32::MAX.unbounded_shr(u32::from(prefix));
                batch.attribute(IFA_BROADCAST, &last.to_be_bytes());
            }
        }
        Address::V6(octets, prefix) => {
            batch.raw(&[AF_INET6, prefix, IFA_F_NODAD, RT_SCOPE_UNIVERSE]).raw(&index.to_le_bytes());
            batch.attribute(IFA_LOCAL, &octets).attribute(IFA_ADDRESS, &octets);
        }
    }
}

/// Makes a gateway known for good: it is never asked for, and no answer of anybody changes it.
pub(super) fn set_neighbour(batch: &mut Batch, index: u32, gateway: &Gateway) {
    batch.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, "set a gateway's hardware address", &[]);
    let (family, octets) = octets(&gateway.address);
    let [state, more] = NUD_PERMANENT.to_le_bytes();
    // struct ndmsg: family, padding, index, state, flags, kind.
    batch.raw(&[family, 0, 0, 0]).raw(&index.to_le_bytes()).raw(&[state, more, 0, 0]);
    batch.attribute(NDA_DST, octets).attribute(NDA_LLADDR, &gateway.mac);
}

/// Makes a gateway the way to everywhere in its family.
pub(super) fn set_default_route(batch: &mut Batch, index: u32, gateway: GatewayAddress) {
    batch.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, "set a default route", &[]);
    let (family, octets) = octets(&gateway);
    default_route(batch, family, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK);
    batch.attribute(RTA_OIF, &index.to_le_bytes()).attribute(RTA_GATEWAY, octets);
}

/// Removes the default route of a family that [`set_default_route`] made, if there is one.
pub(super) fn remove_default_route(batch: &mut Batch, family: u8) {
    // Not supported: a kernel without that family.
    batch.request(RTM_DELROUTE, 0, "remove a default route", &[Errno::SRCH, Errno::NOTSUPP]);
    default_route(batch, family, RT_SCOPE_NOWHERE, RTN_UNSPECIFIED, 0);
}

fn default_route(batch: &mut Batch, family: u8, scope: u8, kind: u8, flags: u32) {
    // struct rtmsg: family, prefix lengths of destination and source, type of service, table, who made it, scope, kind.
    batch.raw(&[family, 0, 0, 0]).raw(&[RT_TABLE_MAIN, ROUTE_PROTOCOL, scope, kind]).raw(&flags.to_le_bytes());
}

fn octets(address: &GatewayAddress) -> (u8, &[u8]) {
    match address {
        GatewayAddress::V4(octets) => (AF_INET, octets),
        GatewayAddress::V6(octets) => (AF_INET6, octets),
    }
}
