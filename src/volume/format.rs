//! The bytes of a map's file, taken apart and put together (FORMAT.md). Pure; fuzzed.
//!
//! What a loss of power leaves is told from damage by one rule: a barrier is written only when all records it covers are
//! durable. So of a map of this boot each record counts, and of another boot's those that its last barrier covers; one
//! of them that is not valid is damage, and what follows them was never promised to anybody.

use std::ops::Range;

use super::chunk::{SIZE_BYTES_MAX, SIZE_STEP_BYTES, chunks_in};

mod entries;
mod header;
mod records;

pub use entries::Run;
pub use header::{Header, LayerLine};
pub use records::{RECORD_BYTES, Record};

pub(super) use records::encode as encode_record;

/// Bytes of a block of entries, and of what a header is padded to.
pub(super) const BLOCK_BYTES: usize = 4096;

/// Bytes of a checksum.
const CHECKSUM_BYTES: usize = 32;

/// What all of a map's checksums but the header's own are made with: the checksum of its header. So nothing of another
/// map is taken for a part of this one.
pub type Salt = [u8; CHECKSUM_BYTES];

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Where, in bytes of the file.
    pub offset: u64,
    /// What.
    pub what: &'static str,
}

/// A map's file, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// What it begins with.
    pub header: Header,
    /// Checksums are made with it.
    pub salt: Salt,
    /// The entries, ascending.
    pub runs: Vec<Run>,
    /// Chunks of which the entries are lost.
    pub lost: Vec<Range<u32>>,
    /// What is wrong with the entries.
    pub wrong: Vec<Wrong>,
    /// Where records begin.
    pub records_start: u64,
    /// The valid records and the slots they are in, ascending.
    pub records: Vec<(u64, Record)>,
}

/// Which of a map's records count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Those that count, in order.
    pub records: Vec<Record>,
    /// The slot that comes next.
    pub slots: u64,
    /// How many slots a barrier covers.
    pub covered: u64,
    /// Records that should be there and are not valid.
    pub wrong: Vec<Wrong>,
    /// The highest generation there is a trace of.
    pub generation: u32,
}

/// A map's bytes without any records, and the salt of the records to come.
pub fn encode(header: &Header, runs: &[Run]) -> (Vec<u8>, Salt) {
    let chunks = chunks_in(header.size_bytes);
    let blocks = entries::blocks(chunks, runs);
    let (mut bytes, salt) = header::encode(header, u32::try_from(blocks.len()).unwrap_or(u32::MAX));
    for (index, block) in blocks.iter().enumerate() {
        entries::encode(&mut bytes, &salt, index as u64, block);
    }
    (bytes, salt)
}

/// Takes a map's file apart. An error is a header that says nothing.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Wrong> {
    let (header, blocks, start) = header::parse(bytes)?;
    let (chunks, layers) = (chunks_in(header.size_bytes), header.layers.len());
    let salt = header::checksum_of(&bytes[..start]);
    let blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
    let records_start = blocks.checked_mul(BLOCK_BYTES).and_then(|bytes| bytes.checked_add(start));
    let records_start = records_start.ok_or(Wrong { offset: 0, what: "the header speaks of too many entries" })?;
    let entries = entries::parse(bytes.get(start..).unwrap_or_default(), blocks, &salt, chunks, layers);
    let wrong = entries.wrong.into_iter().map(|wrong| Wrong { offset: wrong.offset + start as u64, ..wrong }).collect();
    let records = records::parse(bytes.get(records_start..).unwrap_or_default(), &salt, chunks);
    let records_start = records_start as u64;
    Ok(Parsed { header, salt, runs: entries.runs, lost: entries.lost, wrong, records_start, records })
}

impl Parsed {
    /// Which records count, in the boot that wrote them or in a later one.
    pub fn replay(&self, same_boot: bool) -> Replay {
        let mut generation = self.header.generation;
        let mut covered = 0;
        for (_, record) in &self.records {
            match record {
                Record::Touched { generation: of, .. } | Record::Generation(of) => generation = generation.max(*of),
                Record::Barrier { covers } => covered = covered.max(*covers),
            }
        }
        let slots = if same_boot { self.records.last().map_or(0, |(slot, _)| slot + 1) } else { covered };
        let mut replay = Replay { records: Vec::new(), slots, covered, wrong: Vec::new(), generation };
        let mut next = 0;
        for (slot, record) in self.records.iter().filter(|(slot, _)| *slot < slots) {
            replay.missing(self, next..*slot);
            replay.records.push(*record);
            next = slot + 1;
        }
        replay.missing(self, next..slots);
        replay
    }
}

impl Replay {
    /// Each gap is told once.
    fn missing(&mut self, parsed: &Parsed, slots: Range<u64>) {
        if !slots.is_empty() {
            let offset = parsed.records_start.saturating_add(slots.start.saturating_mul(RECORD_BYTES as u64));
            self.wrong.push(Wrong { offset, what: "a record does not have its checksum" });
        }
    }
}

/// Whether a volume may have this size.
const fn is_size(size_bytes: u64) -> bool {
    size_bytes > 0 && size_bytes <= SIZE_BYTES_MAX && size_bytes.is_multiple_of(SIZE_STEP_BYTES)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
