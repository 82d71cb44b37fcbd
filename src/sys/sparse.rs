//! Files with holes: where their data lies, copies that keep the holes or share the blocks, and reads and writes at an
//! offset. Memory images are such files: most of a guest's memory is zero.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use rustix::fs::{copy_file_range, ioctl_ficlone};
use rustix::io::Errno as CopyErrno;

/// Most bytes asked of one copy_file_range(2): the call may do less, and a signal is answered between two.
const COPY_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a copy through this process.
const BUFFER_BYTES: usize = 256 << 10;

/// Where the file has data, as byte ranges in ascending order, apart and within `0..length`. What is left out reads as
/// zero. Granularity is the file system's block; a file system without holes says that all is data.
///
/// Moves the file's offset, which users of this module never look at.
pub fn data_ranges(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(found) = next_data(file, at, length)? {
        at = found.end;
        match ranges.last_mut() {
            Some(last) if last.end == found.start => last.end = found.end,
            Some(_) | None => ranges.push(found),
        }
    }
    Ok(ranges)
}

/// The next range at or after `offset` that the file system holds as data, within `end`; what lies between such ranges
/// reads as zero (lseek(2), `SEEK_DATA`). Moves the file's offset as well.
pub fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if offset >= end {
        return Ok(None);
    }
    let Some(start) = seek(file, offset, Whence::SeekData)?.filter(|start| *start < end) else { return Ok(None) };
    let hole = seek(file, start, Whence::SeekHole)?.unwrap_or(end).min(end);
    if hole <= start {
        return Err(io::Error::other("the file system says that data ends before it starts"));
    }
    Ok(Some(start..hole))
}

/// `None`: there is none from `offset` on.
fn seek(file: &File, offset: u64, what: Whence) -> io::Result<Option<u64>> {
    match lseek(file, signed(offset)?, what) {
        Ok(found) => u64::try_from(found).map(Some).map_err(|_| Errno::EOVERFLOW.into()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::EOVERFLOW.into())
}

/// Makes `to`, an empty file, a copy of the first `length` bytes of `from`: with shared blocks where the file system can
/// do that, otherwise with the same holes. `from` must be as long or longer.
pub fn copy_sparse(from: &File, to: &File, length: u64) -> io::Result<()> {
    if from.metadata()?.len() == length && ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    to.set_len(length)?;
    for range in data_ranges(from, length)? {
        copy_range(from, to, range)?;
    }
    Ok(())
}

/// Makes `to` share all blocks of `from`, on the file systems that can (`FICLONE`, ioctl_ficlone(2)). What is in the page
/// cache of `from` is written to the disk first. `false`: this file system cannot, and `to` is as it was.
pub fn share_blocks(from: &File, to: &File) -> io::Result<bool> {
    match ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(CopyErrno::OPNOTSUPP | CopyErrno::XDEV | CopyErrno::INVAL | CopyErrno::NOTTY | CopyErrno::NOSYS) => {
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Copies a range to the same place in another file. The kernel does it where it can.
pub fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (mut source, mut target) = (at, at);
        let bytes = usize::try_from((range.end - at).min(COPY_BYTES_MAX)).unwrap_or(BUFFER_BYTES);
        match copy_file_range(from, Some(&mut source), to, Some(&mut target), bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => at += copied as u64,
            Err(CopyErrno::INTR) => {}
            Err(CopyErrno::XDEV | CopyErrno::INVAL | CopyErrno::OPNOTSUPP | CopyErrno::NOSYS) => {
                return copy_here(from, to, at..range.end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_here(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = range.start;
    while at < range.end {
        let bytes = usize::try_from(range.end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        from.read_exact_at(&mut buffer[..bytes], at)?;
        to.write_all_at(&buffer[..bytes], at)?;
        at += bytes as u64;
    }
    Ok(())
}

/// Bytes the file takes on its disk.
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    // st_blocks counts 512 bytes whatever the file system's block is (stat(2)).
    Ok(file.metadata()?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 4096;

    #[test]
    fn data_is_found_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * BLOCK).unwrap();
        assert_eq!(data_ranges(&file, 64 * BLOCK).unwrap(), []);
        file.write_all_at(&[1], 3 * BLOCK + 7).unwrap();
        file.write_all_at(&[1; 4096 * 2], 9 * BLOCK).unwrap();
        assert_eq!(
            data_ranges(&file, 64 * BLOCK).unwrap(),
            [3 * BLOCK..4 * BLOCK, 9 * BLOCK..11 * BLOCK],
            "on a file system with holes of a block"
        );
        assert_eq!(data_ranges(&file, 10 * BLOCK).unwrap(), [3 * BLOCK..4 * BLOCK, 9 * BLOCK..10 * BLOCK]);
    }

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

    #[test]
    fn blocks_are_shared_or_nothing_is() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&[3; 4096], 0).unwrap();
        let is_shared = share_blocks(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), if is_shared { BLOCK } else { 0 });
    }

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(1000 * BLOCK).unwrap();
        from.write_all_at(b"first", 0).unwrap();
        from.write_all_at(b"later", 700 * BLOCK + 5).unwrap();
        copy_sparse(&from, &to, 1000 * BLOCK).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 1000 * BLOCK);
        assert_eq!(data_ranges(&to, 1000 * BLOCK).unwrap(), data_ranges(&from, 1000 * BLOCK).unwrap());
        assert!(allocated_bytes(&to).unwrap() <= 4 * BLOCK);
        let mut word = [0; 5];
        to.read_exact_at(&mut word, 700 * BLOCK + 5).unwrap();
        assert_eq!(&word, b"later");
        assert!(copy_range(&from, &to, 999 * BLOCK..1001 * BLOCK).is_err(), "there is no byte to copy there");
    }
}
