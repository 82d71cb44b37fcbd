//! Maps pages of a machine's memory image before its guest reaches them, by the thread that also sends.

use crate::machine::{GuestRam, image};
use crate::sys::fill::{Access, populate};
use crate::units::PAGE_BYTES;
use crate::wire::control::PrefaultSpec;

/// Maps what is named, as far as it is there. A page that cannot be mapped ahead is mapped when it is reached, or is what
/// ends the guest then: it is no failure here.
pub(super) fn serve(ram: &GuestRam, spec: &PrefaultSpec) {
    // What is written first: those cost a guest most, a copy each.
    for (runs, access) in [(&spec.written, Access::Write), (&spec.read, Access::Read)] {
        for &(first, count) in runs {
            for (guest, bytes) in image::in_guest(ram, u64::from(first) * PAGE_BYTES, u64::from(count) * PAGE_BYTES) {
                let _ = populate(ram, guest, bytes, access);
            }
        }
    }
}
