//! How this process knows that it verified these very files before: reading all of memory at each launch would cost
//! more than the launch. A stamp is what stat(2) says; a write, a rename and a change of mode all leave another one.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Which file, and in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The file as it is now. Take it before reading: what changes meanwhile then counts as changed.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// The file's length.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the content is the same, as far as the kernel can tell; the mode may be another.
    pub(super) fn same_content(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
            && self.bytes == other.bytes
            && self.modified == other.modified
    }
}
