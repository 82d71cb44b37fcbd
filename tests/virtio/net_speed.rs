//! What a frame costs: frames per second of processor time of the device thread, over a real tap, in both directions
//! and for small, ordinary and segmented frames. Printed, not judged: the number belongs to the machine it was measured
//! on (`cargo test --release --test virtio net_speed -- --nocapture --test-threads 1`). What is judged is that no frame
//! was lost on the way.

use std::io::Write;

use nix::time::ClockId;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{CHECKSUM, Driver, MERGE, PLAIN, TSO, ram, run};
use crate::net::{MAC, Wire, device, frame, in_namespace, up};

/// Frames handed over at a time: fits both the rings and the tap's queue.
const BATCH: usize = 128;

/// Sizes of frames: the smallest, the usual largest, and a segment the host has to cut.
const SIZES: [usize; 3] = [60, 1514, 65_000];

/// Processor time the device thread has used, in nanoseconds: the kernel's clock of one thread, named by its number
/// as in include/linux/posix-timers.h (per thread, of the scheduler). It is the device thread of this test: it lives in
/// this thread's network namespace.
pub(crate) fn device_thread_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let ours = |task: &std::path::PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "devices")
            && std::fs::read_link(task.join("ns/net")).is_ok_and(|namespace| namespace == here)
    };
    let device = tasks.into_iter().find(ours).unwrap();
    let tid: libc::pid_t = device.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let now = ClockId::from_raw(!tid << 3 | 6).now().unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap()
}

fn rounds() -> usize {
    // Enough for two digits in an optimised build, and quick in the other.
    if cfg!(debug_assertions) { 4 } else { 400 }
}

fn told(direction: &str, bytes: usize, frames: usize, ns: u64) {
    let per_frame = ns / frames as u64;
    println!(
        "{direction} {bytes:>6} bytes: {per_frame:>6} ns a frame, {} frames per CPU-second",
        1_000_000_000 / per_frame
    );
}

#[test]
fn what_a_frame_from_the_guest_costs() {
    for bytes in SIZES {
        in_namespace(move || {
            let ram = ram(64);
            let slot = device(&ram, "tap0");
            up("tap0");
            let _devices = run(&[&slot]);
            let mut driver = Driver::up(&ram, slot, PLAIN | MERGE | CHECKSUM | TSO);
            let out = [&[0; 12][..], &frame([0xff; 6], MAC, &vec![5; bytes - 14])].concat();
            let at = driver.allocate(out.len() as u64);
            driver.ram.write_slice(&out, GuestAddress(at)).unwrap();
            let length = u32::try_from(out.len()).unwrap();
            let before = device_thread_ns();
            for _ in 0..rounds() {
                (0..BATCH).for_each(|_| {
                    driver.queues[1].add(&[(at, length)], &[]);
                });
                driver.kick(1);
                (0..BATCH).for_each(|_| {
                    driver.wait_used(1);
                });
            }
            let ns = device_thread_ns() - before;
            assert_eq!(driver.slot.counts().done, (rounds() * BATCH) as u64);
            told("from the guest", bytes, rounds() * BATCH, ns);
        });
    }
}

#[test]
fn what_a_frame_to_the_guest_costs() {
    for bytes in &SIZES[..2] {
        in_namespace(move || {
            let ram = ram(64);
            let slot = device(&ram, "tap0");
            up("tap0");
            let devices = run(&[&slot]);
            let mut driver = Driver::up(&ram, slot, PLAIN | MERGE | CHECKSUM | TSO);
            let mut wire = Wire::open("tap0");
            let back = frame(MAC, [2; 6], &vec![7; bytes - 14]);
            let buffers: Vec<u64> = (0..BATCH).map(|_| driver.allocate(2048)).collect();
            let before = device_thread_ns();
            for _ in 0..rounds() {
                devices.pause();
                (0..BATCH).for_each(|_| wire.file.write_all(&back).unwrap());
                buffers.iter().for_each(|at| {
                    driver.queues[0].add(&[], &[(*at, 2048)]);
                });
                devices.resume();
                (0..BATCH).for_each(|_| {
                    driver.wait_used(0);
                });
            }
            let ns = device_thread_ns() - before;
            assert!(driver.slot.counts().done >= (rounds() * BATCH) as u64);
            told("to the guest", *bytes, rounds() * BATCH, ns);
        });
    }
}
