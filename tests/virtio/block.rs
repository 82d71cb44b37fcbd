//! The block device on a temporary file, by io_uring and by a thread.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, DeviceLoop, VirtioSlot};
use hearth::sys::uring::Ring;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::driver::{Driver, EVENT_IDX, INDIRECT, VERSION_1, ram, run};

const DISCARD: u64 = 1 << 13;
const FLUSH: u64 = 1 << 9;
const READ_ONLY: u64 = 1 << 5;
const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT | DISCARD | FLUSH | 1 << 14 | 1 << 2 | 1 << 6 | READ_ONLY;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Who carries the requests out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Uring,
    Thread,
}

/// A ring for a disk, where the host has io_uring.
pub(crate) fn ring() -> Option<Ring> {
    Ring::make(1).inspect_err(|error| println!("not tested by io_uring: {error}")).ok()?.pop()
}

/// A test that holds whoever carries the requests out; by a thread only where the host has no io_uring.
pub(crate) fn by_each(test: impl Fn(By)) {
    test(By::Thread);
    if ring().is_some() {
        test(By::Uring);
    }
}

pub(crate) fn device(ram: &GuestRam, file: &File, by: By, read_only: bool) -> Arc<VirtioSlot> {
    let ring = if by == By::Uring { ring() } else { None };
    let backend = Backend::Block { file: file.try_clone().unwrap(), read_only, ring };
    Arc::new(VirtioSlot::new(Slot::block(0).unwrap(), backend, ram).unwrap())
}

/// A disk of 1 MiB whose sectors hold their number, and a guest with its driver.
struct Guest {
    file: File,
    driver: Driver,
    devices: DeviceLoop,
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

const SECTORS: u64 = 2048;

pub(crate) fn disk() -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all_at(&[u8::try_from(sector % 251).unwrap() + 1; 512], sector * 512).unwrap();
    }
    file
}

impl Guest {
    fn up(by: By, read_only: bool) -> Self {
        let file = disk();
        let ram = ram(16);
        let slot = device(&ram, &file, by, read_only);
        let devices = run(&[&slot]);
        let mut driver = Driver::up(&ram, slot, ALL);
        let [header, data, status, table] = [16, 2 << 20, 16, 16 * 256].map(|bytes| driver.allocate(bytes));
        Self { file, driver, devices, header, data, status, table }
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.driver.ram.write_obj(kind, GuestAddress(self.header)).unwrap();
        self.driver.ram.write_obj(sector, GuestAddress(self.header + 8)).unwrap();
        self.driver.ram.write_obj(0xee_u8, GuestAddress(self.status)).unwrap();
    }

    /// One request; its status byte.
    fn ask(&mut self, kind: u32, sector: u64, from: &[(u64, u32)], to: &[(u64, u32)]) -> u8 {
        self.put_header(kind, sector);
        let readable = [&[(self.header, 16)], from].concat();
        let writable = [to, &[(self.status, 1)]].concat();
        if readable.len() + writable.len() > 3 {
            self.driver.queues[0].add_indirect(self.table, &readable, &writable);
        } else {
            self.driver.queues[0].add(&readable, &writable);
        }
        self.driver.kick(0);
        self.driver.wait_used(0);
        self.driver.ram.read_obj(GuestAddress(self.status)).unwrap()
    }

    fn data(&self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.driver.ram.read_slice(&mut data, GuestAddress(self.data)).unwrap();
        data
    }

    fn put_range(&mut self, sector: u64, sectors: u32, flags: u32) -> (u64, u32) {
        let bytes = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.driver.ram.write_slice(&bytes, GuestAddress(self.data)).unwrap();
        (self.data, 16)
    }

    fn on_disk(&self, sector: u64) -> u8 {
        let mut bytes = [0; 512];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }
}

#[test]
fn tells_its_size_and_limits() {
    by_each(|by| {
        let guest = Guest::up(by, false);
        let mut config = [0; 60];
        guest.driver.config(0, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (2048, 0));
        assert_eq!((word(12), word(20)), (62, 512));
        assert_eq!((word(48), word(52), config[56]), (1 << 15, 1, 1));
        assert_eq!(guest.driver.accepted & READ_ONLY, 0);
    });
}

#[test]
fn reads_and_writes_in_pieces() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        let data = guest.data;
        assert_eq!(guest.ask(IN, 5, &[], &[(data, 512)]), OK);
        assert_eq!(guest.data(512), [6; 512]);
        // Pieces need not be sectors; only their sum.
        let pieces = [(data, 100), (data + 100, 1), (data + 101, 923), (data + 1024, 0)];
        assert_eq!(guest.ask(IN, 10, &[], &pieces), OK);
        assert_eq!(guest.data(1024), [[11; 512], [12; 512]].concat());
        guest.driver.ram.write_slice(&[0x77; 1024], GuestAddress(data)).unwrap();
        assert_eq!(guest.ask(OUT, 2046, &[(data, 1), (data + 1, 1023)], &[]), OK);
        assert_eq!([guest.on_disk(2045), guest.on_disk(2046), guest.on_disk(2047)], [38, 0x77, 0x77]);
        assert_eq!(guest.ask(4, 0, &[], &[]), OK);
        // One MiB at once: the whole disk.
        assert_eq!(guest.ask(IN, 0, &[], &[(data, 1 << 20)]), OK);
        assert_eq!(guest.data(512), [1; 512]);
    });
}

#[test]
fn requests_outside_of_the_disk_fail() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        let data = guest.data;
        for (sector, bytes) in [(2048, 512), (2047, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513)] {
            assert_eq!(guest.ask(IN, sector, &[], &[(data, bytes)]), FAILED, "{sector} {bytes}");
            assert_eq!(guest.ask(OUT, sector, &[(data, bytes)], &[]), FAILED, "{sector} {bytes}");
        }
        assert_eq!(guest.ask(99, 0, &[], &[(data, 512)]), UNSUPPORTED);
        assert_eq!(guest.driver.slot.counts().failed, 13);
        assert_eq!(guest.file.metadata().unwrap().len(), SECTORS * 512);
        // A file that became shorter is an error of the request.
        guest.file.set_len(1000 * 512).unwrap();
        assert_eq!(guest.ask(IN, 999, &[], &[(data, 1024)]), FAILED);
    });
}

#[test]
fn a_request_without_a_header_fails_and_one_without_a_status_breaks_the_ring() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        guest.driver.ram.write_obj(0xee_u8, GuestAddress(guest.status)).unwrap();
        guest.driver.queues[0].add(&[(guest.header, 15)], &[(guest.status, 1)]);
        guest.driver.kick(0);
        guest.driver.wait_used(0);
        assert_eq!(guest.driver.ram.read_obj::<u8>(GuestAddress(guest.status)).unwrap(), FAILED);
        guest.put_header(OUT, 0);
        guest.driver.queues[0].add(&[(guest.header, 16), (guest.data, 512)], &[]);
        guest.driver.kick(0);
        while guest.driver.read(0x070) & 64 == 0 {
            assert!(guest.driver.interrupt().is_some());
        }
        guest.driver.bring_up(ALL);
        assert_eq!(guest.ask(4, 0, &[], &[]), OK);
    });
}

#[test]
fn discards_and_zeroes() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        let before = guest.file.metadata().unwrap().blocks();
        let range = guest.put_range(0, 1024, 0);
        assert_eq!(guest.ask(11, 0, &[range], &[]), OK);
        assert_eq!([guest.on_disk(0), guest.on_disk(1023), guest.on_disk(1024)], [0, 0, 21]);
        assert!(guest.file.metadata().unwrap().blocks() <= before - 1000, "no space was given back");
        for (at, flags) in [(1100, 0), (1200, 1)] {
            let range = guest.put_range(at, 10, flags);
            assert_eq!(guest.ask(13, 0, &[range], &[]), OK);
            let around = [at - 1, at, at + 9, at + 10].map(|sector| guest.on_disk(sector) == 0);
            assert_eq!(around, [false, true, true, false]);
        }
        assert_eq!(guest.file.metadata().unwrap().len(), SECTORS * 512);
        for (kind, sector, sectors, flags, answer) in [
            (11, 2040, 9, 0, FAILED),
            (11, u64::MAX, 1, 0, FAILED),
            (11, 0, 1, 1, UNSUPPORTED),
            (13, 0, u32::MAX, 0, FAILED),
            (13, 0, 1, 2, UNSUPPORTED),
        ] {
            let range = guest.put_range(sector, sectors, flags);
            assert_eq!(guest.ask(kind, 0, &[range], &[]), answer, "{kind} {sector} {sectors} {flags}");
        }
        assert_eq!(guest.ask(11, 0, &[(guest.data, 15)], &[]), FAILED);
        assert_eq!(guest.ask(11, 0, &[(guest.data, 17 * 16)], &[]), FAILED);
    });
}

#[test]
fn tells_its_id() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        assert_eq!(guest.ask(8, 0, &[], &[(guest.data, 20)]), OK);
        assert_eq!(&guest.data(20), b"disk-3\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(guest.ask(8, 0, &[], &[(guest.data, 19)]), FAILED);
    });
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    by_each(|by| {
        let mut guest = Guest::up(by, true);
        assert_eq!(guest.driver.accepted & (READ_ONLY | DISCARD), READ_ONLY);
        assert_eq!(guest.ask(OUT, 0, &[(guest.data, 512)], &[]), FAILED);
        let range = guest.put_range(0, 8, 0);
        assert_eq!(guest.ask(11, 0, &[range], &[]), FAILED);
        assert_eq!(guest.ask(13, 0, &[range], &[]), FAILED);
        assert_eq!(guest.ask(IN, 0, &[], &[(guest.data, 512)]), OK);
        assert_eq!(guest.on_disk(0), 1);
    });
}

/// Requests handed over before a pause are finished by it, and nothing is written after it.
#[test]
fn a_pause_finishes_what_was_begun() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        for round in 0..20_u64 {
            let mut heads = Vec::new();
            for at in 0..16_u64 {
                let (header, data, status) =
                    (guest.driver.allocate(16), guest.driver.allocate(4096), guest.driver.allocate(1));
                guest.driver.ram.write_obj(IN, GuestAddress(header)).unwrap();
                guest.driver.ram.write_obj(round * 16 + at, GuestAddress(header + 8)).unwrap();
                guest.driver.ram.write_obj(0xee_u8, GuestAddress(status)).unwrap();
                let head = guest.driver.queues[0].add(&[(header, 16)], &[(data, 4096), (status, 1)]);
                heads.push((head, status));
                guest.driver.kick(0);
            }
            guest.devices.pause();
            let statuses = |guest: &Guest| -> Vec<u8> {
                heads.iter().map(|(_, at)| guest.driver.ram.read_obj(GuestAddress(*at)).unwrap()).collect()
            };
            let before = statuses(&guest);
            let mut used = 0;
            while guest.driver.queues[0].take_used().is_some() {
                used += 1;
            }
            assert_eq!(before.iter().filter(|status| **status == OK).count(), used);
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(statuses(&guest), before);
            guest.devices.resume();
            while used < 16 {
                guest.driver.wait_used(0);
                used += 1;
            }
            assert_eq!(statuses(&guest), [OK; 16]);
        }
    });
}

/// The kernel writes to guest memory without the bitmap; what was read is marked by whoever had it read, and nothing else.
#[test]
fn what_is_read_is_marked_for_whoever_copies_memory() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        let start = guest.data.next_multiple_of(4096) + 4096;
        for bytes in [4096, 512 << 10] {
            guest.driver.ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
            assert_eq!(guest.ask(IN, 0, &[], &[(start, bytes)]), OK);
            let is_dirty = |at: u64| {
                let (region, at) = guest.driver.ram.to_region_addr(GuestAddress(at)).unwrap();
                region.bitmap().dirty_at(usize::try_from(at.raw_value()).unwrap())
            };
            let end = start + u64::from(bytes);
            assert!((start..end).step_by(4096).all(is_dirty), "{bytes}");
            assert!(![start - 1, end].into_iter().any(is_dirty), "{bytes}");
        }
    });
}

/// After a reset nothing is written to what was the driver's memory.
#[test]
fn a_reset_finishes_what_was_begun() {
    by_each(|by| {
        let mut guest = Guest::up(by, false);
        for round in 0..20 {
            let data = guest.driver.allocate(16 << 12);
            for at in 0..16 {
                let (header, status) = (guest.driver.allocate(16), guest.driver.allocate(1));
                guest.driver.ram.write_obj(IN, GuestAddress(header)).unwrap();
                guest.driver.ram.write_obj(at * 8, GuestAddress(header + 8)).unwrap();
                guest.driver.queues[0].add(&[(header, 16)], &[(data + (at << 12), 4096), (status, 1)]);
                guest.driver.kick(0);
            }
            guest.driver.write(0x070, 0);
            guest.driver.ram.write_slice(&[0xee; 16 << 12], GuestAddress(data)).unwrap();
            guest.driver.bring_up(ALL);
            assert_eq!(guest.ask(4, 0, &[], &[]), OK);
            let mut now = vec![0; 16 << 12];
            guest.driver.ram.read_slice(&mut now, GuestAddress(data)).unwrap();
            assert!(now.iter().all(|byte| *byte == 0xee), "round {round}");
        }
    });
}
