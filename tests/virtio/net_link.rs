//! The network device's configuration space, several devices at once, and a tap that is deleted under a running device
//! and comes back.

use std::io::Write;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hearth::machine::layout::Slot;
use hearth::machine::virtio::{Backend, NetCounts, VirtioSlot};
use hearth::saved::Sections;
use hearth::sys::tap;
use hearth::units::NetLimits;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{CHECKSUM, Driver, LINK, MERGE, MTU, PLAIN, TSO, USO, ram, run};
use crate::net::{Guest, MAC, Wire, backend, frame, in_namespace, ip, up};
use crate::net_speed::device_thread_ns;

/// InterruptStatus: the configuration space has changed.
const CONFIG_CHANGED: u32 = 2;

const GENERATION: u64 = 0x0fc;

fn link_up(driver: &Driver) -> bool {
    let mut status = [0; 2];
    driver.config(6, &mut status);
    assert!(status[1] == 0 && status[0] <= 1, "{status:?}");
    status[0] == 1
}

fn await_config_change(driver: &Driver) {
    while driver.interrupt().expect("an interrupt of the configuration space") & CONFIG_CHANGED == 0 {}
}

#[test]
fn eight_interfaces_of_one_machine_are_apart() {
    in_namespace(|| {
        let ram = ram(16);
        let mac = |index| [2, 0, 0, 0, 1, index];
        let slots: Vec<_> = (0..8)
            .map(|index| {
                let tap = tap::open(&format!("tap{index}")).unwrap();
                let mtu = (index > 0).then_some(1400 + u16::from(index));
                let backend = Backend::Net { tap, mac: mac(index), mtu, limits: NetLimits::default() };
                Arc::new(VirtioSlot::new(Slot::net(index).unwrap(), backend, &ram).unwrap())
            })
            .collect();
        let _devices = run(&slots.iter().collect::<Vec<_>>());
        let mut next = 0x1000;
        for (index, slot) in (0..8).zip(&slots) {
            let name = format!("tap{index}");
            up(&name);
            let mut wire = Wire::open(&name);
            let mut driver = Driver::up_from(&ram, slot.clone(), PLAIN | MTU | LINK | USO | TSO | CHECKSUM, next);
            let mut config = [0; 12];
            driver.config(0, &mut config);
            let mtu = if index > 0 { 1400 + u16::from(index) } else { 0 };
            assert_eq!((&config[..6], &config[10..]), (&mac(index)[..], &mtu.to_le_bytes()[..]));
            assert!(link_up(&driver));
            assert_eq!(driver.accepted & MTU != 0, index > 0);
            // This kernel is newer than 6.2.
            assert_eq!(driver.accepted & (USO | LINK), USO | LINK);
            let out = frame([0xff; 6], MAC, &vec![index; 60 + usize::from(index)]);
            let at = driver.allocate(12 + out.len() as u64);
            driver.ram.write_slice(&[&[0; 12][..], &out].concat(), GuestAddress(at)).unwrap();
            driver.queues[1].add(&[(at, 12 + u32::try_from(out.len()).unwrap())], &[]);
            driver.kick(1);
            driver.wait_used(1);
            assert_eq!(wire.read(), out);
            next = driver.allocate(0x1000);
        }
        for (index, slot) in (0..8).zip(&slots) {
            let NetCounts { tx, .. } = slot.net_counts().unwrap();
            assert_eq!((tx.frames, tx.bytes), (1, 74 + index));
        }
    });
}

#[test]
fn a_deleted_tap_takes_the_link_down_and_another_brings_it_up() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | MERGE | CHECKSUM | TSO | USO | LINK);
        guest.post(16, 2048);
        assert!(link_up(&guest.driver));
        let generation = guest.driver.read(GENERATION);
        assert!(leaves_checksums(&mut guest));
        ip("link del tap0");
        await_config_change(&guest.driver);
        assert!(!link_up(&guest.driver));
        assert_ne!(guest.driver.read(GENERATION), generation);
        assert!(!guest.driver.slot.net_counts().unwrap().link_up);
        // What the guest sends waits; the device does nothing meanwhile.
        let used = device_thread_ns();
        let waiting: Vec<_> = (0..3).map(|at| frame([0xff; 6], MAC, &[at; 200])).collect();
        waiting.iter().for_each(|frame| guest.put(frame));
        thread::sleep(Duration::from_millis(100));
        assert!(device_thread_ns() - used < 20_000_000, "{} ns", device_thread_ns() - used);
        assert_eq!(guest.driver.queues[1].take_used(), None);
        // Not a tap: nothing changes.
        guest.driver.slot.replace_tap(tempfile::tempfile().unwrap()).unwrap_err();
        assert!(!guest.driver.slot.net_counts().unwrap().link_up);
        // Another tap under the old name: the same rings, the same offloads, the link is up.
        let tap = tap::open("tap0").unwrap();
        up("tap0");
        guest.wire = Wire::open("tap0");
        let generation = guest.driver.read(GENERATION);
        guest.driver.slot.replace_tap(tap).unwrap();
        await_config_change(&guest.driver);
        assert!(link_up(&guest.driver));
        assert_ne!(guest.driver.read(GENERATION), generation);
        assert!(leaves_checksums(&mut guest));
        for frame in waiting {
            guest.driver.wait_used(1);
            assert_eq!(guest.wire.read(), frame);
        }
        let back = frame(MAC, [2; 6], &[7; 1500]);
        guest.wire.file.write_all(&back).unwrap();
        assert_eq!(guest.hear(), (back, 1));
        let NetCounts { link_up, tx, .. } = guest.driver.slot.net_counts().unwrap();
        assert_eq!((link_up, tx.frames, tx.dropped), (true, 3, 0));
    });
}

/// Whether the host leaves the checksum of a datagram to the guest, as this one negotiated: the first bit of the header
/// (5.1.6, VIRTIO_NET_HDR_F_NEEDS_CSUM).
fn leaves_checksums(guest: &mut Guest) -> bool {
    ip("addr add 10.9.9.1/24 dev tap0");
    ip("neigh replace 10.9.9.2 lladdr 02:00:00:00:00:09 nud permanent dev tap0");
    let socket = std::net::UdpSocket::bind("10.9.9.1:0").unwrap();
    socket.send_to(b"to be summed up", "10.9.9.2:9").unwrap();
    loop {
        let part = guest.part();
        // IPv4 and UDP; the kernel talks of other things on a new interface.
        if part[24..26] == [8, 0] && part[35] == 17 {
            return part[0] & 1 == 1;
        }
    }
}

/// A device without buffers to read into notices as well, and one that is not served yet.
#[test]
fn a_deleted_tap_is_noticed_without_any_traffic() {
    in_namespace(|| {
        let guest = Guest::up(PLAIN | LINK);
        ip("link del tap0");
        await_config_change(&guest.driver);
        assert!(!link_up(&guest.driver));
    });
}

#[test]
fn a_tap_is_replaced_while_the_device_is_paused() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | LINK);
        guest.devices.pause();
        ip("link del tap0");
        guest.put(&frame([0xff; 6], MAC, &[1; 200]));
        let tap = tap::open("tap0").unwrap();
        up("tap0");
        guest.wire = Wire::open("tap0");
        guest.driver.slot.replace_tap(tap).unwrap();
        guest.devices.resume();
        guest.driver.wait_used(1);
        assert_eq!(guest.wire.read(), frame([0xff; 6], MAC, &[1; 200]));
    });
}

#[test]
fn a_guest_saved_without_a_link_learns_that_it_has_one() {
    in_namespace(|| {
        let guest = Guest::up(PLAIN | LINK);
        ip("link del tap0");
        await_config_change(&guest.driver);
        guest.devices.pause();
        let mut sections = Sections::new();
        guest.devices.save().unwrap().into_iter().for_each(|section| sections.push(section).unwrap());
        let Guest { mut driver, devices, .. } = guest;
        devices.stop();
        let (slot, backend) = (Slot::net(0).unwrap(), backend("tap1", NetLimits::default()));
        let restored = Arc::new(VirtioSlot::from_saved(slot, backend, &driver.ram, &mut sections).unwrap());
        driver.move_to(restored.clone());
        let _devices = run(&[&restored]);
        await_config_change(&driver);
        assert!(link_up(&driver));
    });
}
