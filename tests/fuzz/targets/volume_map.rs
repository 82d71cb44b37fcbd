//! Bytes of a volume's map at its reader: refused, or entries and records that stay within the volume, and that are
//! written back as they were read.
#![no_main]

use hearth::volume::CHUNK_BYTES;
use hearth::volume::format::{Header, LayerLine, Parsed, RECORD_BYTES, Record, Run, encode, parse};
use libfuzzer_sys::fuzz_target;

const CHUNKS: u32 = 1000;

fuzz_target!(|bytes: &[u8]| {
    // As it came, and over a map that is fine, at a place that the bytes choose: mutations seldom get that far.
    if let Ok(parsed) = parse(bytes) {
        check(&parsed);
    }
    let [low, high, over @ ..] = bytes else { return };
    let mut map = sample();
    let at = usize::from(u16::from_le_bytes([*low, *high])) % map.len();
    let end = (at + over.len()).min(map.len());
    map[at..end].copy_from_slice(&over[..end - at]);
    if let Ok(parsed) = parse(&map) {
        check(&parsed);
    }
    // Without checksums in the way: a header and runs as the bytes say.
    let runs = runs(over);
    let header = header();
    let (map, _) = encode(&header, &runs);
    let parsed = parse(&map).expect("what was written is read");
    assert_eq!((&parsed.header, &parsed.runs), (&header, &runs));
    assert!(parsed.wrong.is_empty() && parsed.lost.is_empty());
});

fn header() -> Header {
    let layers = vec![LayerLine { number: 1, bytes: CHUNK_BYTES }, LayerLine { number: 2, bytes: u64::MAX }];
    let size_bytes = u64::from(CHUNKS) * CHUNK_BYTES;
    Header { size_bytes, generation: 3, incomplete_to: 0, boot: [1; 32], top: 2, layers }
}

fn sample() -> Vec<u8> {
    let every_other: Vec<u8> = std::iter::repeat_n(1, 400).collect();
    let (mut map, _) = encode(&header(), &runs(&every_other));
    map.resize(map.len() + 8 * RECORD_BYTES, 0);
    map
}

/// Gaps and lengths from bytes.
fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut next = 0;
    let mut runs = Vec::new();
    for byte in bytes {
        let (first, count) = (next + u32::from(byte & 3), 1 + u32::from(byte >> 6));
        if first + count > CHUNKS {
            break;
        }
        next = first + count;
        runs.push(Run { first, count, layer: 1 + u16::from(byte >> 2 & 1), generation: u32::from(*byte) });
    }
    runs
}

fn check(parsed: &Parsed) {
    let chunks = parsed.header.size_bytes.div_ceil(CHUNK_BYTES);
    let mut next = 0;
    for run in &parsed.runs {
        assert!(run.first >= next && run.count > 0 && usize::from(run.layer) <= parsed.header.layers.len());
        next = run.first + run.count;
    }
    assert!(u64::from(next) <= chunks);
    for (slot, record) in &parsed.records {
        match record {
            Record::Touched { first, count, .. } => assert!(u64::from(first + count) <= chunks),
            Record::Barrier { covers } => assert!(covers <= slot),
            Record::Generation(_) => {}
        }
    }
    for same_boot in [true, false] {
        let replay = parsed.replay(same_boot);
        assert!(replay.records.len() <= parsed.records.len() && replay.covered <= replay.slots.max(replay.covered));
    }
    let lost: u64 = parsed.lost.iter().map(|lost| u64::from(lost.end - lost.start)).sum();
    assert!(lost <= chunks && (lost == 0 || !parsed.wrong.is_empty()));
}
