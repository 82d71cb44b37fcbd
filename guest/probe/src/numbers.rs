//! What became of numbered things that were sent: which came, which came twice or late, which never. Pure.
//!
//! Exact for any order and any repetition, as long as no more than [`HOLES_MAX`] runs of numbers are missing at once.
//! Beyond that the oldest run is given up as lost, and what comes of it later is counted apart.

use std::collections::BTreeMap;
use std::ops::Range;

/// Most runs of missing numbers that are remembered: 1 MiB or so.
pub const HOLES_MAX: usize = 16_384;

/// Numbers that came.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// From the lowest number that came or has to come to one behind the highest that came.
    range: Option<Range<u64>>,
    /// Runs within the range that have not come: where each begins and ends.
    holes: BTreeMap<u64, u64>,
    /// Numbers in runs that were given up, and up to where.
    given_up: u64,
    given_up_below: u64,
    received: u64,
    duplicates: u64,
    late: u64,
    untold: u64,
}

impl Tally {
    /// One that counts from the first number that comes.
    pub fn new() -> Self {
        Self::default()
    }

    /// One to which every number from `first` on has to come.
    pub fn from_number(first: u64) -> Self {
        Self { range: Some(first..first), ..Self::default() }
    }

    /// Takes a number that came.
    pub fn take(&mut self, number: u64) {
        let range = self.range.clone().unwrap_or(number..number);
        if number >= range.end {
            // Those in between may still come.
            self.add_hole(range.end..number);
            self.received += 1;
            self.range = Some(range.start..number + 1);
        } else if number < range.start {
            self.add_hole(number + 1..range.start);
            self.received += 1;
            self.late += 1;
            self.range = Some(number..range.end);
        } else if self.fill(number) {
            self.received += 1;
            self.late += 1;
        } else if number < self.given_up_below {
            self.untold += 1;
        } else {
            self.duplicates += 1;
        }
    }

    fn add_hole(&mut self, hole: Range<u64>) {
        if hole.is_empty() {
            return;
        }
        self.holes.insert(hole.start, hole.end);
        if self.holes.len() > HOLES_MAX
            && let Some((start, end)) = self.holes.pop_first()
        {
            self.given_up += end - start;
            self.given_up_below = self.given_up_below.max(end);
        }
    }

    /// Whether a number was missing; then it is so no more.
    fn fill(&mut self, number: u64) -> bool {
        let Some((start, end)) = self.holes.range(..=number).next_back().map(|(start, end)| (*start, *end)) else {
            return false;
        };
        if number >= end {
            return false;
        }
        self.holes.remove(&start);
        self.add_hole(start..number);
        self.add_hole(number + 1..end);
        true
    }

    /// Different numbers that came.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Times a number came again.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Numbers that came after a higher one.
    pub fn out_of_order(&self) -> u64 {
        self.late
    }

    /// Numbers that came of runs that had been given up: late ones or duplicates.
    pub fn untold(&self) -> u64 {
        self.untold
    }

    /// The lowest and the highest number that count.
    pub fn bounds(&self) -> Option<(u64, u64)> {
        self.range.as_ref().and_then(|range| Some((range.start, range.end.checked_sub(1)?)))
    }

    /// Numbers that never came, if those below `total` had to.
    pub fn lost(&self, total: Option<u64>) -> u64 {
        let within: u64 = self.holes.iter().map(|(start, end)| end - start).sum();
        within + self.given_up + self.tail(total)
    }

    /// Runs of numbers that have not come, but for those behind the highest that did and those that were given up.
    pub fn missing(&self) -> impl Iterator<Item = Range<u64>> {
        self.holes.iter().map(|(start, end)| *start..*end)
    }

    /// The longest run of numbers none of which came.
    pub fn longest_hole(&self, total: Option<u64>) -> u64 {
        let within = self.holes.iter().map(|(start, end)| end - start).max().unwrap_or(0);
        within.max(self.tail(total))
    }

    fn tail(&self, total: Option<u64>) -> u64 {
        let end = self.range.as_ref().map_or(0, |range| range.end);
        total.map_or(0, |total| total.saturating_sub(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The same, by remembering everything.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Counted {
        received: u64,
        duplicates: u64,
        late: u64,
        lost: u64,
        longest: u64,
    }

    fn plainly(first: Option<u64>, numbers: &[u64], total: Option<u64>) -> Counted {
        let mut seen = BTreeSet::new();
        let mut counted = Counted::default();
        for number in numbers {
            let is_late = seen.last().is_some_and(|highest| number < highest);
            if !seen.insert(*number) {
                counted.duplicates += 1;
                continue;
            }
            counted.received += 1;
            counted.late += u64::from(is_late);
        }
        let start = first.or(seen.first().copied()).unwrap_or(0);
        let end = seen.last().map_or(start, |last| last + 1).max(total.unwrap_or(0));
        let mut run = 0;
        for number in start..end {
            run = if seen.contains(&number) { 0 } else { run + 1 };
            counted.lost += u64::from(run > 0);
            counted.longest = counted.longest.max(run);
        }
        counted
    }

    fn tallied(first: Option<u64>, numbers: &[u64], total: Option<u64>) -> Counted {
        let mut tally = first.map_or_else(Tally::new, Tally::from_number);
        numbers.iter().for_each(|number| tally.take(*number));
        assert_eq!(tally.untold(), 0);
        Counted {
            received: tally.received(),
            duplicates: tally.duplicates(),
            late: tally.out_of_order(),
            lost: tally.lost(total),
            longest: tally.longest_hole(total),
        }
    }

    proptest! {
        #[test]
        fn any_multiset_in_any_order_is_counted_right(
            numbers in prop::collection::vec(0_u64..200, 0..300),
            from_zero in any::<bool>(),
            total in prop::option::of(0_u64..260),
        ) {
            let first = from_zero.then_some(0);
            // What has to come is only known of somebody who began.
            let total = total.filter(|_| from_zero || !numbers.is_empty());
            prop_assert_eq!(tallied(first, &numbers, total), plainly(first, &numbers, total));
        }

        #[test]
        fn a_permutation_loses_nothing(numbers in Just((0..150_u64).collect::<Vec<_>>()).prop_shuffle()) {
            let counted = tallied(Some(0), &numbers, Some(150));
            prop_assert_eq!((counted.received, counted.lost, counted.duplicates), (150, 0, 0));
            let sorted = numbers.is_sorted();
            prop_assert_eq!(counted.late == 0, sorted);
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let holes = HOLES_MAX as u64;
        // Every second number: one hole for each but the first.
        let mut tally = Tally::from_number(0);
        (0..=holes).for_each(|number| tally.take(number * 2));
        assert_eq!((tally.lost(None), tally.holes.len()), (holes, HOLES_MAX));
        tally.take(holes * 2 + 2);
        assert_eq!((tally.lost(None), tally.holes.len()), (holes + 1, HOLES_MAX), "the oldest is given up, and lost");
        tally.take(1);
        assert_eq!((tally.untold(), tally.duplicates(), tally.lost(None)), (1, 0, holes + 1));
        tally.take(3);
        assert_eq!((tally.out_of_order(), tally.lost(None)), (1, holes), "the next one is still known");
    }

    #[test]
    fn the_highest_number_there_is_is_taken_for_none_that_follows() {
        let mut tally = Tally::new();
        tally.take(u64::MAX - 1);
        tally.take(0);
        assert_eq!((tally.received(), tally.out_of_order(), tally.lost(None)), (2, 1, u64::MAX - 2));
    }
}
