//! A map's bytes: written and read, and what each kind of damage costs.

use proptest::prelude::*;

use super::*;
use crate::volume::chunk::CHUNK_BYTES;

fn header(chunks: u32) -> Header {
    let layers = vec![LayerLine { number: 7, bytes: 8192 }, LayerLine { number: 9, bytes: 65536 }];
    let size_bytes = u64::from(chunks) * CHUNK_BYTES;
    Header { size_bytes, generation: 3, incomplete_to: 1, boot: [5; 32], top: 2, layers }
}

fn every_other(count: u32) -> Vec<Run> {
    (0..count).map(|n| Run { first: n * 2, count: 1, layer: 1 + u16::from(n % 3 == 0), generation: n % 4 }).collect()
}

fn with_records(bytes: &mut Vec<u8>, salt: &Salt, records: &[Record]) {
    for (slot, record) in records.iter().enumerate() {
        bytes.extend(encode_record(salt, slot as u64, *record));
    }
}

fn touched(first: u32) -> Record {
    Record::Touched { first, count: 1, generation: 4 }
}

fn only(ranges: &[Range<u32>]) -> Range<u32> {
    assert_eq!(ranges.len(), 1, "{ranges:?}");
    ranges[0].clone()
}

#[test]
fn what_is_written_is_read() {
    for count in [0, 1, 252, 253, 254, 1000] {
        let (runs, header) = (every_other(count), header(4000));
        let (mut bytes, salt) = encode(&header, &runs);
        with_records(&mut bytes, &salt, &[touched(3), Record::Generation(9), Record::Barrier { covers: 2 }]);
        bytes.resize(bytes.len() + 100, 0);
        let parsed = parse(&bytes).unwrap();
        assert_eq!((&parsed.header, &parsed.runs), (&header, &runs));
        assert_eq!(parsed.records.len(), 3);
        assert!(parsed.lost.is_empty() && parsed.wrong.is_empty());
        assert_eq!(parsed.replay(false).generation, 9);
    }
}

#[test]
fn a_bad_block_costs_its_chunks_only() {
    let (runs, header) = (every_other(700), header(4000));
    let (mut bytes, _) = encode(&header, &runs);
    bytes[4096 + 4096 + 100] ^= 1;
    let parsed = parse(&bytes).unwrap();
    assert_eq!(parsed.wrong.len(), 1);
    assert_eq!(parsed.wrong[0].offset, 8192);
    assert_eq!(only(&parsed.lost), 505..1011);
    assert_eq!(parsed.runs.len(), 700 - 253);
    bytes.truncate(8192);
    let parsed = parse(&bytes).unwrap();
    assert_eq!(only(&parsed.lost), 505..4000);
    // A block of another map, though it is in itself right.
    let (other, _) = encode(&Header { generation: 8, ..header.clone() }, &runs);
    let (mut bytes, _) = encode(&header, &runs);
    bytes[4096..8192].copy_from_slice(&other[4096..8192]);
    assert_eq!(only(&parse(&bytes).unwrap().lost), 0..505);
}

#[test]
fn records_count_up_to_the_end_or_up_to_a_barrier() {
    let (bytes, salt) = encode(&header(64), &[]);
    let records = [touched(1), touched(2), Record::Barrier { covers: 1 }, touched(3), touched(4)];
    let mut whole = bytes.clone();
    with_records(&mut whole, &salt, &records);
    let replay = parse(&whole).unwrap().replay(true);
    assert_eq!((replay.records.as_slice(), replay.slots, replay.wrong.len()), (records.as_slice(), 5, 0));
    let replay = parse(&whole).unwrap().replay(false);
    assert_eq!((replay.records.as_slice(), replay.slots, replay.wrong.len()), (&records[..1], 1, 0));
    assert_eq!(replay.generation, 4);
    let start = bytes.len();
    // A torn tail is none of the records.
    let mut torn = whole.clone();
    torn[start + 4 * RECORD_BYTES + 5] ^= 1;
    let replay = parse(&torn).unwrap().replay(true);
    assert_eq!((replay.slots, replay.wrong.len()), (4, 0));
    // One in the middle is damage, where it counts.
    let mut bad = whole.clone();
    bad[start + RECORD_BYTES] ^= 1;
    let wrong = parse(&bad).unwrap().replay(true).wrong;
    assert_eq!(wrong.len(), 1);
    assert_eq!(wrong[0].offset, (start + RECORD_BYTES) as u64);
    assert!(parse(&bad).unwrap().replay(false).wrong.is_empty(), "no barrier covers it");
    let mut bad = whole;
    bad[start] ^= 1;
    assert_eq!(parse(&bad).unwrap().replay(false).wrong.len(), 1);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..600), at in 0_usize..20_000) {
        let _ = parse(&bytes);
        let (mut map, salt) = encode(&header(300), &every_other(100));
        with_records(&mut map, &salt, &[touched(3), Record::Barrier { covers: 1 }]);
        bytes.truncate(64);
        let at = at % map.len();
        let end = (at + bytes.len()).min(map.len());
        map[at..end].copy_from_slice(&bytes[..end - at]);
        if let Ok(parsed) = parse(&map) {
            for run in &parsed.runs {
                prop_assert!(run.first + run.count <= 300);
            }
            let _ = (parsed.replay(true), parsed.replay(false));
        }
    }
}
