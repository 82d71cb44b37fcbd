//! Bytes of a `manifest.json` at its reader: refused, or a manifest whose parts fit each other and that is written back
//! as it was read.
#![no_main]

use hearth::bundle::manifest::{Manifest, id_of, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let id = id_of(bytes);
    // As it came, and in the place of the memory map of a manifest that is fine: mutations seldom get that far.
    let text = String::from_utf8_lossy(bytes);
    let (before, after) = GOLDEN.split_once(r#""memory":"#).expect("a memory map");
    let after = after.split_once(r#","state""#).expect("what follows it").1;
    let around = format!(r#"{before}"memory":{text},"state"{after}"#);
    for bytes in [bytes, around.as_bytes()] {
        if let Ok(manifest) = read(bytes) {
            check(&manifest);
        }
    }
    assert_eq!(id_of(bytes), id);
});

const GOLDEN: &str = include_str!("../../golden/bundle_v1/manifest.json");

fn check(manifest: &Manifest) {
    let covered: u64 = manifest.memory.zero_runs.iter().map(|run| run.count).sum();
    assert_eq!(covered + manifest.memory.chunks.len() as u64, manifest.chunk_count());
    for run in manifest.memory.pages.iter().flatten() {
        assert!(run.first + run.count <= manifest.page_count());
    }
    let bytes = manifest.to_bytes().expect("a manifest that was read is short enough");
    assert_eq!(&read(&bytes).expect("what was written is read"), manifest);
}
