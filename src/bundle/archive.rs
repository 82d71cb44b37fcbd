//! Bundles as one stream of bytes: records between a header and an ending with a digest over all of it. Written and read
//! once, from the start to the end, without going back. What comes may come from anybody: each length is checked before
//! anything is made of it, and memory is taken for what has arrived, not for what was announced.

use std::io::{self, Read, Write};

use super::digest::Digest;
use super::manifest::{MANIFEST_BYTES_MAX, STATE_BYTES_MAX};
use super::signatures::BundleSignature;
use crate::signing::{KEY_BYTES, PublicKey, SIGNATURE_BYTES, Signature};

/// First bytes of the stream.
pub const MAGIC: [u8; 8] = *b"HRTHBNDL";

/// Version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// Most bytes of memory in a record.
pub const MEMORY_BYTES_MAX: usize = 1 << 20;

/// Bytes of a record's header: kind and length.
const HEADER_BYTES: usize = 8;

/// Bytes of an offset in memory.
const OFFSET_BYTES: usize = 8;

/// Bytes of the digest in the ending.
const DIGEST_BYTES: usize = 32;

mod kind {
    pub(super) const MANIFEST: u32 = 1;
    pub(super) const STATE: u32 = 2;
    pub(super) const MEMORY: u32 = 3;
    pub(super) const SIGNATURE: u32 = 4;
    pub(super) const END: u32 = 5;
}

/// Why bytes are not what was exported.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// They begin otherwise.
    #[error("this is no exported bundle: it begins with other bytes")]
    Magic,
    /// Of a version this program does not read.
    #[error("an exported bundle of version {found}, and this program reads version {VERSION}")]
    Version {
        /// The version.
        found: u32,
    },
    /// They stop too early.
    #[error("it ends after {at} bytes, before its end")]
    Truncated {
        /// Bytes there are.
        at: u64,
    },
    /// A record that cannot be.
    #[error("the record at byte {at} of it: {reason}")]
    Record {
        /// Where it begins.
        at: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The digest at the end is another one.
    #[error("it was changed on its way: the digest at its end is another one")]
    Digest,
    /// They go on.
    #[error("it goes on after its end at byte {at}")]
    Trailing {
        /// Where it ended.
        at: u64,
    },
    /// They do not come.
    #[error("it broke off after {at} bytes")]
    Read {
        /// Bytes that came.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A record, in the order they come: `(Manifest State Memory* Signature*)+ End`.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// `manifest.json` of a bundle. What follows is its.
    Manifest(&'a [u8]),
    /// `state.bin`.
    State(&'a [u8]),
    /// A part of `memory.img`; what is in none is zero.
    Memory {
        /// Where it goes: after all of the parts before it.
        offset: u64,
        /// What goes there, a byte at least.
        bytes: &'a [u8],
    },
    /// Somebody's signature.
    Signature(BundleSignature),
    /// All of it came, as it was written, and nothing after it.
    End,
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    First,
    State,
    /// Memory from this offset on.
    Memory(u64),
    Signatures,
    Nothing,
}

impl Next {
    /// What may come after a record of this kind; `None`: it may not come now.
    const fn after(self, kind: u32, memory_end: u64) -> Option<Self> {
        match (self, kind) {
            (Self::First | Self::Memory(_) | Self::Signatures, kind::MANIFEST) => Some(Self::State),
            (Self::State, kind::STATE) => Some(Self::Memory(0)),
            (Self::Memory(_), kind::MEMORY) => Some(Self::Memory(memory_end)),
            (Self::Memory(_) | Self::Signatures, kind::SIGNATURE) => Some(Self::Signatures),
            (Self::Memory(_) | Self::Signatures, kind::END) => Some(Self::Nothing),
            (_, _) => None,
        }
    }
}

/// Reads a stream.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    hash: blake3::Hasher,
    at: u64,
    next: Next,
    buffer: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn open(from: R) -> Result<Self, ArchiveError> {
        let mut reader = Self { from, hash: blake3::Hasher::new(), at: 0, next: Next::First, buffer: Vec::new() };
        let magic: [u8; MAGIC.len()] = reader.array()?;
        if magic != MAGIC {
            return Err(ArchiveError::Magic);
        }
        match u32::from_le_bytes(reader.array()?) {
            VERSION => Ok(reader),
            found => Err(ArchiveError::Version { found }),
        }
    }

    /// Reads a record. After the end there is none.
    pub fn next_part(&mut self) -> Result<Part<'_>, ArchiveError> {
        let begin = self.at;
        let wrong = |reason| ArchiveError::Record { at: begin, reason };
        if self.next == Next::Nothing {
            return Err(ArchiveError::Trailing { at: begin });
        }
        let kind = u32::from_le_bytes(self.array()?);
        let length = u32::from_le_bytes(self.array()?) as usize;
        let fits = match kind {
            kind::MANIFEST => (1..=MANIFEST_BYTES_MAX).contains(&length),
            kind::STATE => length as u64 <= STATE_BYTES_MAX,
            kind::MEMORY => (OFFSET_BYTES + 1..=OFFSET_BYTES + MEMORY_BYTES_MAX).contains(&length),
            kind::SIGNATURE => length == KEY_BYTES + SIGNATURE_BYTES,
            kind::END => length == DIGEST_BYTES,
            _ => return Err(wrong("its kind is unknown")),
        };
        if !fits {
            return Err(wrong("its length cannot be"));
        }
        let found = *self.hash.finalize().as_bytes();
        let offset = if kind == kind::MEMORY { u64::from_le_bytes(self.array()?) } else { 0 };
        let bytes = if kind == kind::MEMORY { length - OFFSET_BYTES } else { length };
        let memory_end = offset.checked_add(bytes as u64).ok_or_else(|| wrong("memory ends nowhere"))?;
        if matches!(self.next, Next::Memory(from) if kind == kind::MEMORY && offset < from) {
            return Err(wrong("memory is not in its order"));
        }
        self.next = self.next.after(kind, memory_end).ok_or_else(|| wrong("it does not belong there"))?;
        self.payload(bytes)?;
        match kind {
            kind::MANIFEST => Ok(Part::Manifest(&self.buffer)),
            kind::STATE => Ok(Part::State(&self.buffer)),
            kind::MEMORY => Ok(Part::Memory { offset, bytes: &self.buffer }),
            kind::SIGNATURE => {
                let (key, signature) = self.buffer.split_at(KEY_BYTES);
                match (key.try_into(), signature.try_into()) {
                    (Ok(key), Ok(signature)) => Ok(Part::Signature(BundleSignature {
                        key: PublicKey::from_bytes(key),
                        signature: Signature::from_bytes(signature),
                    })),
                    (_, _) => Err(wrong("its length cannot be")),
                }
            }
            _ => self.end(found),
        }
    }

    fn end(&mut self, found: [u8; DIGEST_BYTES]) -> Result<Part<'_>, ArchiveError> {
        if self.buffer != found {
            return Err(ArchiveError::Digest);
        }
        let at = self.at;
        match self.array::<1>() {
            Err(ArchiveError::Truncated { .. }) => Ok(Part::End),
            Ok(_) => Err(ArchiveError::Trailing { at }),
            Err(error) => Err(error),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ArchiveError> {
        let mut bytes = [0; N];
        self.payload(N)?;
        bytes.copy_from_slice(&self.buffer);
        Ok(bytes)
    }

    /// Reads so many bytes into the buffer.
    fn payload(&mut self, length: usize) -> Result<(), ArchiveError> {
        self.buffer.clear();
        let read = (&mut self.from).take(length as u64).read_to_end(&mut self.buffer);
        self.at += self.buffer.len() as u64;
        read.map_err(|source| ArchiveError::Read { at: self.at, source })?;
        if self.buffer.len() < length {
            return Err(ArchiveError::Truncated { at: self.at });
        }
        self.hash.update(&self.buffer);
        Ok(())
    }
}

/// Writes a stream. The order of the records is the caller's.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    hash: blake3::Hasher,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    pub fn begin(to: W) -> io::Result<Self> {
        let mut writer = Self { to, hash: blake3::Hasher::new() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        Ok(writer)
    }

    /// A bundle begins.
    pub fn manifest(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.record(kind::MANIFEST, &[bytes])
    }

    /// Its state.
    pub fn state(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.record(kind::STATE, &[bytes])
    }

    /// Some of its memory, [`MEMORY_BYTES_MAX`] at most in a record.
    pub fn memory(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for bytes in bytes.chunks(MEMORY_BYTES_MAX) {
            self.record(kind::MEMORY, &[&at.to_le_bytes(), bytes])?;
            at = at.saturating_add(MEMORY_BYTES_MAX as u64);
        }
        Ok(())
    }

    /// One of its signatures.
    pub fn signature(&mut self, one: &BundleSignature) -> io::Result<()> {
        self.record(kind::SIGNATURE, &[one.key.as_bytes(), one.signature.as_bytes()])
    }

    /// Writes the ending; what it was written to.
    pub fn end(mut self) -> io::Result<W> {
        self.header(kind::END, DIGEST_BYTES)?;
        let digest: Digest = Digest::from_bytes(*self.hash.finalize().as_bytes());
        self.put(digest.as_bytes())?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn record(&mut self, kind: u32, payload: &[&[u8]]) -> io::Result<()> {
        self.header(kind, payload.iter().map(|bytes| bytes.len()).sum())?;
        payload.iter().try_for_each(|bytes| self.put(bytes))
    }

    fn header(&mut self, kind: u32, length: usize) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[4..].copy_from_slice(&length.to_le_bytes());
        self.put(&header)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.to.write_all(bytes)
    }
}

#[cfg(test)]
mod tests;
