//! Descriptors, files, pipes, terminals and mounts.
#![expect(unsafe_code, reason = "system calls with pointers")]

use core::ffi::CStr;
use core::fmt;
use core::ptr;

use super::raw::{Errno, count, small, syscall};

const READ: u64 = 0;
const WRITE: u64 = 1;
const OPEN: u64 = 2;
const CLOSE: u64 = 3;
const IOCTL: u64 = 16;
const ACCESS: u64 = 21;
const FCNTL: u64 = 72;
const CHDIR: u64 = 80;
const RENAME: u64 = 82;
const MKDIR: u64 = 83;
const CHROOT: u64 = 161;
const MOUNT: u64 = 165;
const UMOUNT2: u64 = 166;
const GETDENTS64: u64 = 217;
const UNLINKAT: u64 = 263;
const SYMLINKAT: u64 = 266;
const PIPE2: u64 = 293;
const OPENAT2: u64 = 437;

const O_WRONLY: u32 = 1;
const O_RDWR: u32 = 2;
const O_CREAT: u32 = 0o100;
const O_TRUNC: u32 = 0o1000;
const O_NOCTTY: u32 = 0o400;
pub(super) const O_NONBLOCK: u32 = 0o4000;
pub(super) const O_CLOEXEC: u32 = 0o2_000_000;
const F_GETFD: u32 = 1;
const F_SETFL: u32 = 4;

const FIONREAD: u32 = 0x541B;
const TIOCSWINSZ: u32 = 0x5414;
/// _IOW('T', 0x31, int): unlock the other side of a terminal pair.
const TIOCSPTLCK: u32 = 0x4004_5431;
/// _IO('T', 0x41): open the other side of a terminal pair, no path needed.
const TIOCGPTPEER: u32 = 0x5441;

/// An open descriptor; closed when dropped.
#[derive(Debug)]
pub(crate) struct Fd(i32);

impl Fd {
    /// Takes what a system call that opens something returned.
    pub(super) fn from_result(result: u64) -> Self {
        Self(small(result))
    }

    pub(super) const fn number(&self) -> i32 {
        self.0
    }

    /// Reads into `buffer`; 0 is the end.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe { syscall!(READ, self.0, buffer.as_mut_ptr(), buffer.len()) }.map(count)
    }

    /// Writes from `bytes`, and says how many were taken.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`.
        unsafe { syscall!(WRITE, self.0, bytes.as_ptr(), bytes.len()) }.map(count)
    }

    /// Makes reads and writes on this open file return at once. For files opened by us with read-write access only:
    /// the other status flags are set to none.
    pub(crate) fn set_nonblocking(&self) -> Result<(), Errno> {
        // SAFETY: F_SETFL takes a number.
        unsafe { syscall!(FCNTL, self.0, F_SETFL, O_NONBLOCK) }.map(drop)
    }

    /// Bytes that a read would find now.
    pub(crate) fn bytes_readable(&self) -> Result<usize, Errno> {
        let mut bytes = 0_i32;
        // SAFETY: FIONREAD writes one int to `bytes`.
        unsafe { syscall!(IOCTL, self.0, FIONREAD, &raw mut bytes) }?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Directory entries, in the kernel's `linux_dirent64` layout; 0 is the end.
    pub(crate) fn read_directory(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe { syscall!(GETDENTS64, self.0, buffer.as_mut_ptr(), buffer.len()) }.map(count)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: this value owned the descriptor, so nothing else uses the number.
        let _ = unsafe { syscall!(CLOSE, self.0) };
    }
}

/// Standard error, for words to people. Not owned, and never closed.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the kernel reads `text.len()` bytes of `text`.
        match unsafe { syscall!(WRITE, 2_i32, text.as_ptr(), text.len()) } {
            Ok(_) => Ok(()),
            Err(_) => Err(fmt::Error),
        }
    }
}

/// Standard input, which is the console for PID 1. Held from the start, and never closed.
pub(crate) fn console_input() -> &'static Fd {
    static INPUT: Fd = Fd(0);
    &INPUT
}

/// Standard error, for programs that have no other place for their words. Held from the start, and never closed.
pub(crate) fn console_output() -> &'static Fd {
    static OUTPUT: Fd = Fd(2);
    &OUTPUT
}

fn open(path: &CStr, flags: u32) -> Result<Fd, Errno> {
    const NEW_FILES: u32 = 0o644;
    // SAFETY: `path` is a C string.
    unsafe { syscall!(OPEN, path.as_ptr(), flags | O_CLOEXEC, NEW_FILES) }.map(Fd::from_result)
}

/// Opens a file or directory for reading.
pub(crate) fn open_read(path: &CStr) -> Result<Fd, Errno> {
    open(path, 0)
}

/// Writes a kernel setting: a file below `/proc/sys` that is there and takes its value whole.
pub(crate) fn write_setting(path: &CStr, value: &[u8]) -> Result<(), Errno> {
    open(path, O_WRONLY)?.write(value).map(drop)
}

/// Writes over the beginning of a file, which is made when it is missing.
pub(crate) fn write_file(path: &CStr, bytes: &[u8]) -> Result<(), Errno> {
    open(path, O_WRONLY | O_CREAT)?.write(bytes).map(drop)
}

/// Makes a file of these bytes, or has it replaced at once as a whole, by way of `fresh` in the same directory.
pub(crate) fn replace_file(path: &CStr, fresh: &CStr, bytes: &[u8]) -> Result<(), Errno> {
    let taken = open(fresh, O_WRONLY | O_CREAT | O_TRUNC)?.write(bytes)?;
    // So small a file is written whole, or the file system is full.
    if taken < bytes.len() {
        return Err(Errno::NOSPC);
    }
    // SAFETY: both are C strings.
    unsafe { syscall!(RENAME, fresh.as_ptr(), path.as_ptr()) }.map(drop)
}

/// Whether there is such a file or directory.
pub(crate) fn exists(path: &CStr) -> bool {
    const F_OK: u32 = 0;
    // SAFETY: `path` is a C string.
    unsafe { syscall!(ACCESS, path.as_ptr(), F_OK) }.is_ok()
}

/// Whether this program may execute the file.
pub(crate) fn may_execute(path: &CStr) -> bool {
    const X_OK: u32 = 1;
    // SAFETY: `path` is a C string.
    unsafe { syscall!(ACCESS, path.as_ptr(), X_OK) }.is_ok()
}

/// Opens a device for reading and writing without making it the controlling terminal.
pub(crate) fn open_controlling(path: &CStr) -> Result<Fd, Errno> {
    open(path, O_RDWR | O_NOCTTY)
}

/// Whether descriptors 0, 1 and 2 are open; when they are not, opens `path` for those that miss.
pub(crate) fn hold_standard_streams(path: &CStr) -> Result<(), Errno> {
    for wanted in 0..=2_i32 {
        // SAFETY: F_GETFD takes no argument.
        if unsafe { syscall!(FCNTL, wanted, F_GETFD) } == Err(Errno::BADF) {
            // SAFETY: `path` is a C string. The lowest free number is given, which is `wanted`: those below are open.
            unsafe { syscall!(OPEN, path.as_ptr(), O_RDWR | O_NOCTTY, 0_u32) }?;
        }
    }
    Ok(())
}

/// A pipe: the end to read from, the end to write to. Programs do not inherit either.
pub(crate) fn pipe() -> Result<(Fd, Fd), Errno> {
    let mut ends = [0_i32; 2];
    // SAFETY: the kernel writes two ints to `ends`.
    unsafe { syscall!(PIPE2, ends.as_mut_ptr(), O_CLOEXEC) }?;
    let [from, to] = ends;
    Ok((Fd(from), Fd(to)))
}

/// A terminal of this size: our end (non-blocking), the program's end.
pub(crate) fn open_terminal(rows: u16, columns: u16) -> Result<(Fd, Fd), Errno> {
    let ours = open(c"/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)?;
    let unlocked = 0_i32;
    // SAFETY: TIOCSPTLCK reads one int.
    unsafe { syscall!(IOCTL, ours.0, TIOCSPTLCK, &raw const unlocked) }?;
    // SAFETY: TIOCGPTPEER takes open flags as a number.
    let theirs = unsafe { syscall!(IOCTL, ours.0, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC) }?;
    let theirs = Fd::from_result(theirs);
    resize_terminal(&ours, rows, columns)?;
    Ok((ours, theirs))
}

/// Sets a terminal's size.
pub(crate) fn resize_terminal(terminal: &Fd, rows: u16, columns: u16) -> Result<(), Errno> {
    // struct winsize: rows, columns, and pixels that nobody knows.
    let size: [u16; 4] = [rows, columns, 0, 0];
    // SAFETY: TIOCSWINSZ reads one struct winsize, which is these four shorts.
    unsafe { syscall!(IOCTL, terminal.0, TIOCSWINSZ, size.as_ptr()) }.map(drop)
}

/// Opens a directory for reading that is an entry of an open one, in the same file system: not what is mounted there, nor
/// what a link leads to.
pub(crate) fn open_directory_in(directory: &Fd, name: &CStr) -> Result<Fd, Errno> {
    const O_DIRECTORY: u64 = 0o200_000;
    const O_NOFOLLOW: u64 = 0o400_000;
    const RESOLVE_NO_XDEV: u64 = 1;
    // struct open_how: flags, mode, resolve.
    let how = [O_DIRECTORY | O_NOFOLLOW | u64::from(O_CLOEXEC), 0, RESOLVE_NO_XDEV];
    // SAFETY: `name` is a C string; the kernel reads one struct open_how, which is these three words.
    unsafe { syscall!(OPENAT2, directory.0, name.as_ptr(), how.as_ptr(), size_of_val(&how)) }.map(Fd::from_result)
}

/// Removes an entry of an open directory that is no directory.
pub(crate) fn remove_in(directory: &Fd, name: &CStr) -> Result<(), Errno> {
    // SAFETY: `name` is a C string.
    unsafe { syscall!(UNLINKAT, directory.0, name.as_ptr(), 0_u32) }.map(drop)
}

/// Removes an empty directory that is an entry of an open one.
pub(crate) fn remove_directory_in(directory: &Fd, name: &CStr) -> Result<(), Errno> {
    const AT_REMOVEDIR: u32 = 0x200;
    // SAFETY: `name` is a C string.
    unsafe { syscall!(UNLINKAT, directory.0, name.as_ptr(), AT_REMOVEDIR) }.map(drop)
}

/// Makes a directory.
pub(crate) fn make_directory(path: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: `path` is a C string.
    unsafe { syscall!(MKDIR, path.as_ptr(), mode) }.map(drop)
}

/// Makes a symbolic link `name` to `target` in an open directory.
pub(crate) fn make_link(directory: &Fd, name: &CStr, target: &CStr) -> Result<(), Errno> {
    // SAFETY: both are C strings.
    unsafe { syscall!(SYMLINKAT, target.as_ptr(), directory.0, name.as_ptr()) }.map(drop)
}

/// Mounts a file system of `kind` on `target`, or changes the flags of the mount there.
pub(crate) fn mount(kind: &CStr, target: &CStr, flags: u32, options: &CStr) -> Result<(), Errno> {
    // SAFETY: all four are C strings; a file system without a device takes its kind as source.
    unsafe { syscall!(MOUNT, kind.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr()) }.map(drop)
}

/// Mounts a disk's file system of `kind` on `target`.
pub(crate) fn mount_disk(disk: &CStr, target: &CStr, kind: &CStr, flags: u32) -> Result<(), Errno> {
    // SAFETY: all four are C strings.
    unsafe { syscall!(MOUNT, disk.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, c"".as_ptr()) }.map(drop)
}

/// Has a mount be on `target`, instead of where it is.
pub(crate) fn move_mount(from: &CStr, target: &CStr) -> Result<(), Errno> {
    const MS_MOVE: u32 = 8192;
    let none = ptr::null::<u8>();
    // SAFETY: both are C strings, and a move looks at no kind or options.
    unsafe { syscall!(MOUNT, from.as_ptr(), target.as_ptr(), none, MS_MOVE, none) }.map(drop)
}

/// Puts the mount on `root` in the place of the root, which it hides, and has it be this program's root and working
/// directory, and so those of all programs it starts.
pub(crate) fn enter_root(root: &CStr) -> Result<(), Errno> {
    // SAFETY: `root` is a C string.
    unsafe { syscall!(CHDIR, root.as_ptr()) }?;
    move_mount(c".", c"/")?;
    // SAFETY: both are C strings.
    unsafe {
        syscall!(CHROOT, c".".as_ptr())?;
        syscall!(CHDIR, c"/".as_ptr())
    }
    .map(drop)
}

/// Unmounts what is on `target`, or not, if it is busy.
pub(crate) fn unmount_now(target: &CStr) -> Result<(), Errno> {
    // SAFETY: `target` is a C string.
    unsafe { syscall!(UMOUNT2, target.as_ptr(), 0_u32) }.map(drop)
}

/// Unmounts what is on `target`; when it is busy, makes it read-only, which leaves the disk as clean.
pub(crate) fn unmount(target: &CStr) -> Result<(), Errno> {
    const MS_REMOUNT_READ_ONLY: u32 = 32 | 1;
    // SAFETY: `target` is a C string.
    match unsafe { syscall!(UMOUNT2, target.as_ptr(), 0_u32) } {
        Err(Errno::BUSY) => {
            let none = ptr::null::<u8>();
            // SAFETY: `target` is a C string, and a remount looks at no source, kind or options.
            unsafe { syscall!(MOUNT, none, target.as_ptr(), none, MS_REMOUNT_READ_ONLY, none) }.map(drop)
        }
        other => other.map(drop),
    }
}
