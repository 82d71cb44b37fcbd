//! What a guest says of how it stood still and how much it wrote → figures. Pure.

use serde::Deserialize;

/// A time, in microseconds since 1970 by whoever's clock: guests have their host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) from_us: u64,
    pub(super) to_us: u64,
}

impl Window {
    /// Whether a time that began then and took so long has a part in it.
    fn meets(self, from_us: u64, ms: f64) -> bool {
        let to_us = super::summary::float(from_us) + ms * 1000.0;
        from_us <= self.to_us && to_us >= super::summary::float(self.from_us)
    }
}

/// A time in which a program that looks at the clock all the time did not get to.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub(super) struct Gap {
    unix_us: u64,
    ms: f64,
}

/// What such a program says in the end.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Stalls {
    longest: Vec<Gap>,
    /// How often a clock of the guest went back.
    backwards: u64,
    clock_backwards: u64,
}

impl Stalls {
    /// The longest gap in a time, in milliseconds.
    pub(super) fn longest_in(&self, window: Window) -> Option<f64> {
        self.longest.iter().filter(|gap| window.meets(gap.unix_us, gap.ms)).map(|gap| gap.ms).max_by(f64::total_cmp)
    }

    /// The longest gap that began in the second time, but in none of the first ones, in milliseconds: what the guest is
    /// used to.
    pub(super) fn longest_beside(&self, windows: &[Window], within: Window) -> Option<f64> {
        let is_within = |gap: &Gap| (within.from_us..=within.to_us).contains(&gap.unix_us);
        let is_in_any = |gap: &Gap| windows.iter().any(|window| window.meets(gap.unix_us, gap.ms));
        let is_beside = |gap: &&Gap| is_within(gap) && !is_in_any(gap);
        self.longest.iter().filter(is_beside).map(|gap| gap.ms).max_by(f64::total_cmp)
    }

    /// How often a clock of the guest went back.
    pub(super) const fn backwards(&self) -> u64 {
        self.backwards + self.clock_backwards
    }
}

/// How much a program that writes memory has written by then, and how often it found something else than it wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Written {
    pub(super) unix_us: u64,
    pub(super) bytes: u64,
    pub(super) wrong: u64,
}

/// Millions of bytes a second that were written in a time, by lines in their order: between the first and the last line
/// in it. `None` when there are not two.
pub(super) fn rate_in(lines: &[Written], window: Window) -> Option<f64> {
    let is_in = |line: &&Written| (window.from_us..=window.to_us).contains(&line.unix_us);
    let (first, last) = (lines.iter().find(is_in)?, lines.iter().rfind(is_in)?);
    let took_us = last.unix_us.checked_sub(first.unix_us).filter(|took| *took > 0)?;
    Some(super::summary::float(last.bytes.saturating_sub(first.bytes)) / super::summary::float(took_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn window(from_us: u64, to_us: u64) -> Window {
        Window { from_us, to_us }
    }

    #[test]
    fn gaps_belong_to_the_times_they_meet() {
        let gap = |unix_us, ms| Gap { unix_us, ms };
        let longest = vec![gap(5_000, 9.0), gap(90_000, 7.0), gap(19_500, 3.0), gap(40_000, 2.0)];
        let stalls = Stalls { longest, backwards: 0, clock_backwards: 1 };
        // One that began before and ended in it, and one that ended before.
        assert_eq!(stalls.longest_in(window(13_000, 20_000)), Some(9.0));
        assert_eq!(stalls.longest_in(window(15_000, 20_000)), Some(3.0));
        assert_eq!(stalls.longest_in(window(50_000, 60_000)), None);
        assert_eq!(
            stalls.longest_beside(&[window(13_000, 20_000), window(80_000, 91_000)], window(0, 100_000)),
            Some(2.0)
        );
        assert_eq!(stalls.longest_beside(&[], window(80_000, 100_000)), Some(7.0));
        assert_eq!(stalls.backwards(), 1);
    }

    #[test]
    fn rates_are_of_whole_lines() {
        let line = |unix_us, bytes| Written { unix_us, bytes, wrong: 0 };
        let lines = [line(0, 0), line(100, 1000), line(200, 4000), line(300, 5000)];
        assert_eq!(rate_in(&lines, window(50, 250)), Some(30.0));
        assert_eq!(rate_in(&lines, window(0, 1000)), Some(5000.0 / 300.0));
        assert_eq!(rate_in(&lines, window(50, 150)), None);
        assert_eq!(rate_in(&lines, window(301, 400)), None);
    }
}
