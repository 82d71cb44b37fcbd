//! The registers vCPU 0 begins with, and the descriptor and page tables they point to.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::machine::layout::{BOOT_GDT, BOOT_IDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::machine::ram::GuestRam;
use crate::units::{GuestPhys, PAGE_BYTES};

/// Selectors of the boot GDT: __BOOT_CS and __BOOT_DS of Linux (boot.rst, 64-bit boot protocol), then a TSS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT_ENTRIES: usize = 5;

/// CR0: protection, extension type, paging. CR4: physical address extension (SDM volume 3 section 2.5).
const CR0_PROTECTION: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;

/// EFER: long mode enabled, long mode active (SDM volume 3 section 2.2.1).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// RFLAGS: the bit that is always set (SDM volume 1 section 3.4.3).
const RFLAGS_FIXED: u64 = 2;

/// Page-table entry: present, writable; and a 2 MiB page (SDM volume 3 section 4.5).
const ENTRY_PRESENT_WRITABLE: u64 = 3;
const ENTRY_LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// Lowest tables: each maps 1 GiB; together all addresses below 4 GiB, wherever the kernel is.
const LOWEST_TABLES: u64 = 4;

/// What vCPU 0 begins with. Registers not named here stay as KVM resets them.
#[derive(Debug, Clone, PartialEq)]
pub struct FirstRegisters {
    /// General registers.
    pub regs: kvm_regs,
    /// Code segment.
    pub code: kvm_segment,
    /// All data segments.
    pub data: kvm_segment,
    /// Task register.
    pub task: kvm_segment,
    /// Descriptor tables: global, interrupt.
    pub tables: (kvm_dtable, kvm_dtable),
    /// CR0, CR3, CR4.
    pub control: (u64, u64, u64),
    /// EFER.
    pub efer: u64,
}

/// 64-bit mode with the first 4 GiB mapped to themselves; RSI points to the zero page.
pub(super) fn long_mode(ram: &GuestRam, entry: GuestPhys) -> Result<FirstRegisters, GuestMemoryError> {
    let code = segment(CODE_SELECTOR, CODE, Width::Bits64);
    let directory = PAGE_TABLES.0 + PAGE_BYTES;
    ram.write_obj(directory | ENTRY_PRESENT_WRITABLE, GuestAddress(PAGE_TABLES.0))?;
    for table in 0..LOWEST_TABLES {
        let lowest = directory + (1 + table) * PAGE_BYTES;
        ram.write_obj(lowest | ENTRY_PRESENT_WRITABLE, GuestAddress(directory + 8 * table))?;
        let entries = (0..ENTRIES).map(|entry| (table * ENTRIES + entry) * LARGE_PAGE_BYTES);
        let bytes: Vec<u8> =
            entries.flat_map(|page| (page | ENTRY_PRESENT_WRITABLE | ENTRY_LARGE).to_le_bytes()).collect();
        ram.write_slice(&bytes, GuestAddress(lowest))?;
    }
    let regs = kvm_regs { rip: entry.0, rsi: ZERO_PAGE.0, rflags: RFLAGS_FIXED, ..Default::default() };
    let control = (CR0_PROTECTION | CR0_EXTENSION_TYPE | CR0_PAGING, PAGE_TABLES.0, CR4_PAE);
    first(ram, regs, code, control, EFER_LME | EFER_LMA)
}

/// 32-bit protected mode without paging; RBX points to the PVH start info.
pub(super) fn protected_mode(ram: &GuestRam, entry: GuestPhys) -> Result<FirstRegisters, GuestMemoryError> {
    let code = segment(CODE_SELECTOR, CODE, Width::Bits32);
    let regs = kvm_regs { rip: entry.0, rbx: PVH_START_INFO.0, rflags: RFLAGS_FIXED, ..Default::default() };
    first(ram, regs, code, (CR0_PROTECTION | CR0_EXTENSION_TYPE, 0, 0), 0)
}

fn first(
    ram: &GuestRam,
    regs: kvm_regs,
    code: kvm_segment,
    control: (u64, u64, u64),
    efer: u64,
) -> Result<FirstRegisters, GuestMemoryError> {
    let data = segment(DATA_SELECTOR, DATA, Width::Bits32);
    // A TSS nobody switches to: base 0, the least limit.
    let task = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(TASK_SELECTOR, BUSY_TASK, Width::Bits32) };
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    let bytes: Vec<u8> = gdt.into_iter().flat_map(u64::to_le_bytes).collect();
    ram.write_slice(&bytes, GuestAddress(BOOT_GDT.0))?;
    let gdt_limit = u16::try_from(GDT_ENTRIES * size_of::<u64>() - 1).unwrap_or(u16::MAX);
    let gdt = kvm_dtable { base: BOOT_GDT.0, limit: gdt_limit, ..Default::default() };
    let idt = kvm_dtable { base: BOOT_IDT.0, limit: 0, ..Default::default() };
    Ok(FirstRegisters { regs, code, data, task, tables: (gdt, idt), control, efer })
}

/// Segment types (SDM volume 3 sections 3.4.5.1 and 3.5): accessed, so that loading them writes nothing.
const CODE: u8 = 0b1011;
const DATA: u8 = 0b0011;
const BUSY_TASK: u8 = 0b1011;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

/// A flat segment.
fn segment(selector: u16, type_: u8, width: Width) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(width == Width::Bits32),
        s: 1,
        l: u8::from(width == Width::Bits64),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The eight bytes of a segment in the GDT (SDM volume 3 section 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, CODE, Width::Bits64)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, CODE, Width::Bits32)), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, DATA, Width::Bits32)), 0x00CF_9300_0000_FFFF);
    }
}
