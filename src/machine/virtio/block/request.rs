//! Disk requests (virtio 1.2 section 5.2.6), taken apart and checked against the disk. Pure; fuzzed.

use crate::machine::virtio::spec::block as spec;

/// Most sectors of one range of a discard: 2 GiB. Deallocating is quick whatever the size.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// Most ranges of one discard.
pub const DISCARD_RANGES_MAX: u32 = 16;

/// Most sectors of a write-zeroes request: 16 MiB, since the host may have to write them, and a pause waits for it.
pub const ZEROES_SECTORS_MAX: u32 = 1 << 15;

/// Most ranges of one write-zeroes request.
pub const ZEROES_RANGES_MAX: u32 = 1;

/// The disk, as far as requests are checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A range of the disk in bytes; inside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// What to do. Lengths are those of the data buffers, ranges are inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Fill the data buffers from here.
    Read(Range),
    /// Write the data buffers to here.
    Write(Range),
    /// Make what was written durable.
    Flush,
    /// Tell the device's id.
    Id,
    /// The contents of these ranges do not matter any more.
    Discard(Vec<Range>),
    /// This range reads as zero from now on; its space may be given back.
    Zero {
        /// Where.
        range: Range,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// Why a request is not carried out; what the guest is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is malformed, outside the disk, or writes to a disk that is read-only.
    Failed,
    /// There is no such request.
    Unsupported,
}

impl Refusal {
    /// The status byte for it.
    pub fn status(self) -> u8 {
        match self {
            Self::Failed => spec::S_IOERR,
            Self::Unsupported => spec::S_UNSUPP,
        }
    }
}

/// Sizes of a request's buffers: what follows the header, and what precedes the status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffers {
    /// Bytes from the guest after the header.
    pub from_guest: usize,
    /// Bytes for the guest before the status.
    pub to_guest: usize,
}

/// Bytes of ranges that [`parse`] wants to see of a request with `from_guest` bytes after its header.
pub fn range_bytes(from_guest: usize) -> usize {
    // One more than any request may have, so that too many are noticed.
    from_guest.min((DISCARD_RANGES_MAX as usize + 1) * spec::RANGE_BYTES)
}

/// Takes a request apart. `ranges` is the start of what follows the header, [`range_bytes`] of it.
pub fn parse(
    header: &[u8; spec::HEADER_BYTES],
    buffers: Buffers,
    ranges: &[u8],
    disk: Disk,
) -> Result<Request, Refusal> {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([*t0, *t1, *t2, *t3]);
    let sector = u64::from_le_bytes(*sector);
    match kind {
        spec::T_IN => Ok(Request::Read(inside(disk, sector, buffers.to_guest as u64)?)),
        spec::T_OUT => {
            writable(disk)?;
            Ok(Request::Write(inside(disk, sector, buffers.from_guest as u64)?))
        }
        spec::T_FLUSH => Ok(Request::Flush),
        spec::T_GET_ID if buffers.to_guest >= spec::ID_BYTES => Ok(Request::Id),
        spec::T_GET_ID => Err(Refusal::Failed),
        spec::T_DISCARD => {
            writable(disk)?;
            let ranges = parse_ranges(buffers, ranges, DISCARD_RANGES_MAX)?;
            let range = |one: &RawRange| match one.flags {
                0 => one.inside(disk, DISCARD_SECTORS_MAX),
                _ => Err(Refusal::Unsupported),
            };
            Ok(Request::Discard(ranges.iter().map(range).collect::<Result<_, _>>()?))
        }
        spec::T_WRITE_ZEROES => {
            writable(disk)?;
            let ranges = parse_ranges(buffers, ranges, ZEROES_RANGES_MAX)?;
            let [one] = ranges.as_slice() else { return Err(Refusal::Failed) };
            if one.flags & !spec::RANGE_UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            let unmap = one.flags & spec::RANGE_UNMAP != 0;
            Ok(Request::Zero { range: one.inside(disk, ZEROES_SECTORS_MAX)?, unmap })
        }
        _ => Err(Refusal::Unsupported),
    }
}

fn writable(disk: Disk) -> Result<(), Refusal> {
    if disk.read_only { Err(Refusal::Failed) } else { Ok(()) }
}

fn inside(disk: Disk, sector: u64, bytes: u64) -> Result<Range, Refusal> {
    let end = sector.checked_add(bytes / spec::SECTOR_BYTES).ok_or(Refusal::Failed)?;
    if !bytes.is_multiple_of(spec::SECTOR_BYTES) || end > disk.sectors {
        return Err(Refusal::Failed);
    }
    let offset = sector.checked_mul(spec::SECTOR_BYTES).ok_or(Refusal::Failed)?;
    Ok(Range { offset, bytes })
}

struct RawRange {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl RawRange {
    fn inside(&self, disk: Disk, sectors_max: u32) -> Result<Range, Refusal> {
        if self.sectors > sectors_max {
            return Err(Refusal::Failed);
        }
        inside(disk, self.sector, u64::from(self.sectors) * spec::SECTOR_BYTES)
    }
}

fn parse_ranges(buffers: Buffers, bytes: &[u8], most: u32) -> Result<Vec<RawRange>, Refusal> {
    let (ranges, rest) = bytes.as_chunks::<{ spec::RANGE_BYTES }>();
    if !rest.is_empty() || ranges.is_empty() || ranges.len() > most as usize || bytes.len() != buffers.from_guest {
        return Err(Refusal::Failed);
    }
    let range = |raw: &[u8; spec::RANGE_BYTES]| {
        let [a, b, c, d, e, f, g, h, s0, s1, s2, s3, flags @ ..] = *raw;
        RawRange {
            sector: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            sectors: u32::from_le_bytes([s0, s1, s2, s3]),
            flags: u32::from_le_bytes(flags),
        }
    };
    Ok(ranges.iter().map(range).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: Disk = Disk { sectors: 100, read_only: false };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn read(sector: u64, bytes: usize) -> Result<Request, Refusal> {
        parse(&header(spec::T_IN, sector), Buffers { from_guest: 0, to_guest: bytes }, &[], DISK)
    }

    fn ranges(kind: u32, all: &[Vec<u8>]) -> Result<Request, Refusal> {
        let bytes = all.concat();
        parse(&header(kind, 0), Buffers { from_guest: bytes.len(), to_guest: 0 }, &bytes, DISK)
    }

    #[test]
    fn reads_end_with_the_disk() {
        assert_eq!(read(99, 512), Ok(Request::Read(Range { offset: 99 * 512, bytes: 512 })));
        assert_eq!(read(99, 1024), Err(Refusal::Failed));
        assert_eq!(read(100, 0), Ok(Request::Read(Range { offset: 51200, bytes: 0 })));
        assert_eq!(read(101, 0), Err(Refusal::Failed));
        assert_eq!(read(0, 511), Err(Refusal::Failed));
        assert_eq!(read(u64::MAX, 512), Err(Refusal::Failed));
        assert_eq!(read(u64::MAX / 512, 512), Err(Refusal::Failed));
    }

    #[test]
    fn a_read_only_disk_takes_no_writes() {
        let buffers = Buffers { from_guest: 512, to_guest: 0 };
        let write = |disk| parse(&header(spec::T_OUT, 0), buffers, &[], disk);
        assert_eq!(write(DISK), Ok(Request::Write(Range { offset: 0, bytes: 512 })));
        assert_eq!(write(Disk { read_only: true, ..DISK }), Err(Refusal::Failed));
    }

    #[test]
    fn ranges_at_and_above_their_limits() {
        let one = range(90, 10, 0);
        assert_eq!(
            ranges(spec::T_DISCARD, std::slice::from_ref(&one)),
            Ok(Request::Discard(vec![Range { offset: 90 * 512, bytes: 5120 }]))
        );
        let most = DISCARD_RANGES_MAX as usize;
        assert!(ranges(spec::T_DISCARD, &vec![one.clone(); most]).is_ok());
        assert_eq!(ranges(spec::T_DISCARD, &vec![one.clone(); most + 1]), Err(Refusal::Failed));
        assert_eq!(ranges(spec::T_DISCARD, &[range(90, 11, 0)]), Err(Refusal::Failed));
        assert_eq!(ranges(spec::T_DISCARD, &[range(0, 1, 1)]), Err(Refusal::Unsupported));
        assert_eq!(ranges(spec::T_DISCARD, &[]), Err(Refusal::Failed));
        assert_eq!(ranges(spec::T_DISCARD, &[vec![0; 15]]), Err(Refusal::Failed));
        assert_eq!(
            ranges(spec::T_WRITE_ZEROES, &[range(0, 100, 1)]),
            Ok(Request::Zero { range: Range { offset: 0, bytes: 51200 }, unmap: true })
        );
        assert_eq!(ranges(spec::T_WRITE_ZEROES, &[one.clone(), one]), Err(Refusal::Failed));
        assert_eq!(ranges(spec::T_WRITE_ZEROES, &[range(0, 1, 2)]), Err(Refusal::Unsupported));
        let huge = Disk { sectors: u64::MAX / 512, read_only: false };
        let zeroes = |sectors| {
            let bytes = range(0, sectors, 0);
            parse(&header(spec::T_WRITE_ZEROES, 0), Buffers { from_guest: 16, to_guest: 0 }, &bytes, huge)
        };
        assert!(zeroes(ZEROES_SECTORS_MAX).is_ok());
        assert_eq!(zeroes(ZEROES_SECTORS_MAX + 1), Err(Refusal::Failed));
    }

    #[test]
    fn what_is_unknown_is_unsupported() {
        let parse = |kind, to_guest| parse(&header(kind, 0), Buffers { from_guest: 0, to_guest }, &[], DISK);
        assert_eq!(parse(2, 0), Err(Refusal::Unsupported));
        assert_eq!(parse(u32::MAX, 0), Err(Refusal::Unsupported));
        assert_eq!(parse(spec::T_GET_ID, 19), Err(Refusal::Failed));
        assert_eq!(parse(spec::T_GET_ID, 20), Ok(Request::Id));
    }

    proptest! {
        #[test]
        fn accepted_requests_are_inside_the_disk(
            kind in prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
            sector in prop_oneof![0_u64..200, any::<u64>()],
            (from_guest, to_guest) in (0_usize..60_000, 0_usize..60_000),
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            (sectors, read_only) in (0_u64..1000, any::<bool>()),
        ) {
            let disk = Disk { sectors, read_only };
            let check = |range: &Range| range.offset + range.bytes <= sectors * 512;
            let buffers = Buffers { from_guest, to_guest };
            match parse(&header(kind, sector), buffers, &bytes[..bytes.len().min(from_guest)], disk) {
                Ok(Request::Read(range)) => prop_assert!(check(&range) && range.bytes == to_guest as u64),
                Ok(Request::Write(range)) => {
                    prop_assert!(!read_only && check(&range) && range.bytes == from_guest as u64);
                }
                Ok(Request::Discard(ranges)) => prop_assert!(!read_only && ranges.iter().all(check)),
                Ok(Request::Zero { range, .. }) => prop_assert!(!read_only && check(&range)),
                Ok(Request::Flush | Request::Id) | Err(_) => {}
            }
        }
    }
}
