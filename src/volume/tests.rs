//! Tests of this floor as a whole: against a model in memory, by many threads, with damage, and after losses of power at
//! any moment.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::ids::{VolumeId, VolumeSnapshotId};

mod crash;
mod damage;
mod limits;
mod model;
mod replayed;
mod tape;
mod threads;

fn volume_id(number: u8) -> VolumeId {
    VolumeId::from_random([number; 10])
}

fn snapshot_id(number: u8) -> VolumeSnapshotId {
    VolumeSnapshotId::from_random([number; 10])
}

fn spec(name: &str, size_bytes: u64) -> CreateSpec {
    CreateSpec { name: name.to_owned(), size_bytes, created_ms: 7 }
}

fn open(root: &Path) -> Store {
    Store::open(root, &Options::new("boot-1")).unwrap()
}

fn open_in_boot(root: &Path, boot: &str) -> Store {
    Store::open(root, &Options::new(boot)).unwrap()
}

fn made(store: &Store, number: u8, size_bytes: u64) -> Arc<Volume> {
    store.create(&spec(&format!("v{number}"), size_bytes), &volume_id(number)).unwrap();
    store.volume(&volume_id(number)).unwrap()
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(volume.size_bytes()).unwrap()];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn content_of(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(snapshot.size_bytes()).unwrap()];
    snapshot.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Numbers that are the same for the same seed (splitmix64).
#[derive(Debug, Clone)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
