//! Which pages guests reach between their resume and their first answer, as they were seen in a bundle's first launches:
//! what later launches map ahead. In which order they are reached is not kept: those that were written are mapped first.
//! Lies beside the bundles, is derived, and is trusted in nothing but speed: one that is damaged is none.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::run::{self, Run};
use super::store::Store;
use crate::ids::BundleId;
use crate::sys::file;
use crate::units::PAGE_BYTES;

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most runs of either kind: a launch asks for all of them in one frame.
const RUNS_MAX: usize = 2000;

/// Pages by their place in the image; ascending runs that do not touch each other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Guests that it was seen at.
    #[serde(default)]
    pub guests: u32,
    /// Those that were read.
    pub read: Vec<Run>,
    /// Those that were written.
    pub written: Vec<Run>,
}

/// Why a working set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// It is not as it was written, or names pages that the bundle does not have.
    #[error("the working set of bundle {bundle} is damaged: {what}")]
    Damaged {
        /// The bundle.
        bundle: BundleId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The disk did not answer.
    #[error("the working set of bundle {bundle}")]
    File {
        /// The bundle.
        bundle: BundleId,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl WorkingSet {
    /// Of all pages of an image, those that were read and those that were written. Where there are more runs than a launch
    /// can ask for, the shortest gaps between them count as read or written as well.
    pub fn of(pages: impl Iterator<Item = Touched>) -> Self {
        Self::seen_at(1, pages)
    }

    fn seen_at(guests: u32, pages: impl Iterator<Item = Touched>) -> Self {
        let (mut read, mut written) = (Vec::new(), Vec::new());
        for (page, touched) in (0..).zip(pages) {
            match touched {
                Touched::Not => {}
                Touched::Read => run::push(&mut read, page),
                Touched::Written => run::push(&mut written, page),
            }
        }
        Self { guests, read: bounded(read), written: bounded(written) }
    }

    /// What guests of either reached. What one of them wrote is written.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let end = |runs: &[Run]| runs.last().and_then(|run| run.end()).unwrap_or(0);
        let pages = [&self.read, &self.written, &other.read, &other.written].map(|runs| end(runs)).into_iter().max();
        let mut all = vec![Touched::Not; pages.and_then(|pages| usize::try_from(pages).ok()).unwrap_or(0)];
        let mut mark = |runs: &[Run], touched| {
            for page in runs.iter().flat_map(|run| run.first..run.end().unwrap_or(run.first)) {
                if let Some(known) = usize::try_from(page).ok().and_then(|page| all.get_mut(page)) {
                    *known = touched;
                }
            }
        };
        for set in [self, other] {
            mark(&set.read, Touched::Read);
        }
        for set in [self, other] {
            mark(&set.written, Touched::Written);
        }
        Self::seen_at(self.guests.saturating_add(other.guests), all.into_iter())
    }

    /// Bytes of memory it names, at most.
    pub fn bytes(&self) -> u64 {
        self.read.iter().chain(&self.written).map(|run| run.count.saturating_mul(PAGE_BYTES)).sum()
    }

    /// The first of it, written pages before others, up to so many bytes.
    #[must_use]
    pub fn capped(mut self, bytes_max: u64) -> Self {
        let mut left = bytes_max / PAGE_BYTES;
        for runs in [&mut self.written, &mut self.read] {
            for run in runs.iter_mut() {
                run.count = run.count.min(left);
                left -= run.count;
            }
            runs.retain(|run| run.count > 0);
        }
        self
    }

    fn check(&self, pages: u64) -> Result<(), &'static str> {
        for runs in [&self.read, &self.written] {
            if runs.len() > RUNS_MAX {
                return Err("it has too many runs");
            }
            let mut next = 0;
            for run in runs {
                if run.count == 0 || run.first < next {
                    return Err("its runs are not in order");
                }
                next = run.end().filter(|end| *end <= pages).ok_or("it names pages that the bundle does not have")?;
            }
        }
        Ok(())
    }
}

/// What a guest did with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// Nothing.
    Not,
    /// It reached it.
    Read,
    /// It wrote to it.
    Written,
}

/// As many runs as are possible, by closing the shortest gaps.
fn bounded(mut runs: Vec<Run>) -> Vec<Run> {
    let excess = runs.len().saturating_sub(RUNS_MAX);
    if excess == 0 {
        return runs;
    }
    let gap = |pair: &[Run]| pair[1].first - (pair[0].first + pair[0].count);
    let mut gaps: Vec<u64> = runs.windows(2).map(gap).collect();
    let (_, longest_closed, _) = gaps.select_nth_unstable(excess - 1);
    let closed = *longest_closed;
    let mut merged: Vec<Run> = Vec::with_capacity(RUNS_MAX);
    for run in runs.drain(..) {
        match merged.last_mut() {
            Some(last) if run.first - (last.first + last.count) <= closed => {
                last.count = run.first + run.count - last.first
            }
            Some(_) | None => merged.push(run),
        }
    }
    merged
}

impl Store {
    /// What is known of a bundle's working set; `None`: nothing yet.
    pub fn working_set(&self, id: &BundleId) -> Result<Option<WorkingSet>, WorkingSetError> {
        let failed = |source| WorkingSetError::File { bundle: id.clone(), source };
        let damaged = |what| WorkingSetError::Damaged { bundle: id.clone(), what };
        let opened = match file::open_regular(&self.places().working_set(id)) {
            Ok(opened) => opened.ok_or_else(|| damaged("it is no regular file"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        // Also of one that is not whole yet: guests run from it.
        let memory_bytes = self.manifest(id).map(|manifest| manifest.machine.memory_bytes);
        let memory_bytes =
            memory_bytes.or_else(|_| self.partial_manifest(id).map(|(manifest, _)| manifest.machine.memory_bytes));
        let memory_bytes = memory_bytes.map_err(|error| failed(io::Error::other(error)))?;
        read(&bytes, memory_bytes / PAGE_BYTES).map(Some).map_err(damaged)
    }

    /// Begins to read a bundle's working set from the disk, all of it at once. Nothing waits for it.
    pub fn read_ahead(&self, id: &BundleId, set: &WorkingSet) {
        let Ok(files) = self.open_for_launch(id) else { return };
        for run in set.written.iter().chain(&set.read) {
            file::will_need(&files.memory, run.bytes(PAGE_BYTES));
        }
    }

    /// Keeps a bundle's working set, in the place of an earlier one.
    pub fn keep_working_set(&self, id: &BundleId, set: &WorkingSet) -> Result<(), WorkingSetError> {
        let failed = |source| WorkingSetError::File { bundle: id.clone(), source };
        let bytes = written(set).map_err(|error| failed(io::Error::other(error)))?;
        // The store's disk may have been mounted since it was opened.
        let kept = file::make_directories(&self.places().working_sets());
        kept.and_then(|()| file::replace(&self.places().working_set(id), &bytes)).map_err(failed)
    }

    /// Forgets a bundle's working set.
    pub fn forget_working_set(&self, id: &BundleId) -> Result<(), WorkingSetError> {
        match std::fs::remove_file(self.places().working_set(id)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(WorkingSetError::File { bundle: id.clone(), source })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// A digest in a line of its own, and what it is of.
fn written(set: &WorkingSet) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_vec(set)?;
    Ok([format!("{}\n", Digest::of(&body)).as_bytes(), &body].concat())
}

/// Reads what [`written`] wrote, for an image of so many pages.
pub fn read(bytes: &[u8], pages: u64) -> Result<WorkingSet, &'static str> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err("it is too long");
    }
    let at = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no digest")?;
    let (digest, body) = (&bytes[..at], &bytes[at + 1..]);
    let digest: Option<Digest> = std::str::from_utf8(digest).ok().and_then(|text| text.parse().ok());
    if digest != Some(Digest::of(body)) {
        return Err("its digest is another one");
    }
    let set: WorkingSet = serde_json::from_slice(body).map_err(|_| "it is not a working set")?;
    set.check(pages)?;
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(first: u64, count: u64) -> Run {
        Run { first, count }
    }

    #[test]
    fn pages_become_runs_and_a_cap_keeps_what_is_written() {
        use Touched::{Not, Read, Written};
        let set = WorkingSet::of([Not, Read, Read, Written, Read, Not, Written, Written].into_iter());
        assert_eq!(
            set,
            WorkingSet { guests: 1, read: vec![run(1, 2), run(4, 1)], written: vec![run(3, 1), run(6, 2)] }
        );
        assert_eq!(set.bytes(), 6 * PAGE_BYTES);
        let capped = set.clone().capped(4 * PAGE_BYTES);
        assert_eq!(capped, WorkingSet { guests: 1, read: vec![run(1, 1)], written: vec![run(3, 1), run(6, 2)] });
        assert_eq!(set.clone().capped(0), WorkingSet { guests: 1, ..WorkingSet::default() });
        assert_eq!(read(&written(&set).unwrap(), 8), Ok(set.clone()));
        assert_eq!(read(&written(&set).unwrap(), 7), Err("it names pages that the bundle does not have"));
        let turned = WorkingSet { guests: 1, read: vec![run(4, 1), run(1, 2)], written: vec![] };
        assert_eq!(read(&written(&turned).unwrap(), 8), Err("its runs are not in order"));
    }

    #[test]
    fn several_guests_are_one_set() {
        use Touched::{Not, Read, Written};
        let first = WorkingSet::of([Read, Not, Written, Not, Read].into_iter());
        let second = WorkingSet::of([Written, Read, Read].into_iter());
        let both = WorkingSet { guests: 2, ..WorkingSet::of([Written, Read, Written, Not, Read].into_iter()) };
        assert_eq!(first.with(&second), both);
        assert_eq!(second.with(&first), both);
        assert_eq!(WorkingSet::default().with(&first), first);
        // What an earlier version wrote says nothing of guests.
        let body = br#"{"read":[],"written":[[2,1]]}"#;
        let bytes = [format!("{}\n", Digest::of(body)).as_bytes(), body].concat();
        assert_eq!(read(&bytes, 9).unwrap().guests, 0);
    }

    #[test]
    fn what_was_changed_in_any_place_is_damaged() {
        let bytes = written(&WorkingSet { guests: 1, read: vec![run(1, 2)], written: vec![run(7, 1)] }).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(read(&changed, 100).is_err(), "byte {at}");
            assert!(read(&bytes[..at], 100).is_err(), "{at} bytes");
        }
    }

    proptest! {
        #[test]
        fn no_page_is_lost_and_no_run_too_many(pages in proptest::collection::vec(0_u8..4, 0..20_000)) {
            let kind = |number: &u8| match number { 0 => Touched::Read, 1 => Touched::Written, _ => Touched::Not };
            let set = WorkingSet::of(pages.iter().map(kind));
            prop_assert_eq!(set.check(pages.len() as u64), Ok(()));
            for (page, number) in (0..).zip(&pages) {
                let holds = |runs: &[Run]| runs.iter().any(|run| (run.first..run.first + run.count).contains(&page));
                match kind(number) {
                    Touched::Read => prop_assert!(holds(&set.read)),
                    Touched::Written => prop_assert!(holds(&set.written)),
                    Touched::Not => {}
                }
            }
        }

        #[test]
        fn garbage_is_refused(bytes: Vec<u8>) {
            prop_assert!(read(&bytes, 1 << 20).is_err());
        }
    }
}
