//! A store beside bytes in memory that are treated the same way.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Act {
    Write { place: usize, length: usize, byte: u8 },
    Zero { place: usize, length: usize, keeps_space: bool },
    Discard { place: usize, length: usize },
    Flush,
    Snapshot,
    Clone { of_snapshot: bool, grow: u64 },
    Resize { blocks: u64 },
    Reopen,
    RemoveSnapshot,
    Switch,
}

fn acts() -> impl Strategy<Value = Act> {
    let place = 0_usize..1 << 20;
    let length = prop_oneof![1_usize..40, 4000_usize..5000, 60_000_usize..300_000];
    prop_oneof![
        8 => (place.clone(), length.clone(), 1_u8..).prop_map(|(place, length, byte)| Act::Write { place, length, byte }),
        3 => (place.clone(), length.clone(), any::<bool>())
            .prop_map(|(place, length, keeps_space)| Act::Zero { place, length, keeps_space }),
        3 => (place, length).prop_map(|(place, length)| Act::Discard { place, length }),
        1 => Just(Act::Flush),
        2 => Just(Act::Snapshot),
        1 => (any::<bool>(), 0_u64..3).prop_map(|(of_snapshot, grow)| Act::Clone { of_snapshot, grow }),
        1 => (0_u64..40).prop_map(|blocks| Act::Resize { blocks }),
        2 => Just(Act::Reopen),
        1 => Just(Act::RemoveSnapshot),
        2 => Just(Act::Switch),
    ]
}

struct Both {
    dir: tempfile::TempDir,
    store: Option<Store>,
    volumes: BTreeMap<u8, Vec<u8>>,
    snapshots: BTreeMap<u8, (u8, u32, Vec<u8>)>,
    at: u8,
    next: u8,
}

impl Both {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = 5 * CHUNK_BYTES + 4096;
        let mut both = Self {
            store: None,
            volumes: BTreeMap::from([(0, vec![0; usize::try_from(size).unwrap()])]),
            snapshots: BTreeMap::new(),
            dir,
            at: 0,
            next: 1,
        };
        both.open();
        made(both.store(), 0, size);
        both
    }

    fn open(&mut self) {
        // The lock of the one that is open ends first.
        self.store = None;
        let options = Options { compact_bytes: 256, ..Options::new("boot-1") };
        self.store = Some(Store::open(self.dir.path(), &options).unwrap());
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn volume(&self) -> Arc<Volume> {
        self.store().volume(&volume_id(self.at)).unwrap()
    }

    fn range(&self, place: usize, length: usize) -> std::ops::Range<usize> {
        let size = self.volumes[&self.at].len();
        let start = place % size;
        start..(start + length).min(size)
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Write { place, length, byte } => {
                let range = self.range(place, length);
                let bytes = vec![byte; range.len()];
                self.volume().write_at(&bytes, range.start as u64).unwrap();
                self.volumes.get_mut(&self.at).unwrap()[range].copy_from_slice(&bytes);
            }
            Act::Zero { place, length, keeps_space } => {
                let range = self.range(place, length);
                self.volume().zero(range.start as u64, range.len() as u64, keeps_space).unwrap();
                self.volumes.get_mut(&self.at).unwrap()[range].fill(0);
            }
            Act::Discard { place, length } => {
                let range = self.range(place, length);
                self.volume().discard(range.start as u64, range.len() as u64).unwrap();
                // Each byte is zero or as it was; whole chunks are zero.
                let mut after = vec![0; range.len()];
                self.volume().read_at(&mut after, range.start as u64).unwrap();
                let chunk = usize::try_from(CHUNK_BYTES).unwrap();
                let whole = range.start.next_multiple_of(chunk)..range.end / chunk * chunk;
                let bytes = self.volumes.get_mut(&self.at).unwrap();
                for (place, byte) in range.zip(after) {
                    assert!(byte == 0 || (byte == bytes[place] && !whole.contains(&place)), "{place}");
                    bytes[place] = byte;
                }
            }
            Act::Flush => self.volume().flush().unwrap(),
            Act::Snapshot => {
                let number = self.number();
                let info =
                    self.store().take_snapshot(&volume_id(self.at), &format!("s{number}"), 1, &snapshot_id(number));
                let generation = info.unwrap().generation;
                self.snapshots.insert(number, (self.at, generation, self.volumes[&self.at].clone()));
            }
            Act::Clone { of_snapshot, grow } => self.clone_one(of_snapshot, grow),
            Act::Resize { blocks } => {
                let bytes = self.volumes[&self.at].len() as u64 + blocks * 4096;
                self.store().resize(&volume_id(self.at), bytes).unwrap();
                self.volumes.get_mut(&self.at).unwrap().resize(usize::try_from(bytes).unwrap(), 0);
            }
            Act::Reopen => self.open(),
            Act::RemoveSnapshot => {
                if let Some((number, _)) = self.snapshots.pop_first() {
                    self.store().remove_snapshot(&snapshot_id(number)).unwrap();
                }
            }
            Act::Switch => {
                let next = self.volumes.range(self.at + 1..).next().or(self.volumes.first_key_value());
                self.at = *next.unwrap().0;
            }
        }
    }

    fn number(&mut self) -> u8 {
        self.next += 1;
        self.next - 1
    }

    fn clone_one(&mut self, of_snapshot: bool, grow: u64) {
        let number = self.number();
        let snapshot = self.snapshots.first_key_value().filter(|_| of_snapshot);
        let (origin, mut bytes) = match snapshot {
            Some((number, (.., bytes))) => (Origin::Snapshot(snapshot_id(*number)), bytes.clone()),
            None => (Origin::Volume(volume_id(self.at)), self.volumes[&self.at].clone()),
        };
        let size = bytes.len() as u64 + grow * 12288;
        let spec = spec(&format!("v{number}"), size);
        let info = self.store().clone_of(&origin, &spec, &volume_id(number)).unwrap();
        assert_eq!(info.parent, Some(origin));
        bytes.resize(usize::try_from(size).unwrap(), 0);
        self.volumes.insert(number, bytes);
    }

    fn compare(&self) {
        for (number, bytes) in &self.volumes {
            let volume = self.store().volume(&volume_id(*number)).unwrap();
            assert!(volume.damage().is_empty());
            assert!(content(&volume) == *bytes, "volume {number}");
            let digest = volume.digest(&mut go_on).unwrap();
            assert_eq!(&digest, blake3::hash(bytes).as_bytes());
            for run in volume.status(0, bytes.len() as u64, usize::MAX).unwrap() {
                let range = usize::try_from(run.offset).unwrap()..usize::try_from(run.offset + run.length).unwrap();
                assert!(run.is_data || bytes[range].iter().all(|byte| *byte == 0), "{run:?}");
            }
        }
        for (number, (of, generation, bytes)) in &self.snapshots {
            let snapshot = self.store().snapshot(&snapshot_id(*number)).unwrap();
            assert!(content_of(&snapshot) == *bytes, "snapshot {number}");
            let changed = self.store().volume(&volume_id(*of)).unwrap().changed_since(*generation);
            assert!(changed.complete);
            assert_covers(&changed, bytes, &self.volumes[of]);
        }
    }
}

/// What differs is in a chunk that is said to be changed.
pub(super) fn assert_covers(changed: &Changed, before: &[u8], now: &[u8]) {
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    for (number, now) in (0_u32..).zip(now.chunks(chunk)) {
        let start = usize::try_from(number).unwrap() * chunk;
        let mut before = before.get(start..(start + chunk).min(before.len())).unwrap_or_default().to_vec();
        before.resize(now.len(), 0);
        let is_told = changed.chunks.iter().any(|run| run.contains(&number));
        assert!(is_told || before == now, "chunk {number} is not in {changed:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn a_store_does_what_bytes_in_memory_do(acts in prop::collection::vec(acts(), 1..60)) {
        let mut both = Both::new();
        for act in &acts {
            both.act(act);
        }
        both.compare();
        both.open();
        both.compare();
    }
}
