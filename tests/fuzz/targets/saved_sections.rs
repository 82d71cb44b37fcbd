//! A state file that is not one, or was changed: refused, or the same when it is written again. Its sections are then
//! given to a device, which takes them or refuses them.
#![no_main]

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::saved::{QueueV1, TransportV1};
use hearth::machine::virtio::{Backend, VirtioSlot};
use hearth::saved::{Section, SectionKind, SectionName, Sections, codec};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

type Transport = ([u32; 4], [u64; 2], [u32; 3], [u16; 4], [u64; 3], bool);

fuzz_target!(|input: (Vec<u8>, Transport, Vec<u8>)| {
    let (bytes, ([device, sel, queue_sel, status], [offered, accepted], numbers, sizes, rings, ready), raw) = input;
    if let Ok(sections) = codec::from_bytes(&bytes) {
        assert_eq!(codec::from_bytes(&codec::to_bytes(&sections).unwrap()).unwrap(), sections);
    }
    let queue = QueueV1 {
        size_max: if sizes[0] % 4 == 0 { sizes[0] } else { 8 },
        size: sizes[1] % 17,
        ready,
        descriptors: rings[0] % 0x2_0000,
        available: rings[1] % 0x2_0000,
        used: rings[2] % 0x2_0000,
        next_avail: sizes[2],
        next_used: sizes[3],
    };
    let transport = TransportV1 {
        device_id: if device % 4 == 0 { device } else { 4 },
        offered: offered & 0x1_3000_0001,
        accepted: accepted & 0x1_3000_0001,
        device_features_sel: sel,
        driver_features_sel: sel,
        queue_sel,
        status: status % 256,
        interrupt_status: numbers[0],
        config_generation: numbers[1],
        queues: vec![queue],
    };
    let mut sections = Sections::new();
    let name = SectionName { kind: SectionKind::Rng, instance: 1 };
    let raw = if raw.is_empty() { vec![7] } else { raw };
    sections.push(Section { name, version: 1, bytes: raw }).unwrap();
    sections.push(Section::new(1, &transport).unwrap()).unwrap();
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    if let Ok(device) = VirtioSlot::from_saved(Slot::RNG, Backend::Rng, &memory, &mut sections) {
        device.step();
    }
});
