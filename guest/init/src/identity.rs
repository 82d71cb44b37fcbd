//! Becoming somebody: what a guest is told about itself is applied before the host lets anything else reach it.

mod files;

use alloc::ffi::CString;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use hearth_guest_wire::{Identity, Interface, Join, NetworkInterface, Registration, json};

use crate::link::Refusal;
use crate::net;
use crate::sys::{self, Console, Errno};

/// Who the guest is, by the identity given last.
pub(crate) struct CurrentIdentity {
    vm_id: String,
    hostname: String,
    generation: [u8; 16],
    /// The membership under this identity, with the number of its registration.
    member: Option<(Join, u64)>,
    /// Whether programs can read it.
    recorded: bool,
}

impl CurrentIdentity {
    /// Whether [`CurrentIdentity::record`] has nothing to do.
    pub(crate) const fn is_recorded(&self) -> bool {
        self.recorded
    }

    /// Writes it down for programs. A guest that cannot do it is told on the console; it is somebody all the same.
    pub(crate) fn record(&mut self) {
        if self.recorded {
            return;
        }
        self.recorded = true;
        if let Err(errno) = files::write_record(self) {
            let _ = writeln!(Console, "hearth-init: write down the identity: errno {}", errno.number());
        }
    }

    /// Words for the environment of programs.
    pub(crate) fn environment(&self) -> Result<[CString; 3], Errno> {
        let word = |name: &str, value: &str| CString::new([name, value].concat()).map_err(|_| Errno::INVAL);
        Ok([
            word("HEARTH_VM_ID=", &self.vm_id)?,
            word("HEARTH_HOSTNAME=", &self.hostname)?,
            word("HEARTH_GENERATION=", &json::hex(&self.generation))?,
        ])
    }

    /// What a registrar is told.
    pub(crate) fn registration(&self, join: &Join) -> Registration {
        Registration {
            executor_id: join.executor_id.clone(),
            cluster_id: join.cluster_id.clone(),
            vm_id: self.vm_id.clone(),
            generation: self.generation,
            token: join.token.clone(),
        }
    }

    /// The number of a registration made before by the same words.
    pub(crate) fn epoch_of(&self, join: &Join) -> Option<u64> {
        let (member, epoch) = self.member.as_ref()?;
        let Join { cluster_id, executor_id, token, endpoint, timeout_ms: _ } = join;
        let same = *cluster_id == member.cluster_id
            && *executor_id == member.executor_id
            && *token == member.token
            && *endpoint == member.endpoint;
        same.then_some(*epoch)
    }

    /// Remembers a registration.
    pub(crate) fn registered(&mut self, join: Join, epoch: u64) {
        self.member = Some((join, epoch));
    }
}

/// Applies an identity, randomness first: guests launched from one bundle share their generator's state until then.
/// Ends at the first thing that fails; applying an identity again is harmless. `current` is what it replaces. The record
/// for programs is left for later: making a file costs an emulated kernel 20 ms, and a launch waits for this.
pub(crate) fn apply(identity: Identity, current: &mut Option<CurrentIdentity>) -> Result<(), Refusal> {
    let Identity { vm_id, hostname, generation, entropy, unix_ns, interfaces } = identity;
    sys::add_entropy(entropy.as_flattened()).map_err(failed("add randomness"))?;
    if unix_ns != 0 {
        sys::set_wall_ns(unix_ns).map_err(failed("set the clock"))?;
    }
    sys::set_hostname(&hostname).map_err(failed("set the host name"))?;
    // A membership is one of a launch.
    let member = current.take_if(|current| current.generation == generation).and_then(|current| current.member);
    *current = Some(CurrentIdentity { vm_id, hostname, generation, member, recorded: false });
    // All zeros are no machine id, and no generation.
    if generation != [0; 16] {
        files::write_machine_id(&generation).map_err(failed("write the machine id"))?;
    }
    if !interfaces.is_empty() {
        // What hosts of version 1 give an interface: addresses, and no way out.
        let interfaces: Vec<NetworkInterface> = interfaces.into_iter().map(without_gateways).collect();
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
