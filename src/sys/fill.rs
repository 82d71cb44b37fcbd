//! Guest memory filled by the page, before a guest runs in it: by what arrives from another host.
//!
//! | mapping | how | why |
//! |---|---|---|
//! | shared file | pwrite(2), then madvise(2) MADV_POPULATE_READ | no page is zeroed first, and none costs a fault of its own |
//! | private | written through the mapping | the file is not to change |
#![expect(unsafe_code, reason = "madvise has no safe wrapper")]

use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::ram::GuestRam;

/// Makes the memory from `at` on hold `content`, and marks it as written. What is not in one region is not written.
pub fn fill(ram: &GuestRam, at: GuestAddress, content: &[u8]) -> Result<(), GuestMemoryError> {
    let region = ram.find_region(at).ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
    let offset = at.unchecked_offset_from(region.start_addr());
    if content.len() as u64 > region.len() - offset {
        return Err(GuestMemoryError::InvalidBackendAddress);
    }
    let is_shared = region.get_mmap().flags() & libc::MAP_SHARED != 0;
    let Some(backing) = region.file_offset().filter(|_| is_shared) else { return ram.write_slice(content, at) };
    backing.file().write_all_at(content, backing.start() + offset).map_err(GuestMemoryError::IOError)?;
    region.bitmap().mark_dirty(usize::try_from(offset).unwrap_or(usize::MAX), content.len());
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(offset))?;
    if let Some(host) = NonNull::new(host) {
        // The content is there; a kernel before 5.14 maps it when it is reached.
        let _ = map_pages(host.cast(), content.len());
    }
    Ok(())
}

/// What memory is mapped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be read: a private page stays the file's.
    Read,
    /// To be written: a private page becomes this process's own, with what it held.
    Write,
}

/// Maps memory from `at` on ahead of its use, as far as it lies in one region. What it holds stays as it is. Needs Linux
/// 5.14.
pub fn populate(ram: &GuestRam, at: GuestAddress, bytes: u64, access: Access) -> io::Result<()> {
    let Some(region) = ram.find_region(at) else { return Ok(()) };
    let offset = at.unchecked_offset_from(region.start_addr());
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(offset)).map_err(io::Error::other)?;
    let bytes = usize::try_from(bytes.min(region.len() - offset)).unwrap_or(0);
    NonNull::new(host).map_or(Ok(()), |host| populate_range(host.cast(), bytes, access))
}

/// Maps pages that the file has.
fn map_pages(host: NonNull<libc::c_void>, bytes: usize) -> io::Result<()> {
    populate_range(host, bytes, Access::Read)
}

fn populate_range(host: NonNull<libc::c_void>, bytes: usize, access: Access) -> io::Result<()> {
    let advice = match access {
        Access::Read => libc::MADV_POPULATE_READ,
        Access::Write => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: the range lies in one mapping of guest memory, which its region keeps for as long as it is borrowed. What
    // it holds stays as it is.
    match unsafe { libc::madvise(host.as_ptr(), bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ram::{self, RegionPlan, Sharing};
    use crate::units::{self, GuestPhys, MIB};

    fn regions() -> [RegionPlan; 2] {
        [(0, 0), (2 * MIB, MIB)].map(|(start, file_offset)| RegionPlan {
            start: GuestPhys(start),
            bytes: units::Bytes(MIB),
            file_offset: units::Bytes(file_offset),
        })
    }

    #[test]
    fn what_is_filled_is_seen_by_all_who_share_it_and_by_nobody_else() {
        for (sharing, in_file) in [(Sharing::Shared, 7), (Sharing::Private, 0)] {
            let file = ram::memfd(units::Bytes(2 * MIB)).unwrap();
            let ram = ram::map(&file, sharing, &regions()).unwrap();
            let at = GuestAddress(2 * MIB + 8192);
            fill(&ram, at, &[7; 8192]).unwrap();
            assert_eq!(ram.read_obj::<[u8; 16]>(at).unwrap(), [7; 16]);
            assert_eq!(ram.read_obj::<[u8; 16]>(GuestAddress(at.0 + 8192)).unwrap(), [0; 16]);
            let mut held = [1; 2];
            file.read_exact_at(&mut held, MIB + 8192 + 8191).unwrap();
            assert_eq!(held, [in_file, 0], "{sharing:?}");
            let region = ram.find_region(at).unwrap();
            let written: Vec<bool> = (1..5).map(|page| region.bitmap().dirty_at(page * 4096)).collect();
            assert_eq!(written, [false, true, true, false], "{sharing:?}");
        }
    }

    #[test]
    fn what_is_not_in_one_region_is_not_written() {
        let file = ram::memfd(units::Bytes(2 * MIB)).unwrap();
        let ram = ram::map(&file, Sharing::Shared, &regions()).unwrap();
        for at in [MIB - 4096, MIB, 3 * MIB - 4096, u64::MAX - 4095] {
            assert!(fill(&ram, GuestAddress(at), &[7; 8192]).is_err(), "{at:#x}");
        }
        let mut all = vec![1; 2 << 20];
        file.read_exact_at(&mut all, 0).unwrap();
        assert!(all.iter().all(|byte| *byte == 0));
    }
}
