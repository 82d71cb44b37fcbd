//! readv(2) and its family on guest memory: one system call moves bytes between a file and several pieces of guest
//! memory, without a copy in between. What is read into guest memory is marked in its dirty bitmap, which the kernel
//! knows nothing of. An interrupted call is made again; short transfers are the caller's to handle.
#![expect(unsafe_code, reason = "scatter-gather calls take raw pointers into guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most pieces of one call (UIO_MAXIOV of linux/uio.h). More than that are not looked at: a short transfer.
const PIECES_MAX: usize = 1024;

/// Calls of up to this many pieces allocate nothing: a packet's header, its first bytes and some fragments.
const PIECES_FEW: usize = 8;

/// What stands behind the last piece of a few; it is not handed over.
const NO_PIECE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// readv(2) into guest memory.
pub fn read<B: BitmapSlice>(from: &impl AsFd, to: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    read_with(to, |pieces, count| {
        // SAFETY: the descriptor is open for as long as it is borrowed. `pieces` has `count` entries, each the address
        // and length of a slice of mapped memory that may be written and stays mapped while `to` is borrowed.
        unsafe { libc::readv(from.as_fd().as_raw_fd(), pieces, count) }
    })
}

/// preadv(2) into guest memory, from `offset` of the file.
pub fn read_at<B: BitmapSlice>(from: &impl AsFd, to: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    read_with(to, |pieces, count| {
        // SAFETY: as in `read`; the offset is a plain number.
        unsafe { libc::preadv(from.as_fd().as_raw_fd(), pieces, count, offset) }
    })
}

/// writev(2) from guest memory.
pub fn write<B: BitmapSlice>(to: &impl AsFd, from: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    write_with(from, |pieces, count| {
        // SAFETY: the descriptor is open for as long as it is borrowed. `pieces` has `count` entries, each the address
        // and length of a slice of mapped memory that may be read and stays mapped while `from` is borrowed.
        unsafe { libc::writev(to.as_fd().as_raw_fd(), pieces, count) }
    })
}

/// send(2) with MSG_NOSIGNAL, gathered from guest memory: a socket whose reader is gone answers EPIPE.
pub fn send<B: BitmapSlice>(to: &impl AsFd, from: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    write_with(from, |pieces, count| {
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: pieces.cast_mut(),
            msg_iovlen: count.unsigned_abs() as usize,
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        // SAFETY: as in `write`; the message has no name and no control part, and sendmsg does not write through it.
        unsafe { libc::sendmsg(to.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// pwritev(2) from guest memory, to `offset` of the file.
pub fn write_at<B: BitmapSlice>(to: &impl AsFd, from: &[VolatileSlice<'_, B>], offset: u64) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    write_with(from, |pieces, count| {
        // SAFETY: as in `write`; the offset is a plain number.
        unsafe { libc::pwritev(to.as_fd().as_raw_fd(), pieces, count, offset) }
    })
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn read_with<B: BitmapSlice>(
    to: &[VolatileSlice<'_, B>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let to = &to[..to.len().min(PIECES_MAX)];
    let guards: Vec<_> = to.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let piece = |guard: &vm_memory::volatile_memory::PtrGuardMut| libc::iovec {
        iov_base: guard.as_ptr().cast(),
        iov_len: guard.len(),
    };
    let pieces: Vec<_> = guards.iter().map(piece).collect();
    let done = until_done(&pieces, call);
    // On an error the kernel may have filled some of it; EAGAIN is the one answer that promises it has not.
    let mut touched = match &done {
        Ok(count) => *count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(_) => usize::MAX,
    };
    for slice in to {
        let here = touched.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        touched -= here;
    }
    done
}

fn write_with<B: BitmapSlice>(
    from: &[VolatileSlice<'_, B>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let from = &from[..from.len().min(PIECES_MAX)];
    let piece = |guard: &vm_memory::volatile_memory::PtrGuard| libc::iovec {
        iov_base: guard.as_ptr().cast_mut().cast(),
        iov_len: guard.len(),
    };
    if from.len() <= PIECES_FEW {
        let guards: [_; PIECES_FEW] = std::array::from_fn(|at| from.get(at).map(VolatileSlice::ptr_guard));
        let pieces = guards.each_ref().map(|guard| guard.as_ref().map_or(NO_PIECE, piece));
        return until_done(&pieces[..from.len()], call);
    }
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard).collect();
    let pieces: Vec<_> = guards.iter().map(piece).collect();
    until_done(&pieces, call)
}

fn until_done(pieces: &[libc::iovec], call: impl Fn(*const libc::iovec, libc::c_int) -> isize) -> io::Result<usize> {
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    loop {
        match usize::try_from(call(pieces.as_ptr(), count)) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

    #[test]
    fn bytes_cross_pieces_and_mark_only_what_was_read() {
        let ram = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let piece = |at, count| {
            ram.get_slices(GuestAddress(at), count, Permissions::ReadWrite).unwrap().next().unwrap().unwrap()
        };
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        assert_eq!(read(&near, &[piece(0, 8)]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!piece(0, 8).bitmap().dirty_at(0));
        ram.write_slice(b"hello", GuestAddress(0x3000)).unwrap();
        assert_eq!(send(&far, &[piece(0x3000, 2), piece(0x3002, 3)]).unwrap(), 5);
        let pieces = [piece(0, 3), piece(0x1000, 8), piece(0x2000, 8)];
        assert_eq!(read(&near, &pieces).unwrap(), 5);
        let mut back = [0; 2];
        ram.read_slice(&mut back, GuestAddress(0x1000)).unwrap();
        assert_eq!(&back, b"lo");
        assert_eq!(pieces.map(|piece| piece.bitmap().dirty_at(0)), [true, true, false]);
        drop(near);
        assert_eq!(send(&far, &[piece(0x3000, 2)]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
