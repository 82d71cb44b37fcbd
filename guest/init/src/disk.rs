//! `init mount DISK DIRECTORY [ro]` and `init unmount DIRECTORY`: what a guest is asked to do with a volume.
//!
//! Run as programs, by who may run programs here: a disk may take its time, and the first process waits for none.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::fmt::Write as _;

use crate::sys::{self, Console, Errno, Fd};

/// The disk has no content yet: it is about to be told of one.
const NOT_YET: u8 = 75;

/// MS_RDONLY.
pub(crate) const READ_ONLY: u32 = 1;

/// Longest list of file systems, and of what is mounted, that is read.
const LIST_BYTES_MAX: usize = 64 << 10;

/// Why it was not done: the exit code, and what is said.
pub(crate) type Failure = (u8, String);

/// Does what these words ask for, and gives the exit code; `None`: they ask for something else.
pub(crate) fn run(arguments: &[&CStr]) -> Option<u8> {
    let done = match arguments {
        [_, word, disk, directory] if word.to_bytes() == b"mount" => mount(disk, directory, 0),
        [_, word, disk, directory, ro] if word.to_bytes() == b"mount" && ro.to_bytes() == b"ro" => {
            mount(disk, directory, READ_ONLY)
        }
        [_, word, directory] if word.to_bytes() == b"unmount" => unmount(directory),
        _ => return None,
    };
    Some(match done {
        Ok(()) => 0,
        Err((code, why)) => {
            // Nobody to tell if that fails.
            let _ = writeln!(Console, "{why}");
            code
        }
    })
}

fn failed(what: &str, on: &CStr, errno: Errno) -> Failure {
    (1, format!("{what} {}: errno {}", on.to_bytes().escape_ascii(), errno.number()))
}

/// Mounts a disk, with whichever file system it has. One that is mounted there already stays.
fn mount(disk: &CStr, directory: &CStr, flags: u32) -> Result<(), Failure> {
    if is_mounted(disk, directory)? {
        return Ok(());
    }
    make_directories(directory)?;
    for kind in kinds()? {
        match sys::mount_disk(disk, directory, &kind, flags) {
            Ok(()) => return Ok(()),
            // It has another file system, or none.
            Err(Errno::INVAL) => {}
            Err(Errno::NXIO | Errno::NOMEDIUM) => {
                return Err((NOT_YET, format!("{} is empty", disk.to_bytes().escape_ascii())));
            }
            Err(errno) => return Err(failed("mount", disk, errno)),
        }
    }
    if is_empty(disk)? {
        return Err((NOT_YET, format!("{} is empty", disk.to_bytes().escape_ascii())));
    }
    Err((1, format!("{} has no file system that this kernel knows", disk.to_bytes().escape_ascii())))
}

fn unmount(directory: &CStr) -> Result<(), Failure> {
    match sys::unmount_now(directory) {
        // Nothing is mounted there.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => {
            Err((1, format!("{} is busy: somebody has a file open there", directory.to_bytes().escape_ascii())))
        }
        Err(errno) => Err(failed("unmount", directory, errno)),
    }
}

/// The file systems on disks that this kernel knows.
pub(crate) fn kinds() -> Result<Vec<CString>, Failure> {
    let list = read(c"/proc/filesystems")?;
    let lines = list.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| CString::new(line.strip_prefix(b"\t")?).ok()).collect())
}

/// Whether a disk has a size of 0 as yet.
pub(crate) fn is_empty(disk: &CStr) -> Result<bool, Failure> {
    let name = disk.to_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let mut path = Vec::from(b"/sys/block/".as_slice());
    path.extend_from_slice(name);
    path.extend_from_slice(b"/size");
    let Ok(path) = CString::new(path) else { return Ok(false) };
    Ok(read(&path)?.starts_with(b"0\n"))
}

fn is_mounted(disk: &CStr, directory: &CStr) -> Result<bool, Failure> {
    let mounts = read(c"/proc/mounts")?;
    let mut lines = mounts.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b' '));
    Ok(lines.any(|mut words| words.next() == Some(disk.to_bytes()) && words.next() == Some(directory.to_bytes())))
}

fn make_directories(path: &CStr) -> Result<(), Failure> {
    let bytes = path.to_bytes();
    let ends = (1..=bytes.len()).filter(|end| *end == bytes.len() || bytes[*end] == b'/');
    for end in ends {
        let Ok(part) = CString::new(&bytes[..end]) else { continue };
        match sys::make_directory(&part, 0o755) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("make", &part, errno)),
        }
    }
    Ok(())
}

fn read(path: &CStr) -> Result<Vec<u8>, Failure> {
    let fill = |file: Fd| {
        let mut bytes = Vec::new();
        let mut piece = [0; 1024];
        while bytes.len() < LIST_BYTES_MAX {
            match file.read(&mut piece)? {
                0 => break,
                count => bytes.extend_from_slice(&piece[..count]),
            }
        }
        Ok(bytes)
    };
    sys::open_read(path).and_then(fill).map_err(|errno| failed("read", path, errno))
}
