//! Hardware addresses: a restored guest's devices have others than its kernel remembers.
//!
//! The addresses of an interface stay, but for its link-local one, which is made of the hardware address. The kernel
//! forgets the neighbours it knew there, permanent ones too.

use alloc::vec::Vec;

use hearth_guest_wire::HardwareAddress;

use super::netlink::Channel;
use super::{find, link_local, links_with, requests};
use crate::identity::failed;
use crate::link::Refusal;
use crate::sys::Interfaces;

/// Gives interfaces other hardware addresses. Nothing is changed when one of them is missing.
pub(crate) fn change(wanted: &[HardwareAddress]) -> Result<(), Refusal> {
    let mut channel = Channel::open().map_err(failed("open rtnetlink"))?;
    let links = links_with(wanted.iter().map(|change| change.from), &mut channel)?;
    let present = |mac| find(&links, mac);
    // Made already, as a whole: an address that one interface was given may be what another was found by.
    if wanted.iter().all(|change| present(change.to).is_ok())
        && wanted.iter().any(|change| present(change.from).is_err())
    {
        return Ok(());
    }
    // All are found before any is changed, so that two may swap.
    let mut found = Vec::with_capacity(wanted.len());
    for change in wanted {
        match present(change.from) {
            Ok(link) => found.push((link, change.to)),
            Err(missing) => drop(present(change.to).map_err(|_| missing)?),
        }
    }
    // By ioctl: rtnetlink would tell the change to whoever listens, with all there is to say of the interface, twice.
    let interfaces = Interfaces::new().map_err(failed("ask for interfaces"))?;
    let mut batch = channel.batch();
    let mut outcome = Ok(());
    for (link, mac) in found {
        if let Err(errno) = interfaces.set_hardware_address(&link.name, mac) {
            outcome = outcome.and(Err(failed("change a hardware address")(errno)));
            continue;
        }
        requests::remove_link_local(&mut batch, link.index, link_local(link.mac));
        // One that is down gets its own when it comes up.
        if link.up {
            requests::set_link_local(&mut batch, link.index, link_local(mac));
        }
    }
    outcome.and(channel.carry_out(batch).map_err(|(errno, what)| failed(what)(errno)))
}
