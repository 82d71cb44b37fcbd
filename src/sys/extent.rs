//! Parts of a file: fallocate(2) makes ranges read as zero from then on (files of most file systems and block devices;
//! where it does not work, the answer is [`Unsupported`](std::io::ErrorKind::Unsupported)).

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Gives the range's space back to the file system.
pub fn punch_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    change(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, bytes)
}

/// Makes the range zero and keeps its space.
pub fn zero_range(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    change(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, bytes)
}

fn change(file: &File, how: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let whole = |number| i64::try_from(number).map_err(|_| io::Error::from(Errno::EINVAL));
    let (offset, bytes) = (whole(offset)?, whole(bytes)?);
    loop {
        match fallocate(file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
