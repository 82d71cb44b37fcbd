//! Files that survive a crash whole: replaced by temporary, write, fsync, rename, fsync of the directory; and locks
//! that end with their holder.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag, PosixFadviseAdvice, posix_fadvise};

/// Mode of files the agent makes: its own only.
pub const FILE_MODE: u32 = 0o600;

/// Mode of directories the agent makes.
pub const DIRECTORY_MODE: u32 = 0o700;

/// Has a part of a file read into memory ahead of its use, if the kernel is so kind.
pub fn will_need(file: &File, part: Range<u64>) {
    let offset = i64::try_from(part.start).unwrap_or(i64::MAX);
    let length = i64::try_from(part.end.saturating_sub(part.start)).unwrap_or(i64::MAX);
    let _ = posix_fadvise(file, offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// Replaces `path` whole: readers see the old content or the new, also after a crash.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let result = write_and_sync(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| sync_parent(path));
    if result.is_err() {
        // The error that matters is the first one; a temporary that stays is overwritten by the next try.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    Ok(path.with_file_name(temporary))
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a rename or creation in the directory of `path` durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Makes the directory and its missing parents, for the owner only.
pub fn make_directories(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)
}

/// A new, empty file for reading and writing; one that is there already is emptied.
pub fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(FILE_MODE).open(path)
}

/// A file to write at the end of, made if it is not there.
pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path)
}

/// Opens a regular file for reading, not what a link leads to; `None` when something else has this name.
pub fn open_regular(path: &Path) -> io::Result<Option<File>> {
    // Without O_NONBLOCK a pipe of this name would keep the caller waiting (open(2)).
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::Error::ELOOP as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same file for reading only, with an offset of its own, whatever name it has by now.
pub fn reopen_to_read(file: &File) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes a file that nobody is to change: readable by its owner only.
pub fn make_read_only(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o400))
}

/// Makes a file writable again for its owner.
pub fn make_writable(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(FILE_MODE))
}

/// Removes a directory with all in it; that there is none is fine.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A lock on a file, held until dropped or until the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _held: Flock<File>,
}

/// Takes the lock file `path`; `None` when somebody else holds it.
pub fn try_lock(path: &Path) -> io::Result<Option<Lock>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE_MODE).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(Lock { _held: held })),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace(&dir.path().join("absent/record"), b"x").is_err());
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("file"), dir.path().join("link"));
        create(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        make_read_only(&open_regular(&path).unwrap().unwrap()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        assert!(open_regular(&link).unwrap().is_none());
        assert!(open_regular(dir.path()).unwrap().is_none());
        assert!(open_regular(&dir.path().join("absent")).is_err());
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(dir.path().join("gone")).unwrap();
        std::fs::remove_file(dir.path().join("gone")).unwrap();
        let mut reader = reopen_to_read(&file).unwrap();
        (&file).write_all(b"x").unwrap();
        assert!(reader.write_all(b"y").is_err() && io::read_to_string(reader).unwrap() == "x");
        remove_tree(dir.path()).unwrap();
        remove_tree(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
