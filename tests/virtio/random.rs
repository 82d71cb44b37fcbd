//! Guests that do anything: rings full of random descriptors, registers poked at random. Nothing panics, nothing goes
//! on for ever, no buffer lies outside of memory, and a reset makes the device whole again.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::queue::{Queue, RingError};
use hearth::machine::virtio::saved::QueueV1;
use hearth::machine::virtio::status::Status;
use hearth::machine::virtio::{Backend, VirtioSlot};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, VERSION_1};

const MEMORY_BYTES: u64 = 0x1_0000;
const SIZE: u16 = 8;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x1100;
const USED: u64 = 0x1200;
/// Where descriptors may have their buffers, and tables of more descriptors.
const BUFFERS: u64 = 0x2000;

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => BUFFERS..BUFFERS + 0x400,
        1 => MEMORY_BYTES - 64..MEMORY_BYTES + 64,
        1 => any::<u64>(),
        1 => Just(DESCRIPTORS),
    ];
    let bytes = prop_oneof![4 => 0_u32..200, 2 => (0_u32..20).prop_map(|count| 16 * count), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0_u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (address, bytes, flags, next).prop_map(|(address, bytes, flags, next)| Descriptor { address, bytes, flags, next })
}

fn memory() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)]).unwrap()
}

fn put_table(memory: &GuestRam, table: u64, descriptors: &[Descriptor]) {
    for (at, descriptor) in (0_u64..).zip(descriptors) {
        let Descriptor { address, bytes, flags, next } = *descriptor;
        let raw =
            [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        memory.write_slice(&raw, GuestAddress(table + 16 * at)).unwrap();
    }
}

fn put_heads(memory: &GuestRam, heads: &[u16], index: u16) {
    for (at, head) in (0_u64..).zip(heads) {
        memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + 2 * (at % u64::from(SIZE)))).unwrap();
    }
    memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
}

fn any_memory() -> impl Strategy<Value = (Vec<Descriptor>, Vec<Descriptor>, Vec<u16>, u16)> {
    let size = usize::from(SIZE);
    (
        proptest::collection::vec(any_descriptor(), size),
        proptest::collection::vec(any_descriptor(), 0..2 * size),
        proptest::collection::vec(prop_oneof![8 => 0..SIZE, 1 => any::<u16>()], size),
        prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()],
    )
}

proptest! {
    #[test]
    fn random_rings_end_and_stay_inside_memory((table, indirect, heads, index) in any_memory(), event_idx: bool) {
        let memory = memory();
        put_table(&memory, DESCRIPTORS, &table);
        put_table(&memory, BUFFERS, &indirect);
        put_heads(&memory, &heads, index);
        let mut queue = Queue::new(memory.clone(), SIZE);
        let setup = queue.setup_mut().unwrap();
        (setup.descriptors, setup.available, setup.used) = (DESCRIPTORS, AVAILABLE, USED);
        queue.enable(event_idx).unwrap();
        let mut popped = 0;
        let ended = loop {
            match queue.pop() {
                Ok(None) => break None,
                Err(error) => break Some(error),
                Ok(Some(chain)) => {
                    popped += 1;
                    prop_assert!(popped <= SIZE);
                    let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
                    let inside = |slices: Result<Vec<_>, RingError>, bytes: usize| {
                        let slices: Vec<hearth::machine::virtio::chain::GuestSlice<'_>> = slices.unwrap();
                        assert_eq!(slices.iter().map(|slice| slice.len()).sum::<usize>(), bytes);
                    };
                    inside(chain.readable_slices(&memory, 0, readable), readable);
                    inside(chain.writable_slices(&memory, 0, writable), writable);
                    prop_assert!(chain.head() < SIZE);
                    queue.add_used(chain, writable).unwrap();
                }
            }
        };
        if index > SIZE {
            prop_assert_eq!(ended, Some(RingError::Index));
        } else if ended.is_none() {
            prop_assert_eq!(popped, index);
        }
        queue.wait_for_buffers().unwrap();
        queue.tell_next_added().unwrap();
        queue.owes_interrupt().unwrap();
        let saved = queue.save();
        prop_assert_eq!(Queue::from_saved(memory, &saved, event_idx).unwrap().save(), saved);
    }

    #[test]
    fn saved_queues_are_refused_or_restored_as_they_are(
        (size_max, size) in (Just(8_u16), prop_oneof![Just(8_u16), Just(4), any::<u16>()]),
        rings in [any::<u64>(), any::<u64>(), any::<u64>()],
        near: bool,
        (next_avail, next_used, ready) in any::<(u16, u16, bool)>(),
    ) {
        let [descriptors, available, used] = if near { rings.map(|ring| ring % 0x1_0100) } else { rings };
        let saved = QueueV1 { size_max, size, ready, descriptors, available, used, next_avail, next_used };
        if let Ok(mut queue) = Queue::from_saved(memory(), &saved, true) {
            if ready {
                prop_assert_eq!(queue.save(), saved);
            }
            let _ = queue.pop();
            let _ = queue.wait_for_buffers();
        }
    }

    #[test]
    fn random_pokes_leave_a_device_that_a_reset_makes_whole(
        pokes in proptest::collection::vec((any::<bool>(), 0_u64..0x120, 0_usize..4, any::<u32>(), any::<bool>()), 0..64)
    ) {
        let memory = memory();
        let device = Arc::new(VirtioSlot::new(Slot::RNG, Backend::Rng, &memory).unwrap());
        let registers = device.registers();
        let mut seen = BTreeSet::new();
        for (write, offset, width, value, small) in pokes {
            let offset = if small { offset & !3 } else { offset };
            let value = u64::from(if small { value % 16 } else { value });
            let width = if small { 4 } else { [1, 2, 4, 8][width] };
            if write {
                registers.lock().unwrap().write(offset, &value.to_le_bytes()[..width]);
            } else {
                registers.lock().unwrap().read(offset, &mut [0; 8][..width]);
            }
            device.step();
            let mut status = [0; 4];
            registers.lock().unwrap().read(0x070, &mut status);
            let status = u32::from_le_bytes(status);
            prop_assert!(Status::from_bits(status).is_some(), "{status:#x}");
            seen.insert(status);
        }
        let mut driver = Driver::new(&memory, device.clone());
        driver.bring_up(VERSION_1);
        let buffer = driver.allocate(16);
        driver.queues[0].add(&[], &[(buffer, 16)]);
        device.step();
        prop_assert_eq!(driver.queues[0].take_used().map(|(_, bytes)| bytes), Some(16));
    }
}
