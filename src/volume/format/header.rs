//! The header of a map: whose it is, and which layers its chunks lie in.

use super::{BLOCK_BYTES, CHECKSUM_BYTES, Salt, Wrong, is_size, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"HEARTHVM";
const VERSION: u32 = 1;

/// Bytes before the list of layers.
const FIXED_BYTES: usize = 80;

/// Bytes of a line of that list.
const LINE_BYTES: usize = 16;

/// Most layers of a map: numbers of layers have 16 bits, of which the first and the last say something else.
pub(in crate::volume) const LAYERS_MAX: usize = 0xfffe;

/// What a map begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the volume.
    pub size_bytes: u64,
    /// The generation of what is written.
    pub generation: u32,
    /// Changes of this generation and of earlier ones are not all known: power was lost.
    pub incomplete_to: u32,
    /// Digest of the id of the boot in which records are appended.
    pub boot: [u8; 32],
    /// The layer that is written, counted from 1; 0 in a snapshot.
    pub top: u16,
    /// The layers, in the order of their numbers in entries: 1 is the first.
    pub layers: Vec<LayerLine>,
}

/// A layer of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLine {
    /// The number it has in the store, also its file's name.
    pub number: u64,
    /// Bytes it has at least. What is beyond reads as zero.
    pub bytes: u64,
}

pub(super) fn encode(header: &Header, blocks: u32) -> (Vec<u8>, Salt) {
    let length = FIXED_BYTES + header.layers.len() * LINE_BYTES + CHECKSUM_BYTES;
    let length = length.next_multiple_of(BLOCK_BYTES);
    let Header { size_bytes, generation, incomplete_to, boot, top, layers } = header;
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(number(length).to_le_bytes());
    bytes.extend(size_bytes.to_le_bytes());
    bytes.extend(generation.to_le_bytes());
    bytes.extend(incomplete_to.to_le_bytes());
    bytes.extend(boot);
    bytes.extend(u32::from(*top).to_le_bytes());
    bytes.extend(number(layers.len()).to_le_bytes());
    bytes.extend(blocks.to_le_bytes());
    bytes.extend([0; 4]);
    for layer in layers {
        bytes.extend(layer.number.to_le_bytes());
        bytes.extend(layer.bytes.to_le_bytes());
    }
    bytes.resize(length - CHECKSUM_BYTES, 0);
    let salt = *blake3::hash(&bytes).as_bytes();
    bytes.extend(salt);
    (bytes, salt)
}

/// The checksum at the end of a header.
pub(super) fn checksum_of(header: &[u8]) -> Salt {
    header.last_chunk().copied().unwrap_or_default()
}

/// The header, how many blocks of entries follow, and where.
pub(super) fn parse(bytes: &[u8]) -> Result<(Header, u32, usize), Wrong> {
    let wrong = |offset, what| Err(Wrong { offset, what });
    if bytes.get(..8) != Some(MAGIC.as_slice()) {
        return wrong(0, "no map of a volume begins so");
    }
    if u32_at(bytes, 8) != VERSION {
        return wrong(8, "a version of maps that this program does not know");
    }
    let length = usize::try_from(u32_at(bytes, 12)).unwrap_or(usize::MAX);
    let longest = (FIXED_BYTES + LAYERS_MAX * LINE_BYTES + CHECKSUM_BYTES).next_multiple_of(BLOCK_BYTES);
    if length == 0 || !length.is_multiple_of(BLOCK_BYTES) || length > longest || length > bytes.len() {
        return wrong(12, "the header's length is none");
    }
    let (checked, checksum) = bytes[..length].split_at(length - CHECKSUM_BYTES);
    if blake3::hash(checked).as_bytes().as_slice() != checksum {
        return wrong(0, "the header does not have its checksum");
    }
    let count = usize::try_from(u32_at(bytes, 68)).unwrap_or(usize::MAX);
    let Some(lines) = count.checked_mul(LINE_BYTES).and_then(|bytes| checked.get(FIXED_BYTES..FIXED_BYTES + bytes))
    else {
        return wrong(68, "more layers than the header has");
    };
    let layers =
        lines.chunks_exact(LINE_BYTES).map(|line| LayerLine { number: u64_at(line, 0), bytes: u64_at(line, 8) });
    let header = Header {
        size_bytes: u64_at(bytes, 16),
        generation: u32_at(bytes, 24),
        incomplete_to: u32_at(bytes, 28),
        boot: checked[32..64].try_into().unwrap_or_default(),
        top: u16::try_from(u32_at(bytes, 64)).unwrap_or(u16::MAX),
        layers: layers.collect(),
    };
    if !is_size(header.size_bytes) || header.layers.len() > LAYERS_MAX || usize::from(header.top) > header.layers.len()
    {
        return wrong(16, "no volume has this size and these layers");
    }
    Ok((header, u32_at(bytes, 72), length))
}
