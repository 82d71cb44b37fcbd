//! Work that is cut off at any moment. Each block that is written says whose it is and when it was written, so whatever is
//! found afterwards can be judged: it is what was flushed last, or something later, and never anything else.

use std::collections::{BTreeMap, BTreeSet};

use super::model::assert_covers;
use super::replayed::{Kept, Replayed};
use super::tape::Tape;
use super::*;

const BLOCK: u64 = 4096;

/// Moments are lengths of the tape.
#[derive(Debug, Clone, Copy)]
struct When {
    begun: usize,
    ended: usize,
}

/// What happened to a block: it got the value of this number, 0 is zero.
#[derive(Debug, Clone, Copy)]
struct Event {
    when: When,
    value: u64,
}

#[derive(Debug, Default)]
struct Told {
    made: Option<When>,
    removed: Option<When>,
    sizes: Vec<(When, u64)>,
    blocks: BTreeMap<u64, Vec<Event>>,
    flushes: Vec<When>,
}

#[derive(Debug)]
struct ToldSnapshot {
    when: When,
    of: u8,
    generation: u32,
    values: Vec<u64>,
}

/// Does some work, and knows what it did.
struct Work {
    store: Store,
    tape: Arc<Tape>,
    numbers: Numbers,
    volumes: BTreeMap<u8, Told>,
    snapshots: BTreeMap<u8, ToldSnapshot>,
    next_value: u64,
    next_id: u8,
}

fn filled(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(512)
}

impl Told {
    /// The value of a block after all that was done.
    fn now(&self, block: u64) -> u64 {
        self.blocks.get(&block).and_then(|events| events.last()).map_or(0, |event| event.value)
    }

    fn size(&self) -> u64 {
        self.sizes.last().unwrap().1
    }

    /// What a block may hold after a crash at this moment: what was flushed last, or what came after that.
    fn allowed(&self, block: u64, cut: usize, survives_kill: bool) -> Vec<u64> {
        let flushed = self.flushes.iter().rev().find(|flush| flush.ended <= cut).map_or(0, |flush| flush.begun);
        // The process was killed, and the host was not: what was acknowledged is there.
        let from = if survives_kill { cut } else { flushed };
        let events = self.blocks.get(&block).map_or(&[][..], Vec::as_slice);
        let before = events.iter().rev().find(|event| event.when.ended <= from).map_or(0, |event| event.value);
        let later = events.iter().filter(|event| event.when.ended > from && event.when.begun < cut);
        std::iter::once(before).chain(later.map(|event| event.value)).collect()
    }
}

impl Work {
    fn new(root: &Path, seed: u64) -> Self {
        let tape = Arc::new(Tape::default());
        let recorder: Arc<dyn Recorder> = Arc::clone(&tape) as _;
        let options = Options { recorder: Some(recorder), compact_bytes: 600, ..Options::new("boot-1") };
        let store = Store::open(root, &options).unwrap();
        let mut work = Self {
            store,
            tape,
            numbers: Numbers(seed),
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            next_value: 1,
            next_id: 3,
        };
        for number in 1..3 {
            let size = 9 * CHUNK_BYTES + 3 * BLOCK;
            let when = work.timed(|store| drop(made(store, number, size)));
            let told = Told { made: Some(when), sizes: vec![(when, size)], ..Told::default() };
            work.volumes.insert(number, told);
        }
        work
    }

    fn timed(&self, act: impl FnOnce(&Store)) -> When {
        let begun = self.tape.length();
        act(&self.store);
        When { begun, ended: self.tape.length() }
    }

    fn pick(&mut self) -> u8 {
        let there: Vec<u8> =
            self.volumes.iter().filter(|(_, told)| told.removed.is_none()).map(|(number, _)| *number).collect();
        there[usize::try_from(self.numbers.below(there.len() as u64)).unwrap()]
    }

    fn blocks(&mut self, number: u8) -> std::ops::Range<u64> {
        let blocks = self.volumes[&number].size() / BLOCK;
        let first = self.numbers.below(blocks);
        let most = [1, 3, 20, 40][usize::try_from(self.numbers.below(4)).unwrap()];
        first..(first + 1 + self.numbers.below(most)).min(blocks)
    }

    fn set(&mut self, number: u8, when: When, values: impl IntoIterator<Item = (u64, u64)>) {
        let told = self.volumes.get_mut(&number).unwrap();
        for (block, value) in values {
            told.blocks.entry(block).or_default().push(Event { when, value });
        }
    }

    fn act(&mut self) {
        let number = self.pick();
        match self.numbers.below(100) {
            0..60 => self.write(number),
            60..78 => {
                let when = self.timed(|store| store.volume(&volume_id(number)).unwrap().flush().unwrap());
                self.volumes.get_mut(&number).unwrap().flushes.push(when);
            }
            78..90 => self.zero(number),
            90..95 => self.take_snapshot(number),
            95..97 => self.clone_one(number),
            97..99 => {
                let size = self.volumes[&number].size() + BLOCK * (1 + self.numbers.below(30));
                let when = self.timed(|store| drop(store.resize(&volume_id(number), size).unwrap()));
                self.volumes.get_mut(&number).unwrap().sizes.push((when, size));
            }
            _ if number > 2 => {
                let when = self.timed(|store| store.remove(&volume_id(number)).unwrap());
                self.volumes.get_mut(&number).unwrap().removed = Some(when);
            }
            _ => {}
        }
    }

    fn write(&mut self, number: u8) {
        let blocks = self.blocks(number);
        let values: Vec<u64> = blocks.clone().map(|_| self.value(number)).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| filled(*value)).collect();
        let offset = blocks.start * BLOCK;
        let when = self.timed(|store| store.volume(&volume_id(number)).unwrap().write_at(&bytes, offset).unwrap());
        self.set(number, when, blocks.zip(values));
    }

    fn value(&mut self, number: u8) -> u64 {
        self.next_value += 1;
        self.next_value << 8 | u64::from(number)
    }

    fn zero(&mut self, number: u8) {
        let blocks = self.blocks(number);
        let (offset, length) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        let how = self.numbers.below(3);
        let when = self.timed(|store| {
            let volume = store.volume(&volume_id(number)).unwrap();
            match how {
                0 => volume.discard(offset, length).unwrap(),
                1 => volume.zero(offset, length, true).unwrap(),
                _ => volume.zero(offset, length, false).unwrap(),
            }
        });
        // A discard leaves some as they are.
        let volume = self.store.volume(&volume_id(number)).unwrap();
        let mut values = Vec::new();
        for block in blocks {
            let mut bytes = vec![0; 4096];
            volume.read_at(&mut bytes, block * BLOCK).unwrap();
            if bytes.iter().all(|byte| *byte == 0) {
                values.push((block, 0));
            }
        }
        drop(volume);
        self.set(number, when, values);
    }

    fn values(&self, number: u8) -> Vec<u64> {
        let told = &self.volumes[&number];
        (0..told.size() / BLOCK).map(|block| told.now(block)).collect()
    }

    fn take_snapshot(&mut self, of: u8) {
        let (number, values) = (self.next_id, self.values(of));
        self.next_id += 1;
        let mut generation = 0;
        let when = self.timed(|store| {
            let name = format!("s{number}");
            generation = store.take_snapshot(&volume_id(of), &name, 1, &snapshot_id(number)).unwrap().generation;
        });
        self.snapshots.insert(number, ToldSnapshot { when, of, generation, values });
    }

    fn clone_one(&mut self, of: u8) {
        let number = self.next_id;
        self.next_id += 1;
        let snapshot = self.snapshots.iter().next_back().filter(|_| of.is_multiple_of(2));
        let (origin, values) = match snapshot {
            Some((number, told)) => (Origin::Snapshot(snapshot_id(*number)), told.values.clone()),
            None => (Origin::Volume(volume_id(of)), self.values(of)),
        };
        let size = values.len() as u64 * BLOCK;
        let when = self.timed(|store| {
            drop(store.clone_of(&origin, &spec(&format!("v{number}"), size), &volume_id(number)).unwrap());
        });
        let told = Told { made: Some(when), sizes: vec![(when, size)], ..Told::default() };
        self.volumes.insert(number, told);
        // What it begins with was there before it was.
        let before = When { begun: 0, ended: 0 };
        self.set(number, before, (0..).zip(values));
    }

    /// Judges what a store holds that was cut off at this moment.
    fn judge(&self, store: &Store, cut: usize, survives_kill: bool) {
        for (number, told) in &self.volumes {
            let volume = store.volume(&volume_id(*number));
            let made = told.made.unwrap();
            let may_be_gone = told.removed.is_some_and(|when| when.begun < cut);
            assert!(volume.is_some() || made.ended > cut || may_be_gone, "volume {number} is gone");
            assert!(volume.is_none() || made.begun < cut, "volume {number} is not made yet");
            assert!(volume.is_none() || told.removed.is_none_or(|when| when.ended > cut), "{number} was removed");
            let Some(volume) = volume else { continue };
            assert_eq!(volume.damage(), [], "volume {number}");
            let size = volume.size_bytes();
            let done =
                told.sizes.iter().rev().find(|(when, _)| when.ended <= cut).map_or(told.sizes[0].1, |size| size.1);
            assert!(size == done || told.sizes.iter().any(|(when, of)| *of == size && when.begun < cut), "{size}");
            for (block, bytes) in (0_u64..).zip(content(&volume).chunks(4096)) {
                let found = u64::from_le_bytes(*bytes.first_chunk().unwrap());
                assert!(bytes == filled(found), "block {block} of volume {number} is mixed");
                let allowed = told.allowed(block, cut, survives_kill);
                assert!(allowed.contains(&found), "block {block} of {number}: {found:x} is none of {allowed:x?}");
            }
        }
        for (number, told) in &self.snapshots {
            let snapshot = store.snapshot(&snapshot_id(*number));
            assert!(snapshot.is_some() || told.when.ended > cut, "snapshot {number} is gone");
            let Some(snapshot) = snapshot else { continue };
            assert!(told.when.begun < cut && snapshot.info().damage.is_empty());
            let expected: Vec<u8> = told.values.iter().flat_map(|value| filled(*value)).collect();
            assert!(content_of(&snapshot) == expected, "snapshot {number} is another");
            let Some(volume) = store.volume(&volume_id(told.of)) else { continue };
            let changed = volume.changed_since(told.generation);
            assert!(changed.complete || !survives_kill);
            if changed.complete {
                assert_covers(&changed, &expected, &content(&volume));
            }
        }
    }
}

/// What was left can be worked with: parts of chunks are written, and the rest of them stays as it was.
fn go_on_with(store: &Store, numbers: &mut Numbers) {
    for info in store.list().unwrap() {
        let volume = store.volume(&info.id).unwrap();
        let mut expected = content(&volume);
        for _ in 0..4 {
            let at = numbers.below(info.size_bytes - 600);
            volume.write_at(&[0x77; 600], at).unwrap();
            let at = usize::try_from(at).unwrap();
            expected[at..at + 600].fill(0x77);
        }
        volume.flush().unwrap();
        assert!(content(&volume) == expected, "a write changed more than it wrote");
    }
}

fn contents(store: &Store) -> Vec<Vec<u8>> {
    store.list().unwrap().iter().map(|info| content(&store.volume(&info.id).unwrap())).collect()
}

/// Where no disk is waited for, if the host has that and nobody says where: what is lost is what these tests lose.
fn directory() -> tempfile::TempDir {
    if std::env::var_os("TMPDIR").is_some() {
        return tempfile::tempdir().unwrap();
    }
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// One cut, by a loss of power. The seed tells which part of what was not synced is there.
fn lose_power(work: &Work, replayed: &Replayed, cut: usize, seed: u64) {
    let mut numbers = Numbers(seed ^ cut as u64);
    let dir = directory();
    let of_ten = [0, 1, 5, 9, 10][usize::try_from(numbers.below(5)).unwrap()];
    replayed.write_to(dir.path(), &mut || numbers.below(10) < of_ten);
    let store = open_in_boot(dir.path(), "boot-2");
    work.judge(&store, cut, false);
    go_on_with(&store, &mut numbers);
    let before = contents(&store);
    drop(store);
    // It was flushed: another loss of power takes nothing.
    assert!(contents(&open_in_boot(dir.path(), "boot-3")) == before);
}

/// One cut, by the end of the process: the host has all that it did.
fn kill(work: &Work, replayed: &Replayed, cut: usize) {
    let mut numbers = Numbers(cut as u64);
    let dir = directory();
    replayed.write_to(dir.path(), &mut || true);
    let store = open_in_boot(dir.path(), "boot-1");
    work.judge(&store, cut, true);
    go_on_with(&store, &mut numbers);
    let before = contents(&store);
    drop(store);
    assert!(contents(&open_in_boot(dir.path(), "boot-1")) == before);
}

/// Environment variable with another seed for the test below.
const SEED: &str = "HEARTH_VOLUME_SEED";

#[test]
fn whatever_is_lost_what_was_flushed_is_there() {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in [seed, seed + 1000] {
        println!("{SEED}={seed}");
        let dir = directory();
        let work = worked(dir.path(), seed);
        let mut replayed = Replayed::new();
        let tape = work.tape.kept();
        let cuts = cuts(seed, tape.len(), 120);
        for (length, kept) in (1..).zip(&tape) {
            replayed.step(kept);
            if cuts.contains(&length) {
                lose_power(&work, &replayed, length, seed);
                kill(&work, &replayed, length);
            }
        }
    }
}

fn worked(root: &Path, seed: u64) -> Work {
    let mut work = Work::new(root, seed);
    for _ in 0..220 {
        work.act();
    }
    work
}

fn cuts(seed: u64, length: usize, count: usize) -> BTreeSet<usize> {
    let mut numbers = Numbers(seed);
    let mut cuts = BTreeSet::new();
    while cuts.len() < count.min(length / 2) {
        cuts.insert(1 + usize::try_from(numbers.below(length as u64)).unwrap());
    }
    cuts
}

/// Threads that write next to each other, in chunks that are copied up, while others flush and the map is exchanged.
#[test]
fn a_flush_covers_what_other_threads_were_told() {
    const THREADS: u64 = 4;
    let dir = directory();
    let mut work = Work::new(dir.path(), 3);
    for _ in 0..12 {
        work.write(1);
    }
    work.take_snapshot(1);
    let size = work.volumes[&1].size();
    let volume = work.store.volume(&volume_id(1)).unwrap();
    let tape = Arc::clone(&work.tape);
    let told: Vec<_> = std::thread::scope(|scope| {
        let threads = (0..THREADS).map(|thread| {
            let (volume, tape) = (&volume, &tape);
            scope.spawn(move || {
                let mut numbers = Numbers(thread);
                let (mut events, mut flushes) = (Vec::new(), Vec::new());
                for number in 0..150 {
                    let block = numbers.below(size / BLOCK / THREADS) * THREADS + thread;
                    let value = (1 << 40) | number << 16 | thread << 8 | 1;
                    let begun = tape.length();
                    volume.write_at(&filled(value), block * BLOCK).unwrap();
                    events.push((block, Event { when: When { begun, ended: tape.length() }, value }));
                    if numbers.below(8) == 0 {
                        let begun = tape.length();
                        volume.flush().unwrap();
                        flushes.push(When { begun, ended: tape.length() });
                    }
                }
                (events, flushes)
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    drop(volume);
    let told_of = work.volumes.get_mut(&1).unwrap();
    let mut flushes = Vec::new();
    for (events, more) in told {
        flushes.extend(more);
        for (block, event) in events {
            told_of.blocks.entry(block).or_default().push(event);
        }
    }
    // The judge asks for the last one that had ended.
    flushes.sort_by_key(|when| when.ended);
    told_of.flushes.extend(flushes);
    let tape = tape.kept();
    let cuts = cuts(9, tape.len(), 60);
    let mut replayed = Replayed::new();
    for (length, kept) in (1..).zip(&tape) {
        replayed.step(kept);
        if cuts.contains(&length) {
            lose_power(&work, &replayed, length, 9);
            kill(&work, &replayed, length);
        }
    }
}

/// Whether a step is left out.
type LeftOut<'a> = &'a dyn Fn(&Kept) -> bool;

/// The judge is judged: of a store that leaves out some kind of step, it finds that.
#[test]
fn what_is_left_out_is_found() {
    let dir = directory();
    let work = worked(dir.path(), 5);
    let tape = work.tape.kept();
    let mut layers = BTreeSet::new();
    for kept in &tape {
        if let Kept::Create(file, path) | Kept::Open(file, path) = kept
            && path.starts_with("layers")
        {
            layers.insert(*file);
        }
    }
    let leave_out: [(&str, LeftOut<'_>); 3] = [
        (
            "syncs of layers",
            &|kept| matches!(kept, Kept::SyncBegin(file) | Kept::SyncEnd(file) if layers.contains(file)),
        ),
        (
            "syncs of maps",
            &|kept| matches!(kept, Kept::SyncBegin(file) | Kept::SyncEnd(file) if !layers.contains(file)),
        ),
        ("syncs of directories", &|kept| matches!(kept, Kept::SyncDirectory(_))),
    ];
    let cuts = cuts(5, tape.len(), 60);
    for (what, is_left_out) in leave_out {
        let mut replayed = Replayed::new();
        let found = (1..).zip(&tape).any(|(length, kept)| {
            if !is_left_out(kept) {
                replayed.step(kept);
            }
            let judged = || lose_power(&work, &replayed, length, 5);
            cuts.contains(&length) && std::panic::catch_unwind(std::panic::AssertUnwindSafe(judged)).is_err()
        });
        assert!(found, "{what} are left out, and nothing is lost");
    }
}
