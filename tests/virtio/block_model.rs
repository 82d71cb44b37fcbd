//! Many requests of every kind under way at once, against a model of the disk: a guest that chooses at random, by a seed.
//! Requests that are under way together do not touch the same sectors, except to read them: what such a guest would read
//! nobody promises.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hearth::machine::virtio::DeviceLoop;
use vm_memory::{Bytes, GuestAddress};

use crate::block::{By, by_each, device};
use crate::driver::{Driver, EVENT_IDX, INDIRECT, VERSION_1, ram, run};

/// Discard and write zeroes, flush.
const FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT | 1 << 14 | 1 << 13 | 1 << 9;

const SECTORS: u64 = 8192;
const SECTOR: u64 = 512;

/// Most requests under way.
const PLACES: usize = 48;

/// Largest request: above what the device loop copies by itself.
const SECTORS_MAX: u64 = 512;

const REQUESTS: usize = 1000;

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zeroes,
}

/// Where one request has its memory, and what is under way there.
struct Place {
    header: u64,
    table: u64,
    status: u64,
    data: u64,
    under_way: Option<(u16, Kind, u64, u64)>,
}

struct Guest {
    dice: Dice,
    file: File,
    model: Vec<u8>,
    driver: Driver,
    devices: DeviceLoop,
    places: Vec<Place>,
}

impl Guest {
    fn up(by: By, seed: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * SECTOR).unwrap();
        let ram = ram(48);
        let slot = device(&ram, &file, by, false);
        let devices = run(&[&slot]);
        let mut driver = Driver::up(&ram, slot, FEATURES);
        let place = |driver: &mut Driver| {
            let [header, table, status, data] =
                [16, 16 * 16, 1, SECTORS_MAX * SECTOR].map(|bytes| driver.allocate(bytes));
            Place { header, table, status, data, under_way: None }
        };
        let places = (0..PLACES).map(|_| place(&mut driver)).collect();
        let model = vec![0; usize::try_from(SECTORS * SECTOR).unwrap()];
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self { dice, file, model, driver, devices, places }
    }

    fn of_model(&mut self, sector: u64, sectors: u64) -> &mut [u8] {
        let [from, to] = [sector, sector + sectors].map(|at| usize::try_from(at * SECTOR).unwrap());
        &mut self.model[from..to]
    }

    /// A request that touches nothing that is under way; `None` if the dice do not find one.
    fn choose(&mut self) -> Option<(Kind, u64, u64)> {
        let kinds = [Kind::Read, Kind::Read, Kind::Write, Kind::Write, Kind::Flush, Kind::Discard, Kind::Zeroes];
        let kind = kinds[usize::try_from(self.dice.below(7)).unwrap()];
        let most = if self.dice.below(8) == 0 { SECTORS_MAX } else { 24 };
        let sectors = if kind == Kind::Flush { 0 } else { 1 + self.dice.below(most) };
        let sector = self.dice.below(SECTORS - sectors);
        let meets = self.places.iter().filter_map(|place| place.under_way).any(|(_, other, at, count)| {
            let apart = sector + sectors <= at || at + count <= sector;
            let only_read = kind == Kind::Read && other == Kind::Read;
            !(apart || only_read)
        });
        (!meets).then_some((kind, sector, sectors))
    }

    /// The data buffer in pieces that need not be sectors.
    fn pieces(&mut self, data: u64, bytes: u64) -> Vec<(u64, u32)> {
        let (mut pieces, mut at) = (Vec::new(), 0);
        while at < bytes {
            let cut = if pieces.len() < 5 { 1 + self.dice.below(bytes - at) } else { bytes - at };
            pieces.push((data + at, u32::try_from(cut).unwrap()));
            at += cut;
        }
        pieces
    }

    fn begin(&mut self, place: usize, (kind, sector, sectors): (Kind, u64, u64)) {
        let Place { header, table, status, data, .. } = self.places[place];
        let (number, at) = match kind {
            Kind::Read => (0_u32, sector),
            Kind::Write => (1, sector),
            Kind::Flush => (4, 0),
            Kind::Discard => (11, 0),
            Kind::Zeroes => (13, 0),
        };
        let ram = self.driver.ram.clone();
        ram.write_obj(number, GuestAddress(header)).unwrap();
        ram.write_obj(at, GuestAddress(header + 8)).unwrap();
        ram.write_obj(0xee_u8, GuestAddress(status)).unwrap();
        let bytes = sectors * SECTOR;
        let (from, to) = match kind {
            Kind::Read => (Vec::new(), self.pieces(data, bytes)),
            Kind::Write => {
                let seed = self.dice.below(251);
                let written: Vec<u8> = (0..bytes).map(|at| u8::try_from((at / 7 + seed) % 251).unwrap()).collect();
                ram.write_slice(&written, GuestAddress(data)).unwrap();
                self.of_model(sector, sectors).copy_from_slice(&written);
                (self.pieces(data, bytes), Vec::new())
            }
            Kind::Flush => (Vec::new(), Vec::new()),
            Kind::Discard | Kind::Zeroes => {
                let unmap = u32::from(kind == Kind::Zeroes && self.dice.below(2) == 0);
                let count = u32::try_from(sectors).unwrap();
                let range = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &unmap.to_le_bytes()].concat();
                ram.write_slice(&range, GuestAddress(data)).unwrap();
                self.of_model(sector, sectors).fill(0);
                (vec![(data, 16)], Vec::new())
            }
        };
        let (readable, writable) = ([&[(header, 16)][..], &from].concat(), [&to[..], &[(status, 1)]].concat());
        let head = self.driver.queues[0].add_indirect(table, &readable, &writable);
        self.places[place].under_way = Some((head, kind, sector, sectors));
    }

    /// Looks at what a request came to.
    fn end(&mut self, head: u16) {
        let place = self.places.iter().position(|place| place.under_way.is_some_and(|(of, ..)| of == head)).unwrap();
        let (_, kind, sector, sectors) = self.places[place].under_way.take().unwrap();
        let (status, data) = (self.places[place].status, self.places[place].data);
        let answer: u8 = self.driver.ram.read_obj(GuestAddress(status)).unwrap();
        assert_eq!(answer, 0, "{kind:?} {sector} {sectors}");
        if kind == Kind::Read {
            let mut read = vec![0; usize::try_from(sectors * SECTOR).unwrap()];
            self.driver.ram.read_slice(&mut read, GuestAddress(data)).unwrap();
            assert!(read == self.of_model(sector, sectors), "{sectors} sectors from {sector} are not what was written");
        }
    }

    fn under_way(&self) -> usize {
        self.places.iter().filter(|place| place.under_way.is_some()).count()
    }

    /// After it everything that the device was told of has come to an end, and nothing is written any more.
    fn pause(&mut self) {
        self.devices.pause();
        while let Some((head, _)) = self.driver.queues[0].take_used() {
            self.end(head);
        }
        let mut on_disk = vec![0; self.model.len()];
        self.file.read_exact_at(&mut on_disk, 0).unwrap();
        if self.under_way() == 0 {
            assert!(on_disk == self.model, "the file is not what the guest made of it");
        }
        self.devices.resume();
    }

    fn live(mut self) {
        for _ in 0..REQUESTS {
            let most = [1, 4, PLACES][usize::try_from(self.dice.below(3)).unwrap()];
            while self.under_way() >= most {
                self.driver.kick(0);
                let (head, _) = self.driver.wait_used(0);
                self.end(head);
            }
            let free = self.places.iter().position(|place| place.under_way.is_none()).unwrap();
            if let Some(request) = self.choose() {
                self.begin(free, request);
            }
            if self.dice.below(3) == 0 {
                self.driver.kick(0);
            }
            if self.dice.below(64) == 0 {
                self.pause();
            }
            while self.under_way() > 0 && self.dice.below(64) == 0 {
                self.driver.kick(0);
                let (head, _) = self.driver.wait_used(0);
                self.end(head);
            }
        }
        self.driver.kick(0);
        while self.under_way() > 0 {
            let (head, _) = self.driver.wait_used(0);
            self.end(head);
        }
        self.pause();
        assert_eq!(self.driver.slot.counts().failed, 0);
    }
}

#[test]
fn many_requests_under_way_do_what_a_model_says() {
    by_each(|by| {
        for seed in 1..=4 {
            println!("{by:?}, seed {seed}");
            Guest::up(by, seed).live();
        }
    });
}
