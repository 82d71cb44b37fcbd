//! A guest writes queue registers and its memory; the device pops what there is. No panic, no endless loop, and every
//! buffer that comes out is inside of memory.
#![no_main]

use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::queue::Queue;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY_BYTES: usize = 0x1_0000;

fuzz_target!(|input: (u8, bool, u8, [u16; 3], Vec<(u16, u64)>)| {
    let (size, event_idx, rounds, [descriptors, available, used], writes) = input;
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    for (at, value) in &writes {
        // Near the rings, where it matters; the rest would be lucky to hit.
        let at = u64::from(*at % 0x1000) * 2;
        let _ = memory.write_slice(&value.to_le_bytes(), GuestAddress(at));
    }
    let mut queue = Queue::new(memory.clone(), 16);
    if let Some(setup) = queue.setup_mut() {
        setup.size = 1 << (size % 6);
        setup.descriptors = u64::from(descriptors % 0x200) * 16;
        setup.available = u64::from(available % 0x1000) * 2;
        setup.used = u64::from(used % 0x800) * 4;
    }
    if queue.enable(event_idx).is_err() {
        return;
    }
    for _ in 0..rounds % 8 {
        let mut popped = 0;
        while let Ok(Some(chain)) = queue.pop() {
            popped += 1;
            assert!(popped <= MEMORY_BYTES, "more chains than any ring holds");
            let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
            for slices in [chain.readable_slices(&memory, 0, readable), chain.writable_slices(&memory, 0, writable)] {
                let bytes: usize = slices.expect("checked by pop").iter().map(|slice| slice.len()).sum();
                assert!(bytes <= readable.max(writable));
            }
            let mut copy = vec![0; readable.min(128)];
            assert_eq!(chain.read(&memory, 0, &mut copy), Ok(copy.len()));
            if popped % 5 == 0 {
                queue.undo_pop(chain);
                break;
            }
            if popped > 64 || queue.add_used(chain, writable).is_err() {
                break;
            }
        }
        let _ = queue.wait_for_buffers();
        let _ = queue.tell_next_added();
        let _ = queue.owes_interrupt();
        let saved = queue.save();
        if let Ok(restored) = Queue::from_saved(memory.clone(), &saved, event_idx) {
            assert_eq!(restored.save(), saved);
        }
    }
});
