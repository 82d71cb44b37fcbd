//! Guest pages as bytes, for a guest that is copied to another host: read here, put into memory there.

use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::dirty::PageRun;
use super::image::{self, PAGE};
use super::ram::{GuestRam, GuestRegion};
use crate::sys::fill::fill;
use crate::units::{PAGE_BYTES, PageCount, PageIndex};

/// Guest memory could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("reach {} pages of guest memory from page {}", .run.count.0, .run.first.0)]
pub struct ReachPagesError {
    /// The pages.
    pub run: PageRun,
    /// What was wrong with them.
    #[source]
    source: vm_memory::GuestMemoryError,
}

fn address(page: PageIndex) -> GuestAddress {
    GuestAddress(page.0.saturating_mul(PAGE_BYTES))
}

/// Reads pages; `bytes` becomes what they hold, at a moment for each.
pub fn read(ram: &GuestRam, run: PageRun, bytes: &mut Vec<u8>) -> Result<(), ReachPagesError> {
    bytes.resize(usize::try_from(run.count.0).unwrap_or(usize::MAX).saturating_mul(PAGE), 0);
    ram.read_slice(bytes, address(run.first)).map_err(|source| ReachPagesError { run, source })
}

/// Parts of pages that are all zero, or all something else.
pub fn by_kind(bytes: &[u8]) -> impl Iterator<Item = Pages<'_>> {
    let parts = bytes.as_chunks::<PAGE>().0.chunk_by(|one, next| image::is_zero(one) == image::is_zero(next));
    parts.map(|pages| Pages { pages, zero: pages.first().is_some_and(image::is_zero) })
}

/// Pages that follow each other, of one kind.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    pages: &'a [[u8; PAGE]],
    /// Whether they are all zero.
    pub zero: bool,
}

impl<'a> Pages<'a> {
    /// How many.
    pub fn count(&self) -> PageCount {
        PageCount(self.pages.len() as u64)
    }

    /// What they hold.
    pub fn bytes(&self) -> &'a [u8] {
        self.pages.as_flattened()
    }
}

/// Memory of a guest on its way here. Any thread may put pages into it; no machine has it yet.
#[derive(Debug, Clone)]
pub struct ArrivingRam {
    ram: GuestRam,
    /// Whether it shows an image where nothing was put.
    of_image: bool,
}

impl ArrivingRam {
    /// `of_image`: it begins as a memory image, not as zeroes.
    pub fn new(ram: GuestRam, of_image: bool) -> Self {
        Self { ram, of_image }
    }

    /// The memory.
    pub fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// How many pages there are from one on, without a gap.
    pub fn pages_from(&self, first: PageIndex) -> PageCount {
        let address = first.0.checked_mul(PAGE_BYTES).map(GuestAddress);
        let region = address.and_then(|address| Some((self.ram.find_region(address)?, address)));
        region.map_or(PageCount(0), |(region, address)| {
            let end = region.start_addr().raw_value() + region.len();
            PageCount((end - address.raw_value()) / PAGE_BYTES)
        })
    }

    /// Puts what a run holds.
    pub fn put(&self, run: PageRun, content: &[u8]) -> Result<(), ReachPagesError> {
        fill(&self.ram, address(run.first), content).map_err(|source| ReachPagesError { run, source })
    }

    /// Makes a run zero. What is zero is left alone, so that it stays a hole.
    pub fn put_zeroes(&self, run: PageRun) -> Result<(), ReachPagesError> {
        let failed = |source| ReachPagesError { run, source };
        for page in run.first.0..run.first.0.saturating_add(run.count.0) {
            let address = address(PageIndex(page));
            if !self.is_zero(address).map_err(failed)? {
                self.ram.write_slice(&[0; PAGE], address).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Whether a page is zero, or was never anything else.
    fn is_zero(&self, address: GuestAddress) -> Result<bool, vm_memory::GuestMemoryError> {
        if self.of_image {
            let mut page = [0; PAGE];
            self.ram.read_slice(&mut page, address)?;
            return Ok(image::is_zero(&page));
        }
        // New memory: reading a hole would fill it.
        Ok(!self.ram.find_region(address).is_some_and(|region| is_written(region, address)))
    }
}

/// Whether this process has written a page: its bitmap is reset by a machine's harvests only, and there is none yet.
fn is_written(region: &GuestRegion, address: GuestAddress) -> bool {
    let offset = address.raw_value() - region.start_addr().raw_value();
    region.bitmap().dirty_at(usize::try_from(offset).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::machine::ram::{self, RamBacking};
    use crate::sys::ram::memfd;
    use crate::sys::sparse::data_ranges;
    use crate::units::{Bytes, MIB};

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageIndex(first), count: PageCount(count) }
    }

    fn held(ram: &GuestRam) -> File {
        ram.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap()
    }

    #[test]
    fn pages_are_read_sorted_and_put() {
        let from = ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap();
        for page in [1, 2, 5] {
            from.write_slice(&[7; PAGE], address(PageIndex(page))).unwrap();
        }
        let mut bytes = Vec::new();
        read(&from, run(0, 8), &mut bytes).unwrap();
        let kinds: Vec<_> = by_kind(&bytes).map(|part| (part.count().0, part.zero)).collect();
        assert_eq!(kinds, [(1, true), (2, false), (2, true), (1, false), (2, true)]);

        let to = ArrivingRam::new(ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap(), false);
        to.put(run(1, 2), &bytes[PAGE..3 * PAGE]).unwrap();
        // What was there is made zero, what was not stays a hole.
        to.put_zeroes(run(2, 500)).unwrap();
        let mut seen = Vec::new();
        read(&to.ram(), run(0, 8), &mut seen).unwrap();
        assert_eq!(seen[PAGE..2 * PAGE], [7; PAGE]);
        assert!(seen[2 * PAGE..].iter().all(|byte| *byte == 0));
        let ram = to.ram();
        drop(seen);
        assert!(data_ranges(&held(&ram), 4 * MIB).unwrap().iter().all(|range| range.end <= 8 * PAGE_BYTES));
    }

    #[test]
    fn zeroes_hide_an_image() {
        let image = memfd(Bytes(4 * MIB)).unwrap();
        image.write_all_at(&[9; 3 * PAGE], PAGE_BYTES).unwrap();
        let to = ArrivingRam::new(ram::make(RamBacking::PrivateFile(image), Bytes(4 * MIB)).unwrap(), true);
        to.put_zeroes(run(2, 100)).unwrap();
        let mut seen = Vec::new();
        read(&to.ram(), run(1, 3), &mut seen).unwrap();
        assert_eq!((seen[0], seen[PAGE], seen[2 * PAGE]), (9, 0, 0));
    }

    #[test]
    fn pages_that_are_none_are_not_reached() {
        let to = ArrivingRam::new(ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap(), false);
        for (page, there) in [(0, 1024), (1023, 1), (1024, 0), (u64::MAX / PAGE_BYTES, 0), (u64::MAX, 0)] {
            assert_eq!(to.pages_from(PageIndex(page)), PageCount(there), "page {page}");
        }
        assert!(to.put(run(1023, 2), &[1; 2 * PAGE]).is_err());
        assert!(read(&to.ram(), run(1023, 2), &mut Vec::new()).is_err());
    }
}
