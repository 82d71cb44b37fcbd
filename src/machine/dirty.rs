//! Which pages of guest memory were written, for whoever must copy them: migration, diffs, live checkpoints.
//!
//! [`DirtySet`] is pure algebra over page numbers. The [`Harvester`] feeds sets: it ORs KVM's log (what the guest wrote)
//! and the VMM's own bitmaps (what devices wrote) into one set per consumer, so that no consumer's forgetting is
//! another's loss. KVM logs only while there is a consumer; the VMM's bitmaps are always on.
//!
//! The rule for consumers: harvest, take a batch, read the pages, and put the batch back if what they were read for did
//! not happen. Pages are re-protected before they are read, so a write during the copy is seen by the next harvest.

use crate::sys::kvm::PAGES_PER_WORD;
use crate::units::{PageCount, PageIndex};

mod harvester;

pub use harvester::{BeginWith, DirtyConsumer, Harvester};

const BITS: u64 = PAGES_PER_WORD;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The first.
    pub first: PageIndex,
    /// How many.
    pub count: PageCount,
}

/// A set of guest-physical pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DirtySet {
    // Bit p of word w is page 64w + p. No zero words at the end are required, none are forbidden.
    words: Vec<u64>,
    // Where the next batch begins, so that pages at low addresses that are written all the time do not starve the rest.
    next: u64,
}

fn place(page: u64) -> (usize, u64) {
    (usize::try_from(page / BITS).expect("page numbers fit the address space"), 1 << (page % BITS))
}

impl DirtySet {
    /// No pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a run of pages.
    pub fn insert(&mut self, run: PageRun) {
        let end = run.first.0.saturating_add(run.count.0);
        let mut page = run.first.0;
        while page < end {
            let in_word = page % BITS;
            let count = (BITS - in_word).min(end - page);
            let mask = if count == BITS { u64::MAX } else { ((1 << count) - 1) << in_word };
            let (word, _) = place(page);
            self.grow(word + 1);
            self.words[word] |= mask;
            page += count;
        }
    }

    /// Adds the pages of a bitmap whose first bit is page `first`, a multiple of 64.
    pub fn insert_words(&mut self, first: PageIndex, words: &[u64]) {
        assert!(first.0.is_multiple_of(BITS), "regions begin at multiples of 64 pages");
        let (start, _) = place(first.0);
        let used = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        self.grow(start + used);
        self.words.iter_mut().skip(start).zip(&words[..used]).for_each(|(own, more)| *own |= more);
    }

    /// Adds all pages of another set.
    pub fn union(&mut self, other: &Self) {
        self.grow(other.words.len());
        self.words.iter_mut().zip(&other.words).for_each(|(own, more)| *own |= more);
    }

    fn grow(&mut self, words: usize) {
        if words > self.words.len() {
            self.words.resize(words, 0);
        }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = place(page.0);
        self.words.get(word).is_some_and(|held| held & bit != 0)
    }

    /// Number of pages.
    pub fn len(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages in ascending order, as runs that do not touch each other.
    pub fn runs(&self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        let mut page = 0;
        while let Some(run) = self.run_from(page) {
            page = run.first.0 + run.count.0;
            runs.push(run);
        }
        runs
    }

    /// The first run at or after `page`.
    fn run_from(&self, page: u64) -> Option<PageRun> {
        let first = self.find(page, |word| word)?;
        let end = self.find(first, |word| !word).unwrap_or(self.words.len() as u64 * BITS);
        Some(PageRun { first: PageIndex(first), count: PageCount(end - first) })
    }

    /// The first page at or after `page` whose bit is set in the words seen through `view`.
    fn find(&self, page: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let start = usize::try_from(page / BITS).ok().filter(|start| *start < self.words.len())?;
        let first = view(self.words[start]) & (u64::MAX << (page % BITS));
        let rest = self.words[start + 1..].iter().map(|word| view(*word));
        let mut all = std::iter::once(first).chain(rest).zip(start as u64..);
        all.find(|(word, _)| *word != 0).map(|(word, at)| at * BITS + u64::from(word.trailing_zeros()))
    }

    /// Takes up to `limit` pages out of the set, going on where the last batch ended.
    pub fn take_batch(&mut self, limit: PageCount) -> Vec<PageRun> {
        let mut batch = Vec::new();
        let mut left = limit.0;
        let mut wrapped = false;
        while left > 0 {
            let Some(run) = self.run_from(self.next) else {
                if wrapped {
                    break;
                }
                wrapped = true;
                self.next = 0;
                continue;
            };
            let count = run.count.0.min(left);
            let taken = PageRun { first: run.first, count: PageCount(count) };
            self.remove(taken);
            self.next = taken.first.0 + count;
            left -= count;
            batch.push(taken);
        }
        batch
    }

    /// Puts pages of a batch back: what they were taken for did not happen.
    pub fn put_back(&mut self, batch: &[PageRun]) {
        batch.iter().for_each(|run| self.insert(*run));
    }

    /// Removes a run of pages.
    pub fn remove(&mut self, run: PageRun) {
        let end = run.first.0.saturating_add(run.count.0).min(self.words.len() as u64 * BITS);
        let mut page = run.first.0;
        while page < end {
            let in_word = page % BITS;
            let count = (BITS - in_word).min(end - page);
            let mask = if count == BITS { u64::MAX } else { ((1 << count) - 1) << in_word };
            let (word, _) = place(page);
            self.words[word] &= !mask;
            page += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 300;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageIndex(first), count: PageCount(count) }
    }

    fn pages(set: &DirtySet) -> BTreeSet<u64> {
        (0..PAGES + 256).filter(|page| set.contains(PageIndex(*page))).collect()
    }

    fn pages_of(runs: &[PageRun]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.first.0..run.first.0 + run.count.0).collect()
    }

    #[derive(Debug, Clone)]
    enum Change {
        Insert(u64, u64),
        Remove(u64, u64),
        Union(Vec<u64>),
        Words(u64, Vec<u64>),
        Batch(u64, bool),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            (0..PAGES, 0_u64..140).prop_map(|(first, count)| Change::Insert(first, count)),
            (0..PAGES, 0_u64..140).prop_map(|(first, count)| Change::Remove(first, count)),
            proptest::collection::vec(0..PAGES, 0..20).prop_map(Change::Union),
            (0_u64..3, proptest::collection::vec(any::<u64>(), 0..3))
                .prop_map(|(at, words)| Change::Words(at * 64, words)),
            (0_u64..200, any::<bool>()).prop_map(|(limit, back)| Change::Batch(limit, back)),
        ]
    }

    proptest! {
        #[test]
        fn a_dirty_set_is_a_set(changes in proptest::collection::vec(change(), 0..40)) {
            let mut set = DirtySet::new();
            let mut oracle = BTreeSet::new();
            for change in changes {
                match change {
                    Change::Insert(first, count) => {
                        set.insert(run(first, count));
                        oracle.extend(first..first + count);
                    }
                    Change::Remove(first, count) => {
                        set.remove(run(first, count));
                        oracle.retain(|page| !(first..first + count).contains(page));
                    }
                    Change::Union(more) => {
                        let mut other = DirtySet::new();
                        more.iter().for_each(|page| other.insert(run(*page, 1)));
                        set.union(&other);
                        oracle.extend(more);
                    }
                    Change::Words(first, words) => {
                        set.insert_words(PageIndex(first), &words);
                        for (at, word) in words.iter().enumerate() {
                            oracle.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + at as u64 * 64 + bit));
                        }
                    }
                    Change::Batch(limit, back) => {
                        let batch = set.take_batch(PageCount(limit));
                        let taken = pages_of(&batch);
                        prop_assert_eq!(taken.len() as u64, limit.min(oracle.len() as u64));
                        prop_assert!(taken.is_subset(&oracle));
                        if back { set.put_back(&batch) } else { oracle.retain(|page| !taken.contains(page)) }
                    }
                }
                prop_assert_eq!(&pages(&set), &oracle);
                prop_assert_eq!(set.len(), PageCount(oracle.len() as u64));
                prop_assert_eq!(set.is_empty(), oracle.is_empty());
                let runs = set.runs();
                prop_assert_eq!(&pages_of(&runs), &oracle);
                prop_assert!(runs.windows(2).all(|pair| pair[0].first.0 + pair[0].count.0 < pair[1].first.0));
            }
        }
    }

    #[test]
    fn batches_go_round_so_that_no_page_starves() {
        let mut set = DirtySet::new();
        set.insert(run(0, 10));
        assert_eq!(set.take_batch(PageCount(4)), [run(0, 4)]);
        set.insert(run(0, 4));
        assert_eq!(set.take_batch(PageCount(4)), [run(4, 4)]);
        assert_eq!(set.take_batch(PageCount(4)), [run(8, 2), run(0, 2)]);
    }
}
