//! Times in which somebody who looks at the clock all the time did not: what they say of how long it stood still. Pure.

/// How many of the longest are kept.
pub const KEPT: usize = 128;

/// One time without a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    /// How long it was, in cycles of the counter that was looked at.
    pub cycles: u64,
    /// The counter when it began.
    pub began: u64,
    /// How far the other clock went meanwhile, in nanoseconds; below 0, if it went back.
    pub clock_ns: i64,
}

/// The longest ones, and how many there were.
#[derive(Debug, Clone, Default)]
pub struct Gaps {
    longest: Vec<Gap>,
    count: u64,
    cycles: u64,
}

impl Gaps {
    /// Takes one.
    pub fn take(&mut self, gap: Gap) {
        self.count += 1;
        self.cycles = self.cycles.saturating_add(gap.cycles);
        let at = self.longest.partition_point(|other| *other > gap);
        if at < KEPT {
            self.longest.insert(at, gap);
            self.longest.truncate(KEPT);
        }
    }

    /// The longest, the longest first.
    pub fn longest(&self) -> &[Gap] {
        &self.longest
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How long they were together.
    pub fn cycles(&self) -> u64 {
        self.cycles
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_longest_are_kept(lengths in prop::collection::vec(0_u64..50, 0..300)) {
            let mut gaps = Gaps::default();
            for (began, cycles) in lengths.iter().enumerate() {
                gaps.take(Gap { cycles: *cycles, began: began as u64, clock_ns: 0 });
            }
            let mut sorted = lengths.clone();
            sorted.sort_unstable_by(|one, other| other.cmp(one));
            sorted.truncate(KEPT);
            let kept: Vec<u64> = gaps.longest().iter().map(|gap| gap.cycles).collect();
            prop_assert_eq!(kept, sorted);
            prop_assert_eq!((gaps.count(), gaps.cycles()), (lengths.len() as u64, lengths.iter().sum()));
        }
    }
}
