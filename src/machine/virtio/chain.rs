//! A descriptor chain, checked: the buffers of one request, all of them inside guest memory.
//!
//! Made by `queue` and owned by the device until it is used. The guest can change what the buffers hold at any time, so
//! whatever is looked at twice is copied out first; where the buffers are cannot change any more. Copies go through
//! volatile access and mark the dirty bitmap.

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::queue::RingError;
use crate::machine::ram::GuestRam;
use crate::units::{Bytes, GuestPhys};

/// A piece of guest memory that marks the dirty bitmap when it is written.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// Most buffers of one chain. The specification allows a queue's size (2.7.5.3.1), drivers with indirect tables go
/// above it on small queues; a network packet needs 19, a disk request of ours 64.
pub const CHAIN_SEGMENTS_MAX: usize = 256;

/// One buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) bytes: u32,
}

/// The buffers of one request: those the device reads, then those it writes.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments are for reading.
    readable: usize,
}

impl Chain {
    pub(super) fn new(head: u16, segments: Vec<Segment>, readable: usize) -> Self {
        Self { head, segments, readable }
    }

    /// Index of its first descriptor, by which the guest knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    pub fn readable_bytes(&self) -> usize {
        total(&self.segments[..self.readable])
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> usize {
        total(&self.segments[self.readable..])
    }

    /// Where the writable buffers are, for a device that wants the memory and not what it holds.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (GuestPhys, Bytes)> {
        let segments = self.segments[self.readable..].iter();
        segments.map(|segment| (GuestPhys(segment.address.0), Bytes(segment.bytes.into())))
    }

    /// Copies from `offset` of the readable part; returns how many bytes were there.
    pub fn read(&self, ram: &GuestRam, offset: usize, to: &mut [u8]) -> Result<usize, RingError> {
        let mut done = 0;
        for slice in self.readable_slices(ram, offset, to.len())? {
            done += slice.copy_to(&mut to[done..]);
        }
        Ok(done)
    }

    /// Copies to `offset` of the writable part; returns how many bytes had room.
    pub fn write(&self, ram: &GuestRam, offset: usize, from: &[u8]) -> Result<usize, RingError> {
        let mut done = 0;
        for slice in self.writable_slices(ram, offset, from.len())? {
            let part = &from[done..done + slice.len()];
            slice.write_slice(part, 0).map_err(|_| RingError::Buffer)?;
            done += part.len();
        }
        Ok(done)
    }

    /// Up to `bytes` bytes from `offset` of the readable part.
    pub fn readable_slices<'a>(
        &self,
        ram: &'a GuestRam,
        offset: usize,
        bytes: usize,
    ) -> Result<Vec<GuestSlice<'a>>, RingError> {
        slices(ram, &self.segments[..self.readable], offset, bytes, Permissions::Read)
    }

    /// Up to `bytes` bytes from `offset` of the writable part.
    pub fn writable_slices<'a>(
        &self,
        ram: &'a GuestRam,
        offset: usize,
        bytes: usize,
    ) -> Result<Vec<GuestSlice<'a>>, RingError> {
        slices(ram, &self.segments[self.readable..], offset, bytes, Permissions::Write)
    }

    /// Where up to `bytes` bytes from `offset` of the readable part are.
    pub fn readable_pieces(&self, offset: usize, bytes: usize) -> Vec<(GuestPhys, usize)> {
        pieces(&self.segments[..self.readable], offset, bytes).collect()
    }

    /// Where up to `bytes` bytes from `offset` of the writable part are.
    pub fn writable_pieces(&self, offset: usize, bytes: usize) -> Vec<(GuestPhys, usize)> {
        pieces(&self.segments[self.readable..], offset, bytes).collect()
    }
}

fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.bytes as usize).sum()
}

/// The parts of these segments that hold `wanted` bytes after the first `skip`.
fn pieces(segments: &[Segment], mut skip: usize, mut wanted: usize) -> impl Iterator<Item = (GuestPhys, usize)> {
    segments.iter().filter_map(move |segment| {
        let bytes = segment.bytes as usize;
        if skip >= bytes {
            skip -= bytes;
            return None;
        }
        let count = (bytes - skip).min(wanted);
        let start = GuestPhys(segment.address.0 + skip as u64);
        skip = 0;
        wanted -= count;
        (count > 0).then_some((start, count))
    })
}

fn slices<'a>(
    ram: &'a GuestRam,
    segments: &[Segment],
    skip: usize,
    wanted: usize,
    access: Permissions,
) -> Result<Vec<GuestSlice<'a>>, RingError> {
    let mut found = Vec::with_capacity(segments.len());
    for (start, count) in pieces(segments, skip, wanted) {
        for slice in ram.get_slices(GuestAddress(start.0), count, access).map_err(|_| RingError::Buffer)? {
            found.push(slice.map_err(|_| RingError::Buffer)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)]).unwrap()
    }

    fn chain() -> Chain {
        let at = |address, bytes| Segment { address: GuestAddress(address), bytes };
        Chain::new(7, vec![at(0x1000, 3), at(0x3ffe, 4), at(0x6000, 2), at(0x7000, 5)], 2)
    }

    #[test]
    fn copies_cross_buffers_and_regions() {
        let (ram, chain) = (ram(), chain());
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (7, 7));
        ram.write_slice(b"abc", GuestAddress(0x1000)).unwrap();
        ram.write_slice(b"defg", GuestAddress(0x3ffe)).unwrap();
        let mut all = [0; 7];
        assert_eq!(chain.read(&ram, 0, &mut all).unwrap(), 7);
        assert_eq!(&all, b"abcdefg");
        let mut more = [0; 9];
        assert_eq!(chain.read(&ram, 2, &mut more).unwrap(), 5);
        assert_eq!(&more[..5], b"cdefg");
        assert_eq!(chain.read(&ram, 7, &mut more).unwrap(), 0);
        assert_eq!(chain.write(&ram, 1, b"123456789").unwrap(), 6);
        let mut back = [0; 5];
        ram.read_slice(&mut back, GuestAddress(0x7000)).unwrap();
        assert_eq!(&back, b"23456");
    }

    #[test]
    fn writing_marks_the_page_and_reading_does_not() {
        let (ram, chain) = (ram(), chain());
        let mut all = [0; 7];
        chain.read(&ram, 0, &mut all).unwrap();
        chain.write(&ram, 0, b"1").unwrap();
        let dirty: Vec<bool> = ram
            .iter()
            .flat_map(|region| (0..4).map(|page| region.bitmap().dirty_at(page * 0x1000)).collect::<Vec<_>>())
            .collect();
        assert_eq!(dirty, [false, false, false, false, false, false, true, false]);
    }
}
