//! Guest memory as the VMM sees it: what backs it and which regions it has.
//!
//! Owned by the [`crate::sys::kvm::Vm`]; devices hold clones, which share the mapping. Any thread may read and write it,
//! by volatile access only.

use std::fs::File;
use std::io;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::layout::{self, MemorySizeError};
use crate::report::Retry;
pub use crate::sys::ram::GuestRam;
use crate::sys::ram::{self, MapRamError, RegionPlan, Sharing};
use crate::units::{Bytes, GuestPhys};

/// One region of guest memory.
pub type GuestRegion = vm_memory::GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>;

/// What guest memory is made of.
#[derive(Debug)]
pub enum RamBacking {
    /// A new, zeroed memory file, shared: other processes that get it see the same memory (hand-over, peers).
    SharedMemfd,
    /// A memory file made elsewhere, shared (hand-over).
    SharedFile(File),
    /// An immutable memory image: pages come from the file (and its page cache) until they are written, and writes stay
    /// in this process.
    PrivateFile(File),
    /// Memory that is mapped already, with its content (arrival from another host) or as it comes (`super::filling`).
    Mapped(GuestRam),
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeRamError {
    /// No machine has this much.
    #[error("size of guest memory")]
    Size(#[source] MemorySizeError),
    /// The kernel gave no memory file.
    #[error("make a memory file of {bytes}")]
    Memfd {
        /// Its size.
        bytes: Bytes,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What is mapped already is of another size.
    #[error("{found} of guest memory are mapped, the machine has {wanted}")]
    OtherSize {
        /// What is mapped.
        found: Bytes,
        /// What the machine has.
        wanted: Bytes,
    },
    /// It could not be mapped.
    #[error("map guest memory")]
    Map(#[source] MapRamError),
}

impl MakeRamError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Memfd { .. } | Self::Map(MapRamError::File(_) | MapRamError::Map { .. }) => Retry::Later,
            Self::Size(_)
            | Self::OtherSize { .. }
            | Self::Map(MapRamError::FileTooShort { .. } | MapRamError::OutOfRange { .. } | MapRamError::Arrange(_)) => {
                Retry::WithChange
            }
        }
    }
}

/// Maps `memory` bytes of guest memory; what is mapped already has the layout of as many.
pub fn make(backing: RamBacking, memory: Bytes) -> Result<GuestRam, MakeRamError> {
    let ranges = layout::ram_ranges(memory).map_err(MakeRamError::Size)?;
    let regions: Vec<_> = ranges
        .iter()
        .map(|range| RegionPlan { start: range.start, bytes: range.bytes, file_offset: range.file_offset })
        .collect();
    let (file, sharing) = match backing {
        RamBacking::Mapped(ram) if size(&ram) == memory => return Ok(ram),
        RamBacking::Mapped(ram) => return Err(MakeRamError::OtherSize { found: size(&ram), wanted: memory }),
        RamBacking::SharedMemfd => {
            (ram::memfd(memory).map_err(|source| MakeRamError::Memfd { bytes: memory, source })?, Sharing::Shared)
        }
        RamBacking::SharedFile(file) => (file, Sharing::Shared),
        RamBacking::PrivateFile(file) => (file, Sharing::Private),
    };
    ram::map(&file, sharing, &regions).map_err(MakeRamError::Map)
}

/// Bytes in all regions.
pub fn size(ram: &GuestRam) -> Bytes {
    Bytes(ram.iter().map(GuestMemoryRegion::len).sum())
}

/// Where a region lies in the guest, in this process and in its file: for accounting what a guest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRegion {
    /// Where the guest sees it.
    pub guest: GuestPhys,
    /// Its address in this process, as in `/proc/self/smaps`.
    pub host_address: usize,
    /// Its size.
    pub bytes: Bytes,
    /// Where it begins in its file.
    pub file_offset: Bytes,
}

/// The regions of `ram`.
pub fn mapped_regions(ram: &GuestRam) -> Vec<MappedRegion> {
    ram.iter()
        .filter_map(|region| {
            Some(MappedRegion {
                guest: GuestPhys(region.start_addr().raw_value()),
                host_address: region.get_host_address(MemoryRegionAddress(0)).ok()?.addr(),
                bytes: Bytes(region.len()),
                file_offset: Bytes(region.file_offset().map_or(0, |backing| backing.start())),
            })
        })
        .collect()
}
