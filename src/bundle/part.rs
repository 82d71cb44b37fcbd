//! Parts of a bundle for another host that has it in parts. What is handed out was verified, also of a bundle that is
//! damaged elsewhere, or of which only a part is here.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::launch::OpenBundleError;
use super::manifest::Manifest;
use super::partial::range_of;
use super::places::{MANIFEST, MEMORY, Places, STATE};
use super::signatures::{BundleSignature, SignError, Signed, write_signatures};
use super::store::Store;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::units::PAGE_BYTES;

/// Most bytes of memory that are read at once.
pub const PART_BYTES_MAX: u64 = 1 << 20;

/// A part of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BundlePart {
    /// The bytes of its manifest.
    Manifest,
    /// Its saved state.
    State,
    /// Its signatures, as [`read_signatures`](super::read_signatures) reads them; nothing when there is none.
    Signatures,
    /// A range of guest memory, as the guest sees it.
    Memory {
        /// Its first byte.
        offset: u64,
        /// How many, [`PART_BYTES_MAX`] at most.
        bytes: u64,
    },
}

/// Why a part is not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadPartError {
    /// The bundle is not here, or must not be used.
    #[error(transparent)]
    Read(#[from] ReadBundleError),
    /// The memory of what it builds on cannot be used.
    #[error(transparent)]
    Open(#[from] OpenBundleError),
    /// Its signatures cannot be read.
    #[error(transparent)]
    Signatures(#[from] SignError),
    /// There is no such range of memory.
    #[error(
        "{bytes} bytes of memory from {offset} of bundle {bundle}: it has {memory_bytes}, and {PART_BYTES_MAX} are read at \
         once"
    )]
    Beyond {
        /// The bundle.
        bundle: BundleId,
        /// The first byte that was asked for.
        offset: u64,
        /// How many were.
        bytes: u64,
        /// How many there are.
        memory_bytes: u64,
    },
    /// Of the bundle only a part is here, and not this one.
    #[error("of bundle {bundle} only a part is here, and chunk {chunk} is not")]
    NotHere {
        /// The bundle.
        bundle: BundleId,
        /// The first chunk that is not here.
        chunk: u64,
    },
}

impl ReadPartError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Read(error) => error.retry(),
            Self::Open(error) => error.retry(),
            Self::Signatures(error) => error.retry(),
            Self::Beyond { .. } => Retry::Never,
            Self::NotHere { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Reads a part of a bundle, or of one of which only a part is here.
    pub fn read_part(&self, id: &BundleId, part: BundlePart) -> Result<Vec<u8>, ReadPartError> {
        match self.manifest(id) {
            Ok(manifest) => self.read_part_of_whole(id, &manifest, part),
            Err(ReadBundleError::Unknown { .. }) => self.read_part_of_partial(id, part),
            Err(error @ (ReadBundleError::Damaged { .. } | ReadBundleError::File { .. })) => Err(error.into()),
        }
    }

    fn read_part_of_whole(
        &self,
        id: &BundleId,
        manifest: &Manifest,
        part: BundlePart,
    ) -> Result<Vec<u8>, ReadPartError> {
        match part {
            BundlePart::Manifest => Ok(self.manifest_bytes(id, &mut self.places().open(id, MANIFEST)?)?),
            BundlePart::State => {
                let mut bytes = Vec::new();
                let file = self.verified_state(id, manifest)?;
                let read = file.take(manifest.state.bytes).read_to_end(&mut bytes);
                read.map_err(|source| self.unread(id, STATE, source))?;
                Ok(bytes)
            }
            BundlePart::Signatures => {
                let Signed { manifest_digest, signatures, .. } = self.signed(id)?;
                self.signatures_part(id, &manifest_digest, signatures)
            }
            BundlePart::Memory { offset, bytes } => {
                let range = memory_range(id, manifest, offset, bytes)?;
                let unread = |source| ReadPartError::from(self.unread(id, MEMORY, source));
                let is_verified = self.known(id).is_some_and(|known| known.memory.is_some());
                if is_verified || manifest.is_diff() {
                    let mut part = buffer(&range);
                    self.flat_memory(id, manifest)?.read_exact_at(&mut part, range.start).map_err(unread)?;
                    return Ok(part);
                }
                // Whoever asks for some of it does not wait until all of it is read.
                let memory = self.places().open(id, MEMORY)?;
                self.check_length(id, &self.stamp(id, &memory, MEMORY)?, manifest)?;
                let part = verified(&memory, manifest, &range).map_err(unread)?;
                part.map_err(|index| {
                    let chunk = range_of(manifest, index);
                    let (first_page, last_page) = (chunk.start / PAGE_BYTES, (chunk.end - 1) / PAGE_BYTES);
                    let damage = Damage::Chunk { index, first_page, last_page };
                    ReadBundleError::Damaged { bundle: id.clone(), damage }.into()
                })
            }
        }
    }

    fn read_part_of_partial(&self, id: &BundleId, part: BundlePart) -> Result<Vec<u8>, ReadPartError> {
        let directory = self.places().partial(id);
        match part {
            BundlePart::Manifest => Ok(self.manifest_bytes(id, &mut Places::open_in(&directory, id, MANIFEST)?)?),
            BundlePart::State => {
                let (manifest, _) = self.partial_manifest(id)?;
                Ok(self.partial_state(id, &manifest)?)
            }
            BundlePart::Signatures => {
                let (_, digest) = self.partial_manifest(id)?;
                self.signatures_part(id, &digest, self.beside(id)?.signatures)
            }
            BundlePart::Memory { offset, bytes } => {
                let (manifest, _) = self.partial_manifest(id)?;
                let range = memory_range(id, &manifest, offset, bytes)?;
                let memory = Places::open_in(&directory, id, MEMORY)?;
                match verified(&memory, &manifest, &range) {
                    Ok(Ok(part)) => Ok(part),
                    Ok(Err(chunk)) => Err(ReadPartError::NotHere { bundle: id.clone(), chunk }),
                    Err(source) => {
                        let path = directory.join(MEMORY);
                        Err(ReadBundleError::File { bundle: id.clone(), path, source }.into())
                    }
                }
            }
        }
    }

    fn signatures_part(
        &self,
        id: &BundleId,
        manifest_digest: &Digest,
        mut signatures: Vec<BundleSignature>,
    ) -> Result<Vec<u8>, ReadPartError> {
        // Somebody wrote into the file who is not this program: nobody would take the others with it.
        signatures.retain(|one| one.is_of(manifest_digest));
        if signatures.is_empty() {
            return Ok(Vec::new());
        }
        let path = self.places().signatures_of(id);
        Ok(write_signatures(signatures).map_err(|_| SignError::Malformed { path })?)
    }
}

/// The range that was asked for, if there is one.
fn memory_range(id: &BundleId, manifest: &Manifest, offset: u64, bytes: u64) -> Result<Range<u64>, ReadPartError> {
    let memory_bytes = manifest.machine.memory_bytes;
    let end = offset.checked_add(bytes).filter(|end| *end <= memory_bytes && bytes <= PART_BYTES_MAX);
    end.map(|end| offset..end).ok_or_else(|| ReadPartError::Beyond { bundle: id.clone(), offset, bytes, memory_bytes })
}

fn buffer(range: &Range<u64>) -> Vec<u8> {
    // At most a chunk, or a part.
    vec![0; usize::try_from(range.end - range.start).unwrap_or(0)]
}

/// A range of memory, of which each chunk was compared with its digest; or the first chunk that is something else.
fn verified(memory: &File, manifest: &Manifest, range: &Range<u64>) -> io::Result<Result<Vec<u8>, u64>> {
    let mut part = Vec::new();
    let chunk_bytes = u64::from(manifest.memory.chunk_bytes);
    for index in range.start / chunk_bytes..range.end.div_ceil(chunk_bytes) {
        let chunk = range_of(manifest, index);
        let wanted = range.start.max(chunk.start)..range.end.min(chunk.end);
        let mut content = buffer(&chunk);
        // One of zeros is here by being no data.
        if let Some(digest) = manifest.memory.digest(index) {
            match memory.read_exact_at(&mut content, chunk.start) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Err(index)),
                Err(error) => return Err(error),
            }
            if Digest::of(&content) != digest {
                return Ok(Err(index));
            }
        }
        let at = |offset: u64| usize::try_from(offset - chunk.start).unwrap_or(usize::MAX);
        part.extend_from_slice(&content[at(wanted.start)..at(wanted.end)]);
    }
    Ok(Ok(part))
}
