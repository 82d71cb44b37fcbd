//! The entries of a map: runs of chunks in one layer, in blocks that have a checksum and a range of chunks each, so that a
//! bad block costs those chunks only.

use std::ops::Range;

use super::{BLOCK_BYTES, CHECKSUM_BYTES, Salt, Wrong, u32_at};

const HEAD_BYTES: usize = 16;
const RUN_BYTES: usize = 16;

/// Most runs of a block.
const RUNS_MAX: usize = (BLOCK_BYTES - HEAD_BYTES - CHECKSUM_BYTES) / RUN_BYTES;

/// Chunks that follow each other, in one layer and of one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first chunk.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// The layer, counted from 1.
    pub layer: u16,
    /// The generation in which they were last touched.
    pub generation: u32,
}

/// A block to be written.
pub(super) struct Block<'a> {
    chunks: Range<u32>,
    runs: &'a [Run],
}

/// Spreads runs over blocks whose ranges are all chunks.
pub(super) fn blocks(chunks: u32, runs: &[Run]) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    for part in runs.chunks(RUNS_MAX) {
        let start = blocks.last().map_or(0, |last| last.chunks.end);
        let end = part.last().map_or(chunks, |last| last.first + last.count);
        blocks.push(Block { chunks: start..end, runs: part });
    }
    match blocks.last_mut() {
        Some(last) => last.chunks.end = chunks,
        None => blocks.push(Block { chunks: 0..chunks, runs: &[] }),
    }
    blocks
}

pub(super) fn encode(bytes: &mut Vec<u8>, salt: &Salt, index: u64, block: &Block<'_>) {
    let start = bytes.len();
    bytes.extend(block.chunks.start.to_le_bytes());
    bytes.extend(block.chunks.end.to_le_bytes());
    bytes.extend(u32::try_from(block.runs.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend([0; 4]);
    for run in block.runs {
        bytes.extend(run.first.to_le_bytes());
        bytes.extend(run.count.to_le_bytes());
        bytes.extend(u32::from(run.layer).to_le_bytes());
        bytes.extend(run.generation.to_le_bytes());
    }
    bytes.resize(start + BLOCK_BYTES - CHECKSUM_BYTES, 0);
    let checksum = checksum(salt, index, &bytes[start..]);
    bytes.extend(checksum);
}

fn checksum(salt: &Salt, index: u64, block: &[u8]) -> Salt {
    let mut hasher = blake3::Hasher::new();
    hasher.update(salt).update(&index.to_le_bytes()).update(block);
    *hasher.finalize().as_bytes()
}

/// What blocks say.
pub(super) struct Entries {
    pub(super) runs: Vec<Run>,
    pub(super) lost: Vec<Range<u32>>,
    /// Offsets from the first block.
    pub(super) wrong: Vec<Wrong>,
}

/// Reads `count` blocks. The chunks of those that are bad or missing lie between what the others say.
pub(super) fn parse(bytes: &[u8], count: usize, salt: &Salt, chunks: u32, layers: usize) -> Entries {
    let mut entries = Entries { runs: Vec::new(), lost: Vec::new(), wrong: Vec::new() };
    let mut next = 0;
    // Blocks beyond the end of the file are all bad in the same way: they are told once.
    let there = count.min(bytes.len().div_ceil(BLOCK_BYTES).saturating_add(1));
    for index in 0..there {
        let at = index * BLOCK_BYTES;
        let block = bytes.get(at..at + BLOCK_BYTES).and_then(|block| read(block, salt, index as u64, chunks, layers));
        match block.filter(|(range, _)| range.start >= next) {
            Some((range, runs)) => {
                if range.start > next {
                    entries.lost.push(next..range.start);
                }
                next = range.end;
                entries.runs.extend(runs);
            }
            None => {
                entries.wrong.push(Wrong { offset: at as u64, what: "a block of entries does not have its checksum" });
            }
        }
    }
    if next < chunks {
        entries.lost.push(next..chunks);
    }
    if !entries.lost.is_empty() && entries.wrong.is_empty() {
        entries.wrong.push(Wrong { offset: 0, what: "entries of some chunks are missing" });
    }
    entries
}

/// A block, if it is one, and speaks of nothing but its chunks.
fn read(block: &[u8], salt: &Salt, index: u64, chunks: u32, layers: usize) -> Option<(Range<u32>, Vec<Run>)> {
    let (checked, found) = block.split_at_checked(BLOCK_BYTES - CHECKSUM_BYTES)?;
    if checksum(salt, index, checked).as_slice() != found {
        return None;
    }
    let range = u32_at(block, 0)..u32_at(block, 4);
    let count = usize::try_from(u32_at(block, 8)).ok().filter(|count| *count <= RUNS_MAX)?;
    if range.start > range.end || range.end > chunks {
        return None;
    }
    let mut runs = Vec::with_capacity(count);
    let mut next = range.start;
    for line in checked[HEAD_BYTES..].chunks_exact(RUN_BYTES).take(count) {
        let layer = u16::try_from(u32_at(line, 8)).ok()?;
        let run = Run { first: u32_at(line, 0), count: u32_at(line, 4), layer, generation: u32_at(line, 12) };
        let end = run.first.checked_add(run.count)?;
        if run.first < next || end > range.end || run.count == 0 || layer == 0 || usize::from(layer) > layers {
            return None;
        }
        next = end;
        runs.push(run);
    }
    Some((range, runs))
}
