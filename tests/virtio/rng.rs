//! The entropy device, and with it what all devices share: bring-up, reset, notification, interrupts, broken rings.

use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, VirtioSlot};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, EVENT_IDX, INDIRECT, NEXT, TABLE, VERSION_1, WRITE, ram, run};

fn device(ram: &GuestRam) -> Arc<VirtioSlot> {
    Arc::new(VirtioSlot::new(Slot::RNG, Backend::Rng, ram).unwrap())
}

fn random(driver: &mut Driver, indirect: bool) -> Vec<u8> {
    let (first, second, table) = (driver.allocate(8), driver.allocate(56), driver.allocate(32));
    let buffers = [(first, 8), (second, 56)];
    if indirect {
        driver.queues[0].add_indirect(table, &[], &buffers);
    } else {
        driver.queues[0].add(&[], &buffers);
    }
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 64);
    let mut bytes = vec![0; 64];
    driver.ram.read_slice(&mut bytes[..8], GuestAddress(first)).unwrap();
    driver.ram.read_slice(&mut bytes[8..], GuestAddress(second)).unwrap();
    bytes
}

#[test]
fn gives_random_bytes_with_every_feature_set() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | EVENT_IDX | INDIRECT] {
        let ram = ram(4);
        let slot = device(&ram);
        let _devices = run(&[&slot]);
        let mut driver = Driver::up(&ram, slot, features);
        let indirect = features & INDIRECT != 0;
        let mut seen = vec![vec![0; 64]];
        // More rounds than the ring has entries.
        for _ in 0..40 {
            let bytes = random(&mut driver, indirect);
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
        assert_eq!(driver.slot.counts().done, 40);
    }
}

#[test]
fn a_device_without_version_1_or_with_unknown_features_is_refused() {
    let ram = ram(4);
    let driver = Driver::new(&ram, device(&ram));
    for (low, high) in [(0, 0), (1 << 29, 0), (1 << 3, 1), (0, 3)] {
        for (register, value) in
            [(0x070, 0), (0x070, 1), (0x070, 3), (0x024, 0), (0x020, low), (0x024, 1), (0x020, high)]
        {
            driver.write(register, value);
        }
        driver.write(0x070, 11);
        assert_eq!(driver.read(0x070), 3, "{low:#x} {high:#x}");
    }
}

#[test]
fn works_after_reset_and_holds_still_while_paused() {
    let ram = ram(4);
    let slot = device(&ram);
    let devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot.clone(), VERSION_1 | EVENT_IDX);
    random(&mut driver, false);
    driver.bring_up(VERSION_1 | EVENT_IDX);
    random(&mut driver, false);
    devices.pause();
    while driver.interrupt_within(0).is_some() {}
    let buffer = driver.allocate(64);
    driver.queues[0].add(&[], &[(buffer, 64)]);
    driver.kick(0);
    assert_eq!(driver.interrupt_within(50), None);
    assert_eq!(driver.queues[0].take_used(), None);
    devices.resume();
    assert_eq!(driver.wait_used(0).1, 64);
    devices.stop();
}

#[test]
fn a_notification_by_register_works_as_well() {
    let ram = ram(4);
    let slot = device(&ram);
    let _devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot, VERSION_1);
    let buffer = driver.allocate(64);
    driver.queues[0].add(&[], &[(buffer, 64)]);
    driver.write(0x050, 0);
    assert_eq!(driver.wait_used(0).1, 64);
    driver.write(0x050, 77);
    assert_eq!(driver.slot.counts().refused, 1);
}

/// An address above all memory of these tests.
const BEYOND: u64 = 64 << 20;

type Breaks = &'static dyn Fn(&mut Driver);

/// Every way to break a ring ends in a request for a reset, and the device works again after it.
#[test]
fn broken_rings_ask_for_a_reset() {
    let cases: [(&str, Breaks); 9] = [
        ("loop", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, 0x100, 8, (NEXT | WRITE, 1));
            queue.descriptor(queue.descriptors, 1, 0x100, 8, (NEXT | WRITE, 0));
            queue.announce(0);
        }),
        ("head outside of the table", &|driver| driver.queues[0].announce(8)),
        ("next outside of the table", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, 0x100, 8, (NEXT | WRITE, 8));
            queue.announce(0);
        }),
        ("buffer outside of memory", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, BEYOND, 8, (WRITE, 0));
            queue.announce(0);
        }),
        ("buffer that wraps around", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, u64::MAX - 3, u32::MAX, (WRITE, 0));
            queue.announce(0);
        }),
        ("readable after writable", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, 0x100, 8, (NEXT | WRITE, 1));
            queue.descriptor(queue.descriptors, 1, 0x100, 8, (0, 0));
            queue.announce(0);
        }),
        ("too many chains", &|driver| (0..9).for_each(|_| driver.queues[0].announce(0))),
        ("table in a table", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, 0x200, 32, (TABLE, 0));
            queue.descriptor(0x200, 0, 0x200, 32, (TABLE, 0));
            queue.announce(0);
        }),
        ("table of an odd size", &|driver| {
            let queue = &mut driver.queues[0];
            queue.descriptor(queue.descriptors, 0, 0x200, 17, (TABLE, 0));
            queue.announce(0);
        }),
    ];
    let ram = ram(4);
    let slot = device(&ram);
    let _devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot, VERSION_1 | EVENT_IDX | INDIRECT);
    for (at, (name, breaks)) in cases.iter().enumerate() {
        breaks(&mut driver);
        driver.write(0x050, 0);
        while driver.read(0x070) & 64 == 0 {
            assert_ne!(driver.interrupt(), None, "{name}: not noticed");
        }
        assert_eq!(driver.slot.counts().broken, at as u64 + 1, "{name}");
        driver.bring_up(VERSION_1 | EVENT_IDX | INDIRECT);
        while driver.interrupt_within(0).is_some() {}
        random(&mut driver, false);
    }
}

#[test]
fn impossible_rings_are_refused_when_the_queue_is_enabled() {
    let ram = ram(4);
    let driver = Driver::new(&ram, device(&ram));
    // size, descriptors, available, used
    let cases = [
        (3, 0x1000, 0x2000, 0x3000),
        (0, 0x1000, 0x2000, 0x3000),
        (16, 0x1000, 0x2000, 0x3000),
        (0x1_0008, 0x1000, 0x2000, 0x3000),
        (8, 0x1008, 0x2000, 0x3000),
        (8, 0x1000, 0x2001, 0x3000),
        (8, 0x1000, 0x2000, 0x3002),
        (8, 0x1000, 0, 0x3000),
        (8, 64 << 20, 0x2000, 0x3000),
        (8, 0x1000, (4 << 20) - 16, 0x3000),
        (8, 0x1000, 0x2000, (4 << 20) - 64),
    ];
    for (size, descriptors, available, used) in cases {
        for (register, value) in [
            (0x070, 0),
            (0x070, 1),
            (0x070, 3),
            (0x024, 1),
            (0x020, 1),
            (0x070, 11),
            (0x038, size),
            (0x080, descriptors),
            (0x090, available),
            (0x0a0, used),
            (0x044, 1),
        ] {
            driver.write(register, value);
        }
        assert_eq!(driver.read(0x044), 0, "{size} {descriptors:#x} {available:#x} {used:#x}");
        assert_eq!(driver.read(0x070), 11 | 64);
    }
}
