//! io_uring(7) between one file and guest memory: many reads, writes and changes of the file under way at once, without a
//! thread that waits for each.
//!
//! ```text
//! Ring::make ▶ Ring ── serve(file, ram) ─▶ FileRing:  begin … begin, submit ─▶ the kernel
//!  no file, no memory, restricted           take_completions ◀─ finished (eventfd)
//! ```
//! A filter of system calls does not see what a ring is asked for, so a ring says itself what it takes
//! (`IORING_REGISTER_RESTRICTIONS`, in force from before its first operation to its end): the operations of
//! [`Operation`] and no others, on its one registered file and on no descriptor. io_uring_setup(2) and what restricts a
//! ring are needed in [`Ring::make`] only, io_uring_register(2) to register the file ([`REGISTER_FILE`]), and afterwards
//! nothing but io_uring_enter(2).
//!
//! What cannot be done at once, the kernel hands to threads of its own (`iou-wrk-…`), which belong to the thread that
//! asked for it: at most [`WORKERS_MAX`], for all of its rings.
//!
//! Guest memory is not registered with the ring: pages of it may be mapped over and given back at any time, which the
//! kernel would not notice of pages it holds on to. What is read into guest memory is marked in its dirty bitmap when
//! that is heard of, so it is known once nothing is under way.
#![expect(unsafe_code, reason = "the kernel is handed pointers into guest memory that it uses later")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, register::Restriction, types::Fixed};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::ram::GuestRam;
use super::thread::{self, ThreadClass};
use crate::units::GuestPhys;

/// Most operations of a ring that are under way.
pub const DEPTH: usize = 64;

/// Most threads of the kernel that carry out what would block, for each thread that asks: writes to one file take turns
/// on one of them in any case.
pub const WORKERS_MAX: u32 = 8;

/// `IORING_REGISTER_FILES_UPDATE` (linux/io_uring.h).
const FILES_UPDATE: u8 = 6;

/// The operation of io_uring_register(2) that [`Ring::serve`] needs.
pub const REGISTER_FILE: u32 = FILES_UPDATE as u32;

/// The flag of io_uring_enter(2) that waiting needs: `IORING_ENTER_GETEVENTS` (linux/io_uring.h). There is no other.
pub const ENTER_WAIT: u32 = 1;

/// Where a ring's file is registered.
const FILE: Fixed = Fixed(0);

/// Most pieces of one operation (UIO_MAXIOV of linux/uio.h). More than that are not looked at: a short transfer.
const PIECES_MAX: usize = 1024;

/// What is written where zeroes are asked for.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A range of guest memory.
pub type Piece = (GuestPhys, usize);

/// What can be asked of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// preadv(2) into these pieces of guest memory; gives the bytes that were read.
    Read {
        /// Where to.
        to: &'a [Piece],
        /// From where in the file.
        offset: u64,
    },
    /// pwritev(2) of these pieces of guest memory; gives the bytes that were written.
    Write {
        /// Where from.
        from: &'a [Piece],
        /// To where in the file.
        offset: u64,
    },
    /// pwritev(2) of zeroes; gives the bytes that were written.
    WriteZeroes {
        /// To where in the file.
        offset: u64,
        /// How many.
        bytes: u64,
    },
    /// fdatasync(2): covers what was completed before it was submitted.
    Sync,
    /// fallocate(2): gives a range's space back to the file system.
    PunchHole {
        /// Where it begins.
        offset: u64,
        /// Its length, above 0.
        bytes: u64,
    },
    /// fallocate(2): makes a range zero and keeps its space.
    ZeroRange {
        /// Where it begins.
        offset: u64,
        /// Its length, above 0.
        bytes: u64,
    },
}

/// Who carries an operation out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The submitting thread, as far as that does not wait for the file: a read of what is in the page cache is done when
    /// [`FileRing::submit`] returns.
    Caller,
    /// A thread of the kernel.
    Worker,
}

/// An operation that is over.
#[derive(Debug)]
pub struct Completion {
    /// What it was begun with.
    pub token: usize,
    /// How many bytes were moved (0 for what moves none), or why it failed. Short transfers and interrupted operations
    /// are the caller's to go on with.
    pub result: io::Result<usize>,
}

/// A ring that has no file and no memory yet.
pub struct Ring {
    ring: IoUring,
    finished: EventFd,
}

impl Ring {
    /// Makes so many rings and restricts them for good. Fails where the kernel has no io_uring, where the host's settings
    /// (`kernel.io_uring_disabled`) or a filter forbid it, and where a limit is reached.
    ///
    /// A thread of their own makes them, and ends: when a ring is closed, the kernel interrupts whoever made or used it,
    /// as a signal would, but at some time afterwards. Calls that are not made again then (epoll_wait(2), `KVM_CREATE_VM`)
    /// would fail on a thread that has had no part in it.
    pub fn make(count: usize) -> io::Result<Vec<Self>> {
        let make = move || (0..count).map(|_| Self::new()).collect();
        let thread = thread::start(ThreadClass::Disk, "rings".to_owned(), make)?;
        thread.join().map_err(|_| io::Error::other("the thread that makes rings panicked"))?
    }

    fn new() -> io::Result<Self> {
        let entries = u32::try_from(DEPTH).map_err(io::Error::other)?;
        let ring = IoUring::builder().setup_r_disabled().setup_submit_all().build(entries)?;
        // Without it the pieces' list would have to outlive the submission in other ways than it does; Linux 5.5.
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let finished = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_eventfd(finished.as_fd().as_raw_fd())?;
        // The second kind is for sockets and the like, of which a ring has none; 0 would leave it without a bound.
        submitter.register_iowq_max_workers(&mut [WORKERS_MAX, 1])?;
        // A place without a file.
        submitter.register_files(&[-1])?;
        submitter.register_restrictions(&mut [
            Restriction::register_op(FILES_UPDATE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_allowed(Flags::ASYNC.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, finished })
    }

    /// Registers the file, which stays open as long as the ring lives.
    pub fn serve(self, file: &impl AsFd, ram: GuestRam) -> io::Result<FileRing> {
        self.ring.submitter().register_files_update(FILE.0, &[file.as_fd().as_raw_fd()])?;
        let flights = (0..DEPTH).map(|_| None).collect();
        Ok(FileRing { ring: self.ring, finished: self.finished, ram, flights })
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Ring").field("finished", &self.finished).finish_non_exhaustive()
    }
}

/// What the kernel works with until an operation is over.
#[derive(Debug, Default)]
struct Flight {
    /// Where it writes to guest memory.
    writes: Vec<Piece>,
    /// The list that the operation points to.
    pieces: Vec<Iovec>,
}

/// A `struct iovec` that may cross threads.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
struct Iovec(libc::iovec);

// SAFETY: an address and a length, which this process does not follow: only the kernel does.
unsafe impl Send for Iovec {}

/// A ring on one file and one guest's memory.
pub struct FileRing {
    ring: IoUring,
    finished: EventFd,
    ram: GuestRam,
    /// By token: what is under way.
    flights: Vec<Option<Flight>>,
}

impl fmt::Debug for FileRing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("FileRing").field("under_way", &self.under_way()).finish_non_exhaustive()
    }
}

impl FileRing {
    /// Signalled with every completion.
    pub fn finished(&self) -> &EventFd {
        &self.finished
    }

    /// How many operations were begun and are not over.
    pub fn under_way(&self) -> usize {
        self.flights.iter().flatten().count()
    }

    /// Adds an operation to those of the next [`submit`](Self::submit). `token` names it from here to its completion: below
    /// [`DEPTH`], and of no other that is under way. On an error it was not begun: the token is not free, or a piece is
    /// no guest memory.
    pub fn begin(&mut self, token: usize, operation: Operation<'_>, by: By) -> io::Result<()> {
        if self.flights.get(token).is_none_or(Option::is_some) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let (flight, entry) = self.prepare(operation)?;
        let flags = match by {
            By::Caller => Flags::FIXED_FILE,
            By::Worker => Flags::FIXED_FILE | Flags::ASYNC,
        };
        let entry = entry.flags(flags).user_data(token as u64);
        // SAFETY: what the entry points to is the list of `flight` and, through it, ZEROES or guest memory of `self.ram`
        // that was looked up for this kind of access. The list's memory does not move with the `Vec` that owns it. Both
        // are kept in `self` until the completion was taken; `drop` waits for that, or keeps them for ever. Guest
        // memory is written by the guest at any time: no reference to it exists.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There is an entry for every token.
        pushed.map_err(|_| io::Error::from(io::ErrorKind::QuotaExceeded))?;
        self.flights[token] = Some(flight);
        Ok(())
    }

    fn prepare(&self, operation: Operation<'_>) -> io::Result<(Flight, Entry)> {
        let mut flight = Flight::default();
        let entry = match operation {
            Operation::Read { to, offset } => {
                flight.pieces = self.look_up(to, Permissions::Write)?;
                flight.writes = to.to_vec();
                opcode::Readv::new(FILE, list(&flight.pieces), length(&flight.pieces)).offset(offset).build()
            }
            Operation::Write { from, offset } => {
                flight.pieces = self.look_up(from, Permissions::Read)?;
                opcode::Writev::new(FILE, list(&flight.pieces), length(&flight.pieces)).offset(offset).build()
            }
            Operation::WriteZeroes { offset, bytes } => {
                flight.pieces = zeroes(bytes);
                opcode::Writev::new(FILE, list(&flight.pieces), length(&flight.pieces)).offset(offset).build()
            }
            Operation::Sync => opcode::Fsync::new(FILE).flags(io_uring::types::FsyncFlags::DATASYNC).build(),
            Operation::PunchHole { offset, bytes } => allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, bytes),
            Operation::ZeroRange { offset, bytes } => allocate(libc::FALLOC_FL_ZERO_RANGE, offset, bytes),
        };
        Ok((flight, entry))
    }

    fn look_up(&self, pieces: &[Piece], access: Permissions) -> io::Result<Vec<Iovec>> {
        let mut found = Vec::with_capacity(pieces.len());
        for (start, bytes) in pieces {
            let slices = self.ram.get_slices(GuestAddress(start.0), *bytes, access).map_err(io::Error::other)?;
            for slice in slices {
                let guard = slice.map_err(io::Error::other)?.ptr_guard_mut();
                found.push(Iovec(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }));
            }
        }
        found.truncate(PIECES_MAX);
        Ok(found)
    }

    /// Hands what was begun to the kernel. On an error the kernel could not take (all of) it now, for want of memory or
    /// by an interruption: it stays begun, and the next call tries again.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            self.ring.submit()?;
        }
        Ok(())
    }

    /// The same, and waits until at least one operation is over; there has to be one under way.
    pub fn wait(&mut self) -> io::Result<()> {
        self.ring.submit_and_wait(1).map(drop)
    }

    /// The operations that are over and were not taken yet, in the order they ended.
    pub fn take_completions(&mut self) -> Vec<Completion> {
        let entries: Vec<_> = self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        let mut completions = Vec::with_capacity(entries.len());
        for (token, result) in entries {
            let token = usize::try_from(token).unwrap_or(usize::MAX);
            let Some(flight) = self.flights.get_mut(token).and_then(Option::take) else { continue };
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            self.mark(&flight.writes, &result);
            completions.push(Completion { token, result });
        }
        completions
    }

    /// Marks what the kernel wrote to guest memory: it knows nothing of the bitmap.
    fn mark(&self, pieces: &[Piece], result: &io::Result<usize>) {
        // On an error it may have written some of it.
        let mut touched = *result.as_ref().unwrap_or(&usize::MAX);
        for (start, bytes) in pieces {
            let here = touched.min(*bytes);
            // They were looked up before.
            let slices = self.ram.get_slices(GuestAddress(start.0), here, Permissions::Write);
            for slice in slices.into_iter().flatten().flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            touched -= here;
        }
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        while self.under_way() > 0 {
            match self.wait() {
                Ok(()) => drop(self.take_completions()),
                Err(error) if is_passing(&error) => {}
                Err(_) => {
                    // What the kernel may still use is never given back.
                    std::mem::forget((self.ram.clone(), std::mem::take(&mut self.flights)));
                    return;
                }
            }
        }
    }
}

/// Whether an error of [`FileRing::submit`] or [`FileRing::wait`] passes by itself: a signal, or no memory for now
/// (io_uring_enter(2)). Any other says that the ring is not one.
pub fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}

fn list(pieces: &[Iovec]) -> *const libc::iovec {
    pieces.as_ptr().cast()
}

fn length(pieces: &[Iovec]) -> u32 {
    // At most PIECES_MAX.
    u32::try_from(pieces.len()).unwrap_or(u32::MAX)
}

fn zeroes(mut bytes: u64) -> Vec<Iovec> {
    let mut pieces = Vec::new();
    while bytes > 0 && pieces.len() < PIECES_MAX {
        let here = usize::try_from(bytes).unwrap_or(usize::MAX).min(ZEROES.len());
        // Only ever read: the ring's one operation on this list is a write to the file.
        pieces.push(Iovec(libc::iovec { iov_base: ZEROES.as_ptr().cast_mut().cast(), iov_len: here }));
        bytes -= here as u64;
    }
    pieces
}

fn allocate(how: libc::c_int, offset: u64, bytes: u64) -> Entry {
    opcode::Fallocate::new(FILE, bytes).offset(offset).mode(how | libc::FALLOC_FL_KEEP_SIZE).build()
}

#[cfg(test)]
mod tests;
