//! The way to the disk: every change the store makes to a file or a directory is made here, so that it can be recorded,
//! in an order from which it can be told what a loss of power may leave.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::{extent, file, sparse};

/// A change of the disk. Files have numbers, since their names change; paths are below the store's root. All but
/// [`SyncBegin`](Self::SyncBegin) were done when they are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// A new and empty file has this name.
    Create {
        /// Its number from now on.
        file: u64,
        /// Its name.
        path: &'a Path,
    },
    /// The file of this name was opened.
    Open {
        /// Its number from now on, which differs from what others have it open under.
        file: u64,
        /// Its name.
        path: &'a Path,
    },
    /// Bytes were written.
    Write {
        /// To this file.
        file: u64,
        /// From here on.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range became zero (a hole, or space that is kept).
    Punch {
        /// Of this file.
        file: u64,
        /// From here on.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// The file has another length.
    Truncate {
        /// This file.
        file: u64,
        /// Its length.
        length: u64,
    },
    /// A file shares all blocks of another one.
    Share {
        /// The one that has the content.
        from: u64,
        /// The one that got it.
        to: u64,
    },
    /// What was done to the file up to here is to be made durable (fsync, fdatasync).
    SyncBegin {
        /// This file.
        file: u64,
    },
    /// It is durable, as it was at the beginning.
    SyncEnd {
        /// This file.
        file: u64,
    },
    /// A directory was made.
    MakeDirectory {
        /// Its name.
        path: &'a Path,
    },
    /// A file or a directory has another name, and what had that before is gone.
    Rename {
        /// Its old name.
        from: &'a Path,
        /// Its new one.
        to: &'a Path,
    },
    /// A file has no name any more, or a directory with all in it.
    Remove {
        /// The name.
        path: &'a Path,
    },
    /// The names in a directory are durable.
    SyncDirectory {
        /// The directory.
        path: &'a Path,
    },
}

/// Told all changes of the disk, by the threads that make them.
pub trait Recorder: fmt::Debug + Send + Sync {
    /// A change was made.
    fn record(&self, operation: &Operation<'_>);
}

/// The files below a store's root.
#[derive(Debug)]
pub(super) struct Disk {
    root: PathBuf,
    recorder: Option<Arc<dyn Recorder>>,
    next: AtomicU64,
}

/// An open file. It is written and read at offsets only, by any number of threads.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    number: u64,
    recorder: Option<Arc<dyn Recorder>>,
}

impl Disk {
    pub(super) fn new(root: &Path, recorder: Option<Arc<dyn Recorder>>) -> Self {
        Self { root: root.to_owned(), recorder, next: AtomicU64::new(1) }
    }

    /// A name below the root, as the system wants it.
    pub(super) fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn record(&self, operation: &Operation<'_>) {
        if let Some(recorder) = &self.recorder {
            recorder.record(operation);
        }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn opened(&self, file: File, number: u64) -> DiskFile {
        DiskFile { file, number, recorder: self.recorder.clone() }
    }

    pub(super) fn create(&self, path: &Path) -> io::Result<DiskFile> {
        let (file, number) = (file::create(&self.path(path))?, self.number());
        self.record(&Operation::Create { file: number, path });
        Ok(self.opened(file, number))
    }

    /// A file that is read only.
    pub(super) fn open(&self, path: &Path) -> io::Result<DiskFile> {
        let file = file::open_regular(&self.path(path))?.ok_or(io::ErrorKind::InvalidInput)?;
        let number = self.number();
        self.record(&Operation::Open { file: number, path });
        Ok(self.opened(file, number))
    }

    /// A file that is written as well.
    pub(super) fn open_to_write(&self, path: &Path) -> io::Result<DiskFile> {
        // The directory is this program's own; what is no file is not opened all the same.
        drop(file::open_regular(&self.path(path))?.ok_or(io::ErrorKind::InvalidInput)?);
        let file = File::options().read(true).write(true).open(self.path(path))?;
        let number = self.number();
        self.record(&Operation::Open { file: number, path });
        Ok(self.opened(file, number))
    }

    /// Makes a directory, if it is not there.
    pub(super) fn make_directory(&self, path: &Path) -> io::Result<()> {
        if !self.path(path).is_dir() {
            file::make_directories(&self.path(path))?;
            self.record(&Operation::MakeDirectory { path });
        }
        Ok(())
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(self.path(from), self.path(to))?;
        self.record(&Operation::Rename { from, to });
        Ok(())
    }

    /// Removes a file; that there is none is fine.
    pub(super) fn remove_file(&self, path: &Path) -> io::Result<()> {
        match std::fs::remove_file(self.path(path)) {
            Ok(()) => self.record(&Operation::Remove { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Removes whatever has this name, a directory with all in it; that there is none is fine.
    pub(super) fn remove_tree(&self, path: &Path) -> io::Result<()> {
        let found = match std::fs::symlink_metadata(self.path(path)) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if !found.is_dir() {
            return self.remove_file(path);
        }
        file::remove_tree(&self.path(path))?;
        self.record(&Operation::Remove { path });
        Ok(())
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(self.path(path))?.sync_all()?;
        self.record(&Operation::SyncDirectory { path });
        Ok(())
    }

    /// The names in a directory, sorted, as far as they are text.
    pub(super) fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.path(path))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Writes a new file, durable but for its name.
    pub(super) fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<DiskFile> {
        let file = self.create(path)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        Ok(file)
    }
}

impl DiskFile {
    fn record(&self, operation: impl FnOnce(u64) -> Operation<'static>) {
        if let Some(recorder) = &self.recorder {
            recorder.record(&operation(self.number));
        }
    }

    /// Reads until the buffer is full or the file ends; tells how much that was.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    pub(super) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        if let Some(recorder) = &self.recorder {
            recorder.record(&Operation::Write { file: self.number, offset, bytes });
        }
        Ok(())
    }

    /// Makes a range zero, a hole where the file system has holes.
    pub(super) fn punch(&self, range: &Range<u64>) -> io::Result<()> {
        self.make_zero(range, extent::punch_hole)
    }

    /// Makes a range zero and has space for it.
    pub(super) fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        self.make_zero(range, extent::zero_range)
    }

    fn make_zero(&self, range: &Range<u64>, how: fn(&File, u64, u64) -> io::Result<()>) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let length = range.end.saturating_sub(range.start);
        match how(&self.file, range.start, length) {
            Ok(()) => {
                self.record(|file| Operation::Punch { file, offset: range.start, length });
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let mut at = range.start;
                while at < range.end {
                    let bytes = usize::try_from(range.end - at).unwrap_or(ZEROS.len()).min(ZEROS.len());
                    self.write_all_at(&ZEROS[..bytes], at)?;
                    at += bytes as u64;
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.record(|file| Operation::Truncate { file, length });
        Ok(())
    }

    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Bytes it takes on the disk.
    pub(super) fn allocated_bytes(&self) -> io::Result<u64> {
        sparse::allocated_bytes(&self.file)
    }

    /// The next range of data at or after `offset`, before `end`.
    pub(super) fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        sparse::next_data(&self.file, offset, end)
    }

    /// Makes this file, an empty one, share all blocks of another. `false`: the file system cannot, nothing was done.
    pub(super) fn share(&self, from: &Self) -> io::Result<bool> {
        let is_shared = sparse::share_blocks(&from.file, &self.file)?;
        if is_shared {
            let from = from.number;
            self.record(|to| Operation::Share { from, to });
        }
        Ok(is_shared)
    }

    /// Makes its content durable, and its length.
    pub(super) fn sync_data(&self) -> io::Result<()> {
        self.record(|file| Operation::SyncBegin { file });
        self.file.sync_data()?;
        self.record(|file| Operation::SyncEnd { file });
        Ok(())
    }

    /// Makes all of it durable but for its name.
    pub(super) fn sync_all(&self) -> io::Result<()> {
        self.record(|file| Operation::SyncBegin { file });
        self.file.sync_all()?;
        self.record(|file| Operation::SyncEnd { file });
        Ok(())
    }
}
