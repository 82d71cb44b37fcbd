//! Bytes of an exported bundle at what imports it: refused with nothing left, or a bundle that is whole. As they came, and
//! as the content of records with a good ending: mutations never make a digest.
#![no_main]

use std::sync::OnceLock;

use hearth::bundle::Store;
use hearth::bundle::archive::{Part, Reader, Writer};
use libfuzzer_sys::fuzz_target;

const MANIFEST: &[u8] = include_bytes!("../../golden/bundle_v1/manifest.json");
const STATE: &[u8] = include_bytes!("../../golden/bundle_v1/state.bin");

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    import(bytes);
    import(&records(bytes));
});

/// The parser alone: parts follow each other, memory ascends.
fn read(bytes: &[u8]) {
    let Ok(mut reader) = Reader::open(bytes) else { return };
    let mut end = 0;
    loop {
        match reader.next_part() {
            Ok(Part::Manifest(_)) => end = 0,
            Ok(Part::Memory { offset, bytes }) => {
                assert!(offset >= end && !bytes.is_empty());
                end = offset + bytes.len() as u64;
            }
            Ok(Part::State(_) | Part::Signature(_)) => {}
            Ok(Part::End) => {
                assert!(reader.next_part().is_err());
                return;
            }
            Err(_) => return,
        }
    }
}

/// The bytes say which records there are: the golden manifest and state, and memory wherever they want it.
fn records(mut bytes: &[u8]) -> Vec<u8> {
    let mut writer = Writer::begin(Vec::new()).expect("a vector takes all");
    while let Some((what, rest)) = bytes.split_first() {
        bytes = rest;
        let written = match what % 4 {
            0 => writer.manifest(MANIFEST),
            1 => writer.state(STATE),
            2 => match bytes.split_first_chunk::<4>() {
                Some((place, rest)) => {
                    let count = usize::from(place[3]).min(rest.len());
                    let (content, rest) = rest.split_at(count);
                    bytes = rest;
                    writer.memory(u64::from(u32::from_le_bytes([place[0], place[1], place[2], 0])), content)
                }
                None => writer.memory(0, bytes),
            },
            _ => {
                let (content, rest) = bytes.split_at(bytes.len().min(usize::from(*what)));
                bytes = rest;
                writer.manifest(content)
            }
        };
        written.expect("a vector takes all");
    }
    writer.end().expect("a vector takes all")
}

fn import(bytes: &[u8]) {
    static STORE: OnceLock<(tempfile::TempDir, Store)> = OnceLock::new();
    let (directory, store) = STORE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Store::open(directory.path()).expect("a store");
        (directory, store)
    });
    if let Ok(imported) = store.import(bytes, "fuzz", &mut |_| ()) {
        for one in imported {
            store.verify(&one.id, &mut |_| ()).expect("what was imported is whole");
            store.remove(&one.id).expect("it is removed");
        }
    }
    // The directories that a store keeps.
    let left = std::fs::read_dir(directory.path()).expect("the store").count();
    assert_eq!(left, 5, "something is left");
}
