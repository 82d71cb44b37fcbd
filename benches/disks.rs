//! What a disk on a file carries, by io_uring and by a thread: reads and writes of 4 KiB, one after the other and anywhere,
//! with one request under way and with sixteen. There is no guest: a driver of virtio-blk in this process fills the ring
//! and waits for interrupts, as Linux does. `cached`: all of the file is in the page cache; otherwise nothing of it is when
//! a pass begins.
//!
//! Usage: `cargo bench --bench disks [-- DIRECTORY]`, where the file is to be (a temporary directory otherwise). Prints one
//! JSON object a line: requests per second, and microseconds of processor that one takes in all threads of the process
//! together. The figures that decided are in `src/ARCHITECTURE.md`.

#![expect(clippy::disallowed_methods, reason = "it measures by the host's own clock")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth::machine::layout::Slot;
use hearth::machine::virtio::{Backend, VirtioSlot};
use hearth::sys::uring::Ring;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use vm_memory::{Bytes, GuestAddress};

#[path = "../tests/virtio/driver.rs"]
#[expect(dead_code, reason = "other devices' tests need the rest")]
mod driver;

use driver::{Driver, EVENT_IDX, INDIRECT, VERSION_1, ram, run};

const FILE_BYTES: u64 = 512 << 20;
const BLOCK: u64 = 4096;

/// How long a pass is measured.
const PASS: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Thread,
    Uring,
}

#[derive(Debug, Clone, Copy)]
struct Pass {
    by: By,
    write: bool,
    random: bool,
    depth: usize,
    cached: bool,
}

fn main() {
    let directory = std::env::args().skip(1).find(|word| !word.starts_with('-')).map(PathBuf::from);
    let file = tempfile::tempfile_in(directory.unwrap_or_else(std::env::temp_dir)).expect("a file");
    let piece = vec![0x5a; 1 << 20];
    for at in 0..FILE_BYTES >> 20 {
        file.write_all_at(&piece, at << 20).expect("fill it");
    }
    file.sync_all().expect("write it out");
    for cached in [true, false] {
        for (write, random) in [(false, false), (false, true), (true, false), (true, true)] {
            for depth in [1, 16] {
                for by in [By::Thread, By::Uring] {
                    // What is written does not depend on what is cached.
                    if cached || !write {
                        measure(&file, Pass { by, write, random, depth, cached });
                    }
                }
            }
        }
    }
}

fn prepare(file: &File, cached: bool) {
    file.sync_all().expect("write it out");
    if cached {
        let mut piece = vec![0; 1 << 20];
        for at in 0..FILE_BYTES >> 20 {
            file.read_exact_at(&mut piece, at << 20).expect("read it");
        }
    } else {
        posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("forget it");
    }
}

fn measure(file: &File, pass: Pass) {
    prepare(file, pass.cached);
    let ring = (pass.by == By::Uring).then(|| Ring::make(1).expect("io_uring").pop().expect("a ring"));
    let ram = ram(16);
    let backend = Backend::Block { file: file.try_clone().expect("the file"), read_only: false, ring };
    let slot = Arc::new(VirtioSlot::new(Slot::block(0).expect("a slot"), backend, &ram).expect("a disk"));
    let devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot, VERSION_1 | EVENT_IDX | INDIRECT);
    let mut places: Vec<[u64; 4]> =
        (0..pass.depth).map(|_| [16, 16, 64, BLOCK].map(|bytes| driver.allocate(bytes))).collect();
    let (mut next, mut dice) = (0_u64, 0x9e37_79b9_7f4a_7c15_u64);
    let mut begin = |driver: &mut Driver, place: [u64; 4]| {
        let [header, status, table, data] = place;
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        let block = if pass.random { dice } else { next } % (FILE_BYTES / BLOCK);
        next += 1;
        driver.ram.write_obj(u32::from(pass.write), GuestAddress(header)).expect("memory");
        driver.ram.write_obj(block * (BLOCK / 512), GuestAddress(header + 8)).expect("memory");
        let data = (data, 4096);
        let (from, to) = if pass.write { (vec![data], vec![]) } else { (vec![], vec![data]) };
        let readable = [&[(header, 16)][..], &from].concat();
        let writable = [&to[..], &[(status, 1)]].concat();
        driver.queues[0].add_indirect(table, &readable, &writable)
    };
    let mut under_way: Vec<(u16, [u64; 4])> =
        places.drain(..).map(|place| (begin(&mut driver, place), place)).collect();
    driver.kick(0);
    let (begun, used_before) = (Instant::now(), processor());
    let mut done = 0_u64;
    while begun.elapsed() < PASS {
        let mut head = Some(driver.wait_used(0).0);
        // All that there are, then one notification, as Linux does.
        while let Some(ended) = head {
            done += 1;
            let at = under_way.iter().position(|(of, _)| *of == ended).expect("it was under way");
            let (_, place) = under_way.swap_remove(at);
            under_way.push((begin(&mut driver, place), place));
            head = driver.queues[0].take_used().map(|(head, _)| head);
        }
        driver.kick(0);
    }
    let (took, used) = (begun.elapsed(), processor() - used_before);
    devices.pause();
    assert_eq!(driver.slot.counts().failed, 0);
    let Pass { by, write, random, depth, cached } = pass;
    let per_s = u128::from(done) * 1_000_000 / took.as_micros();
    let each = used.as_micros() as f64 / done as f64;
    println!(
        "{{\"by\":\"{by:?}\",\"write\":{write},\"random\":{random},\"depth\":{depth},\"cached\":{cached},\
         \"per_s\":{per_s},\"processor_us\":{each:.1}}}"
    );
}

/// Processor time of this process.
fn processor() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("it is asked of itself");
    let microseconds = (usage.user_time() + usage.system_time()).num_microseconds();
    Duration::from_micros(microseconds.unsigned_abs())
}
