//! The guest-physical map: every address a guest can see, with its source. It is part of the compatibility contract
//! (bundles and migration carry it), so it is golden-tested and changes only by a new layout version.
//!
//! ```text
//! 0x0000_0000  RAM ........................ up to 3 GiB
//!   0x0500                   boot GDT, then an empty IDT
//!   0x6000                   PVH start info, module list, memory map (PVH entry only)
//!   0x7000                   zero page (64-bit entry only)
//!   0x8000                   seed for the guest's random pool (64-bit entry only)
//!   0x9000 - 0xEFFF          page tables that map the first 4 GiB to themselves
//!   0x2_0000                 kernel command line
//!   0x9_FC00 - 0x9_FFFF      MP table, where a PC's extended BIOS data area is
//!   0xA_0000 - 0xF_FFFF      reserved: video memory and BIOS of a PC
//!   0x10_0000                kernel, where its own headers say
//!   below the end of low RAM initrd
//! 0xC000_0000  hole: devices, IO-APIC, LAPIC, identity-map page table and TSS of KVM
//!   0xD000_0000 + i*0x1000   virtio-mmio slot i, GSI 5+i
//!   0xFEC0_0000              IO-APIC
//!   0xFEE0_0000              local APICs
//!   0xFFFB_C000              identity-map page, then 3 pages of TSS (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR)
//! 0x1_0000_0000  RAM that did not fit below 3 GiB
//! ```
//! The boot structures are ordinary RAM to the guest once it has read them; a guest restored from saved state needs
//! none of them.

use crate::units::{Bytes, GuestPhys, MIB, PAGE_BYTES};

/// Version of this map; saved state carries it.
pub const LAYOUT_VERSION: u16 = 1;

/// Most vCPUs: the MP table of this many fits the 1 KiB it has, and APIC ids stay below 255 without x2APIC.
pub const VCPUS_MAX: u8 = 32;

/// Least memory of any machine: the first MiB is taken by boot structures and a PC's reserved areas, and a tiny guest
/// needs some more. What a kernel needs is checked against the kernel.
pub const MEMORY_MIN: Bytes = Bytes(2 * MIB);

/// Most memory: 1 TiB keeps guest-physical addresses within 41 bits, which every x86-64 processor with virtualisation
/// has.
pub const MEMORY_MAX: Bytes = Bytes(1 << 40);

/// Global descriptor table of the first instructions, in the first free bytes after a PC's BIOS data area (0x400-0x4FF).
pub const BOOT_GDT: GuestPhys = GuestPhys(0x500);

/// Interrupt descriptor table of the first instructions: empty, so that any exception before the kernel has its own is
/// a triple fault.
pub const BOOT_IDT: GuestPhys = GuestPhys(0x540);

/// PVH start info (xen/include/public/arch-x86/hvm/start_info.h), 56 bytes.
pub const PVH_START_INFO: GuestPhys = GuestPhys(0x6000);

/// PVH module list: one entry, the initrd.
pub const PVH_MODULES: GuestPhys = GuestPhys(0x6040);

/// PVH memory map, 24 bytes an entry.
pub const PVH_MEMORY_MAP: GuestPhys = GuestPhys(0x6080);

/// Zero page: `struct boot_params` (Documentation/arch/x86/zero-page.rst), one page.
pub const ZERO_PAGE: GuestPhys = GuestPhys(0x7000);

/// Setup data with a seed for the guest's random pool (boot.rst, setup_data), 48 bytes.
pub const SEED: GuestPhys = GuestPhys(0x8000);

/// Top-level page table, then one table of the next level and four of the one below: 2 MiB pages for 4 GiB.
pub const PAGE_TABLES: GuestPhys = GuestPhys(0x9000);

/// Kernel command line, up to [`COMMAND_LINE_BYTES_MAX`] and a zero.
pub const COMMAND_LINE: GuestPhys = GuestPhys(0x2_0000);

/// Longest command line without its zero: COMMAND_LINE_SIZE of x86 Linux is 2048 (arch/x86/include/asm/setup.h).
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// MP table: the last KiB of the 640 KiB of base memory, one of the places the guest searches (MultiProcessor
/// Specification 1.4 section 4).
pub const MP_TABLE: GuestPhys = GuestPhys(0x9_FC00);

/// Bytes kept for the MP table.
pub const MP_TABLE_BYTES: u64 = 0x400;

/// End of a PC's base memory: video memory and the BIOS follow up to [`HIGH_MEMORY`].
pub const BASE_MEMORY_END: GuestPhys = GuestPhys(0xA_0000);

/// 1 MiB: the lowest address a kernel may load to.
pub const HIGH_MEMORY: GuestPhys = GuestPhys(0x10_0000);

/// IO-APIC registers (82093AA data sheet; KVM's in-kernel one sits here).
pub const IO_APIC: GuestPhys = GuestPhys(0xFEC0_0000);

/// Local APIC registers (SDM volume 3 section 11.4.1).
pub const LOCAL_APIC: GuestPhys = GuestPhys(0xFEE0_0000);

/// One page for KVM's identity-map page table, in the hole (api.rst section 4.40, KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: GuestPhys = GuestPhys(0xFFFB_C000);

/// Three pages for KVM's TSS, right after the identity map (api.rst section 4.36, KVM_SET_TSS_ADDR).
pub const KVM_TSS: GuestPhys = GuestPhys(0xFFFB_D000);

/// Pins of the IO-APIC, each with the GSI of its number.
pub const IO_APIC_PINS: u32 = 24;

/// Register ports of the first serial port (COM1 of a PC).
pub const SERIAL_PORT: u16 = 0x3F8;

/// Ports of a 16550.
pub const SERIAL_PORT_COUNT: u16 = 8;

/// Data port of the keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;

/// Status and command port of the keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Port where a guest says what happened to it: one byte (see `machine::event_port`).
pub const EVENT_PORT: u16 = 0x600;

/// First address after low RAM: 3 GiB. Above it lies the hole for devices.
pub const LOW_RAM_END: u64 = 0xC000_0000;

/// Where RAM goes on after the hole: 4 GiB.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Address of the first virtio-mmio slot.
pub const VIRTIO_MMIO_START: u64 = 0xD000_0000;

/// Bytes of register space of a virtio-mmio slot: one page, so that a slot can be mapped alone.
pub const VIRTIO_MMIO_SLOT_BYTES: u64 = 0x1000;

/// GSI of slot 0; slot i has this plus i. 0-4 are the timer, keyboard, cascade and serial lines of a PC.
pub const VIRTIO_GSI_START: u32 = 5;

/// Number of slots: the IO-APIC has 24 pins and the first five are taken.
pub const VIRTIO_SLOTS: u8 = 19;

/// Offset of QueueNotify in a slot's registers (virtio 1.2 section 4.2.2).
pub const VIRTIO_MMIO_QUEUE_NOTIFY: u64 = 0x50;

/// GSI of the first serial port (COM1, IRQ 4 of a PC).
pub const SERIAL_GSI: u32 = 4;

/// A virtio-mmio slot. Kinds are fixed by number: 0 vsock, 1 rng, 2 balloon, 3-8 blk, 9-16 net, 17-18 free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u8);

impl Slot {
    /// The vsock device's slot.
    pub const VSOCK: Self = Self(0);
    /// The entropy device's slot.
    pub const RNG: Self = Self(1);
    /// The balloon's slot.
    pub const BALLOON: Self = Self(2);

    /// Block devices: slots 3 to 8.
    pub fn block(index: u8) -> Option<Self> {
        (index < 6).then_some(Self(3 + index))
    }

    /// Which block device's slot it is, if it is one's.
    pub const fn block_index(self) -> Option<u8> {
        match self.0 {
            number @ 3..=8 => Some(number - 3),
            _ => None,
        }
    }

    /// Network devices: slots 9 to 16.
    pub fn net(index: u8) -> Option<Self> {
        (index < 8).then_some(Self(9 + index))
    }

    /// Which network device's slot it is, if it is one's.
    pub const fn net_index(self) -> Option<u8> {
        match self.0 {
            number @ 9..=16 => Some(number - 9),
            _ => None,
        }
    }

    /// The slot's number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Guest-physical address of its registers.
    pub const fn address(self) -> u64 {
        VIRTIO_MMIO_START + self.0 as u64 * VIRTIO_MMIO_SLOT_BYTES
    }

    /// Its interrupt line.
    pub const fn gsi(self) -> u32 {
        VIRTIO_GSI_START + self.0 as u32
    }
}

/// A contiguous piece of guest memory. In a memory file, the pieces follow each other without the hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Where the guest sees it.
    pub start: GuestPhys,
    /// Its size.
    pub bytes: Bytes,
    /// Where it begins in a memory file.
    pub file_offset: Bytes,
}

/// Why a machine cannot have this much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// Less than any machine needs.
    #[error("{memory} of memory; the least is {MEMORY_MIN}")]
    TooSmall {
        /// What was asked for.
        memory: Bytes,
    },
    /// More than the map has room for.
    #[error("{memory} of memory; the most is {MEMORY_MAX}")]
    TooLarge {
        /// What was asked for.
        memory: Bytes,
    },
    /// Not whole pages.
    #[error("{memory} of memory is not a whole number of {PAGE_BYTES}-byte pages")]
    NotPages {
        /// What was asked for.
        memory: Bytes,
    },
}

/// Where `memory` lies: below 3 GiB, and what does not fit there from 4 GiB.
pub fn ram_ranges(memory: Bytes) -> Result<Vec<RamRange>, MemorySizeError> {
    match memory {
        _ if memory < MEMORY_MIN => return Err(MemorySizeError::TooSmall { memory }),
        _ if memory > MEMORY_MAX => return Err(MemorySizeError::TooLarge { memory }),
        _ if !memory.0.is_multiple_of(PAGE_BYTES) => return Err(MemorySizeError::NotPages { memory }),
        _ => {}
    }
    let low = memory.0.min(LOW_RAM_END);
    let mut ranges = vec![RamRange { start: GuestPhys(0), bytes: Bytes(low), file_offset: Bytes(0) }];
    if memory.0 > low {
        let bytes = Bytes(memory.0 - low);
        ranges.push(RamRange { start: GuestPhys(HIGH_RAM_START), bytes, file_offset: Bytes(low) });
    }
    Ok(ranges)
}

/// End of low RAM of a machine with this much memory.
pub fn low_ram_end(memory: Bytes) -> GuestPhys {
    GuestPhys(memory.0.min(LOW_RAM_END))
}

/// Where an initrd goes: as high in low RAM as it fits, on a page of its own. `None` when it would not leave the first
/// MiB and the kernel, which ends at `kernel_end`, alone.
pub fn initrd_start(memory: Bytes, kernel_end: GuestPhys, initrd: Bytes) -> Option<GuestPhys> {
    let start = low_ram_end(memory).0.checked_sub(initrd.0)? / PAGE_BYTES * PAGE_BYTES;
    (start >= kernel_end.0.max(HIGH_MEMORY.0)).then_some(GuestPhys(start))
}

/// What an entry of the memory map is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapUse {
    /// Memory the guest may use.
    Ram,
    /// Memory the guest must leave alone.
    Reserved,
}

/// The memory map a guest is told at boot.
pub fn memory_map(memory: Bytes) -> Result<Vec<(GuestPhys, Bytes, MapUse)>, MemorySizeError> {
    let mut map = vec![
        (GuestPhys(0), Bytes(MP_TABLE.0), MapUse::Ram),
        (MP_TABLE, Bytes(HIGH_MEMORY.0 - MP_TABLE.0), MapUse::Reserved),
    ];
    for range in ram_ranges(memory)? {
        let start = range.start.0.max(HIGH_MEMORY.0);
        map.push((GuestPhys(start), Bytes(range.start.0 + range.bytes.0 - start), MapUse::Ram));
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_map_is_what_it_was() {
        let mut text = format!("layout {LAYOUT_VERSION}\n");
        for (name, address) in [
            ("boot gdt", BOOT_GDT),
            ("boot idt", BOOT_IDT),
            ("pvh start info", PVH_START_INFO),
            ("pvh modules", PVH_MODULES),
            ("pvh memory map", PVH_MEMORY_MAP),
            ("zero page", ZERO_PAGE),
            ("seed", SEED),
            ("page tables", PAGE_TABLES),
            ("command line", COMMAND_LINE),
            ("mp table", MP_TABLE),
            ("high memory", HIGH_MEMORY),
            ("io-apic", IO_APIC),
            ("local apic", LOCAL_APIC),
            ("kvm identity map", KVM_IDENTITY_MAP),
            ("kvm tss", KVM_TSS),
        ] {
            writeln!(text, "{name:<18} {address}").unwrap();
        }
        for (name, port) in
            [("serial", SERIAL_PORT), ("i8042", I8042_DATA_PORT), ("i8042", I8042_COMMAND_PORT), ("event", EVENT_PORT)]
        {
            writeln!(text, "port {name:<13} {port:#x}").unwrap();
        }
        let slots = [Slot::VSOCK, Slot::RNG, Slot::BALLOON].into_iter();
        let slots = slots.chain((0..).map_while(Slot::block)).chain((0..).map_while(Slot::net));
        for slot in slots {
            writeln!(text, "slot {:<13} {:#x} gsi {}", slot.number(), slot.address(), slot.gsi()).unwrap();
        }
        for gib in [1, 3, 5] {
            for range in ram_ranges(Bytes(gib * GIB)).unwrap() {
                writeln!(text, "{gib} GiB: {} at {} from {:#x}", range.bytes, range.start, range.file_offset.0)
                    .unwrap();
            }
        }
        for (start, bytes, used) in memory_map(Bytes(5 * GIB)).unwrap() {
            writeln!(text, "map {start:<14} {:#x} {used:?}", bytes.0).unwrap();
        }
        assert_eq!(text, include_str!("../../tests/golden/machine_layout.txt"));
    }

    #[test]
    fn memory_is_bounded_on_both_sides() {
        assert!(ram_ranges(MEMORY_MIN).is_ok());
        assert!(ram_ranges(MEMORY_MAX).is_ok());
        assert!(matches!(ram_ranges(Bytes(MEMORY_MIN.0 - PAGE_BYTES)), Err(MemorySizeError::TooSmall { .. })));
        assert!(matches!(ram_ranges(Bytes(MEMORY_MAX.0 + PAGE_BYTES)), Err(MemorySizeError::TooLarge { .. })));
        assert!(matches!(ram_ranges(Bytes(MEMORY_MIN.0 + 1)), Err(MemorySizeError::NotPages { .. })));
    }

    #[test]
    fn an_initrd_fits_or_is_refused() {
        let memory = Bytes(128 * MIB);
        let kernel_end = GuestPhys(32 * MIB);
        assert_eq!(initrd_start(memory, kernel_end, Bytes(1)), Some(GuestPhys(128 * MIB - PAGE_BYTES)));
        assert_eq!(initrd_start(memory, kernel_end, Bytes(96 * MIB)), Some(kernel_end));
        assert_eq!(initrd_start(memory, kernel_end, Bytes(96 * MIB + 1)), None);
        assert_eq!(initrd_start(memory, kernel_end, Bytes(u64::MAX)), None);
        assert_eq!(initrd_start(Bytes(8 * GIB), kernel_end, Bytes(MIB)), Some(GuestPhys(LOW_RAM_END - MIB)));
    }
}
