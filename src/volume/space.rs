//! How much of the disk a store may still take: its quota, and the reserve of the file system. What is left is looked up
//! seldom, and handed out in the meantime from a credit that becomes small as the end comes near.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::sys::host;

/// The most that is handed out between two looks at the disk.
const CREDIT_BYTES_MAX: u64 = 64 << 20;

/// What a store may take.
#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    quota_bytes: Option<u64>,
    reserve_bytes: u64,
    credit: Mutex<u64>,
}

impl Space {
    pub(super) fn new(root: &Path, quota_bytes: Option<u64>, reserve_bytes: u64) -> Self {
        Self { root: root.to_owned(), quota_bytes, reserve_bytes, credit: Mutex::new(0) }
    }

    /// The directory of the store.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Takes bytes that are about to be written; `needed` says how many of them the disk has no space for yet, and is
    /// asked only when there is little left. The error is what may still be taken.
    pub(super) fn take(&self, bytes: u64, needed: impl FnOnce() -> io::Result<u64>) -> io::Result<Result<(), u64>> {
        if self.quota_bytes.is_none() && self.reserve_bytes == 0 {
            return Ok(Ok(()));
        }
        let mut credit = self.credit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rest) = credit.checked_sub(bytes) {
            *credit = rest;
            return Ok(Ok(()));
        }
        let available = self.available()?;
        if bytes > available {
            let needed = needed()?;
            *credit = 0;
            return Ok(if needed <= available || needed == 0 { Ok(()) } else { Err(available) });
        }
        *credit = (available - bytes).min((available / 8).min(CREDIT_BYTES_MAX));
        Ok(Ok(()))
    }

    /// Bytes that may be taken now.
    pub(super) fn available(&self) -> io::Result<u64> {
        let of_quota = match self.quota_bytes {
            Some(quota) => quota.saturating_sub(self.allocated()?),
            None => u64::MAX,
        };
        let of_disk = match self.reserve_bytes {
            0 => u64::MAX,
            reserve => host::space(&self.root)?.free_bytes.saturating_sub(reserve),
        };
        Ok(of_quota.min(of_disk))
    }

    /// Bytes that the files of the store take on the disk. Blocks that files share count for each of them.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        fn below(directory: &Path, depth: u32) -> io::Result<u64> {
            use std::os::unix::fs::MetadataExt;
            let mut bytes = 0;
            for entry in std::fs::read_dir(directory)? {
                let entry = entry?;
                // What is removed meanwhile takes nothing.
                let Ok(found) = entry.metadata() else { continue };
                if found.is_file() {
                    bytes += found.blocks() * 512;
                } else if found.is_dir() && depth > 0 {
                    bytes += below(&entry.path(), depth - 1).unwrap_or(0);
                }
            }
            Ok(bytes)
        }
        // The deepest are files of what is being made: <root>/.staging/<id>/map.
        below(&self.root, 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_taken_is_counted_and_what_is_there_needs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::new(dir.path(), Some(1 << 20), 0);
        assert_eq!(space.take(2 << 20, || Ok(2 << 20)).unwrap(), Err(1 << 20));
        assert_eq!(space.take(1 << 20, || unreachable!()).unwrap(), Ok(()));
        let file = crate::sys::file::create(&dir.path().join("layer")).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        assert_eq!(space.available().unwrap(), 0);
        assert_eq!(space.take(4096, || Ok(4096)).unwrap(), Err(0));
        assert_eq!(space.take(4096, || Ok(0)).unwrap(), Ok(()), "it is written over");
        let all = Space::new(dir.path(), None, u64::MAX);
        assert_eq!(all.take(1, || Ok(1)).unwrap(), Err(0), "all of the disk is a reserve");
        assert_eq!(Space::new(dir.path(), None, 0).take(u64::MAX, || unreachable!()).unwrap(), Ok(()));
    }
}
