//! Boot parameters in guest memory: Linux's zero page, or PVH's start info with its module and memory lists.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Initrd};
use crate::machine::layout::{
    COMMAND_LINE, COMMAND_LINE_BYTES_MAX, HIGH_MEMORY, MapUse, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, SEED,
    ZERO_PAGE, memory_map,
};
use crate::machine::ram::GuestRam;
use crate::sys::entropy;
use crate::units::{Bytes, GuestPhys};

/// "boot_flag" and "header" of a setup header (Documentation/arch/x86/boot.rst).
const BOOT_FLAG: u16 = 0xAA55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// "type_of_loader": none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xFF;

/// "loadflags": the kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// E820 types.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// SETUP_RNG_SEED (arch/x86/include/uapi/asm/setup_data.h) and the seed's length: one ChaCha20 key.
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: usize = 32;

/// The version of start info with a memory map.
const START_INFO_VERSION: u32 = 1;

fn low(address: GuestPhys) -> u32 {
    u32::try_from(address.0).expect("boot structures and low RAM are below 4 GiB")
}

/// Writes the zero page. `header` is the setup header of a bzImage; a vmlinux has none and gets one.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    memory: Bytes,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            // Linux wants it where it was linked; it is not moved.
            kernel_alignment: low(HIGH_MEMORY),
            ..Default::default()
        }),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = low(COMMAND_LINE);
    params.hdr.cmdline_size = u32::try_from(COMMAND_LINE_BYTES_MAX).unwrap_or(u32::MAX);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.start);
        params.hdr.ramdisk_size = u32::try_from(initrd.bytes.0).expect("an initrd lies in low RAM");
    }
    let map = memory_map(memory).map_err(BootError::Size)?;
    for (slot, (start, bytes, used)) in params.e820_table.iter_mut().zip(&map) {
        let r#type = match used {
            MapUse::Ram => E820_RAM,
            MapUse::Reserved => E820_RESERVED,
        };
        *slot = boot_e820_entry { addr: start.0, size: bytes.0, r#type };
    }
    params.hdr.setup_data = SEED.0;
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    ram.write_slice(&seed()?, GuestAddress(SEED.0)).map_err(|source| BootError::Write { what: "seed", source })?;
    ram.write_obj(params, GuestAddress(ZERO_PAGE.0)).map_err(|source| BootError::Write { what: "zero page", source })
}

/// A fresh seed as setup data: next (none), type, length, bytes. A guest with it need not wait for its random pool; it
/// wipes the bytes after reading them.
fn seed() -> Result<Vec<u8>, BootError> {
    let mut random = [0; SEED_BYTES];
    entropy::fill(&mut random).map_err(|source| BootError::Seed { source })?;
    let mut data = vec![0; 8];
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend(u32::try_from(SEED_BYTES).unwrap_or(u32::MAX).to_le_bytes());
    data.extend(random);
    Ok(data)
}

/// Writes the PVH start info and its lists.
pub(super) fn write_pvh(ram: &GuestRam, memory: Bytes, initrd: Option<Initrd>) -> Result<(), BootError> {
    let write = |what| move |source| BootError::Write { what, source };
    let map = memory_map(memory).map_err(BootError::Size)?;
    let mut at = PVH_MEMORY_MAP.0;
    for (start, bytes, used) in &map {
        let type_ = match used {
            MapUse::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
            MapUse::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
        };
        let entry = hvm_memmap_table_entry { addr: start.0, size: bytes.0, type_, reserved: 0 };
        ram.write_obj(entry, GuestAddress(at)).map_err(write("PVH memory map"))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start.0, size: initrd.bytes.0, ..Default::default() };
        ram.write_obj(module, GuestAddress(PVH_MODULES.0)).map_err(write("PVH module list"))?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { PVH_MODULES.0 } else { 0 },
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(PVH_START_INFO.0)).map_err(write("PVH start info"))
}
