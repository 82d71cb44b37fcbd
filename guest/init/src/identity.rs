//! Becoming somebody: what a guest is told about itself is applied before the host lets anything else reach it.

use alloc::string::String;
use alloc::vec::Vec;

use hearth_guest_wire::{Identity, Interface, NetworkInterface};

use crate::link::Refusal;
use crate::net;
use crate::sys::{self, Errno};

/// Applies an identity, randomness first: guests launched from one bundle share their generator's state until then.
/// Ends at the first thing that fails; applying an identity again is harmless.
pub(crate) fn apply(identity: &Identity) -> Result<(), Refusal> {
    let Identity { vm_id: _, hostname, generation: _, entropy, unix_ns, interfaces } = identity;
    sys::add_entropy(entropy.as_flattened()).map_err(failed("add randomness"))?;
    if *unix_ns != 0 {
        sys::set_wall_ns(*unix_ns).map_err(failed("set the clock"))?;
    }
    sys::set_hostname(hostname).map_err(failed("set the host name"))?;
    if !interfaces.is_empty() {
        // What hosts of version 1 give an interface: addresses, and no way out.
        let interfaces: Vec<NetworkInterface> = interfaces.iter().cloned().map(without_gateways).collect();
        net::apply(&interfaces)?;
    }
    Ok(())
}

fn without_gateways(interface: Interface) -> NetworkInterface {
    let Interface { mac, addresses, mtu } = interface;
    NetworkInterface { mac, mtu, addresses, gateways: Vec::new() }
}

/// Puts words to an errno.
pub(crate) fn failed(what: &'static str) -> impl FnOnce(Errno) -> Refusal {
    move |errno| Refusal { errno, what: Some(String::from(what)) }
}
