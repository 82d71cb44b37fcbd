//! The records appended to a map: what was touched since it was written. All have one size, so that a bad one hides no
//! other.

use super::{Salt, u32_at, u64_at};

/// Bytes of a record. A page holds whole ones, so none is ever torn by the end of a process.
pub const RECORD_BYTES: usize = 32;

const CHECKED_BYTES: usize = 24;

/// What is appended to a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Chunks are in the layer that is written from now on, and were touched in this generation.
    Touched {
        /// The first chunk.
        first: u32,
        /// How many, one after the other.
        count: u32,
        /// The generation.
        generation: u32,
    },
    /// What the records in the first `covers` slots speak of is durable, and so are they.
    Barrier {
        /// How many slots.
        covers: u64,
    },
    /// What is touched from now on is of this generation.
    Generation(u32),
}

pub(in crate::volume) fn encode(salt: &Salt, slot: u64, record: Record) -> [u8; RECORD_BYTES] {
    let (kind, first, count, generation, covers) = match record {
        Record::Touched { first, count, generation } => (1, first, count, generation, 0),
        Record::Barrier { covers } => (2, 0, 0, 0, covers),
        Record::Generation(generation) => (3, 0, 0, generation, 0),
    };
    let mut bytes = [0; RECORD_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&covers.to_le_bytes());
    let check = check(salt, slot, &bytes[..CHECKED_BYTES]);
    bytes[CHECKED_BYTES..].copy_from_slice(&check);
    bytes
}

fn check(salt: &Salt, slot: u64, checked: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(salt).update(&slot.to_le_bytes()).update(checked);
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

/// The valid records and their slots.
pub(super) fn parse(bytes: &[u8], salt: &Salt, chunks: u32) -> Vec<(u64, Record)> {
    let slots = bytes.chunks_exact(RECORD_BYTES).enumerate();
    slots.filter_map(|(slot, bytes)| Some((slot as u64, read(bytes, salt, slot as u64, chunks)?))).collect()
}

fn read(bytes: &[u8], salt: &Salt, slot: u64, chunks: u32) -> Option<Record> {
    // Space that was not written to yet is not worth a checksum.
    if bytes[0] == 0 || check(salt, slot, &bytes[..CHECKED_BYTES]).as_slice() != &bytes[CHECKED_BYTES..] {
        return None;
    }
    let generation = u32_at(bytes, 12);
    match bytes[0] {
        1 => {
            let (first, count) = (u32_at(bytes, 4), u32_at(bytes, 8));
            let end = first.checked_add(count)?;
            (count > 0 && end <= chunks).then_some(Record::Touched { first, count, generation })
        }
        2 => Some(Record::Barrier { covers: u64_at(bytes, 16) }).filter(|_| u64_at(bytes, 16) <= slot),
        3 => Some(Record::Generation(generation)),
        _ => None,
    }
}
