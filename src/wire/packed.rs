//! Pages as one lz4 block: made by the source of a migration, unpacked by its target. A block says nothing of its own
//! length: how many bytes it has to become is said beside it, and neither more nor fewer are taken. It is another host's
//! word, so it is unpacked by code without anything unsafe in it, into memory that is bounded before it is looked at.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use super::stream::PAGES_MAX;

/// Most bytes that a block becomes: the pages of one frame.
const UNPACKED_BYTES_MAX: usize = PAGES_MAX as usize * 4096;

/// Bytes that are no block, or become more or fewer than was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a block of {bytes} bytes does not unpack to {wanted}")]
pub struct UnpackError {
    /// Bytes of the block.
    pub bytes: usize,
    /// How many it had to become.
    pub wanted: usize,
}

/// Packs pages. What it needs for that it keeps.
pub struct Packer {
    table: CompressTable,
    block: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Packer")
    }
}

impl Default for Packer {
    fn default() -> Self {
        Self { table: CompressTable::large(), block: vec![0; get_maximum_output_size(UNPACKED_BYTES_MAX)] }
    }
}

impl Packer {
    /// The bytes as a block; `None` if that would not be shorter, or if they are more than a frame may have.
    pub fn pack(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        if bytes.len() > UNPACKED_BYTES_MAX {
            return None;
        }
        let packed = compress_into_with_table(bytes, &mut self.block, &mut self.table).ok()?;
        self.block.get(..packed).filter(|block| block.len() < bytes.len())
    }
}

/// Unpacks a block that has to become this many bytes, which are no more than the pages of one frame; `bytes` becomes
/// those.
pub fn unpack(block: &[u8], wanted: usize, bytes: &mut Vec<u8>) -> Result<(), UnpackError> {
    let failed = UnpackError { bytes: block.len(), wanted };
    if wanted > UNPACKED_BYTES_MAX {
        return Err(failed);
    }
    bytes.resize(wanted, 0);
    match decompress_into(block, bytes) {
        Ok(unpacked) if unpacked == wanted => Ok(()),
        Ok(_) | Err(_) => Err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_shrink_is_not_packed() {
        let mut packer = Packer::default();
        let noise: Vec<u8> = (0..4_u32).flat_map(|part| *blake3::hash(&part.to_le_bytes()).as_bytes()).collect();
        assert_eq!(packer.pack(&noise), None);
        assert_eq!(packer.pack(&[]), None);
        assert_eq!(packer.pack(&vec![0; UNPACKED_BYTES_MAX + 1]), None);
        let most = vec![7; UNPACKED_BYTES_MAX];
        let block = packer.pack(&most).unwrap();
        assert!(block.len() < most.len() / 200, "{}", block.len());
        let mut bytes = Vec::new();
        assert_eq!(unpack(block, most.len(), &mut bytes), Ok(()));
        assert!(bytes == most);
    }

    #[test]
    fn a_block_becomes_what_was_said_and_nothing_else() {
        let mut packer = Packer::default();
        let block = packer.pack(&[9; 8192]).unwrap().to_vec();
        let mut bytes = Vec::new();
        for wanted in [0, 4096, 8191, 8193, 12288, UNPACKED_BYTES_MAX, UNPACKED_BYTES_MAX + 1, usize::MAX] {
            let refused = unpack(&block, wanted, &mut bytes);
            assert_eq!(refused, Err(UnpackError { bytes: block.len(), wanted }));
            assert!(bytes.capacity() <= UNPACKED_BYTES_MAX);
        }
        assert!(unpack(&block[..block.len() - 1], 8192, &mut bytes).is_err());
        assert!(unpack(&[], 4096, &mut bytes).is_err());
        assert_eq!(unpack(&block, 8192, &mut bytes), Ok(()));
        assert_eq!(bytes, [9; 8192]);
    }

    /// Bytes as guests have them: repeated pieces, and some that repeat nothing.
    fn pages() -> impl Strategy<Value = Vec<u8>> {
        let piece = (proptest::collection::vec(any::<u8>(), 1..64), 1..200_usize);
        proptest::collection::vec(piece, 1..40).prop_map(|pieces| {
            let mut bytes: Vec<u8> = pieces.iter().flat_map(|(piece, times)| piece.repeat(*times)).collect();
            let pages = bytes.len().div_ceil(4096).min(PAGES_MAX as usize);
            bytes.resize(pages * 4096, 0);
            bytes
        })
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(bytes in pages()) {
            let mut packer = Packer::default();
            let mut unpacked = vec![1; 100];
            if let Some(block) = packer.pack(&bytes) {
                prop_assert!(block.len() < bytes.len());
                prop_assert_eq!(unpack(block, bytes.len(), &mut unpacked), Ok(()));
                prop_assert!(unpacked == bytes);
            }
        }

        #[test]
        fn garbage_never_panics(block in proptest::collection::vec(any::<u8>(), 0..2000), pages in 0..400_usize) {
            let mut bytes = Vec::new();
            let _ = unpack(&block, pages * 4096, &mut bytes);
            prop_assert!(bytes.capacity() <= UNPACKED_BYTES_MAX);
        }

        #[test]
        fn a_block_that_was_changed_never_panics(bytes in pages(), at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
            let mut packer = Packer::default();
            if let Some(block) = packer.pack(&bytes) {
                let mut block = block.to_vec();
                let at = at.index(block.len());
                block[at] = value;
                let mut unpacked = Vec::new();
                let _ = unpack(&block, bytes.len(), &mut unpacked);
                let _ = unpack(&block[..cut.index(block.len())], bytes.len(), &mut unpacked);
                prop_assert!(unpacked.capacity() <= UNPACKED_BYTES_MAX);
            }
        }
    }
}
