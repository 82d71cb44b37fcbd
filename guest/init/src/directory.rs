//! Entries of a directory, as the kernel lists them.

use alloc::ffi::CString;
use alloc::vec;
use alloc::vec::Vec;

use crate::sys::{Errno, Fd};

/// The names in an open directory, but for itself and the one above.
pub(crate) fn names(directory: &Fd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    let mut entries = vec![0; 4096];
    loop {
        let count = directory.read_directory(&mut entries)?;
        if count == 0 {
            return Ok(names);
        }
        let found = Entries(entries.get(..count).unwrap_or_default());
        let found = found.filter(|entry| !matches!(entry.name, b"." | b".."));
        names.extend(found.filter_map(|entry| CString::new(entry.name).ok()));
    }
}

/// Entries in bytes that `read_directory` gave: `struct linux_dirent64`, one after the other.
pub(crate) struct Entries<'a>(pub(crate) &'a [u8]);

/// One entry.
pub(crate) struct Entry<'a> {
    /// File name, without the null.
    pub(crate) name: &'a [u8],
    /// Whether it is known to be a directory; not every file system says.
    pub(crate) is_directory: bool,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        const DT_DIR: u8 = 4;
        // Inode (8), offset (8), length of this entry (2), type (1), name with a null byte and padding.
        let &[low, high, kind] = self.0.get(16..19)?.first_chunk()?;
        let length = usize::from(u16::from_le_bytes([low, high]));
        let (entry, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        let name = entry.get(19..).and_then(|name| name.split(|byte| *byte == 0).next()).unwrap_or_default();
        Some(Entry { name, is_directory: kind == DT_DIR })
    }
}
