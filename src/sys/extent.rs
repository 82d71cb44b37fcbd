//! Parts of a file: fallocate(2) makes ranges read as zero from then on (files of most file systems and block devices;
//! where it does not work, the answer is [`Unsupported`](std::io::ErrorKind::Unsupported)); lseek(2) finds the ranges
//! that are not holes.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

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

/// The next range at or after `offset` that the file system holds as data, within `end`; what lies between such ranges
/// reads as zero (lseek(2), `SEEK_DATA`). A file system that keeps no holes answers with everything.
pub fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| io::Error::from(Errno::EINVAL))?;
        match lseek(file, from, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            // Nothing but a hole up to the file's end.
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(io::Error::from(errno)),
        }
    };
    if offset >= end {
        return Ok(None);
    }
    let Some(start) = seek(offset, Whence::SeekData)?.filter(|start| *start < end) else { return Ok(None) };
    let hole = seek(start, Whence::SeekHole)?.unwrap_or(end);
    Ok(Some(start..hole.min(end)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_lies_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(next_data(&file, 0, 1 << 20).unwrap(), None);
        file.write_all_at(&[1], 0x8000).unwrap();
        assert_eq!(next_data(&file, 0, 1 << 20).unwrap(), Some(0x8000..0x9000));
        assert_eq!(next_data(&file, 0x8800, 1 << 20).unwrap(), Some(0x8800..0x9000));
        assert_eq!(next_data(&file, 0x8800, 0x8900).unwrap(), Some(0x8800..0x8900));
        assert_eq!(next_data(&file, 0x9000, 1 << 20).unwrap(), None);
        assert_eq!(next_data(&file, 0, 0x8000).unwrap(), None);
    }
}
