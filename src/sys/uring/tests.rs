//! What a ring does, and what it refuses.

use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use io_uring::types::{Fd, OpenHow};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;

const PAGE: usize = 4096;

fn ram() -> GuestRam {
    // Two regions: a piece may cross from one to the other.
    let half = 8 * PAGE;
    GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

/// A ring on this file; `None` where the host has no io_uring, which is no failure of the ring's.
fn on(file: &File, ram: &GuestRam) -> Option<FileRing> {
    let made = Ring::make(1).inspect_err(|error| println!("not tested, as there is no io_uring: {error}"));
    Some(made.ok()?.pop().unwrap().serve(file, ram.clone()).unwrap())
}

/// What one operation comes to.
fn one(ring: &mut FileRing, operation: Operation<'_>, by: By) -> io::Result<usize> {
    ring.begin(7, operation, by).unwrap();
    ring.submit().unwrap();
    loop {
        match ring.take_completions().pop() {
            Some(completion) => {
                assert_eq!((completion.token, ring.under_way()), (7, 0));
                return completion.result;
            }
            None => ring.wait().unwrap(),
        }
    }
}

fn piece(at: usize, bytes: usize) -> Piece {
    (GuestPhys(at as u64), bytes)
}

fn dirty(ram: &GuestRam) -> Vec<usize> {
    let is_dirty = |page: &usize| {
        let slices = ram.get_slices(GuestAddress((page * PAGE) as u64), 1, Permissions::Read).unwrap();
        slices.map(Result::unwrap).all(|slice| slice.bitmap().dirty_at(0))
    };
    (0..16).filter(is_dirty).collect()
}

#[test]
fn bytes_cross_pieces_and_mark_only_what_was_read() {
    let (file, ram) = (tempfile::tempfile().unwrap(), ram());
    file.write_all_at(b"hello, ring", 100).unwrap();
    let Some(mut ring) = on(&file, &ram) else { return };
    for by in [By::Caller, By::Worker] {
        let to = [piece(3 * PAGE, 3), piece(8 * PAGE - 2, 4), piece(12 * PAGE, PAGE)];
        assert_eq!(one(&mut ring, Operation::Read { to: &to, offset: 100 }, by).unwrap(), 11);
        let mut read = [0; 4];
        ram.read_slice(&mut read, GuestAddress(8 * PAGE as u64 - 2)).unwrap();
        assert_eq!(&read, b"lo, ");
        assert_eq!(dirty(&ram), [3, 7, 8, 12]);
        assert_eq!(one(&mut ring, Operation::Read { to: &to, offset: 111 }, by).unwrap(), 0);
    }
    let from = [piece(8 * PAGE - 2, 2), piece(3 * PAGE, 3)];
    assert_eq!(one(&mut ring, Operation::Write { from: &from, offset: 4 }, By::Caller).unwrap(), 5);
    let mut written = [1; 10];
    file.read_exact_at(&mut written, 0).unwrap();
    assert_eq!(&written, b"\0\0\0\0lohel\0");
    assert_eq!(dirty(&ram), [3, 7, 8, 12], "memory that was only read is not marked");
}

#[test]
fn the_file_is_changed_in_place() {
    let (file, ram) = (tempfile::tempfile().unwrap(), ram());
    file.write_all_at(&[7; 16 * PAGE], 0).unwrap();
    let Some(mut ring) = on(&file, &ram) else { return };
    let page = |at: usize| {
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, (at * PAGE) as u64).unwrap();
        page
    };
    let range = |at: usize| ((at * PAGE) as u64, PAGE as u64);
    let (offset, bytes) = range(1);
    assert_eq!(one(&mut ring, Operation::PunchHole { offset, bytes }, By::Caller).unwrap(), 0);
    let (offset, bytes) = range(3);
    assert_eq!(one(&mut ring, Operation::ZeroRange { offset, bytes }, By::Caller).unwrap(), 0);
    let (offset, bytes) = range(5);
    assert_eq!(one(&mut ring, Operation::WriteZeroes { offset, bytes }, By::Worker).unwrap(), PAGE);
    assert_eq!(one(&mut ring, Operation::Sync, By::Caller).unwrap(), 0);
    assert_eq!((0..16).filter(|at| page(*at) != [7; PAGE]).collect::<Vec<_>>(), [1, 3, 5]);
    assert_eq!([1, 3, 5].map(page), [[0; PAGE]; 3]);
    // Longer than the zeroes there are.
    assert_eq!(one(&mut ring, Operation::WriteZeroes { offset: 0, bytes: 200_000 }, By::Worker).unwrap(), 200_000);
    let nothing = one(&mut ring, Operation::PunchHole { offset: 0, bytes: 0 }, By::Caller).unwrap_err();
    assert_eq!(nothing.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn what_the_file_answers_is_told() {
    let (full, ram) = (File::options().read(true).write(true).open("/dev/full").unwrap(), ram());
    let Some(mut ring) = on(&full, &ram) else { return };
    let pieces = [piece(0, PAGE)];
    let no_space = one(&mut ring, Operation::Write { from: &pieces, offset: 0 }, By::Caller).unwrap_err();
    assert_eq!(no_space.raw_os_error(), Some(libc::ENOSPC));
    let read_only = File::open("/proc/self/exe").unwrap();
    let mut ring = on(&read_only, &ram).unwrap();
    let refused = one(&mut ring, Operation::Write { from: &pieces, offset: 0 }, By::Caller).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn what_is_no_guest_memory_and_a_token_twice_are_not_begun() {
    let (file, ram) = (tempfile::tempfile().unwrap(), ram());
    let Some(mut ring) = on(&file, &ram) else { return };
    for (at, bytes) in [(16 * PAGE, 1), (15 * PAGE, PAGE + 1), (usize::MAX, 2)] {
        let to = [piece(0, PAGE), piece(at, bytes)];
        assert!(ring.begin(0, Operation::Read { to: &to, offset: 0 }, By::Caller).is_err(), "{at} {bytes}");
    }
    assert_eq!(ring.under_way(), 0);
    for token in 0..DEPTH {
        ring.begin(token, Operation::Sync, By::Caller).unwrap();
        assert!(ring.begin(token, Operation::Sync, By::Caller).is_err());
    }
    assert!(ring.begin(DEPTH, Operation::Sync, By::Caller).is_err());
    let mut ended = Vec::new();
    while ended.len() < DEPTH {
        ring.wait().unwrap();
        ended.extend(ring.take_completions().into_iter().map(|completion| completion.token));
    }
    ended.sort_unstable();
    assert!(ended.into_iter().eq(0..DEPTH));
    assert!(ring.finished().read().unwrap() > 0, "the event was not signalled");
}

/// What is under way uses guest memory: it is waited for.
#[test]
fn a_ring_that_goes_finishes_what_was_begun() {
    let (file, ram) = (tempfile::tempfile().unwrap(), ram());
    ram.write_slice(&[9; 8 * PAGE], GuestAddress(0)).unwrap();
    let Some(mut ring) = on(&file, &ram) else { return };
    for token in 0..DEPTH {
        let from = [piece(0, 8 * PAGE)];
        let offset = (token * 8 * PAGE) as u64;
        ring.begin(token, Operation::Write { from: &from, offset }, By::Worker).unwrap();
    }
    drop(ring);
    assert_eq!(file.metadata().unwrap().len(), (DEPTH * 8 * PAGE) as u64);
}

/// Asks the ring for something that its safe functions cannot ask for; gives errno.
fn forbidden(ring: &mut FileRing, entry: &Entry) -> i32 {
    ring.flights[0] = Some(Flight::default());
    // SAFETY: what the tests' entries point to outlives this function, which returns when the operation is over.
    unsafe { ring.ring.submission().push(entry) }.unwrap();
    loop {
        ring.wait().unwrap();
        if let Some(completion) = ring.take_completions().pop() {
            return completion.result.map_or_else(|error| error.raw_os_error().unwrap(), |_| 0);
        }
    }
}

/// An attacker in a VMM that has a ring and io_uring_enter(2) is not to have what the filters keep from it.
#[test]
fn a_ring_refuses_other_operations_other_files_and_other_flags() {
    let (file, other, ram) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap(), ram());
    let Some(mut ring) = on(&file, &ram) else { return };
    let mut buffer = [0_u8; 16];
    let pieces = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let (how, mut status) = (OpenHow::new().flags(libc::O_RDONLY as u64), [0_u8; 256]);
    let here = Fd(libc::AT_FDCWD);
    let operations = [
        opcode::OpenAt::new(here, c"/".as_ptr()).build(),
        opcode::OpenAt2::new(here, c"/".as_ptr(), &raw const how).build(),
        opcode::Statx::new(here, c"/".as_ptr(), status.as_mut_ptr().cast()).build(),
        opcode::UnlinkAt::new(here, c"/no-such-file".as_ptr()).build(),
        opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        opcode::Read::new(FILE, buffer.as_mut_ptr(), 16).build().flags(Flags::FIXED_FILE),
        opcode::Write::new(FILE, buffer.as_ptr(), 16).build().flags(Flags::FIXED_FILE),
        opcode::FilesUpdate::new([0].as_ptr(), 1).build(),
        opcode::Close::new(Fd(other.as_raw_fd())).build(),
        opcode::Nop::new().build().flags(Flags::FIXED_FILE),
    ];
    for entry in &operations {
        assert_eq!(forbidden(&mut ring, entry), libc::EACCES, "operation {}", entry.get_opcode());
    }
    let read = |flags| opcode::Readv::new(FILE, pieces.as_ptr(), 1).build().flags(flags);
    let by_descriptor = opcode::Readv::new(Fd(other.as_raw_fd()), pieces.as_ptr(), 1).build();
    assert_eq!(forbidden(&mut ring, &by_descriptor), libc::EACCES);
    for flags in [Flags::IO_LINK, Flags::IO_DRAIN, Flags::BUFFER_SELECT] {
        assert_eq!(forbidden(&mut ring, &read(Flags::FIXED_FILE | flags)), libc::EACCES, "{flags:?}");
    }
    let no_such_file = opcode::Readv::new(Fixed(1), pieces.as_ptr(), 1).build().flags(Flags::FIXED_FILE);
    assert_eq!(forbidden(&mut ring, &no_such_file), libc::EBADF);
    assert_eq!(forbidden(&mut ring, &read(Flags::FIXED_FILE)), 0, "what is allowed goes on");
}

#[test]
fn a_ring_is_restricted_for_good() {
    let (file, ram) = (tempfile::tempfile().unwrap(), ram());
    let Some(ring) = on(&file, &ram) else { return };
    let submitter = ring.ring.submitter();
    let more = submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::OpenAt::CODE)]);
    let files: io::Result<()> = submitter.register_files(&[file.as_raw_fd() as RawFd]);
    for refused in [more, files, submitter.unregister_files(), submitter.unregister_eventfd()] {
        let errno = refused.unwrap_err().raw_os_error();
        assert!(matches!(errno, Some(libc::EACCES | libc::EBADFD)), "{errno:?}");
    }
}
