//! The MP table (MultiProcessor Specification 1.4, chapter 4): how a guest without ACPI finds its processors, the
//! IO-APIC and the interrupt lines.
//!
//! One structure after the other: floating pointer, configuration header, processors, the ISA bus, the IO-APIC, one
//! interrupt entry per pin, two local interrupts. Pin n carries GSI n, which is Linux's interrupt n.

use crate::machine::layout::{IO_APIC, IO_APIC_PINS, LOCAL_APIC, MP_TABLE, MP_TABLE_BYTES, VCPUS_MAX};

/// Version of the specification: 1.4.
const SPECIFICATION: u8 = 4;

/// Version of the local APICs: integrated, as KVM's.
const LOCAL_APIC_VERSION: u8 = 0x14;

/// Version of the IO-APIC: 82093AA with 24 pins, as KVM's.
const IO_APIC_VERSION: u8 = 0x11;

/// Entry types.
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types.
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

/// Processor flags: usable; the one that boots.
const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;

/// Processor signature and features of the table: only read by people. Family 6; FPU and APIC.
const PROCESSOR_SIGNATURE: u32 = 0x600;
const PROCESSOR_FEATURES: u32 = 0x201;

/// The only bus.
const ISA_BUS: u8 = 0;

/// For local interrupts: every local APIC.
const ALL_LOCAL_APICS: u8 = 0xFF;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// The table for `vcpus` processors, at [`MP_TABLE`].
pub(super) fn build(vcpus: u8) -> Vec<u8> {
    assert!((1..=VCPUS_MAX).contains(&vcpus), "checked by whoever builds the machine");
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0_u16;
    let mut add = |bytes: &[u8]| {
        entries.extend(bytes);
        count += 1;
    };
    for index in 0..vcpus {
        let flags = PROCESSOR_ENABLED | if index == 0 { PROCESSOR_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, index, LOCAL_APIC_VERSION, flags];
        entry.extend(PROCESSOR_SIGNATURE.to_le_bytes());
        entry.extend(PROCESSOR_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    // APIC ids 0 to vcpus - 1 are the processors'.
    let io_apic_id = vcpus;
    let mut entry = vec![ENTRY_IO_APIC, io_apic_id, IO_APIC_VERSION, 1];
    entry.extend(low_word(IO_APIC.0));
    add(&entry);
    for pin in 0..u8::try_from(IO_APIC_PINS).unwrap_or(u8::MAX) {
        // Flags 0: polarity and trigger mode of the bus, which for ISA are high and edge.
        add(&[ENTRY_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let length = u16::try_from(HEADER_BYTES + entries.len()).unwrap_or(u16::MAX);
    let mut table = pointer();
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend(b"PCMP");
    header.extend(length.to_le_bytes());
    header.extend([SPECIFICATION, 0]);
    header.extend(b"HEARTH  ");
    header.extend(b"MICROVM     ");
    // No OEM table: pointer and size are zero.
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(low_word(LOCAL_APIC.0));
    // No extended table.
    header.extend([0; 4]);
    header.extend(entries);
    header[7] = checksum(&header);
    table.extend(header);
    assert!(table.len() as u64 <= MP_TABLE_BYTES, "VCPUS_MAX processors fit");
    table
}

fn pointer() -> Vec<u8> {
    let mut pointer = Vec::with_capacity(POINTER_BYTES);
    pointer.extend(b"_MP_");
    pointer.extend(low_word(MP_TABLE.0 + POINTER_BYTES as u64));
    // Length in units of 16 bytes, version, checksum, then five feature bytes: zero means "there is a table".
    pointer.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// The byte that makes the sum of all bytes zero, given that its place holds zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// The low 32 bits of an address below 4 GiB.
fn low_word(address: u64) -> [u8; 4] {
    let [a, b, c, d, rest @ ..] = address.to_le_bytes();
    assert!(rest == [0; 4], "table addresses are below 4 GiB");
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn sums_are_zero_and_lengths_are_right_for_every_count() {
        for vcpus in 1..=VCPUS_MAX {
            let table = build(vcpus);
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let length = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert_eq!(length, table.len() - 16);
            let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(count, u16::from(vcpus) + 1 + 1 + 24 + 2);
        }
    }

    #[test]
    fn the_table_for_two_is_what_it_was() {
        let text: String = build(2)
            .chunks(16)
            .map(|row| row.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ") + "\n")
            .collect();
        assert_eq!(text, include_str!("../../../tests/golden/machine_mptable_2.txt"));
    }

    #[test]
    #[should_panic(expected = "checked by whoever")]
    fn too_many_processors_are_a_mistake_of_ours() {
        build(VCPUS_MAX + 1);
    }
}
