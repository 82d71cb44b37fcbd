//! The balloon: memory leaves the host and comes back, whatever numbers a guest says; what it says of itself is kept.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hearth::clock::{Clock, Monotonic, UnixNanos};
use hearth::machine::image::{self, Pages};
use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, BalloonCounts, DeviceLoop, VirtioSlot};
use hearth::saved::Sections;
use hearth::sys::ram::{RegionPlan, Sharing, map, memfd};
use hearth::sys::sparse::next_data;
use hearth::units::{Bytes, GuestPhys, PageCount};
use vm_memory::{Bytes as _, GuestAddress};

use crate::driver::{Driver, PLAIN, run};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const STATS: u64 = 1 << 1;
const ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
const ALL: u64 = PLAIN | STATS | ON_OOM | REPORTING;

/// Where the tests' pages begin: rings and buffers are below.
const PAGES: u64 = MIB;

fn memory(file: &File, sharing: Sharing, mib: u64) -> GuestRam {
    map(file, sharing, &[RegionPlan { start: GuestPhys(0), bytes: Bytes(mib * MIB), file_offset: Bytes(0) }]).unwrap()
}

fn shared(mib: u64) -> (File, GuestRam) {
    let file = memfd(Bytes(mib * MIB)).unwrap();
    let ram = memory(&file, Sharing::Shared, mib);
    (file, ram)
}

fn balloon(ram: &GuestRam) -> Arc<VirtioSlot> {
    Arc::new(VirtioSlot::new(Slot::BALLOON, Backend::Balloon, ram).unwrap())
}

/// Bytes of the file from `PAGES` on that are there.
fn data(file: &File) -> u64 {
    let (mut at, end, mut sum) = (PAGES, file.metadata().unwrap().len(), 0);
    while let Some(found) = next_data(file, at, end).unwrap() {
        sum += found.end - found.start;
        at = found.end;
    }
    sum
}

/// Writes into each of these pages, as a guest that uses them.
fn touch(ram: &GuestRam, pages: std::ops::Range<u64>) {
    for page in pages {
        ram.write_obj(page + 1, GuestAddress(PAGES + page * PAGE)).unwrap();
    }
}

/// Puts page numbers into guest memory, to be sent.
fn numbers(driver: &mut Driver, pages: &[u32]) -> (u64, u32) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    let at = driver.allocate(bytes.len() as u64);
    driver.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
    (at, u32::try_from(bytes.len()).unwrap())
}

fn number(page: u64) -> u32 {
    u32::try_from((PAGES + page * PAGE) / PAGE).unwrap()
}

fn counts(driver: &Driver) -> BalloonCounts {
    driver.slot.balloon(None).unwrap()
}

#[test]
fn inflated_pages_leave_the_host_and_are_there_again_when_touched() {
    let (file, ram) = shared(4);
    touch(&ram, 0..64);
    let slot = balloon(&ram);
    let _devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot, ALL);
    assert_eq!(driver.accepted & (STATS | ON_OOM | REPORTING), STATS | ON_OOM | REPORTING);
    // Out of order, with a gap at 10, and one of them twice.
    let mut pages: Vec<u32> = (0..32).filter(|page| *page != 10).rev().map(number).collect();
    pages.push(number(3));
    let buffer = numbers(&mut driver, &pages);
    driver.queues[0].add(&[buffer], &[]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 0);
    assert_eq!(data(&file), 33 * PAGE);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGES + 10 * PAGE)).unwrap(), 11);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGES + 40 * PAGE)).unwrap(), 41);
    driver.queues[1].add(&[buffer], &[]);
    driver.kick(1);
    driver.wait_used(1);
    touch(&ram, 0..4);
    assert_eq!((data(&file), driver.slot.counts().failed), (37 * PAGE, 0));
}

/// Under the number of the specification, 4, and under the one of a driver that counts the queues it uses, 3; and under
/// 2 for one that does without statistics.
#[test]
fn reported_pages_leave_the_host_under_every_number_of_the_queue() {
    for (queue, features) in [(4, ALL), (3, ALL), (2, PLAIN | REPORTING)] {
        let (file, ram) = shared(4);
        touch(&ram, 0..64);
        let slot = balloon(&ram);
        let _devices = run(&[&slot]);
        let mut driver = Driver::up(&ram, slot, features);
        let at = |page: u64| PAGES + page * PAGE;
        driver.queues[queue].add(&[], &[(at(0), 16 * 4096), (at(32), 8 * 4096)]);
        driver.kick(queue);
        driver.wait_used(queue);
        assert_eq!((data(&file), counts(&driver).reported), (40 * PAGE, Bytes(24 * PAGE)), "queue {queue}");
    }
}

#[test]
fn without_reporting_its_queue_gives_nothing_back() {
    let (file, ram) = shared(4);
    touch(&ram, 0..8);
    let slot = balloon(&ram);
    let mut driver = Driver::up(&ram, slot.clone(), PLAIN | STATS);
    driver.queues[4].add(&[], &[(PAGES, 8 * 4096)]);
    driver.kick(4);
    assert!(!slot.step());
    assert_eq!((data(&file), driver.queues[4].take_used()), (8 * PAGE, None));
}

/// A page that was given back is the image's again: it is no change to save.
#[test]
fn a_private_page_that_was_given_back_is_unchanged() {
    let file = memfd(Bytes(4 * MIB)).unwrap();
    touch(&memory(&file, Sharing::Shared, 4), 0..1);
    let ram = memory(&file, Sharing::Private, 4);
    let changed = || {
        let (pagemap, out) = (File::open("/proc/self/pagemap").unwrap(), tempfile::tempfile().unwrap());
        let written = image::write(&ram, Pages::Changed, &pagemap, &out).unwrap();
        let tests = written.pages.iter().filter(|run| run.first.0 >= PAGES / PAGE);
        tests.map(|run| (run.first.0 - PAGES / PAGE, run.count.0)).collect::<Vec<_>>()
    };
    ram.write_obj(77_u64, GuestAddress(PAGES)).unwrap();
    touch(&ram, 1..4);
    assert_eq!(changed(), [(0, 4)]);
    let slot = balloon(&ram);
    let mut driver = Driver::up(&ram, slot.clone(), ALL);
    let buffer = numbers(&mut driver, &[number(0), number(2)]);
    driver.queues[0].add(&[buffer], &[]);
    assert!(!slot.step());
    assert!(driver.queues[0].take_used().is_some());
    assert_eq!(changed(), [(1, 1), (3, 1)]);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGES)).unwrap(), 1, "what the image holds");
}

#[test]
fn numbers_and_buffers_that_are_no_pages_do_no_harm() {
    let (file, ram) = shared(4);
    touch(&ram, 0..64);
    let slot = balloon(&ram);
    let mut driver = Driver::up(&ram, slot.clone(), ALL);
    let beyond = numbers(&mut driver, &[u32::MAX, 1024, 1025, 0x8000_0000]);
    // Half a number at its end.
    let (at, bytes) = numbers(&mut driver, &[number(0), number(1)]);
    driver.queues[0].add(&[beyond], &[]);
    driver.queues[0].add(&[(at, bytes - 2)], &[]);
    driver.queues[0].add(&[], &[(PAGES, 4096)]);
    driver.queues[4].add(&[], &[(PAGES + 8 * PAGE + 1, 2 * 4096), (PAGES + 20 * PAGE + 5, 100)]);
    while slot.step() {}
    assert_eq!(std::iter::from_fn(|| driver.queues[0].take_used()).count(), 3);
    assert!(driver.queues[4].take_used().is_some());
    // Page 0 by its number, and the one whole page of a buffer that is none.
    assert_eq!(data(&file), 62 * PAGE);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGES + PAGE)).unwrap(), 2);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(PAGES + 8 * PAGE)).unwrap(), 9);
    // Three runs beyond memory, two buffers that are not whole pages.
    assert_eq!((slot.counts().failed, slot.counts().broken), (5, 0));
    driver.queues[4].add(&[], &[(64 * MIB, 4096)]);
    while slot.step() {}
    assert_eq!((slot.counts().broken, data(&file)), (1, 62 * PAGE));
}

/// A chain with more than a turn's share takes several turns; a pause in the middle leaves it to be begun again.
#[test]
fn a_turn_is_bounded_and_a_pause_in_a_chain_is_harmless() {
    const MEMORY_MIB: u64 = 132;
    let (file, ram) = shared(MEMORY_MIB);
    let slot = balloon(&ram);
    let mut driver = Driver::up(&ram, slot.clone(), ALL);
    let pages = (MEMORY_MIB - 4) * MIB / PAGE;
    touch(&ram, 0..pages);
    driver.queues[4].add(&[], &[(PAGES, 100 << 20), (PAGES + 100 * MIB, 28 << 20)]);
    assert!(slot.step(), "there is more to do");
    let left = data(&file);
    assert!(left < pages * PAGE && left >= 64 * MIB, "{left} bytes are left after one turn");
    assert_eq!(driver.queues[4].take_used(), None);
    let devices = DeviceLoop::start(vec![slot]).unwrap();
    devices.pause();
    let mut sections = Sections::new();
    devices.save().unwrap().into_iter().for_each(|section| sections.push(section).unwrap());
    devices.stop();
    let restored = Arc::new(VirtioSlot::from_saved(Slot::BALLOON, Backend::Balloon, &ram, &mut sections).unwrap());
    driver.move_to(restored.clone());
    let mut steps = 1;
    while restored.step() {
        steps += 1;
    }
    assert!(driver.queues[4].take_used().is_some());
    assert_eq!(data(&file), 0);
    // A step is two turns of 32 MiB at most.
    assert!(steps >= 2, "{steps} steps for 128 MiB");
    // The same with numbers: more of them than a turn handles, of pages that are gone already.
    let buffer = numbers(&mut driver, &(0..20_000).map(number).collect::<Vec<_>>());
    driver.queues[0].add(&[buffer], &[]);
    assert!(restored.step());
    assert_eq!(driver.queues[0].take_used(), None);
    while restored.step() {}
    assert!(driver.queues[0].take_used().is_some());
}

#[test]
fn the_guest_is_told_of_a_target_and_says_how_far_it_is() {
    let (_, ram) = shared(4);
    let slot = balloon(&ram);
    let devices = run(&[&slot]);
    let mut driver = Driver::up(&ram, slot, ALL);
    let wanted = |driver: &Driver| {
        let mut field = [0; 4];
        driver.config(0, &mut field);
        u32::from_le_bytes(field)
    };
    while driver.interrupt_within(0).is_some() {}
    let generation = driver.read(0x0fc);
    driver.slot.balloon(Some(PageCount(300))).unwrap();
    assert_eq!(driver.interrupt(), Some(2), "the configuration changed");
    assert_eq!((wanted(&driver), driver.read(0x0fc)), (300, generation + 1));
    driver.write(0x104, 299);
    assert_eq!((counts(&driver).target, counts(&driver).actual), (Bytes(300 * PAGE), Bytes(299 * PAGE)));
    // No guest gives or is asked for more than it has; num_pages is not the guest's to write.
    driver.write(0x104, u32::MAX);
    driver.slot.balloon(Some(PageCount(u64::MAX))).unwrap();
    assert_eq!(driver.interrupt(), Some(2));
    driver.write(0x100, 1);
    assert_eq!((counts(&driver).target, counts(&driver).actual), (Bytes(4 * MIB), Bytes(4 * MIB)));
    assert_eq!(driver.slot.counts().refused, 1);
    // A paused guest is told when it goes on; the same target again is no news.
    devices.pause();
    driver.slot.balloon(Some(PageCount(7))).unwrap();
    assert_eq!(driver.interrupt_within(20), None);
    devices.resume();
    assert_eq!(driver.interrupt().unwrap() & 2, 2);
    assert_eq!(wanted(&driver), 7);
    // Another driver begins with an empty balloon, and the same target.
    driver.write(0x104, 5);
    driver.bring_up(ALL);
    assert_eq!((counts(&driver).target, counts(&driver).actual), (Bytes(7 * PAGE), Bytes(0)));
}

/// A clock that stands still until it is turned.
#[derive(Debug, Default)]
struct Turned(AtomicU64);

impl Clock for Turned {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos(0)
    }
}

#[test]
fn statistics_are_asked_for_at_most_once_a_second_and_only_for_somebody() {
    let (_, ram) = shared(4);
    let clock = Arc::new(Turned::default());
    let slot = VirtioSlot::with_clock(Slot::BALLOON, Backend::Balloon, &ram, clock.clone());
    let slot = Arc::new(slot.unwrap());
    let mut driver = Driver::up(&ram, slot.clone(), ALL);
    let say = |driver: &mut Driver, free: u64| {
        let entries = [(4_u16, free), (5, 4 * MIB), (1234, 1)];
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        let at = driver.allocate(bytes.len() as u64);
        driver.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        driver.queues[2].add(&[(at, u32::try_from(bytes.len()).unwrap())], &[]);
        driver.slot.step();
    };
    let free = |driver: &Driver| counts(driver).guest.map(|(stats, _)| (stats.free_bytes, stats.total_bytes));
    say(&mut driver, 100);
    assert_eq!(driver.queues[2].take_used(), None, "nobody asked");
    // Asking shows what is there, and has the guest asked.
    assert_eq!(free(&driver), Some((Some(100), Some(4 * MIB))));
    slot.step();
    assert!(driver.queues[2].take_used().is_some());
    say(&mut driver, 200);
    for _ in 0..3 {
        assert_eq!(free(&driver), Some((Some(200), Some(4 * MIB))));
        slot.step();
        assert_eq!(driver.queues[2].take_used(), None, "within the same second");
    }
    clock.0.store(1_000_000_000, Ordering::SeqCst);
    let (stats, age) = counts(&driver).guest.unwrap();
    assert_eq!((stats.swap_in_bytes, age), (None, std::time::Duration::from_secs(1)));
    slot.step();
    assert!(driver.queues[2].take_used().is_some());
}
