//! What is written is read, what is anything else is refused.

use super::*;
use proptest::prelude::*;

/// A record, with bytes of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owned {
    Manifest(Vec<u8>),
    State(Vec<u8>),
    Memory(u64, Vec<u8>),
    Signature([u8; 96]),
}

fn signature(bytes: &[u8; 96]) -> BundleSignature {
    BundleSignature {
        key: PublicKey::from_bytes(bytes[..32].try_into().unwrap()),
        signature: Signature::from_bytes(bytes[32..].try_into().unwrap()),
    }
}

fn write(records: &[Owned]) -> Vec<u8> {
    let mut writer = Writer::begin(Vec::new()).unwrap();
    for record in records {
        match record {
            Owned::Manifest(bytes) => writer.manifest(bytes),
            Owned::State(bytes) => writer.state(bytes),
            Owned::Memory(offset, bytes) => writer.memory(*offset, bytes),
            Owned::Signature(bytes) => writer.signature(&signature(bytes)),
        }
        .unwrap();
    }
    writer.end().unwrap()
}

fn read(bytes: &[u8]) -> Result<Vec<Owned>, ArchiveError> {
    let mut reader = Reader::open(bytes)?;
    let mut records = Vec::new();
    loop {
        records.push(match reader.next_part()? {
            Part::Manifest(bytes) => Owned::Manifest(bytes.to_vec()),
            Part::State(bytes) => Owned::State(bytes.to_vec()),
            Part::Memory { offset, bytes } => Owned::Memory(offset, bytes.to_vec()),
            Part::Signature(one) => {
                let bytes = [&one.key.as_bytes()[..], &one.signature.as_bytes()[..]].concat();
                Owned::Signature(bytes.try_into().unwrap())
            }
            Part::End => return Ok(records),
        });
    }
}

fn bundle() -> impl Strategy<Value = Vec<Owned>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 1..40);
    let memory = proptest::collection::vec((0_u64..50, bytes()), 0..5);
    let signatures = proptest::collection::vec(any::<[u8; 32]>(), 0..3);
    (bytes(), bytes(), memory, signatures).prop_map(|(manifest, state, memory, signatures)| {
        let mut records = vec![Owned::Manifest(manifest), Owned::State(state)];
        let mut end = 0;
        for (gap, bytes) in memory {
            let offset = end + gap;
            end = offset + bytes.len() as u64;
            records.push(Owned::Memory(offset, bytes));
        }
        let whole = |bytes: [u8; 32]| [bytes; 3].concat().try_into().unwrap();
        records.extend(signatures.into_iter().map(|bytes| Owned::Signature(whole(bytes))));
        records
    })
}

fn bundles() -> impl Strategy<Value = Vec<Owned>> {
    proptest::collection::vec(bundle(), 1..4).prop_map(|bundles| bundles.concat())
}

proptest! {
    #[test]
    fn what_is_written_is_read(records in bundles()) {
        prop_assert_eq!(read(&write(&records)).unwrap(), records);
    }

    #[test]
    fn every_start_of_it_is_truncated(records in bundles(), more: u8) {
        let mut bytes = write(&records);
        for length in 0..bytes.len() {
            let found = read(&bytes[..length]);
            let is_told = matches!(found, Err(ArchiveError::Truncated { at }) if at == length as u64);
            prop_assert!(is_told, "{}: {:?}", length, found);
        }
        bytes.push(more);
        let longer = matches!(read(&bytes), Err(ArchiveError::Trailing { .. }));
        prop_assert!(longer);
    }

    #[test]
    fn a_bit_that_is_another_one_is_noticed(records in bundles(), at: prop::sample::Index, bit in 0_u8..8) {
        let mut bytes = write(&records);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err(), "byte {at}");
    }

    #[test]
    fn any_bytes_are_refused(bytes: Vec<u8>) {
        prop_assert!(read(&bytes).is_err());
        let begun = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
        prop_assert!(read(&begun).is_err());
    }

    #[test]
    fn records_out_of_their_order_are_refused(records in bundles(), a: prop::sample::Index, b: prop::sample::Index) {
        let mut other = records.clone();
        let (a, b) = (a.index(other.len()), b.index(other.len()));
        other.swap(a, b);
        let begins = |records: &[Owned]| matches!(records, [Owned::Manifest(_), Owned::State(_), ..]);
        match read(&write(&other)) {
            // Still an order they may come in.
            Ok(found) => prop_assert!(found == other && begins(&found)),
            Err(error) => {
                let is_told = matches!(error, ArchiveError::Record { .. });
                prop_assert!(is_told, "{:?}", error);
            }
        }
    }
}

/// The header, and one of a record.
fn begun(version: u32, kind: u32, length: u32) -> Vec<u8> {
    [&MAGIC[..], &version.to_le_bytes(), &kind.to_le_bytes(), &length.to_le_bytes()].concat()
}

#[test]
fn absurd_records_are_refused_before_they_are_read() {
    for (kind, length) in [
        (kind::MANIFEST, 0),
        (kind::MANIFEST, MANIFEST_BYTES_MAX + 1),
        (kind::STATE, usize::try_from(STATE_BYTES_MAX).unwrap() + 1),
        (kind::MEMORY, OFFSET_BYTES),
        (kind::MEMORY, OFFSET_BYTES + MEMORY_BYTES_MAX + 1),
        (kind::SIGNATURE, 95),
        (kind::SIGNATURE, 97),
        (kind::END, 0),
        (0, 5),
        (6, 5),
        (u32::MAX, u32::MAX as usize),
    ] {
        let found = read(&begun(VERSION, kind, u32::try_from(length).unwrap()));
        assert!(matches!(found, Err(ArchiveError::Record { at: 12, .. })), "{kind} {length}: {found:?}");
    }
    for kind in [kind::STATE, kind::MEMORY, kind::SIGNATURE, kind::END] {
        let bytes = [begun(VERSION, kind, if kind == kind::SIGNATURE { 96 } else { 32 }), vec![0; 96]].concat();
        assert!(matches!(read(&bytes), Err(ArchiveError::Record { at: 12, .. })), "{kind} comes first");
    }
    assert!(matches!(read(&begun(2, 1, 1)), Err(ArchiveError::Version { found: 2 })));
    assert!(matches!(read(b"HRTHBNDX\x01\0\0\0"), Err(ArchiveError::Magic)));
    let nowhere = [Owned::Manifest(vec![1]), Owned::State(vec![]), Owned::Memory(u64::MAX, vec![1, 2])];
    assert!(matches!(read(&write(&nowhere)), Err(ArchiveError::Record { .. })));
    let back = [Owned::Manifest(vec![1]), Owned::State(vec![]), Owned::Memory(9, vec![1]), Owned::Memory(9, vec![1])];
    assert!(matches!(read(&write(&back)), Err(ArchiveError::Record { reason: "memory is not in its order", .. })));
}

/// A source that fails.
struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn a_source_that_breaks_is_told_from_one_that_ends() {
    let header = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
    let header = header.as_slice();
    let mut reader = Reader::open(header.chain(Broken)).unwrap();
    assert!(matches!(reader.next_part(), Err(ArchiveError::Read { at: 12, .. })));
}
