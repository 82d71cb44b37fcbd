//! Hardware addresses: a restored guest's devices have others than its kernel remembers.
//!
//! The addresses of an interface stay, but for its link-local one, which is made of the hardware address. The kernel
//! forgets the neighbours it knew there, permanent ones too.

use alloc::vec::Vec;

use hearth_guest_wire::HardwareAddress;

use super::netlink::Channel;
use super::{find, link_local, requests};
use crate::identity::failed;
use crate::link::Refusal;

/// Gives interfaces other hardware addresses. Nothing is changed when one of them is missing.
pub(crate) fn change(wanted: &[HardwareAddress]) -> Result<(), Refusal> {
    let mut channel = Channel::open().map_err(failed("open rtnetlink"))?;
    let links = requests::links(&mut channel).map_err(failed("list interfaces"))?;
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
    let mut batch = channel.batch();
    for (link, mac) in found {
        requests::set_hardware_address(&mut batch, link.index, mac);
        requests::remove_link_local(&mut batch, link.index, link_local(link.mac));
        // One that is down gets its own when it comes up.
        if link.up {
            requests::set_link_local(&mut batch, link.index, link_local(mac));
        }
    }
    channel.carry_out(batch).map_err(|(errno, what)| failed(what)(errno))
}
