//! Limits of the network device: with a clock of the test's, to the byte; with the host's, that the device wakes up by
//! itself, spends no processor time on waiting, and survives pauses and saves with a wait under way.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hearth::clock::{Clock, Monotonic, SystemClock, UnixNanos};
use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{DeviceLoop, NetCounts, VirtioSlot};
use hearth::saved::Sections;
use hearth::units::{FlowLimits, NetLimits, Rate};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, MERGE, PLAIN, ram, run};
use crate::net::{Guest, MAC, Wire, backend, frame, in_namespace, up};
use crate::net_speed::device_thread_ns;

const MS: u64 = 1_000_000;

/// A clock that stands until it is turned.
#[derive(Default)]
struct HandTurned(AtomicU64);

impl Clock for HandTurned {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::Relaxed))
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos(0)
    }
}

impl HandTurned {
    fn turn(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

fn bytes(per_s: u64, burst: u64) -> FlowLimits {
    FlowLimits { bytes: Some(Rate { per_s, burst }), frames: None }
}

fn frames(per_s: u64, burst: u64) -> FlowLimits {
    FlowLimits { bytes: None, frames: Some(Rate { per_s, burst }) }
}

/// A device that is stepped, with 32 frames of 1000 bytes waiting in each direction.
fn both_ways(limits: NetLimits) -> (Arc<HandTurned>, Driver) {
    let ram: GuestRam = ram(16);
    let clock = Arc::new(HandTurned::default());
    let time: Arc<dyn Clock> = clock.clone();
    let slot = VirtioSlot::with_clock(Slot::net(0).unwrap(), backend("tap0", limits), &ram, time).unwrap();
    up("tap0");
    let mut wire = Wire::open("tap0");
    let mut driver = Driver::up(&ram, Arc::new(slot), PLAIN | MERGE);
    for _ in 0..32 {
        wire.file.write_all(&frame(MAC, [2; 6], &[1; 986])).unwrap();
        let at = driver.allocate(2048);
        driver.queues[0].add(&[], &[(at, 2048)]);
        let at = driver.allocate(1012);
        driver.ram.write_slice(&[&[0; 12][..], &frame([0xff; 6], MAC, &[1; 986])].concat(), GuestAddress(at)).unwrap();
        driver.queues[1].add(&[(at, 1012)], &[]);
    }
    (clock, driver)
}

/// Frames that passed so far, to and from the guest, after the device had its turns.
fn passed(driver: &Driver) -> (u64, u64) {
    (0..4).for_each(|_| {
        driver.slot.step();
    });
    let NetCounts { rx, tx, .. } = driver.slot.net_counts().unwrap();
    assert_eq!((rx.bytes, tx.bytes), (1000 * rx.frames, 1000 * tx.frames));
    (rx.frames, tx.frames)
}

#[test]
fn what_passes_is_the_burst_and_then_the_rate() {
    in_namespace(|| {
        // The least burst that is possible is not asked for here: the device takes any.
        let (clock, driver) = both_ways(NetLimits { rx: bytes(100_000, 3_500), tx: frames(50, 4) });
        assert_eq!(passed(&driver), (3, 4));
        assert_eq!(passed(&driver), (3, 4));
        // 500 bytes are left over, and 500 are gained in 5 ms; a frame in 20 ms.
        clock.turn(5 * MS - 1);
        assert_eq!(passed(&driver), (3, 4));
        clock.turn(1);
        assert_eq!(passed(&driver), (4, 4));
        clock.turn(15 * MS);
        assert_eq!(passed(&driver), (5, 5));
        // A long rest gains one burst and no more.
        clock.turn(1 << 62);
        assert_eq!(passed(&driver), (8, 9));
        let NetCounts { rx, tx, .. } = driver.slot.net_counts().unwrap();
        assert_eq!((rx.throttled, rx.dropped), (4, 0));
        assert_eq!((tx.throttled, tx.dropped), (3, 0));
    });
}

#[test]
fn a_frame_larger_than_the_burst_passes_and_is_paid_for() {
    in_namespace(|| {
        let (clock, driver) = both_ways(NetLimits { rx: bytes(1_000_000, 100), tx: bytes(1_000_000, 100) });
        assert_eq!(passed(&driver), (1, 1));
        clock.turn(MS - 1);
        assert_eq!(passed(&driver), (1, 1));
        clock.turn(1);
        assert_eq!(passed(&driver), (2, 2));
    });
}

/// 20 frames a second above a burst of 4: whatever the host's load, 14 frames take half a second at least.
#[test]
fn the_device_wakes_up_by_itself_and_does_not_spin_meanwhile() {
    in_namespace(|| {
        let mut guest = Guest::limited(PLAIN | MERGE, NetLimits { rx: frames(20, 4), tx: frames(20, 4) });
        guest.post(32, 2048);
        let clock = SystemClock::new();
        let (begun, used) = (clock.monotonic(), device_thread_ns());
        let body = [9; 986];
        for _ in 0..14 {
            guest.put(&frame([0xff; 6], MAC, &body));
            guest.wire.file.write_all(&frame(MAC, [2; 6], &body)).unwrap();
        }
        (0..14).for_each(|_| {
            guest.driver.wait_used(1);
        });
        (0..14).for_each(|_| {
            guest.hear();
        });
        let took = clock.monotonic().since(begun);
        assert!((500..10_000).contains(&took.as_millis()), "{took:?}");
        // 28 frames and about as many turns take well below a millisecond.
        assert!(device_thread_ns() - used < 50 * MS, "{} ns", device_thread_ns() - used);
        let NetCounts { rx, tx, .. } = guest.driver.slot.net_counts().unwrap();
        assert_eq!((rx.frames, rx.dropped, tx.frames, tx.dropped), (14, 0, 14, 0));
        assert!((1..=10).contains(&rx.throttled) && (1..=10).contains(&tx.throttled), "{rx:?} {tx:?}");
    });
}

#[test]
fn a_wait_survives_a_pause() {
    in_namespace(|| {
        let mut guest = Guest::limited(PLAIN, NetLimits { rx: FlowLimits::default(), tx: frames(20, 1) });
        (0..3).for_each(|_| guest.put(&frame([0xff; 6], MAC, &[4; 100])));
        guest.driver.wait_used(1);
        // The timer is set now, and may expire during the pause.
        guest.devices.pause();
        while guest.driver.queues[1].take_used().is_some() {}
        let before = guest.driver.slot.net_counts().unwrap().tx.frames;
        std::thread::sleep(std::time::Duration::from_millis(120));
        assert_eq!(guest.driver.slot.net_counts().unwrap().tx.frames, before);
        assert_eq!(guest.driver.queues[1].take_used(), None);
        guest.devices.resume();
        (before..3).for_each(|_| {
            guest.driver.wait_used(1);
        });
    });
}

#[test]
fn frames_that_wait_are_sent_by_the_restored_device() {
    in_namespace(|| {
        // Never more than one: the next would come after a quarter of an hour.
        let limits = NetLimits { rx: FlowLimits::default(), tx: bytes(1_000, 1_514) };
        let mut guest = Guest::limited(PLAIN, limits);
        (0..3).for_each(|_| guest.put(&frame([0xff; 6], MAC, &[4; 1_500])));
        guest.driver.wait_used(1);
        guest.devices.pause();
        let mut sections = Sections::new();
        guest.devices.save().unwrap().into_iter().for_each(|section| sections.push(section).unwrap());
        let Guest { mut driver, devices, .. } = guest;
        devices.stop();
        // Limits come with the launch of the restored machine: this one has none.
        let (slot, open) = (Slot::net(0).unwrap(), NetLimits::default());
        let restored =
            Arc::new(VirtioSlot::from_saved(slot, backend("tap1", open), &driver.ram, &mut sections).unwrap());
        up("tap1");
        let mut wire = Wire::open("tap1");
        driver.move_to(restored.clone());
        let _devices: DeviceLoop = run(&[&restored]);
        for _ in 0..2 {
            driver.wait_used(1);
            assert_eq!(wire.read().len(), 1_514);
        }
    });
}
