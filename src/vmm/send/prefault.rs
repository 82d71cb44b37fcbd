//! Maps pages of a machine's memory image before its guest reaches them, by the thread that also sends.

use crate::machine::{GuestRam, Presence, image};
use crate::sys::fill::{Access, populate};
use crate::units::PAGE_BYTES;
use crate::wire::control::PrefaultSpec;

/// Maps what is named, as far as it is there. A page that cannot be mapped ahead is mapped when it is reached, or is what
/// ends the guest then: it is no failure here. Of memory that is being filled only the chunks that are there are mapped:
/// waiting for others would hold this thread, and asking for them is the agent's to think of.
pub(super) fn serve(ram: &GuestRam, spec: &PrefaultSpec, presence: Option<&Presence>) {
    // What is written first: those cost a guest most, a copy each.
    for (runs, access) in [(&spec.written, Access::Write), (&spec.read, Access::Read)] {
        for &(first, count) in runs {
            let (offset, bytes) = (u64::from(first) * PAGE_BYTES, u64::from(count) * PAGE_BYTES);
            let there = match presence {
                Some(presence) => presence.there(offset, bytes),
                None => vec![(offset, bytes)],
            };
            for (guest, bytes) in there.into_iter().flat_map(|(offset, bytes)| image::in_guest(ram, offset, bytes)) {
                let _ = populate(ram, guest, bytes, access);
            }
        }
    }
}
