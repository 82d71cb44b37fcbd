//! Tests of `bundle::launch`.

use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;
use crate::bundle::Compaction;
use crate::bundle::samples::{self, Rig, content, names};
use crate::clock::UnixNanos;
use crate::units::MIB;

fn refused(store: &Store, id: &BundleId) -> (BundleId, Damage) {
    match store.open_for_launch(id) {
        Err(OpenBundleError::Read(ReadBundleError::Damaged { bundle, damage })) => (bundle, damage),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_committed_is_what_is_launched() {
    let rig = Rig::new(4 * MIB);
    let id = rig.full("one", &[(5, b"five"), (3 * MIB, b"late")]).id;
    for store in [rig.store.clone(), rig.restarted()] {
        let files = store.open_for_launch(&id).unwrap();
        let memory = content(&files.memory);
        assert_eq!((memory.len() as u64, &memory[5..9]), (4 * MIB, &b"five"[..]));
        assert!(files.memory.write_all_at(b"x", 0).is_err(), "read-only");
        assert_eq!(content(&files.state), samples::state());
        assert_eq!(files.manifest.name.as_deref(), Some("one"));
    }
}

/// A bundle of format 1 as it came from a disk: all later versions must go on launching it. Its memory is written here,
/// to keep an image out of the repository. To change the format: a new version, and a golden beside this one.
#[test]
fn the_golden_bundle_is_launched() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bundle_v1");
    let rig = Rig::new(MIB);
    let id: BundleId = samples::GOLDEN_ID.parse().unwrap();
    let place = rig.root.join(samples::GOLDEN_ID);
    file::make_directories(&place).unwrap();
    for name in ["manifest.json", STATE] {
        std::fs::copy(golden.join(name), place.join(name)).unwrap();
    }
    let memory = file::create(&place.join(MEMORY)).unwrap();
    memory.set_len(MIB).unwrap();
    samples::GOLDEN_MEMORY.iter().for_each(|(at, bytes)| memory.write_all_at(bytes, *at).unwrap());
    let files = rig.store.open_for_launch(&id).unwrap();
    assert_eq!(files.manifest.machine.memory_bytes, MIB);
    rig.store.verify(&id, &mut |_| ()).unwrap();
}

#[test]
fn a_change_after_it_was_verified_is_refused() {
    let rig = Rig::new(4 * MIB);
    let id = rig.full("one", &[(0, b"a"), (MIB, b"b")]).id;
    rig.store.open_for_launch(&id).unwrap();
    rig.flip(&id, MEMORY, MIB + 1, 2);
    let (bundle, damage) = refused(&rig.store, &id);
    assert_eq!(bundle, id);
    assert!(matches!(damage, Damage::Chunk { index: 4, .. }));
    rig.flip(&id, MEMORY, MIB + 1, 2);
    rig.store.open_for_launch(&id).unwrap();
    rig.flip(&id, STATE, 0, 0);
    assert!(matches!(refused(&rig.store, &id).1, Damage::State));
    rig.flip(&id, STATE, 0, 0);
    rig.flip(&id, "manifest.json", 0, 0);
    assert!(matches!(refused(&rig.store, &id).1, Damage::Id { .. }));
    rig.flip(&id, "manifest.json", 0, 0);
    rig.tamper(&id, MEMORY, |file| file.set_len(MIB).unwrap());
    assert!(matches!(refused(&rig.store, &id).1, Damage::Length { file: MEMORY, found: MIB, .. }));
}

#[test]
fn a_chain_of_three_is_composed_once_and_compacts() {
    let rig = Rig::new(4 * MIB);
    let flat = rig.full("flat", &[(0, b"one"), (MIB, b"one"), (2 * MIB, b"one")]).id;
    let second = rig.diff("second", &flat, &[(256, 1)], &[(MIB, b"two")]).id;
    // The first page of the third MiB is held and zero.
    let third = rig.diff("third", &second, &[(0, 1), (512, 1)], &[(0, b"thr")]).id;
    let expected = |memory: &[u8]| {
        let at = |mib: usize| memory[mib << 20..(mib << 20) + 3].to_vec();
        assert_eq!((at(0), at(1), at(2)), (b"thr".to_vec(), b"two".to_vec(), vec![0; 3]));
    };
    let store = rig.restarted();
    let files = store.open_for_launch(&third).unwrap();
    expected(&content(&files.memory));
    assert_eq!(files.manifest.parent.as_ref().map(|parent| parent.depth), Some(2));
    assert!(files.memory.metadata().unwrap().blocks() * 512 <= 64 << 10, "holes stay");
    assert_eq!(names(&rig.root.join(".flat")).len(), 2);
    let again = store.open_for_launch(&third).unwrap();
    assert_eq!(inode(&again.memory), inode(&files.memory), "composed once");

    let compaction = Compaction { token: "compact".to_owned(), name: None, built_at: UnixNanos(5) };
    let compact = store.compact(&third, compaction.clone(), &mut |_| ()).unwrap();
    assert_eq!(compact.manifest.provenance.compacted_from, Some(third.clone()));
    assert_eq!(compact.manifest.memory.chunks, files.manifest.memory.chunks);
    assert!(!compact.manifest.is_diff());
    for id in [&third, &second, &flat] {
        store.remove(id).unwrap();
    }
    expected(&content(&rig.restarted().open_for_launch(&compact.id).unwrap().memory));
    store.verify(&compact.id, &mut |_| ()).unwrap();
    let error = store.compact(&compact.id, compaction, &mut |_| ()).unwrap_err();
    assert!(matches!(error, crate::bundle::CompactError::Flat { .. }));
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

#[test]
fn many_at_once_compose_one_image() {
    let rig = Rig::new(16 * MIB);
    let data = vec![3; 8 << 20];
    let flat = rig.full("flat", &[(MIB, &data)]).id;
    let child = rig.diff("child", &flat, &[(0, 1)], &[(0, b"x")]).id;
    let store = rig.restarted();
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let launch = || inode(&store.open_for_launch(&child).unwrap().memory);
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(launch)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(inodes.windows(2).all(|pair| pair[0] == pair[1]), "{inodes:?}");
}

#[test]
fn a_changed_flat_image_is_made_again() {
    let rig = Rig::new(4 * MIB);
    let flat = rig.full("flat", &[(0, b"one")]).id;
    let child = rig.diff("child", &flat, &[(1, 1)], &[(4096, b"two")]).id;
    rig.store.open_for_launch(&child).unwrap();
    let image = rig.root.join(".flat").join(format!("{child}.img"));
    file::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let memory = content(&rig.store.open_for_launch(&child).unwrap().memory);
    assert_eq!((&memory[..3], &memory[4096..4099]), (&b"one"[..], &b"two"[..]));
    rig.flip(&child, MEMORY, 4096, 0);
    assert_eq!(refused(&rig.store, &child).0, child);
    rig.flip(&child, MEMORY, 4096, 0);
    rig.flip(&flat, MEMORY, 0, 0);
    assert_eq!(refused(&rig.restarted(), &child).0, flat, "it is the parent that is named");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Pages written at random over a chain: what is launched is what a plain array says.
    #[test]
    fn a_chain_is_a_history_of_writes(
        levels in proptest::collection::vec(proptest::collection::btree_map(0_u64..512, 0_u8..4, 0..24), 1..5),
    ) {
        let rig = Rig::new(2 * MIB);
        let mut model = vec![0_u8; 2 << 20];
        let mut last: Option<BundleId> = None;
        for (level, pages) in levels.iter().enumerate() {
            let written: Vec<(u64, Vec<u8>)> = pages.iter().map(|(page, byte)| (page * 4096, vec![*byte; 4096])).collect();
            let mut runs = Vec::new();
            for (page, byte) in pages {
                run::push(&mut runs, *page);
                let start = usize::try_from(page * 4096).unwrap();
                model[start..start + 4096].fill(*byte);
            }
            // A page of zeros may be left a hole.
            let not_zero = written.iter().filter(|(_, bytes)| bytes[0] != 0);
            let writes: Vec<(u64, &[u8])> = not_zero.map(|(at, bytes)| (*at, &bytes[..])).collect();
            let token = format!("level-{level}");
            let runs: Vec<(u64, u64)> = runs.into_iter().map(Into::into).collect();
            last = Some(match &last {
                None => rig.full(&token, &writes).id,
                Some(parent) => rig.diff(&token, parent, &runs, &writes).id,
            });
        }
        let id = last.unwrap();
        let memory = content(&rig.restarted().open_for_launch(&id).unwrap().memory);
        prop_assert!(memory == model);
        prop_assert!(rig.restarted().verify(&id, &mut |_| ()).is_ok());
    }
}
