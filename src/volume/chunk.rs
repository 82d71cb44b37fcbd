//! Chunks: the unit in which a map says where a volume's bytes are; and which sizes and ranges there may be.

use std::ops::Range;

use super::error::VolumeError;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u64 = 64 << 10;

/// A volume's size is a multiple of this: the block of what guests and file systems count in.
pub const SIZE_STEP_BYTES: u64 = 4096;

/// The largest volume. Its chunks have numbers of 32 bits, with room to spare.
pub const SIZE_BYTES_MAX: u64 = 64 << 40;

/// Some bytes of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The chunk.
    pub(super) chunk: u32,
    /// Where the bytes begin in the volume.
    pub(super) start: u64,
    /// Where they end.
    pub(super) end: u64,
    /// Where the chunk ends: at the volume's end, if that comes first.
    pub(super) chunk_end: u64,
}

impl Piece {
    /// Whether they are all of the chunk.
    pub(super) const fn is_whole(self) -> bool {
        self.start == self.chunk as u64 * CHUNK_BYTES && self.end == self.chunk_end
    }

    pub(super) const fn range(self) -> Range<u64> {
        self.start..self.end
    }

    /// All of the chunk.
    pub(super) const fn chunk_range(self) -> Range<u64> {
        self.chunk as u64 * CHUNK_BYTES..self.chunk_end
    }
}

/// The number of the chunk that this byte is in. A volume is too short for other numbers.
pub(super) fn chunk_of(offset: u64) -> u32 {
    u32::try_from(offset / CHUNK_BYTES).unwrap_or(u32::MAX)
}

/// How many chunks a volume of this size has.
pub(super) fn chunks_in(size_bytes: u64) -> u32 {
    u32::try_from(size_bytes.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX)
}

/// The bytes of some chunks, in a volume of this size.
pub(super) fn bytes_of(chunks: &Range<u32>, size_bytes: u64) -> Range<u64> {
    let at = |chunk: u32| (u64::from(chunk) * CHUNK_BYTES).min(size_bytes);
    at(chunks.start)..at(chunks.end)
}

/// A range cut at the bounds of chunks.
pub(super) fn pieces(range: Range<u64>, size_bytes: u64) -> impl Iterator<Item = Piece> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let chunk = chunk_of(at);
        let chunk_end = (u64::from(chunk) + 1).saturating_mul(CHUNK_BYTES).min(size_bytes);
        let piece = Piece { chunk, start: at, end: chunk_end.min(range.end), chunk_end };
        at = piece.end;
        Some(piece)
    })
}

/// The bytes from `offset` on, if a volume of this size has them all.
pub(super) fn range_in(subject: &str, offset: u64, length: u64, size_bytes: u64) -> Result<Range<u64>, VolumeError> {
    match offset.checked_add(length).filter(|end| *end <= size_bytes) {
        Some(end) => Ok(offset..end),
        None => Err(VolumeError::Range { subject: subject.to_owned(), offset, length, size_bytes }),
    }
}

/// Whether a volume may have this size.
pub(super) fn check_size(size_bytes: u64, max: u64) -> Result<(), VolumeError> {
    let max = max.min(SIZE_BYTES_MAX) / SIZE_STEP_BYTES * SIZE_STEP_BYTES;
    if size_bytes == 0 || !size_bytes.is_multiple_of(SIZE_STEP_BYTES) || size_bytes > max {
        return Err(VolumeError::Size { size_bytes, step: SIZE_STEP_BYTES, max });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_a_range_cut_at_chunks() {
        let size = 2 * CHUNK_BYTES + 4096;
        let found: Vec<Piece> = pieces(CHUNK_BYTES - 10..size, size).collect();
        assert_eq!(found.len(), 3);
        assert_eq!((found[0].chunk, found[0].range(), found[0].is_whole()), (0, CHUNK_BYTES - 10..CHUNK_BYTES, false));
        assert_eq!((found[1].chunk, found[1].is_whole()), (1, true));
        assert_eq!((found[2].chunk_range(), found[2].is_whole()), (2 * CHUNK_BYTES..size, true));
        assert_eq!(pieces(5..5, size).count(), 0);
    }

    #[test]
    fn ranges_beyond_the_end_are_refused() {
        for (offset, length) in [(u64::MAX, 1), (0, 4097), (4096, 1), (1, u64::MAX)] {
            assert!(range_in("vol-x", offset, length, 4096).is_err(), "{offset} {length}");
        }
        assert_eq!(range_in("vol-x", 4096, 0, 4096).unwrap(), 4096..4096);
        for size in [0, 1, 4097, SIZE_BYTES_MAX + 4096, u64::MAX] {
            assert!(check_size(size, u64::MAX).is_err(), "{size}");
        }
        assert!(check_size(4096, u64::MAX).is_ok() && check_size(8192, 4096).is_err());
    }
}
