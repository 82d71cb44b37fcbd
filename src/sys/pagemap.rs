//! What a process has mapped, page by page, as the kernel tells it (`Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::units::PAGE_BYTES;

/// Bytes of an entry.
const ENTRY_BYTES: usize = 8;

/// Entries read at once.
const ENTRIES: usize = 32 * 1024;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// What is told of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// Whether it is the process's alone: a private file's page that was written, in memory or in swap.
    pub const fn is_own(self) -> bool {
        self.0 & SWAPPED != 0 || self.0 & PRESENT != 0 && self.0 & OF_FILE == 0
    }

    /// Whether the process has it in memory or in swap: it was reached, or lies beside one that was.
    pub const fn is_mapped(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }
}

/// Reads what `pagemap` says of `count` pages from an address on, in this order.
pub fn read(pagemap: &File, address: u64, count: usize, mut each: impl FnMut(usize, Entry)) -> io::Result<()> {
    let mut at = address / PAGE_BYTES * ENTRY_BYTES as u64;
    let mut bytes = vec![0; ENTRIES.min(count) * ENTRY_BYTES];
    for first in (0..count).step_by(ENTRIES) {
        let part = &mut bytes[..(count - first).min(ENTRIES) * ENTRY_BYTES];
        pagemap.read_exact_at(part, at)?;
        at += part.len() as u64;
        for (index, entry) in part.as_chunks::<ENTRY_BYTES>().0.iter().enumerate() {
            each(first + index, Entry(u64::from_le_bytes(*entry)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ram::{self, RegionPlan, Sharing};
    use crate::units::{Bytes, GuestPhys, MIB};
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};

    #[test]
    fn what_was_read_is_mapped_and_what_was_written_is_its_own() {
        let file = ram::memfd(Bytes(MIB)).unwrap();
        file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        let plan = RegionPlan { start: GuestPhys(0), bytes: Bytes(MIB), file_offset: Bytes(0) };
        let ram = ram::map(&file, Sharing::Private, &[plan]).unwrap();
        ram.write_obj(1_u8, GuestAddress(0x3000)).unwrap();
        let seen: u8 = ram.read_obj(GuestAddress(0x8_0000)).unwrap();
        assert_eq!(seen, 7);
        let start = ram.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap();
        let (mut own, mut mapped) = (Vec::new(), Vec::new());
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        read(&pagemap, start.addr() as u64, 256, |page, entry| {
            own.extend(entry.is_own().then_some(page));
            mapped.extend(entry.is_mapped().then_some(page));
        })
        .unwrap();
        assert_eq!(own, [3]);
        assert!(mapped.contains(&3) && mapped.contains(&0x80), "{mapped:?}");
    }
}
