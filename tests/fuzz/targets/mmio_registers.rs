//! A guest pokes at registers in any order and width. The device answers, keeps to its states, and goes on.
#![no_main]

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::status::Status;
use hearth::machine::virtio::{Backend, VirtioSlot};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

/// The registers a driver writes while it brings a device up, more likely than the others.
const USUAL: [u64; 16] = [
    0x014, 0x020, 0x024, 0x030, 0x034, 0x038, 0x044, 0x050, 0x060, 0x064, 0x070, 0x080, 0x090, 0x0a0, 0x0fc, 0x100,
];

fuzz_target!(|accesses: Vec<(u8, u16, u32)>| {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let slot = VirtioSlot::new(Slot::RNG, Backend::Rng, &memory).unwrap();
    let registers = slot.registers();
    for (how, place, value) in accesses {
        let offset = if how & 0x40 == 0 { USUAL[usize::from(place) % USUAL.len()] } else { u64::from(place) };
        let width = if how & 0x30 == 0 { [1, 2, 8, 4][usize::from(how & 3)] } else { 4 };
        if how & 0x80 == 0 {
            // Small values and single bits are what registers mean something by.
            let value = if how & 8 == 0 { value % 16 } else { value };
            let bytes = u64::from(value).to_le_bytes();
            registers.lock().unwrap().write(offset, &bytes[..width]);
        } else {
            registers.lock().unwrap().read(offset, &mut [0; 8][..width]);
        }
        if how & 4 != 0 {
            slot.step();
        }
        let mut status = [0; 4];
        registers.lock().unwrap().read(0x070, &mut status);
        assert!(Status::from_bits(u32::from_le_bytes(status)).is_some());
    }
});
