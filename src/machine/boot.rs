//! From a kernel file to a vCPU's first instruction: checks and loads the kernel and the initrd, writes command line,
//! MP table and boot parameters into guest memory, and says which registers to begin with.
//!
//! Runs once, on the thread that builds the machine, before any vCPU exists. All files are untrusted: whatever is in
//! them ends in a typed error, never in a panic. Two entries are known: Linux's 64-bit one
//! (Documentation/arch/x86/boot.rst, for vmlinux and bzImage) and PVH (xen docs/misc/pvh.pandoc, vmlinux only).

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::layout::{
    self, COMMAND_LINE, COMMAND_LINE_BYTES_MAX, EVENT_PORT, HIGH_MEMORY, MP_TABLE, MemorySizeError, Slot,
};
use super::ram::GuestRam;
use crate::report::Retry;
use crate::units::{Bytes, GuestPhys, MIB};

mod image;
mod mptable;
mod params;
mod registers;

pub use image::{Format, KernelImageError, KernelShape};
pub use registers::FirstRegisters;

/// What a kernel needs beside itself and its initrd before it can free anything: early page tables, the array of page
/// structures, per-CPU areas. A 6.12 kernel without extras takes 5 MiB on a 128 MiB machine; rounded up.
pub const WORKING_BYTES: Bytes = Bytes(8 * MIB);

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Entry {
    /// Linux's 64-bit entry: the shortest way, no 32-bit code in the guest.
    #[default]
    Linux64,
    /// The PVH entry of an ELF note: also for kernels that are not Linux.
    Pvh,
}

/// What to boot.
#[derive(Debug)]
pub struct BootPlan<'a> {
    /// vmlinux or bzImage.
    pub kernel: File,
    /// Initial file system, if there is one.
    pub initrd: Option<File>,
    /// The command line without the words for devices.
    pub command_line: &'a str,
    /// Announced virtio-mmio slots.
    pub slots: &'a [Slot],
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How to enter the kernel.
    pub entry: Entry,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is not one this VMM boots.
    #[error("kernel file")]
    Kernel(#[source] KernelImageError),
    /// The PVH entry was asked for and the kernel has none.
    #[error("the kernel has no PVH entry")]
    NoPvhEntry,
    /// The loader refused what the checks let through.
    #[error("load the kernel")]
    Load(#[source] linux_loader::loader::Error),
    /// A file could not be read.
    #[error("read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel ends after the memory does.
    #[error("the kernel ends at {kernel_end}, the machine has {memory} of memory")]
    KernelDoesNotFit {
        /// Where the kernel would end.
        kernel_end: GuestPhys,
        /// Memory of the machine.
        memory: Bytes,
    },
    /// The initrd does not fit beside the kernel.
    #[error("the initrd has {initrd}, which does not fit {memory} of memory beside a kernel that ends at {kernel_end}")]
    InitrdDoesNotFit {
        /// Its size.
        initrd: Bytes,
        /// Where the kernel ends.
        kernel_end: GuestPhys,
        /// Memory of the machine.
        memory: Bytes,
    },
    /// Kernel and initrd fit, but leave too little to work with.
    #[error("{memory} of memory; this kernel and initrd need at least {needed}")]
    MemoryTooSmall {
        /// Memory of the machine.
        memory: Bytes,
        /// What would do.
        needed: Bytes,
    },
    /// The memory size itself is impossible.
    #[error("size of guest memory")]
    Size(#[source] MemorySizeError),
    /// The command line is longer than the kernel reads.
    #[error("the command line has {found} bytes with the words for devices, the most is {COMMAND_LINE_BYTES_MAX}")]
    CommandLineTooLong {
        /// Its length.
        found: usize,
    },
    /// The command line has a character that is not printable ASCII.
    #[error("the command line has byte {byte:#04x} at {at}: only printable ASCII is allowed")]
    CommandLineCharacter {
        /// The byte.
        byte: u8,
        /// Its position.
        at: usize,
    },
    /// The host has no random bytes.
    #[error("get a seed for the guest's random pool")]
    Seed {
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A boot structure could not be written.
    #[error("write the {what} into guest memory")]
    Write {
        /// Which one.
        what: &'static str,
        /// The reason.
        #[source]
        source: GuestMemoryError,
    },
}

impl BootError {
    /// Whether the same boot may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Read { .. } | Self::Seed { .. } => Retry::Later,
            Self::Kernel(error) => error.retry(),
            Self::NoPvhEntry
            | Self::Load(_)
            | Self::KernelDoesNotFit { .. }
            | Self::InitrdDoesNotFit { .. }
            | Self::MemoryTooSmall { .. }
            | Self::Size(_)
            | Self::CommandLineTooLong { .. }
            | Self::CommandLineCharacter { .. }
            | Self::Write { .. } => Retry::WithChange,
        }
    }
}

/// Where the initrd was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    start: GuestPhys,
    bytes: Bytes,
}

/// Loads everything a boot needs into `ram` and returns the first registers of vCPU 0.
pub fn load(ram: &GuestRam, memory: Bytes, plan: BootPlan<'_>) -> Result<FirstRegisters, BootError> {
    let command_line = command_line(plan.command_line, plan.slots)?;
    let BootPlan { mut kernel, initrd, vcpus, entry, .. } = plan;
    let shape = image::examine(&mut kernel).map_err(BootError::Kernel)?;
    if shape.end > layout::low_ram_end(memory) {
        return Err(BootError::KernelDoesNotFit { kernel_end: shape.end, memory });
    }
    let (initrd, placed) = match initrd {
        None => (None, None),
        Some(file) => {
            let placed = place_initrd(&file, memory, shape.end)?;
            (Some(file), Some(placed))
        }
    };
    check_memory(memory, shape.end, placed.map_or(Bytes(0), |placed| placed.bytes))?;

    let loaded = load_kernel(ram, &mut kernel, &shape)?;
    if let (Some(mut file), Some(placed)) = (initrd, placed) {
        load_initrd(ram, &mut file, placed)?;
    }
    let write = |what| move |source| BootError::Write { what, source };
    let mut terminated = command_line.into_bytes();
    terminated.push(0);
    ram.write_slice(&terminated, GuestAddress(COMMAND_LINE.0)).map_err(write("command line"))?;
    ram.write_slice(&mptable::build(vcpus), GuestAddress(MP_TABLE.0)).map_err(write("MP table"))?;

    match entry {
        Entry::Linux64 => {
            params::write_zero_page(ram, memory, loaded.setup_header, placed)?;
            registers::long_mode(ram, shape.entry).map_err(write("page tables"))
        }
        Entry::Pvh => {
            let PvhBootCapability::PvhEntryPresent(at) = loaded.pvh_boot_cap else { return Err(BootError::NoPvhEntry) };
            let at = GuestPhys(at.0);
            if !shape.holds(at) {
                return Err(BootError::Kernel(KernelImageError::EntryOutside { entry: at }));
            }
            params::write_pvh(ram, memory, placed)?;
            registers::protected_mode(ram, at).map_err(write("descriptor tables"))
        }
    }
}

/// The whole command line: where the machine's own devices are, then what was given, which may end in `--` and words
/// for init.
fn command_line(given: &str, slots: &[Slot]) -> Result<String, BootError> {
    let port = format!("hearth.eventport={EVENT_PORT:#x}");
    // Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device.
    let device = |slot: &Slot| format!("virtio_mmio.device=4K@{:#x}:{}", slot.address(), slot.gsi());
    let words: Vec<String> = std::iter::once(port).chain(slots.iter().map(device)).collect();
    let line = format!("{} {}", words.join(" "), given.trim()).trim_end().to_owned();
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(BootError::CommandLineTooLong { found: line.len() });
    }
    match line.bytes().enumerate().find(|(_, byte)| !(b' '..=b'~').contains(byte)) {
        Some((at, byte)) => Err(BootError::CommandLineCharacter { byte, at }),
        None => Ok(line),
    }
}

fn place_initrd(file: &File, memory: Bytes, kernel_end: GuestPhys) -> Result<Initrd, BootError> {
    let length = file.metadata().map_err(|source| BootError::Read { what: "initrd", source })?.len();
    let bytes = Bytes(length);
    match layout::initrd_start(memory, kernel_end, bytes) {
        Some(start) => Ok(Initrd { start, bytes }),
        None => Err(BootError::InitrdDoesNotFit { initrd: bytes, kernel_end, memory }),
    }
}

/// An initrd is unpacked into memory before its own pages are given back, so it counts twice.
fn check_memory(memory: Bytes, kernel_end: GuestPhys, initrd: Bytes) -> Result<(), BootError> {
    let unpacked = initrd.0.saturating_mul(2);
    let needed = kernel_end.0.saturating_add(unpacked).saturating_add(WORKING_BYTES.0);
    if memory.0 < needed {
        let needed = Bytes(needed.div_ceil(MIB).saturating_mul(MIB));
        return Err(BootError::MemoryTooSmall { memory, needed });
    }
    Ok(())
}

fn load_kernel(ram: &GuestRam, kernel: &mut File, shape: &KernelShape) -> Result<KernelLoaderResult, BootError> {
    let above = Some(GuestAddress(HIGH_MEMORY.0));
    match shape.format {
        Format::Elf => Elf::load(ram, None, kernel, above),
        Format::BzImage => BzImage::load(ram, Some(GuestAddress(shape.start.0)), kernel, None),
    }
    .map_err(BootError::Load)
}

fn load_initrd(ram: &GuestRam, file: &mut File, placed: Initrd) -> Result<(), BootError> {
    let read = |source| BootError::Read { what: "initrd", source };
    file.rewind().map_err(read)?;
    let count = usize::try_from(placed.bytes.0).map_err(|_| read(io::ErrorKind::FileTooLarge.into()))?;
    ram.read_exact_volatile_from(GuestAddress(placed.start.0), file, count)
        .map_err(|source| BootError::Write { what: "initrd", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_devices_are_announced_before_the_given_words() {
        let line = command_line(" quiet ", &[Slot::VSOCK, Slot::RNG]).unwrap();
        let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(line, format!("hearth.eventport=0x600 {devices} quiet"));
        assert_eq!(command_line("", &[]).unwrap(), "hearth.eventport=0x600");
    }

    #[test]
    fn a_command_line_is_bounded_and_printable() {
        let own = command_line("", &[]).unwrap().len() + 1;
        assert!(command_line(&"x".repeat(COMMAND_LINE_BYTES_MAX - own), &[]).is_ok());
        let long = "x".repeat(COMMAND_LINE_BYTES_MAX + 1 - own);
        assert!(matches!(command_line(&long, &[]), Err(BootError::CommandLineTooLong { found: 2048 })));
        for bad in ["a\nb", "a\0b", "a\u{e9}b", "a\tb"] {
            assert!(matches!(command_line(bad, &[]), Err(BootError::CommandLineCharacter { .. })));
        }
    }

    #[test]
    fn the_memory_a_boot_needs_is_told() {
        let end = GuestPhys(20 * MIB);
        assert!(check_memory(Bytes(34 * MIB), end, Bytes(3 * MIB)).is_ok());
        let error = check_memory(Bytes(34 * MIB - 1), end, Bytes(3 * MIB)).unwrap_err();
        assert!(matches!(error, BootError::MemoryTooSmall { needed, .. } if needed == Bytes(34 * MIB)));
    }
}
