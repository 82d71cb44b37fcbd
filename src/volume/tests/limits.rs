//! What is refused: sizes, ranges, names, space; and what becomes of files that nobody needs.

use std::os::unix::fs::FileExt;

use super::*;

#[test]
fn sizes_names_and_ranges_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { largest: Largest::Bytes(1 << 40), ..Options::new("boot-1") };
    let store = Store::open(dir.path(), &options).unwrap();
    let kind = |result: Result<Info, VolumeError>| result.unwrap_err().kind();
    for size in [0, 1, 4095, 5000, (1 << 40) + 4096, u64::MAX] {
        assert_eq!(kind(store.create(&spec("a", size), &volume_id(1))), ErrorKind::BadRequest, "{size}");
    }
    for name in ["", "A", "a/b", "..", "a b", &"x".repeat(64)] {
        assert_eq!(kind(store.create(&spec(name, 4096), &volume_id(1))), ErrorKind::BadRequest, "{name}");
    }
    let volume = made(&store, 1, 8192);
    assert_eq!(kind(store.create(&spec("v1", 4096), &volume_id(2))), ErrorKind::Taken);
    assert_eq!(kind(store.create(&spec("other", 4096), &volume_id(1))), ErrorKind::Taken);
    for (offset, length) in [(8192, 1), (8191, 2), (u64::MAX, 1), (0, u64::MAX)] {
        assert_eq!(volume.discard(offset, length).unwrap_err().kind(), ErrorKind::BadRequest);
        assert!(volume.zero(offset, length, true).is_err() && volume.status(offset, length, 9).is_err());
    }
    assert!(volume.write_at(&[1; 2], 8191).is_err() && volume.read_at(&mut [1; 2], u64::MAX).is_err());
    assert!(volume.write_at(&[], 8192).is_ok() && volume.status(8192, 0, 1).unwrap().is_empty());
    assert_eq!(kind(store.resize(&volume_id(1), 4096)), ErrorKind::BadRequest);
    assert_eq!(kind(store.resize(&volume_id(1), 8193)), ErrorKind::BadRequest);
    assert_eq!(kind(store.resize(&volume_id(9), 8192)), ErrorKind::NotFound);
    let origin = Origin::Volume(volume_id(1));
    assert_eq!(kind(store.clone_of(&origin, &spec("c", 4096), &volume_id(3))), ErrorKind::BadRequest);
    assert_eq!(store.remove(&volume_id(1)).unwrap_err().kind(), ErrorKind::InUse);
    drop(volume);
    assert_eq!(Store::open(dir.path(), &options).unwrap_err().kind(), ErrorKind::InUse);
    store.remove(&volume_id(1)).unwrap();
    assert_eq!(store.remove(&volume_id(1)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_large_volume_costs_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let volume = made(&store, 1, 4 << 40);
    volume.write_at(b"end", (4 << 40) - 3).unwrap();
    volume.write_at(b"start", 1 << 40).unwrap();
    volume.flush().unwrap();
    let ended = volume.bump().unwrap();
    volume.write_at(b"more", 1 << 30).unwrap();
    volume.write_at(b"again", 1 << 40).unwrap();
    let changed = volume.changed_since(ended);
    assert_eq!(
        (changed.chunks.as_slice(), changed.complete),
        ([1 << 14..(1 << 14) + 1, 1 << 24..(1 << 24) + 1].as_slice(), true)
    );
    volume.discard(1 << 30, CHUNK_BYTES).unwrap();
    volume.flush().unwrap();
    assert!(volume.info().unwrap().allocated_bytes < 1 << 20);
    let runs = volume.status(0, 4 << 40, 8).unwrap();
    assert_eq!(runs.len(), 4);
    assert_eq!(volume.changed_since(0).chunks.len(), 3);
    drop((volume, store));
    let store = open_in_boot(dir.path(), "boot-2");
    assert!(!store.volume(&volume_id(1)).unwrap().changed_since(ended).complete);
    let mut word = [0; 3];
    store.volume(&volume_id(1)).unwrap().read_at(&mut word, (4 << 40) - 3).unwrap();
    assert_eq!(&word, b"end");
}

#[test]
fn the_quota_and_the_reserve_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let quota = 4 << 20;
    let store = Store::open(dir.path(), &Options { quota_bytes: Some(quota), ..Options::new("boot-1") }).unwrap();
    let volume = made(&store, 1, 1 << 30);
    let mut written = 0;
    let refused = loop {
        match volume.write_at(&[3; 64 << 10], written) {
            Ok(()) => written += 64 << 10,
            Err(error) => break error,
        }
        assert!(written <= quota, "the quota is not kept");
    };
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert!(written >= quota - (512 << 10), "{written} of {quota} could be written");
    assert!(store.allocated_bytes().unwrap() <= quota);
    volume.write_at(&[4; 64 << 10], 0).unwrap();
    assert_eq!(volume.write_at(&[5; 512 << 10], 64 << 20).unwrap_err().kind(), ErrorKind::NoSpace);
    volume.discard(0, 1 << 20).unwrap();
    volume.flush().unwrap();
    volume.write_at(&[5; 512 << 10], 64 << 20).unwrap();
    drop((volume, store));
    let reserve = Options { reserve_bytes: u64::MAX, ..Options::new("boot-1") };
    let store = Store::open(dir.path(), &reserve).unwrap();
    let refused = store.volume(&volume_id(1)).unwrap().write_at(&[1], 512 << 20).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert_eq!(store.create(&spec("b", 4096), &volume_id(2)).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_volume_is_at_most_as_large_as_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { largest: Largest::FileSystem, ..Options::new("boot-1") };
    let store = Store::open(dir.path(), &options).unwrap();
    let disk_bytes = crate::sys::host::space(dir.path()).unwrap().total_bytes / 4096 * 4096;
    let refused = store.create(&spec("a", disk_bytes + 4096), &volume_id(1)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::BadRequest);
    assert!(refused.to_string().contains(&disk_bytes.to_string()), "{refused}");
    // They are thin: together they may be larger than the disk.
    for id in [1, 2] {
        store.create(&spec(&format!("v{id}"), disk_bytes), &volume_id(id)).unwrap();
    }
    assert_eq!(store.resize(&volume_id(1), disk_bytes + 4096).unwrap_err().kind(), ErrorKind::BadRequest);
}

#[test]
fn an_image_is_copied_without_its_holes_and_may_be_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let image = tempfile::tempfile().unwrap();
    image.write_all_at(b"boot", 10).unwrap();
    image.write_all_at(b"later", 9_000_000).unwrap();
    let size = image_bytes(&image).unwrap();
    assert_eq!(size % 4096, 0);
    let mut calls = 0;
    let mut stop = |_: Progress| {
        calls += 1;
        if calls > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let stopped = store.create_from_image(&spec("i", size), &volume_id(1), &image, &mut stop);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    let short = store.create_from_image(&spec("i", 4096), &volume_id(1), &image, &mut go_on);
    assert_eq!(short.unwrap_err().kind(), ErrorKind::BadRequest);
    let info = store.create_from_image(&spec("i", size), &volume_id(1), &image, &mut go_on).unwrap();
    assert!(info.allocated_bytes < 1 << 20, "{info:?}");
    let volume = store.volume(&volume_id(1)).unwrap();
    let mut expected = vec![0; usize::try_from(size).unwrap()];
    expected[10..14].copy_from_slice(b"boot");
    expected[9_000_000..9_000_005].copy_from_slice(b"later");
    assert!(content(&volume) == expected);
    assert_eq!(volume.changed_since(0).chunks.len(), 2);
    drop((volume, store));
    let store = open_in_boot(dir.path(), "boot-2");
    assert!(content(&store.volume(&volume_id(1)).unwrap()) == expected, "it was durable when it was there");
}

#[test]
fn layers_that_nobody_needs_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let layers = || std::fs::read_dir(dir.path().join("layers")).unwrap().count();
    let store = open(dir.path());
    let volume = made(&store, 1, 4 * CHUNK_BYTES);
    volume.write_at(&[1; 100_000], 0).unwrap();
    drop(volume);
    store.take_snapshot(&volume_id(1), "s", 1, &snapshot_id(1)).unwrap();
    store.clone_of(&Origin::Snapshot(snapshot_id(1)), &spec("c", 4 * CHUNK_BYTES), &volume_id(2)).unwrap();
    assert_eq!(layers(), 3);
    assert_eq!(store.list().unwrap().len(), 2);
    store.remove_snapshot(&snapshot_id(1)).unwrap();
    store.remove(&volume_id(1)).unwrap();
    assert_eq!(layers(), 2, "the clone needs what it was made of");
    let volume = store.volume(&volume_id(2)).unwrap();
    assert_eq!(content(&volume)[99_999], 1);
    drop((volume, store));
    // What a crash may leave.
    for left in ["layers/00000000000000ff", ".staging/vol-x", "vol-readme"] {
        crate::sys::file::create(&dir.path().join(left)).unwrap();
    }
    std::fs::create_dir(dir.path().join(".removing/vol-y")).unwrap();
    crate::sys::file::create(&dir.path().join(".removing/vol-y/map")).unwrap();
    let store = open(dir.path());
    assert_eq!(layers(), 2);
    store.remove(&volume_id(2)).unwrap();
    assert_eq!(layers(), 0);
    assert!(std::fs::read_dir(dir.path().join(".removing")).unwrap().next().is_none());
}
