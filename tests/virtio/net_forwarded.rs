//! A guest's interface moves from one tap to another while somebody sends to it: what waited in the first reaches the
//! guest before what came to the second, nothing is lost, nothing comes twice.

use std::io::Write;
use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::virtio::VirtioSlot;
use hearth::saved::Sections;
use hearth::units::NetLimits;

use crate::driver::{MERGE, PLAIN, run};
use crate::net::{Guest, MAC, Wire, backend, frame, in_namespace, up};

fn numbered(number: u8) -> Vec<u8> {
    frame(MAC, [2; 6], &[number; 600])
}

#[test]
fn frames_of_the_tap_before_come_first_and_all_of_them() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | MERGE);
        // Room for one frame: the second is read from the tap, and waits in the device.
        guest.post(1, 2048);
        (0..2).for_each(|number| guest.wire.file.write_all(&numbered(number)).unwrap());
        assert_eq!(guest.hear().0, numbered(0));
        guest.devices.pause();
        (2..20).for_each(|number| guest.wire.file.write_all(&numbered(number)).unwrap());

        let mut sections = Sections::new();
        guest.devices.save().unwrap().into_iter().for_each(|section| sections.push(section).unwrap());
        let other = backend("tap1", NetLimits::default());
        let before = guest.driver.slot.clone();
        let restored =
            Arc::new(VirtioSlot::from_saved(Slot::net(0).unwrap(), other, &guest.driver.ram, &mut sections).unwrap());
        restored.expect_packets(true);
        up("tap1");
        // These come to the new tap before any of the others is forwarded.
        let mut wire = Wire::open("tap1");
        (20..30).for_each(|number| wire.file.write_all(&numbered(number)).unwrap());
        guest.driver.move_to(restored.clone());
        let devices = run(&[&restored]);
        let old = std::mem::replace(&mut guest.devices, devices);
        guest.post(40, 2048);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(guest.driver.queues[0].take_used(), None, "what may still be forwarded is waited for");

        let mut forwarded = 0;
        while let Some(packet) = before.take_packet().unwrap() {
            assert!(restored.add_packet(&packet));
            forwarded += 1;
        }
        assert!(forwarded >= 19, "{forwarded} were forwarded");
        restored.expect_packets(false);
        for number in 1..30 {
            assert_eq!(guest.hear().0, numbered(number), "frame {number}");
        }
        // What is no frame is refused and counted.
        let dropped = restored.net_counts().unwrap().rx.dropped;
        assert!(!restored.add_packet(&[0; 20]) && !restored.add_packet(&vec![0; 80_000]));
        assert_eq!(restored.net_counts().unwrap().rx.dropped, dropped + 2);
        old.stop();
    });
}
