//! Runs of numbered things, pages or chunks: how they are written, and the little algebra a diff needs of them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// `count` things from number `first` on; `[first, count]` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl From<(u64, u64)> for Run {
    fn from((first, count): (u64, u64)) -> Self {
        Self { first, count }
    }
}

impl From<Run> for (u64, u64) {
    fn from(run: Run) -> Self {
        (run.first, run.count)
    }
}

impl Run {
    /// The number after the last one; `None` when there is no such number.
    pub const fn end(self) -> Option<u64> {
        self.first.checked_add(self.count)
    }

    /// The same things as bytes, `unit` bytes each. For runs that were checked against a size.
    pub const fn bytes(self, unit: u64) -> Range<u64> {
        self.first.saturating_mul(unit)..self.first.saturating_add(self.count).saturating_mul(unit)
    }
}

/// Ascending numbers as runs; a number that follows the last one makes its run longer.
pub fn push(runs: &mut Vec<Run>, number: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == Some(number) => last.count += 1,
        Some(_) | None => runs.push(Run { first: number, count: 1 }),
    }
}

/// What of `ranges` lies in none of `without`. Both ascend and do not overlap in themselves.
pub(super) fn subtract(ranges: &[Range<u64>], without: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut without = without.iter().peekable();
    for range in ranges {
        let mut at = range.start;
        while without.next_if(|hole| hole.end <= at).is_some() {}
        let mut coming = without.clone();
        while let Some(hole) = coming.next_if(|hole| hole.start < range.end) {
            if hole.start > at {
                left.push(at..hole.start);
            }
            at = at.max(hole.end);
        }
        if at < range.end {
            left.push(at..range.end);
        }
    }
    left
}

/// What of `ranges` lies in `within`. `ranges` ascend and do not overlap.
pub(super) fn intersect<'a>(
    ranges: &'a [Range<u64>],
    within: &Range<u64>,
) -> impl Iterator<Item = Range<u64>> + use<'a> {
    let Range { start, end } = *within;
    let first = ranges.partition_point(|range| range.end <= start);
    ranges[first..]
        .iter()
        .take_while(move |range| range.start < end)
        .map(move |range| range.start.max(start)..range.end.min(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges_of(marks: &[bool]) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for (number, _) in (0..).zip(marks).filter(|(_, mark)| **mark) {
            push(&mut runs, number);
        }
        runs.into_iter().map(|run| run.bytes(1)).collect()
    }

    proptest! {
        #[test]
        fn ranges_are_sets(marks in proptest::collection::vec(any::<(bool, bool)>(), 0..60), from in 0_u64..60) {
            let (a, b): (Vec<bool>, Vec<bool>) = marks.iter().copied().unzip();
            let difference: Vec<bool> = marks.iter().map(|(a, b)| *a && !*b).collect();
            prop_assert_eq!(subtract(&ranges_of(&a), &ranges_of(&b)), ranges_of(&difference));
            let within = from..from + 9;
            let inside: Vec<bool> = (0..).zip(&a).map(|(at, mark)| *mark && within.contains(&at)).collect();
            prop_assert_eq!(intersect(&ranges_of(&a), &within).collect::<Vec<_>>(), ranges_of(&inside));
        }
    }
}
