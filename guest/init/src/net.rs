//! Interfaces, addresses, neighbours and default routes: what the host says is what the guest has afterwards.
//!
//! An interface is found by its hardware address and ends with exactly the addresses it was given, and the IPv6
//! link-local one that its hardware address makes: those of an earlier identity, left by the bundle it was launched
//! from, are removed. Nothing on the link configures the guest. Applying the same again is harmless, applying
//! something else replaces it.
//!
//! All changes go to the kernel in one send. When one of them fails the others are made all the same; the answer names
//! the first that failed.

pub(crate) mod hardware;
mod netlink;
mod requests;

use alloc::format;
use alloc::vec::Vec;
use core::ffi::CStr;

use hearth_guest_wire::{Address, GatewayAddress, NetworkInterface};

use crate::identity::failed;
use crate::link::Refusal;
use crate::sys::{self, Errno, Interfaces};
use netlink::{Batch, Channel};
use requests::{AF_INET, AF_INET6, Link};

/// Makes the network what `wanted` says.
pub(crate) fn apply(wanted: &[NetworkInterface]) -> Result<(), Refusal> {
    let mut channel = Channel::open().map_err(failed("open rtnetlink"))?;
    let links = links_with(wanted.iter().map(|interface| interface.mac), &mut channel)?;
    let mut found = Vec::with_capacity(wanted.len());
    for interface in wanted {
        found.push((find(&links, interface.mac)?, interface));
    }
    for (link, _) in &found {
        ignore_routers(link).map_err(failed("turn router advertisements off"))?;
    }
    let present = requests::addresses(&mut channel).map_err(failed("list addresses"))?;

    let mut batch = channel.batch();
    for link in links.iter().filter(|link| link.loopback && !link.up) {
        requests::bring_up(&mut batch, link.index, 0);
    }
    for (link, interface) in &found {
        // The kernel would make the same link-local address when the interface comes up, and then ask for a second or
        // two whether somebody has it already: only the host is at the other end.
        requests::make_no_addresses(&mut batch, link.index);
        requests::bring_up(&mut batch, link.index, interface.mtu);
        let link_local = link_local(link.mac);
        for old in present.iter().filter(|old| old.index == link.index && old.address != link_local) {
            if !interface.addresses.contains(&old.address) {
                requests::remove_address(&mut batch, link.index, old.address);
            }
        }
        requests::set_link_local(&mut batch, link.index, link_local);
        // Those that are there as well: with an old address of the same subnet the kernel may have dropped them.
        for new in &interface.addresses {
            requests::set_address(&mut batch, link.index, *new);
        }
        for gateway in &interface.gateways {
            requests::set_neighbour(&mut batch, link.index, gateway);
        }
    }
    set_default_route(&mut batch, &found, AF_INET);
    set_default_route(&mut batch, &found, AF_INET6);
    channel.carry_out(batch).map_err(|(errno, what)| failed(what)(errno))
}

/// The interfaces, all of them or the first ones with these hardware addresses among them. The loopback interface is the
/// first of all.
fn links_with(macs: impl Iterator<Item = [u8; 6]> + Clone, channel: &mut Channel) -> Result<Vec<Link>, Refusal> {
    /// A guest's interfaces are numbered one after the other as it boots. When there are gaps, the kernel is to list.
    const FIRST: u32 = 24;
    let interfaces = Interfaces::new().map_err(failed("ask for interfaces"))?;
    let mut links = Vec::new();
    for index in 1..=FIRST {
        let Ok(facts) = interfaces.facts(index) else { continue };
        links.push(Link::from_facts(index, &facts));
        if macs.clone().all(|mac| find(&links, mac).is_ok()) {
            return Ok(links);
        }
    }
    requests::links(channel).map_err(failed("list interfaces"))
}

fn find(links: &[Link], mac: [u8; 6]) -> Result<&Link, Refusal> {
    links.iter().find(|link| link.mac == mac && !link.loopback).ok_or_else(|| {
        let [a, b, c, d, e, f] = mac;
        let what = Some(format!("no interface is {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"));
        Refusal { errno: Errno::NODEV, what }
    })
}

/// By the first gateway of the family, or none of ours.
fn set_default_route(batch: &mut Batch, found: &[(&Link, &NetworkInterface)], family: u8) {
    for (link, interface) in found {
        let of_family = |address: &GatewayAddress| match address {
            GatewayAddress::V4(_) => family == AF_INET,
            GatewayAddress::V6(_) => family == AF_INET6,
        };
        if let Some(gateway) = interface.gateways.iter().find(|gateway| of_family(&gateway.address)) {
            requests::set_default_route(batch, link.index, gateway.address);
            return;
        }
    }
    requests::remove_default_route(batch, family);
}

/// The link-local address an interface gives itself: the modified EUI-64 of its hardware address (RFC 4291 appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Address {
    Address::V6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f], 64)
}

/// Keeps an interface from taking routes, and with them addresses, out of router advertisements. To be done before it
/// is up, which is when the kernel would ask for some. There is no netlink message for it, and a look-up below
/// /proc/sys costs an emulated kernel 17 ms: so this is the only one.
fn ignore_routers(link: &Link) -> Result<(), Errno> {
    let path = [b"/proc/sys/net/ipv6/conf/", link.name.as_slice(), b"/accept_ra\0"].concat();
    let path = CStr::from_bytes_with_nul(&path).map_err(|_| Errno::INVAL)?;
    match sys::write_setting(path, b"0") {
        // A kernel without IPv6, or without /proc.
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}
