//! Damaged files: what can be read is read, nothing is written, and it is told what is wrong and where.

use std::os::unix::fs::FileExt;

use super::*;

/// A volume with an entry and some records; its first chunk lies in a layer below, that of a snapshot. The same on all file
/// systems.
fn sample(dir: &Path) -> Vec<u8> {
    let store = open(dir);
    made(&store, 9, 8 * CHUNK_BYTES).write_at(&[1; 5000], 0).unwrap();
    store.take_snapshot(&volume_id(9), "s", 1, &snapshot_id(1)).unwrap();
    store.remove(&volume_id(9)).unwrap();
    let spec = spec("v1", 8 * CHUNK_BYTES);
    store.clone_of(&Origin::Snapshot(snapshot_id(1)), &spec, &volume_id(1)).unwrap();
    let volume = store.volume(&volume_id(1)).unwrap();
    for chunk in 2..5 {
        volume.write_at(&[2; 5000], chunk * CHUNK_BYTES).unwrap();
        volume.flush().unwrap();
    }
    content(&volume)
}

fn flip(dir: &Path, file: &str, offset: u64) {
    let file = std::fs::File::options().read(true).write(true).open(dir.join(file)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

fn map_of_volume() -> String {
    format!("{}/map", volume_id(1))
}

/// Opens it in both boots; each byte is as it was or is refused, and nothing is written.
fn check_damaged(dir: &Path, expected: &[u8], offset: u64, readable_at_least: usize) {
    for boot in ["boot-1", "boot-2"] {
        let store = open_in_boot(dir, boot);
        let volume = store.volume(&volume_id(1)).unwrap();
        let damage = volume.damage();
        assert!(damage.iter().any(|damage| damage.file == map_of_volume() && damage.offset == offset), "{damage:?}");
        assert_eq!(volume.write_at(&[9], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(volume.discard(0, CHUNK_BYTES).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert!(store.resize(&volume_id(1), 16 * CHUNK_BYTES).is_err());
        assert!(store.take_snapshot(&volume_id(1), "t", 1, &snapshot_id(2)).is_err());
        assert!(volume.flush().is_ok() && !volume.changed_since(0).complete);
        let mut readable = 0;
        for (block, expected) in (0_u64..).zip(expected.chunks(4096)) {
            let mut bytes = vec![0; 4096];
            match volume.read_at(&mut bytes, block * 4096) {
                Ok(()) => {
                    assert!(bytes == expected, "block {block} is another one's");
                    readable += 1;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Damaged),
            }
        }
        assert!(readable >= readable_at_least, "{readable}");
        let snapshot = store.snapshot(&snapshot_id(1)).unwrap();
        assert!(snapshot.info().damage.is_empty() && content_of(&snapshot)[4999] == 1);
    }
}

#[test]
fn a_damaged_header_makes_it_unreadable() {
    for offset in [0, 9, 17, 25, 40, 66, 70, 74, 85, 2000, 4095] {
        let dir = tempfile::tempdir().unwrap();
        let expected = sample(dir.path());
        flip(dir.path(), &map_of_volume(), offset);
        let told = match offset {
            0 => 0,
            9 => 8,
            _ => 0,
        };
        check_damaged(dir.path(), &expected, told, 0);
        // Its layers are kept until it is removed.
        let layers = || std::fs::read_dir(dir.path().join("layers")).unwrap().count();
        let store = open(dir.path());
        assert_eq!(layers(), 2);
        store.remove(&volume_id(1)).unwrap();
        assert_eq!(layers(), 1);
        assert_eq!(content_of(&store.snapshot(&snapshot_id(1)).unwrap())[4999], 1);
    }
}

#[test]
fn damaged_entries_cost_their_chunks() {
    for offset in [4096, 4100, 4110, 4125, 8000, 8191] {
        let dir = tempfile::tempdir().unwrap();
        let expected = sample(dir.path());
        flip(dir.path(), &map_of_volume(), offset);
        // Records tell of three chunks.
        check_damaged(dir.path(), &expected, 4096, 3 * 16);
    }
}

#[test]
fn a_damaged_record_costs_its_chunk() {
    for byte in [0, 4, 9, 13, 20, 31] {
        let dir = tempfile::tempdir().unwrap();
        let expected = sample(dir.path());
        // Records are: touched, barrier, touched, barrier, touched, barrier.
        let slot = 8192 + 2 * 32;
        flip(dir.path(), &map_of_volume(), slot + byte);
        check_damaged(dir.path(), &expected, slot, 7 * 16);
    }
}

#[test]
fn a_torn_tail_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let expected = sample(dir.path());
    flip(dir.path(), &map_of_volume(), 8192 + 5 * 32 + 7);
    let store = open(dir.path());
    let volume = store.volume(&volume_id(1)).unwrap();
    assert_eq!(volume.damage(), []);
    assert!(content(&volume) == expected);
    volume.write_at(&[7; 10], 6 * CHUNK_BYTES).unwrap();
    drop((volume, store));
    let store = open(dir.path());
    assert_eq!(content(&store.volume(&volume_id(1)).unwrap())[6 * 65536 + 9], 7);
}

#[test]
fn layers_that_are_missing_or_short_are_told() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let names = std::fs::read_dir(dir.path().join("layers")).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<_> = names.collect();
    names.sort();
    std::fs::File::options().write(true).open(&names[0]).unwrap().set_len(CHUNK_BYTES).unwrap();
    let store = open(dir.path());
    let volume = store.volume(&volume_id(1)).unwrap();
    assert_eq!(volume.damage()[0].offset, CHUNK_BYTES);
    assert!(volume.read_at(&mut [0; 5000], 0).is_ok() && volume.write_at(&[1], 0).is_err());
    drop((volume, store));
    std::fs::remove_file(&names[0]).unwrap();
    let store = open(dir.path());
    let volume = store.volume(&volume_id(1)).unwrap();
    let mut bytes = [0; 5000];
    assert_eq!(volume.read_at(&mut bytes, 0).unwrap_err().kind(), ErrorKind::Damaged);
    volume.read_at(&mut bytes, 2 * CHUNK_BYTES).unwrap();
    assert_eq!(bytes, [2; 5000]);
    assert!(!store.snapshot(&snapshot_id(1)).unwrap().info().damage.is_empty());
}

#[test]
fn what_is_said_beside_a_map_may_be_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let expected = sample(dir.path());
    flip(dir.path(), &format!("{}/volume.json", volume_id(1)), 0);
    let store = open(dir.path());
    let volume = store.volume(&volume_id(1)).unwrap();
    assert_eq!((volume.name(), volume.damage().len()), (volume_id(1).to_string(), 1));
    assert!(content(&volume) == expected, "the map says all that reading needs");
    assert!(volume.write_at(&[1], 0).is_err());
}
