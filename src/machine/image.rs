//! Guest memory as a file: the image of a paused machine, written sparse.
//!
//! A page's place in the image is its place in the backing file: regions one after the other, as in
//! [`super::layout::ram_ranges`]. Pages that are zero are left out: the file begins as one hole. Which pages can be
//! anything but zero is asked of the kernel, so that what a guest never touched is neither read nor allocated:
//!
//! | backing | pages of interest |
//! |---|---|
//! | shared file | what the file holds as data |
//! | private file | what the file holds as data, and what this process has of its own (`/proc/PID/pagemap`) |
//!
//! [`Pages::Changed`] writes only the latter of a private file: the difference to the file it was launched from, without
//! a dirty log that would have to run from the start.
//!
//! Runs on the machine's thread, while it is paused: this is the longest part of a snapshot's pause.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Address, Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::dirty::PageRun;
use super::ram::{GuestRam, GuestRegion};
use crate::sys::pagemap;
use crate::sys::sparse::next_data;
use crate::units::{Bytes, PAGE_BYTES, PageCount, PageIndex};

/// Which pages to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All that are not zero.
    All,
    /// Those that differ from the private file the machine was made from.
    Changed,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Written {
    /// The pages of interest by their place in the image, ascending. Those among them that are zero are holes.
    pub pages: Vec<PageRun>,
    /// Bytes that were written.
    pub bytes: Bytes,
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteImageError {
    /// Only memory made from a private file has changed pages.
    #[error("this machine was not made from a memory image: there is nothing it could differ from")]
    NoOriginal,
    /// The kernel did not say which pages there are.
    #[error("find the pages of guest memory")]
    Find(#[source] io::Error),
    /// Guest memory could not be read.
    #[error("read guest memory")]
    Read(#[source] vm_memory::GuestMemoryError),
    /// The image could not be written.
    #[error("write the memory image")]
    Write(#[source] io::Error),
}

/// Bytes written at once, and the most that is held besides guest memory.
const BUFFER_BYTES: usize = 256 * 1024;

#[expect(clippy::cast_possible_truncation, reason = "4096")]
pub(super) const PAGE: usize = PAGE_BYTES as usize;

/// Writes `ram` to `image`, an empty file, which becomes as long as guest memory. `pagemap` is this process's
/// `/proc/PID/pagemap`.
pub fn write(ram: &GuestRam, pages: Pages, pagemap: &File, image: &File) -> Result<Written, WriteImageError> {
    let mut written = Written::default();
    let length: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    image.set_len(length).map_err(WriteImageError::Write)?;
    for region in ram.iter() {
        let found = pages_of(region, pages, pagemap)?;
        let first = region.file_offset().map_or(0, |backing| backing.start()) / PAGE_BYTES;
        for run in found {
            let in_image = PageRun { first: PageIndex(first + run.first.0), count: run.count };
            let guest = GuestAddress(region.start_addr().raw_value() + run.first.0 * PAGE_BYTES);
            written.bytes.0 += write_run(ram, (guest, in_image), image, Zeroes::LeftOut)?;
            written.pages.push(in_image);
        }
    }
    Ok(written)
}

/// What becomes of pages that are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroes {
    /// They are left out: nothing was written where they belong yet.
    LeftOut,
    /// They are written, over what was there.
    Written,
}

/// Writes guest-physical pages to `image`, which is as long as guest memory; gives how many bytes those are.
pub fn write_pages(ram: &GuestRam, run: PageRun, image: &File, zeroes: Zeroes) -> Result<Bytes, WriteImageError> {
    let mut bytes = 0;
    for (guest, in_image) in places(ram, run) {
        bytes += write_run(ram, (guest, in_image), image, zeroes)?;
    }
    Ok(Bytes(bytes))
}

/// Where guest-physical pages lie in an image: a run for each region they are in.
pub fn places(ram: &GuestRam, run: PageRun) -> impl Iterator<Item = (GuestAddress, PageRun)> {
    let end = run.first.0.saturating_add(run.count.0);
    ram.iter().filter_map(move |region| {
        let start = region.start_addr().raw_value() / PAGE_BYTES;
        let (first, last) = (run.first.0.max(start), end.min(start + region.len() / PAGE_BYTES));
        let in_file = region.file_offset().map_or(0, |backing| backing.start()) / PAGE_BYTES;
        let count = last.checked_sub(first).filter(|count| *count > 0)?;
        let place = PageRun { first: PageIndex(in_file + first - start), count: PageCount(count) };
        Some((GuestAddress(first * PAGE_BYTES), place))
    })
}

/// The guest-physical pages that can be anything but zero, ascending. While the guest runs, those it touches meanwhile
/// may be among them or not. Or those of them that differ from the image. `pagemap` is this process's
/// `/proc/PID/pagemap`.
pub fn touched(ram: &GuestRam, pages: Pages, pagemap: &File) -> Result<Vec<PageRun>, WriteImageError> {
    let mut touched = Vec::new();
    for region in ram.iter() {
        let first = region.start_addr().raw_value() / PAGE_BYTES;
        let found = pages_of(region, pages, pagemap)?;
        touched.extend(found.iter().map(|run| PageRun { first: PageIndex(first + run.first.0), count: run.count }));
    }
    Ok(touched)
}

/// The pages of interest of a region, counted from its first.
pub(super) fn pages_of(region: &GuestRegion, pages: Pages, pagemap: &File) -> Result<Vec<PageRun>, WriteImageError> {
    let is_private = region.get_mmap().flags() & libc::MAP_PRIVATE != 0;
    if pages == Pages::Changed && !is_private {
        return Err(WriteImageError::NoOriginal);
    }
    let count = usize::try_from(region.len() / PAGE_BYTES).unwrap_or(usize::MAX);
    let mut wanted = vec![false; count];
    if is_private {
        own_pages(region, pagemap, &mut wanted).map_err(WriteImageError::Find)?;
    }
    if pages == Pages::All {
        data_pages(region, &mut wanted).map_err(WriteImageError::Find)?;
    }
    Ok(runs(&wanted))
}

/// Marks the pages that this process has a copy of its own of.
fn own_pages(region: &GuestRegion, pagemap: &File, wanted: &mut [bool]) -> io::Result<()> {
    let start = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let count = wanted.len();
    pagemap::read(pagemap, start.addr() as u64, count, |page, entry| {
        if let Some(wanted) = wanted.get_mut(page) {
            *wanted |= entry.is_own();
        }
    })
}

/// Marks the pages that the backing file holds as data.
fn data_pages(region: &GuestRegion, wanted: &mut [bool]) -> io::Result<()> {
    let Some(backing) = region.file_offset() else {
        wanted.fill(true);
        return Ok(());
    };
    let (start, end) = (backing.start(), backing.start() + region.len());
    let mut at = start;
    while let Some(data) = next_data(backing.file(), at, end)? {
        let page = |offset: u64| usize::try_from(offset / PAGE_BYTES).unwrap_or(usize::MAX);
        let (first, last) = (page(data.start - start), page((data.end - start).next_multiple_of(PAGE_BYTES)));
        if let Some(pages) = wanted.get_mut(first..last.min(page(region.len()))) {
            pages.fill(true);
        }
        at = data.end;
    }
    Ok(())
}

fn runs(wanted: &[bool]) -> Vec<PageRun> {
    let mut runs = Vec::new();
    let mut at = 0_u64;
    for part in wanted.chunk_by(|one, next| one == next) {
        let count = part.len() as u64;
        if part.first() == Some(&true) {
            runs.push(PageRun { first: PageIndex(at), count: PageCount(count) });
        }
        at += count;
    }
    runs
}

/// Where a part of an image lies in guest memory: address and bytes, for each region it is in.
pub fn in_guest(ram: &GuestRam, offset: u64, bytes: u64) -> impl Iterator<Item = (GuestAddress, u64)> {
    let end = offset.saturating_add(bytes);
    ram.iter().filter_map(move |region| {
        let start = region.file_offset().map_or(0, |backing| backing.start());
        let (first, last) = (offset.max(start), end.min(start + region.len()));
        let bytes = last.checked_sub(first).filter(|bytes| *bytes > 0)?;
        Some((region.start_addr().unchecked_add(first - start), bytes))
    })
}

/// Writes the pages of a run; gives how many bytes those are.
fn write_run(
    ram: &GuestRam,
    (guest, run): (GuestAddress, PageRun),
    image: &File,
    zeroes: Zeroes,
) -> Result<u64, WriteImageError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut done, bytes, mut written) = (0, run.count.0 * PAGE_BYTES, 0);
    while done < bytes {
        let length = usize::try_from(bytes - done).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let part = &mut buffer[..length];
        ram.read_slice(part, guest.unchecked_add(done)).map_err(WriteImageError::Read)?;
        let at = run.first.0 * PAGE_BYTES + done;
        let mut offset = 0;
        let same_kind = |one: &[u8; PAGE], next: &[u8; PAGE]| is_zero(one) == is_zero(next);
        for pages in part.as_chunks::<PAGE>().0.chunk_by(same_kind) {
            let bytes = pages.as_flattened();
            if zeroes == Zeroes::Written || pages.first().is_some_and(|page| !is_zero(page)) {
                image.write_all_at(bytes, at + offset).map_err(WriteImageError::Write)?;
                written += bytes.len() as u64;
            }
            offset += bytes.len() as u64;
        }
        done += length as u64;
    }
    Ok(written)
}

/// Whether a page holds nothing but zeroes.
pub(super) fn is_zero(page: &[u8; PAGE]) -> bool {
    // By words: eight times fewer comparisons, and the compiler makes vectors of them.
    page.as_chunks::<8>().0.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ram::{self, RamBacking};
    use crate::sys::ram::memfd;
    use crate::units::MIB;

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    fn page(file: &File, index: u64) -> [u8; 2] {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, index * PAGE_BYTES).unwrap();
        bytes
    }

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageIndex(first), count: PageCount(count) }
    }

    #[test]
    fn an_image_holds_what_was_written_and_nothing_else() {
        let memory = ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap();
        for (address, value) in [(0x1000, [1_u8, 2]), (0x2000, [3, 4]), (0x10_0000, [5, 6]), (0x20_0000, [0, 0])] {
            memory.write_slice(&value, GuestAddress(address)).unwrap();
        }
        let image = tempfile::tempfile().unwrap();
        let written = write(&memory, Pages::All, &pagemap(), &image).unwrap();
        assert_eq!(written.bytes, Bytes(3 * PAGE_BYTES));
        assert_eq!(written.pages, [run(1, 2), run(0x100, 1), run(0x200, 1)]);
        assert_eq!(image.metadata().unwrap().len(), 4 * MIB);
        assert_eq!([1, 2, 0x100].map(|index| page(&image, index)), [[1, 2], [3, 4], [5, 6]]);
        assert_eq!(next_data(&image, 0x3000, 4 * MIB).unwrap(), Some(0x10_0000..0x10_1000));
        assert!(matches!(write(&memory, Pages::Changed, &pagemap(), &image), Err(WriteImageError::NoOriginal)));
    }

    #[test]
    fn pages_are_written_over_others_and_lie_where_their_region_does() {
        // Two regions: the second begins at 4 GiB, and in the image where the first one ends.
        let bytes = Bytes(3 * 1024 * MIB + 2 * MIB);
        let memory = ram::make(RamBacking::SharedMemfd, bytes).unwrap();
        let high = 4 * 1024 * MIB / PAGE_BYTES;
        let found: Vec<_> = places(&memory, run(high - 8, 16)).map(|(guest, place)| (guest.0, place)).collect();
        assert_eq!(found, [(high * PAGE_BYTES, run(3 * 1024 * MIB / PAGE_BYTES, 8))]);
        assert_eq!(places(&memory, run(u64::MAX - 1, 2)).count(), 0);

        let image = tempfile::tempfile().unwrap();
        image.set_len(bytes.0).unwrap();
        image.write_all_at(&[7; 2 * PAGE], PAGE_BYTES).unwrap();
        memory.write_slice(&[9; 2], GuestAddress(0x2000)).unwrap();
        memory.write_slice(&[8; 2], GuestAddress(high * PAGE_BYTES)).unwrap();
        assert_eq!(write_pages(&memory, run(1, 2), &image, Zeroes::LeftOut).unwrap(), Bytes(PAGE_BYTES));
        assert_eq!([1, 2].map(|index| page(&image, index)), [[7, 7], [9, 9]]);
        assert_eq!(write_pages(&memory, run(1, 2), &image, Zeroes::Written).unwrap(), Bytes(2 * PAGE_BYTES));
        assert_eq!(write_pages(&memory, run(high, 1), &image, Zeroes::LeftOut).unwrap(), Bytes(PAGE_BYTES));
        assert_eq!([1, 2, found[0].1.first.0].map(|index| page(&image, index)), [[0, 0], [9, 9], [8, 8]]);
    }

    #[test]
    fn a_difference_holds_what_changed_also_to_zero() {
        let original = memfd(Bytes(4 * MIB)).unwrap();
        original.write_all_at(&[7; 3 * PAGE], 0x4000).unwrap();
        let memory = ram::make(RamBacking::PrivateFile(original), Bytes(4 * MIB)).unwrap();
        let mut seen = [0; 1];
        memory.read_slice(&mut seen, GuestAddress(0x4000)).unwrap();
        memory.write_slice(&[0; PAGE], GuestAddress(0x5000)).unwrap();
        memory.write_slice(&[9], GuestAddress(0x9000)).unwrap();
        let difference = tempfile::tempfile().unwrap();
        let written = write(&memory, Pages::Changed, &pagemap(), &difference).unwrap();
        assert_eq!((written.pages, written.bytes), (vec![run(5, 1), run(9, 1)], Bytes(PAGE_BYTES)));
        let whole = tempfile::tempfile().unwrap();
        let written = write(&memory, Pages::All, &pagemap(), &whole).unwrap();
        assert_eq!(written.bytes, Bytes(3 * PAGE_BYTES));
        assert_eq!([4, 5, 6, 9].map(|index| page(&whole, index)), [[7, 7], [0, 0], [7, 7], [9, 0]]);
    }
}
