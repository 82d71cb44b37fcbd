//! The contents of a container's files, one behind the other in a file of ours.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use super::fault::ContainerError;
use super::not_written;
use crate::units::Bytes;

/// Bytes that are copied at once.
const CHUNK_BYTES: usize = 128 * 1024;

/// A file's content: where it lies, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Content {
    start: u64,
    /// Its length.
    pub(super) bytes: u64,
}

/// Why a content was not taken.
#[derive(Debug)]
pub(super) enum SpoolError {
    /// The archive cannot be read.
    Read(io::Error),
    /// It ends too early.
    Cut,
    /// It cannot be kept.
    Keep(ContainerError),
}

/// All contents.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl Spool {
    pub(super) const fn new(file: File, bytes_max: u64) -> Self {
        Self { file, bytes: 0, bytes_max }
    }

    /// Takes a content of `bytes` from an archive.
    pub(super) fn take(&mut self, mut from: impl Read, bytes: u64) -> Result<Content, SpoolError> {
        let start = self.bytes;
        let end = start.checked_add(bytes).filter(|end| *end <= self.bytes_max);
        let end = end.ok_or(SpoolError::Keep(ContainerError::NoSpace { left: Bytes(self.bytes_max) }))?;
        let mut buffer = vec![0; usize::try_from(bytes).map_or(CHUNK_BYTES, |bytes| bytes.min(CHUNK_BYTES))];
        while self.bytes < end {
            let left = usize::try_from(end - self.bytes).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            let chunk = buffer.get_mut(..left).unwrap_or_default();
            let count = match from.read(chunk) {
                Ok(0) => return Err(SpoolError::Cut),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(SpoolError::Read(error)),
            };
            let chunk = chunk.get(..count).unwrap_or_default();
            self.file.write_all_at(chunk, self.bytes).map_err(|error| SpoolError::Keep(not_written(error)))?;
            self.bytes += u64::try_from(count).unwrap_or(0);
        }
        Ok(Content { start, bytes })
    }

    /// Writes a content to `to`.
    pub(super) fn give(&self, content: Content, to: &mut impl Write) -> io::Result<()> {
        let end = content.start + content.bytes;
        let mut at = content.start;
        let mut buffer = vec![0; usize::try_from(content.bytes).map_or(CHUNK_BYTES, |bytes| bytes.min(CHUNK_BYTES))];
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(CHUNK_BYTES).min(buffer.len());
            let chunk = buffer.get_mut(..left).unwrap_or_default();
            self.file.read_exact_at(chunk, at)?;
            to.write_all(chunk)?;
            at += u64::try_from(left).unwrap_or(0);
        }
        Ok(())
    }
}
