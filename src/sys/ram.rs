//! Guest memory: files mapped into this process, as `vm-memory` regions with a dirty bitmap each.
//!
//! A mapping lives as long as any clone of its [`GuestRam`]. A file that shrinks under a mapping would turn accesses
//! into SIGBUS: [`memfd`] seals its size, and a private file is immutable by its owner's promise (committed bundles
//! are). Nothing here is unsafe: `vm-memory` owns the mappings.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::process::GUEST_MEMORY_NAME;
use crate::units::{Bytes, GuestPhys};

/// Guest memory. Every write the VMM makes through it marks the page in the region's bitmap: KVM's dirty log sees
/// only what the guest writes. Cloning shares the mapping.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Who sees what is written to mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes go to the file.
    Shared,
    /// Writes stay in this process; the file is only read.
    Private,
}

/// One region to map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionPlan {
    /// Where the guest sees it.
    pub start: GuestPhys,
    /// Its size.
    pub bytes: Bytes,
    /// Where it begins in the file.
    pub file_offset: Bytes,
}

/// Why guest memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapRamError {
    /// The file could not be examined or copied.
    #[error("examine the file of guest memory")]
    File(#[source] io::Error),
    /// The file ends before the region does.
    #[error("the file of guest memory has {found}, {wanted} are needed")]
    FileTooShort {
        /// Bytes in the file.
        found: Bytes,
        /// Bytes needed.
        wanted: Bytes,
    },
    /// A size or address does not fit this machine's numbers.
    #[error("a region of {bytes} at {start} does not fit the address space")]
    OutOfRange {
        /// Where it was to begin.
        start: GuestPhys,
        /// Its size.
        bytes: Bytes,
    },
    /// The kernel refused the mapping.
    #[error("map {bytes} of guest memory")]
    Map {
        /// Its size.
        bytes: Bytes,
        /// The kernel's answer.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions overlap or are out of order.
    #[error("arrange the regions of guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
}

/// A new memory file of this size, all zero, whose size can never change.
pub fn memfd(bytes: Bytes) -> io::Result<File> {
    let file = File::from(memfd_create(GUEST_MEMORY_NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes.0)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Maps `regions` of `file`. Refuses a file that is too short: pages after its end would be SIGBUS.
pub fn map(file: &File, sharing: Sharing, regions: &[RegionPlan]) -> Result<GuestRam, MapRamError> {
    let found = Bytes(file.metadata().map_err(MapRamError::File)?.len());
    let mut mapped = Vec::with_capacity(regions.len());
    for plan in regions {
        let out_of_range = || MapRamError::OutOfRange { start: plan.start, bytes: plan.bytes };
        let wanted = Bytes(plan.file_offset.0.checked_add(plan.bytes.0).ok_or_else(out_of_range)?);
        if wanted > found {
            return Err(MapRamError::FileTooShort { found, wanted });
        }
        let size = usize::try_from(plan.bytes.0).map_err(|_| out_of_range())?;
        let backing = FileOffset::new(file.try_clone().map_err(MapRamError::File)?, plan.file_offset.0);
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED | libc::MAP_NORESERVE,
            Sharing::Private => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        };
        let region = MmapRegion::<AtomicBitmap>::build(Some(backing), size, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(|source| MapRamError::Map { bytes: plan.bytes, source })?;
        mapped.push(GuestRegionMmap::new(region, GuestAddress(plan.start.0)).ok_or_else(out_of_range)?);
    }
    GuestRam::from_regions(mapped).map_err(MapRamError::Arrange)
}

/// A dirty bitmap for a region of this size, for tests that make regions by hand.
pub fn bitmap(bytes: usize) -> AtomicBitmap {
    AtomicBitmap::with_len(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes as _, GuestMemoryBackend, GuestMemoryRegion};

    fn plan(bytes: u64) -> RegionPlan {
        RegionPlan { start: GuestPhys(0), bytes: Bytes(bytes), file_offset: Bytes(0) }
    }

    #[test]
    fn a_memfd_cannot_change_its_size() {
        let file = memfd(Bytes(MIB)).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 * MIB).is_err());
    }

    #[test]
    fn writes_mark_pages_and_private_writes_stay_out_of_the_file() {
        let file = memfd(Bytes(MIB)).unwrap();
        let private = map(&file, Sharing::Private, &[plan(MIB)]).unwrap();
        let shared = map(&file, Sharing::Shared, &[plan(MIB)]).unwrap();
        private.write_obj(1_u64, GuestAddress(0x2000)).unwrap();
        assert_eq!(shared.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);
        shared.write_obj(2_u64, GuestAddress(0x3000)).unwrap();
        assert_eq!(private.read_obj::<u64>(GuestAddress(0x3000)).unwrap(), 2);
        let region = private.iter().next().unwrap();
        assert!(region.bitmap().dirty_at(0x2000));
        assert!(!region.bitmap().dirty_at(0x3000));
    }

    #[test]
    fn a_short_file_is_refused() {
        let file = memfd(Bytes(MIB)).unwrap();
        let error = map(&file, Sharing::Shared, &[plan(MIB + 4096)]).unwrap_err();
        assert!(matches!(error, MapRamError::FileTooShort { .. }));
        let far = RegionPlan { start: GuestPhys(0), bytes: Bytes(u64::MAX), file_offset: Bytes(1) };
        assert!(matches!(map(&file, Sharing::Shared, &[far]), Err(MapRamError::OutOfRange { .. })));
    }
}
