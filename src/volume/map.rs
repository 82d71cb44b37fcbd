//! The map of a volume in memory: where each chunk is and when it was last touched. Looked up without locks. Segments
//! come with the first entry in them: a large volume that holds little costs little.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::format::Run;

/// Entries of a segment: 256 MiB of a volume.
const SEGMENT: usize = 4096;

/// The layer of a chunk of which it is not known where it is: the map is damaged.
pub(super) const LOST: u16 = u16::MAX;

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    /// The layer, counted from 1; 0 is none, the chunk is zero; or [`LOST`].
    pub(super) layer: u16,
    /// The generation in which it was last touched.
    pub(super) generation: u32,
}

impl Entry {
    fn pack(self) -> u64 {
        u64::from(self.layer) << 32 | u64::from(self.generation)
    }

    fn unpack(packed: u64) -> Self {
        let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
        Self { layer: u16::try_from(half(packed >> 32)).unwrap_or(LOST), generation: half(packed) }
    }
}

type Segment = OnceLock<Box<[AtomicU64]>>;

/// The entries of a volume.
#[derive(Debug, Default)]
pub(super) struct ChunkMap {
    chunks: u32,
    /// What chunks are of which nothing was said.
    absent: Entry,
    segments: Vec<Segment>,
}

fn index(chunk: u32) -> (usize, usize) {
    let chunk = usize::try_from(chunk).unwrap_or(usize::MAX);
    (chunk / SEGMENT, chunk % SEGMENT)
}

impl ChunkMap {
    pub(super) fn new(chunks: u32) -> Self {
        let mut map = Self::default();
        map.grow(chunks);
        map
    }

    /// A map of which nothing is known.
    pub(super) fn lost(chunks: u32) -> Self {
        Self { absent: Entry { layer: LOST, generation: 0 }, ..Self::new(chunks) }
    }

    /// Has room for this many chunks, if that is more than before.
    pub(super) fn grow(&mut self, chunks: u32) {
        self.chunks = self.chunks.max(chunks);
        let segments = index(self.chunks).0 + 1;
        self.segments.resize_with(segments.max(self.segments.len()), OnceLock::new);
    }

    /// A chunk beyond the end is nowhere.
    pub(super) fn get(&self, chunk: u32) -> Entry {
        let (segment, place) = index(chunk);
        let entries = self.segments.get(segment).and_then(OnceLock::get);
        // Whoever sees that a chunk is in a layer sees what was written there before that was said.
        entries.map_or(self.absent, |entries| Entry::unpack(entries[place].load(Ordering::Acquire)))
    }

    pub(super) fn set(&self, chunks: Range<u32>, entry: Entry) {
        for chunk in chunks.start..chunks.end.min(self.chunks) {
            let (segment, place) = index(chunk);
            if let Some(segment) = self.segments.get(segment) {
                let entries =
                    segment.get_or_init(|| (0..SEGMENT).map(|_| AtomicU64::new(self.absent.pack())).collect());
                entries[place].store(entry.pack(), Ordering::Release);
            }
        }
    }

    /// The first chunks from `chunks.start` on that are all in the same layer, or none.
    pub(super) fn same_layer(&self, chunks: Range<u32>) -> (u16, Range<u32>) {
        let layer = self.get(chunks.start).layer;
        let mut end = chunks.start;
        while end < chunks.end {
            let (segment, place) = index(end);
            let is_absent = self.segments.get(segment).is_none_or(|segment| segment.get().is_none());
            if is_absent && layer == self.absent.layer {
                // Nothing was said of any chunk of this segment.
                let rest = u32::try_from(SEGMENT - place).unwrap_or(1);
                end = end.saturating_add(rest).min(chunks.end);
            } else if self.get(end).layer == layer {
                end += 1;
            } else {
                break;
            }
        }
        (layer, chunks.start..end)
    }

    /// Calls for each chunk that is somewhere, ascending.
    fn each(&self, mut call: impl FnMut(u32, Entry)) {
        for (number, segment) in self.segments.iter().enumerate() {
            let Some(entries) = segment.get() else { continue };
            for (place, entry) in entries.iter().enumerate() {
                let entry = Entry::unpack(entry.load(Ordering::Acquire));
                let chunk = u32::try_from(number * SEGMENT + place).unwrap_or(u32::MAX);
                if entry.layer != 0 && chunk < self.chunks {
                    call(chunk, entry);
                }
            }
        }
    }

    /// All entries as runs, ascending. What is lost is not among them.
    pub(super) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        self.each(|chunk, Entry { layer, generation }| match runs.last_mut() {
            _ if layer == LOST => {}
            Some(last) if last.first + last.count == chunk && (last.layer, last.generation) == (layer, generation) => {
                last.count += 1;
            }
            Some(_) | None => runs.push(Run { first: chunk, count: 1, layer, generation }),
        });
        runs
    }

    /// The chunks touched after a generation, as runs.
    pub(super) fn touched_after(&self, after: u32) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        self.each(|chunk, entry| match runs.last_mut() {
            _ if entry.generation <= after => {}
            Some(last) if last.end == chunk => last.end += 1,
            Some(_) | None => runs.push(chunk..chunk + 1),
        });
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_kept_and_cost_nothing_where_there_are_none() {
        let mut map = ChunkMap::new(1 << 26);
        map.set(3..5, Entry { layer: 1, generation: 2 });
        map.set(4095..4098, Entry { layer: 2, generation: u32::MAX });
        map.set((1 << 26) - 1..(1 << 26) + 9, Entry { layer: 1, generation: 1 });
        assert_eq!(map.segments.iter().filter(|segment| segment.get().is_some()).count(), 3);
        assert_eq!(map.get(4097), Entry { layer: 2, generation: u32::MAX });
        assert_eq!(map.get(5), Entry::default());
        assert_eq!(map.same_layer(5..1 << 26), (0, 5..4095));
        assert_eq!(map.same_layer(4095..1 << 26), (2, 4095..4098));
        let firsts: Vec<_> = map.runs().iter().map(|run| (run.first, run.count)).collect();
        assert_eq!(firsts, [(3, 2), (4095, 3), ((1 << 26) - 1, 1)]);
        assert_eq!(map.touched_after(2).first(), Some(&(4095..4098)));
        assert_eq!(map.touched_after(2).len(), 1);
        map.grow((1 << 26) + 10);
        assert_eq!(map.get((1 << 26) + 1), Entry::default());
    }
}
