//! How sections become bytes: postcard inside, and around them a file form that can be checked before anything is
//! decoded.
//!
//! ```text
//! magic "HEARTHST" | format u16 | count u16 | count × (kind u16, version u16, instance u16, 0 u16, length u32, bytes)
//! | blake3 of everything before, 32 bytes
//! ```
//! Integers are little-endian. A reader refuses another magic or format, unknown kinds, lengths over their limits,
//! bytes after the digest and a digest that does not match, before it looks into any section.

use serde::{Serialize, de::DeserializeOwned};

use super::{Section, SectionKind, SectionName, Sections};

/// First bytes of the file form.
pub const MAGIC: [u8; 8] = *b"HEARTHST";

/// Version of the file form.
pub const FORMAT: u16 = 1;

/// Most bytes in one section. The largest is a vCPU: registers, up to 256 MSRs, an xsave area of at most a few tens
/// of KiB; a vsock device with all its streams stays below 128 KiB.
pub const SECTION_BYTES_MAX: usize = 1 << 20;

/// Most sections of one machine: 32 vCPUs, 19 slots of two sections, and a handful more, rounded up.
pub const SECTIONS_MAX: usize = 256;

const DIGEST_BYTES: usize = 32;
const SECTION_HEADER_BYTES: usize = 12;

/// Why bytes are not saved state, or state cannot be bytes.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// More than a limit allows.
    #[error("{what}: {found} is over the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// How many there were.
        found: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// The value's encoding is malformed.
    #[error("malformed value")]
    Malformed(#[source] postcard::Error),
    /// There are bytes after the value.
    #[error("{count} bytes left over after the value")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// The bytes end too early.
    #[error("truncated: {wanted} more bytes were expected, {found} are there")]
    Truncated {
        /// Bytes that were needed.
        wanted: usize,
        /// Bytes that were left.
        found: usize,
    },
    /// Not this format at all.
    #[error("not saved state: the first bytes are not {MAGIC:?}")]
    Magic,
    /// A format this build does not read.
    #[error("format {found}, this build reads {FORMAT}")]
    Format {
        /// The format found.
        found: u16,
    },
    /// A section kind this build does not know.
    #[error("unknown section kind {number}")]
    Kind {
        /// Its number.
        number: u16,
    },
    /// The content is not what was written.
    #[error("the digest does not match: the bytes were changed after they were written")]
    Digest,
    /// The same section twice.
    #[error("malformed state")]
    Duplicate(#[source] super::DuplicateSection),
}

/// Encodes one value; refuses more than [`SECTION_BYTES_MAX`].
pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = postcard::to_stdvec(value).map_err(CodecError::Malformed)?;
    limit("bytes in a section", bytes.len(), SECTION_BYTES_MAX)?;
    Ok(bytes)
}

/// Decodes one value that must fill `bytes`.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    limit("bytes in a section", bytes.len(), SECTION_BYTES_MAX)?;
    match postcard::take_from_bytes(bytes).map_err(CodecError::Malformed)? {
        (value, []) => Ok(value),
        (_, rest) => Err(CodecError::TrailingBytes { count: rest.len() }),
    }
}

fn limit(what: &'static str, found: usize, limit: usize) -> Result<(), CodecError> {
    if found > limit { Err(CodecError::Limit { what, found, limit }) } else { Ok(()) }
}

/// The file form of `sections`.
pub fn to_bytes(sections: &Sections) -> Result<Vec<u8>, CodecError> {
    limit("sections", sections.len(), SECTIONS_MAX)?;
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(u16::try_from(sections.len()).unwrap_or(u16::MAX).to_le_bytes());
    for section in sections.iter() {
        limit("bytes in a section", section.bytes.len(), SECTION_BYTES_MAX)?;
        bytes.extend((section.name.kind as u16).to_le_bytes());
        bytes.extend(section.version.to_le_bytes());
        bytes.extend(section.name.instance.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(u32::try_from(section.bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(&section.bytes);
    }
    let digest = blake3::hash(&bytes);
    bytes.extend(digest.as_bytes());
    Ok(bytes)
}

/// Reads the file form.
pub fn from_bytes(bytes: &[u8]) -> Result<Sections, CodecError> {
    let mut rest = Reader { bytes };
    if rest.array::<8>()? != MAGIC {
        return Err(CodecError::Magic);
    }
    let found = rest.u16()?;
    if found != FORMAT {
        return Err(CodecError::Format { found });
    }
    let count = usize::from(rest.u16()?);
    limit("sections", count, SECTIONS_MAX)?;
    let mut sections = Sections::new();
    for _ in 0..count {
        let header = rest.take(SECTION_HEADER_BYTES)?;
        let mut header = Reader { bytes: header };
        let number = header.u16()?;
        let kind = SectionKind::from_number(number).ok_or(CodecError::Kind { number })?;
        let version = header.u16()?;
        let instance = header.u16()?;
        header.u16()?;
        let length = u32::from_le_bytes(header.array()?) as usize;
        limit("bytes in a section", length, SECTION_BYTES_MAX)?;
        let section = Section { name: SectionName { kind, instance }, version, bytes: rest.take(length)?.to_vec() };
        sections.push(section).map_err(CodecError::Duplicate)?;
    }
    let written = bytes.len() - rest.bytes.len();
    let digest = rest.array::<DIGEST_BYTES>()?;
    if !rest.bytes.is_empty() {
        return Err(CodecError::TrailingBytes { count: rest.bytes.len() });
    }
    if blake3::hash(&bytes[..written]) != blake3::Hash::from_bytes(digest) {
        return Err(CodecError::Digest);
    }
    Ok(sections)
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, wanted: usize) -> Result<&'a [u8], CodecError> {
        let Some((taken, rest)) = self.bytes.split_at_checked(wanted) else {
            return Err(CodecError::Truncated { wanted, found: self.bytes.len() });
        };
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u16(&mut self) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_sections() -> impl Strategy<Value = Sections> {
        let section = (0_u16..4, any::<u16>(), proptest::collection::vec(any::<u8>(), 0..64));
        proptest::collection::vec(section, 0..6).prop_map(|parts| {
            let mut sections = Sections::new();
            for (at, (instance, version, bytes)) in parts.into_iter().enumerate() {
                let kind = if at % 2 == 0 { SectionKind::Vcpu } else { SectionKind::Net };
                let _ = sections.push(Section { name: SectionName { kind, instance }, version, bytes });
            }
            sections
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(sections in any_sections()) {
            prop_assert_eq!(from_bytes(&to_bytes(&sections).unwrap()).unwrap(), sections);
        }

        #[test]
        fn one_flipped_bit_is_found(sections in any_sections(), at: prop::sample::Index, bit in 0_u8..8) {
            let mut bytes = to_bytes(&sections).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(from_bytes(&bytes).is_err());
        }

        #[test]
        fn truncated_and_prolonged_state_is_refused(sections in any_sections(), at: prop::sample::Index) {
            let mut bytes = to_bytes(&sections).unwrap();
            prop_assert!(from_bytes(&bytes[..at.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert!(from_bytes(&bytes).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(from_bytes(&bytes).is_err());
        }
    }
}
