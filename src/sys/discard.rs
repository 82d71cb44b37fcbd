//! Pages of guest memory given back to the host: what a guest says it does not use.
//!
//! | mapping | how | what the guest reads there afterwards |
//! |---|---|---|
//! | shared file | fallocate(2) punches a hole, in whatever process the file is mapped | zeroes |
//! | private | madvise(2) MADV_DONTNEED drops this process's own pages | zeroes, or what the private file holds |
#![expect(unsafe_code, reason = "madvise has no safe wrapper")]

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::extent;
use super::ram::GuestRam;
use crate::units::{Bytes, GuestPhys, PAGE_BYTES};

/// Gives back the whole pages between `start` and `start + bytes`, and passes over whatever there is no guest memory
/// at. Returns the bytes that were given back.
pub fn discard(ram: &GuestRam, start: GuestPhys, bytes: Bytes) -> io::Result<Bytes> {
    let first = start.0.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
    let end = start.0.saturating_add(bytes.0) / PAGE_BYTES * PAGE_BYTES;
    let mut given = 0;
    for region in ram.iter() {
        let (low, high) = (region.start_addr().raw_value(), region.last_addr().raw_value());
        let (from, to) = (first.max(low), end.min(high.saturating_add(1)));
        if let Some(length) = to.checked_sub(from).and_then(|length| NonZeroUsize::new(usize::try_from(length).ok()?)) {
            discard_in(region, from - low, length)?;
            given += length.get() as u64;
        }
    }
    Ok(Bytes(given))
}

type Region = vm_memory::GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>;

/// Whole pages, all of them inside the region.
fn discard_in(region: &Region, at: u64, bytes: NonZeroUsize) -> io::Result<()> {
    let is_shared = region.get_mmap().flags() & libc::MAP_SHARED != 0;
    match region.file_offset() {
        Some(backing) if is_shared => extent::punch_hole(backing.file(), backing.start() + at, bytes.get() as u64),
        Some(_) | None => {
            let host = region.get_host_address(MemoryRegionAddress(at)).map_err(io::Error::other)?;
            let host = NonNull::new(host.cast()).ok_or(io::ErrorKind::InvalidInput)?;
            drop_pages(host, bytes)
        }
    }
}

fn drop_pages(host: NonNull<libc::c_void>, bytes: NonZeroUsize) -> io::Result<()> {
    // SAFETY: the range lies in one mapping of guest memory, which its region keeps for as long as it is borrowed.
    // Guest memory is read and written through volatile access only, by a guest at any time: nothing in this process
    // counts on what it holds, and no reference to it exists.
    match unsafe { libc::madvise(host.as_ptr(), bytes.get(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ram::{self, RegionPlan, Sharing};
    use crate::sys::sparse::next_data;
    use crate::units::MIB;
    use std::fs::File;
    use vm_memory::{Bytes as _, GuestAddress};

    /// Two regions with a hole between them, from one file.
    fn memory(file: &File, sharing: Sharing) -> GuestRam {
        let plan = |start, file_offset| RegionPlan {
            start: GuestPhys(start),
            bytes: Bytes(MIB),
            file_offset: Bytes(file_offset),
        };
        ram::map(file, sharing, &[plan(0, 0), plan(4 * MIB, MIB)]).unwrap()
    }

    #[test]
    fn shared_pages_become_holes_of_the_file() {
        let file = ram::memfd(Bytes(2 * MIB)).unwrap();
        let ram = memory(&file, Sharing::Shared);
        for page in 0..8 {
            ram.write_obj(7_u64, GuestAddress(4 * MIB + page * PAGE_BYTES)).unwrap();
        }
        // From the middle of a page to the middle of one: only the whole pages between.
        let given = discard(&ram, GuestPhys(4 * MIB + 100), Bytes(4 * PAGE_BYTES)).unwrap();
        assert_eq!(given, Bytes(3 * PAGE_BYTES));
        assert_eq!(next_data(&file, 0, 2 * MIB).unwrap(), Some(MIB..MIB + PAGE_BYTES));
        let rest = MIB + 4 * PAGE_BYTES..MIB + 8 * PAGE_BYTES;
        assert_eq!(next_data(&file, MIB + PAGE_BYTES, 2 * MIB).unwrap(), Some(rest));
        assert_eq!(ram.read_obj::<u64>(GuestAddress(4 * MIB + PAGE_BYTES)).unwrap(), 0);
    }

    #[test]
    fn private_pages_show_the_file_again_and_the_file_is_untouched() {
        let file = ram::memfd(Bytes(2 * MIB)).unwrap();
        memory(&file, Sharing::Shared).write_obj(5_u64, GuestAddress(PAGE_BYTES)).unwrap();
        let ram = memory(&file, Sharing::Private);
        ram.write_obj(6_u64, GuestAddress(PAGE_BYTES)).unwrap();
        assert_eq!(discard(&ram, GuestPhys(PAGE_BYTES), Bytes(PAGE_BYTES)).unwrap(), Bytes(PAGE_BYTES));
        assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGE_BYTES)).unwrap(), 5);
        assert_eq!(next_data(&file, 0, 2 * MIB).unwrap(), Some(PAGE_BYTES..2 * PAGE_BYTES));
    }

    #[test]
    fn what_is_no_memory_is_passed_over() {
        let file = ram::memfd(Bytes(2 * MIB)).unwrap();
        let ram = memory(&file, Sharing::Shared);
        let nothing = [
            (GuestPhys(2 * MIB), Bytes(MIB)),
            (GuestPhys(64 * MIB), Bytes(MIB)),
            (GuestPhys(u64::MAX), Bytes(u64::MAX)),
            (GuestPhys(1), Bytes(PAGE_BYTES)),
            (GuestPhys(0), Bytes(0)),
        ];
        for (start, bytes) in nothing {
            assert_eq!(discard(&ram, start, bytes).unwrap(), Bytes(0), "{start} {bytes}");
        }
        assert_eq!(discard(&ram, GuestPhys(0), Bytes(u64::MAX)).unwrap(), Bytes(2 * MIB));
    }
}
