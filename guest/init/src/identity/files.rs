//! Where programs read who the guest is.
//!
//! `/run/hearth/identity.json` has all of it, and appears whole or not at all. `/etc/machine-id` is what other software
//! takes for the name of an installation (systemd's machine-id(5)): here that of a launch, the generation id.

use alloc::vec::Vec;

use hearth_guest_wire::json;

use super::CurrentIdentity;
use crate::sys::{self, Errno};

/// Writes `/run/hearth/identity.json`.
pub(super) fn write_record(identity: &CurrentIdentity) -> Result<(), Errno> {
    let mut record = Vec::with_capacity(256);
    let generation = json::hex(&identity.generation);
    let members = [("vm_id", identity.vm_id.as_str()), ("hostname", &identity.hostname), ("generation", &generation)];
    json::push_object(&mut record, &members);
    record.push(b'\n');
    let write = || sys::replace_file(c"/run/hearth/identity.json", c"/run/hearth/.identity.json", &record);
    match write() {
        Err(Errno::NOENT) => {
            sys::make_directory(c"/run/hearth", 0o755)?;
            write()
        }
        other => other,
    }
}

/// Writes the machine id: in place, in one write of what is always as long, so that it is never seen half-written and
/// what is mounted or linked there stays it. An image that cannot be written to gets one mounted over its own.
pub(super) fn write_machine_id(generation: &[u8; 16]) -> Result<(), Errno> {
    const MS_BIND: u32 = 4096;
    let mut id = json::hex(generation).into_bytes();
    id.push(b'\n');
    match sys::write_file(c"/etc/machine-id", &id) {
        Err(Errno::ROFS) => {
            sys::write_file(c"/run/machine-id", &id)?;
            match sys::mount(c"/run/machine-id", c"/etc/machine-id", MS_BIND, c"") {
                Err(Errno::NOENT) => Ok(()),
                other => other,
            }
        }
        // An image without /etc: nobody looks there.
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}
