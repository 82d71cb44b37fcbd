//! Memory images: a file as long as guest memory whose holes are zero pages. Here they are read chunk by chunk, holes
//! without being read, and measured into the map a manifest holds.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::damage::Damage;
use super::digest::Digest;
use super::manifest::{Chunk, Manifest, MemoryMap};
use super::run::{self, Run};
use crate::sys::sparse;
use crate::units::PAGE_BYTES;

/// How far a long piece of work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of data that were looked at.
    pub done_bytes: u64,
    /// Bytes of data there are.
    pub total_bytes: u64,
}

/// Told now and then how far the work is.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

/// A memory image, read in chunks.
pub(super) struct Image<'a> {
    file: &'a File,
    data: Vec<Range<u64>>,
    memory_bytes: u64,
    chunk_bytes: u64,
}

/// A memory image as guests see it: one file, or the pages that diffs hold over it.
pub(super) struct View<'a> {
    base: Image<'a>,
    /// The diffs, each over those before it; the last one is the one that is looked at.
    held: Vec<(Image<'a>, Vec<Range<u64>>)>,
    buffer: Vec<u8>,
    zeros: Vec<u8>,
}

/// A chunk's content.
pub(super) enum Content<'a> {
    /// Nothing but zeros. `allocated`: they take space.
    Zero { allocated: bool },
    /// Something.
    Data(&'a [u8]),
}

impl<'a> Image<'a> {
    pub(super) fn new(file: &'a File, memory_bytes: u64, chunk_bytes: u32) -> io::Result<Self> {
        let data = sparse::data_ranges(file, memory_bytes)?;
        Ok(Self { file, data, memory_bytes, chunk_bytes: chunk_bytes.into() })
    }

    /// Where there is data.
    pub(super) fn data(&self) -> &[Range<u64>] {
        &self.data
    }

    /// Whether a range reads as zero.
    pub(super) fn is_zero(&self, range: &Range<u64>) -> io::Result<bool> {
        let step = usize::try_from(self.chunk_bytes).unwrap_or(0);
        let mut buffer = vec![0; step];
        for start in range.clone().step_by(step) {
            let part = start..(start + self.chunk_bytes).min(range.end);
            let bytes = place(&part, start);
            self.file.read_exact_at(&mut buffer[bytes.clone()], start)?;
            if buffer[bytes].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn range(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(self.chunk_bytes).min(self.memory_bytes);
        start..start.saturating_add(self.chunk_bytes).min(self.memory_bytes)
    }

    /// Reads the data of `range` into `buffer`, whose first byte is that at `start`. Holes are left as they are.
    fn read(&self, range: &Range<u64>, start: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let mut any = false;
        for data in run::intersect(&self.data, range) {
            self.file.read_exact_at(&mut buffer[place(&data, start)], data.start)?;
            any = true;
        }
        Ok(any)
    }
}

/// Where a range of the file lies in a buffer whose first byte is that at `start`. Both are within one chunk.
fn place(range: &Range<u64>, start: u64) -> Range<usize> {
    let offset = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
    offset(range.start)..offset(range.end)
}

impl<'a> View<'a> {
    /// One file.
    pub(super) fn flat(image: Image<'a>) -> Self {
        let bytes = usize::try_from(image.chunk_bytes).unwrap_or(0);
        Self { base: image, held: Vec::new(), buffer: vec![0; bytes], zeros: vec![0; bytes] }
    }

    /// The pages of `held` that `pages` name, and else the parent's.
    pub(super) fn over(parent: Image<'a>, held: Image<'a>, pages: &[Run]) -> Self {
        Self::flat(parent).with(held, pages)
    }

    /// The pages of `held` that `pages` name, and else what was there.
    pub(super) fn with(mut self, held: Image<'a>, pages: &[Run]) -> Self {
        self.held.push((held, pages.iter().map(|run| run.bytes(PAGE_BYTES)).collect()));
        self
    }

    /// Whether some of a chunk is held by the diff itself; always, in a flat image.
    pub(super) fn holds(&self, index: u64) -> bool {
        let range = self.base.range(index);
        self.held.last().is_none_or(|(_, pages)| run::intersect(pages, &range).next().is_some())
    }

    /// A chunk's content.
    pub(super) fn chunk(&mut self, index: u64) -> io::Result<Content<'_>> {
        let range = self.base.range(index);
        let bytes = place(&range, range.start);
        self.buffer.fill(0);
        let mut any = self.base.read(&range, range.start, &mut self.buffer)?;
        for (held, pages) in &self.held {
            for pages in run::intersect(pages, &range) {
                self.buffer[place(&pages, range.start)].fill(0);
                any |= held.read(&pages, range.start, &mut self.buffer)?;
            }
        }
        let content = &self.buffer[bytes.clone()];
        Ok(if any && content != &self.zeros[bytes] { Content::Data(content) } else { Content::Zero { allocated: any } })
    }

    /// Bytes of data in the file that is new here.
    fn data_bytes(&self) -> u64 {
        let image = self.held.last().map_or(&self.base, |(held, _)| held);
        image.data.iter().map(|range| range.end - range.start).sum()
    }

    fn chunk_count(&self) -> u64 {
        self.base.memory_bytes.div_ceil(self.base.chunk_bytes)
    }
}

/// What measuring an image found.
pub(super) struct Measured {
    /// The map of its content.
    pub(super) map: MemoryMap,
    /// Ranges of zeros that take space.
    pub(super) allocated_zeros: Vec<Range<u64>>,
}

/// The map of an image. In a diff, chunks it holds nothing of are as in the parent's map.
pub(super) fn measure(
    mut view: View<'_>,
    parent: Option<&MemoryMap>,
    on_progress: OnProgress<'_>,
) -> io::Result<Measured> {
    let chunk_bytes = u32::try_from(view.base.chunk_bytes).unwrap_or(u32::MAX);
    let mut map = MemoryMap { chunk_bytes, chunks: Vec::new(), zero_runs: Vec::new(), pages: None };
    let mut allocated_zeros = Vec::new();
    let mut meter = Meter { done: 0, total: view.data_bytes(), on_progress };
    for index in 0..view.chunk_count() {
        let range = view.base.range(index);
        let digest = match parent.filter(|_| !view.holds(index)) {
            Some(parent) => parent.digest(index),
            None => match view.chunk(index)? {
                Content::Data(bytes) => {
                    meter.add(bytes.len() as u64);
                    Some(Digest::of(bytes))
                }
                Content::Zero { allocated } => {
                    if allocated {
                        allocated_zeros.push(range);
                    }
                    None
                }
            },
        };
        match digest {
            Some(digest) => map.chunks.push(Chunk { index, digest }),
            None => run::push(&mut map.zero_runs, index),
        }
    }
    meter.end();
    Ok(Measured { map, allocated_zeros })
}

/// What of an image is not as its manifest says: at most `damages_max` places. With the parent's map, chunks a diff
/// holds nothing of are compared by their digests alone.
pub(super) fn compare(
    mut view: View<'_>,
    manifest: &Manifest,
    parent: Option<&MemoryMap>,
    damages_max: usize,
    on_progress: OnProgress<'_>,
) -> io::Result<Vec<Damage>> {
    let mut damages = Vec::new();
    let mut meter = Meter { done: 0, total: view.data_bytes(), on_progress };
    for index in 0..view.chunk_count() {
        if damages.len() >= damages_max {
            break;
        }
        let wanted = manifest.memory.digest(index);
        let range = view.base.range(index);
        let (first_page, last_page) = (range.start / PAGE_BYTES, (range.end - 1) / PAGE_BYTES);
        let found = match parent.filter(|_| !view.holds(index)) {
            Some(parent) => parent.digest(index),
            None => match view.chunk(index)? {
                Content::Data(bytes) => {
                    meter.add(bytes.len() as u64);
                    Some(Digest::of(bytes))
                }
                Content::Zero { .. } => None,
            },
        };
        match (wanted, found) {
            (None, None) => {}
            (Some(wanted), Some(found)) if wanted == found => {}
            (Some(_), _) => damages.push(Damage::Chunk { index, first_page, last_page }),
            (None, Some(_)) => damages.push(Damage::NotZero { index, first_page, last_page }),
        }
    }
    meter.end();
    Ok(damages)
}

impl MemoryMap {
    /// The digest of a chunk; `None` for a chunk of zeros.
    pub fn digest(&self, index: u64) -> Option<Digest> {
        let at = self.chunks.binary_search_by_key(&index, |chunk| chunk.index).ok()?;
        self.chunks.get(at).map(|chunk| chunk.digest)
    }
}

/// Tells progress once every few MiB.
struct Meter<'a> {
    done: u64,
    total: u64,
    on_progress: OnProgress<'a>,
}

/// Bytes between two reports.
const REPORT_BYTES: u64 = 8 << 20;

impl Meter<'_> {
    fn add(&mut self, bytes: u64) {
        let before = self.done / REPORT_BYTES;
        // A chunk that is data in part counts whole here.
        self.done = (self.done + bytes).min(self.total);
        if self.done / REPORT_BYTES != before {
            (self.on_progress)(Progress { done_bytes: self.done, total_bytes: self.total });
        }
    }

    fn end(&mut self) {
        (self.on_progress)(Progress { done_bytes: self.total, total_bytes: self.total });
    }
}
