//! What the daemon says beside its work, to the log it was started with.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Monotonic;

/// Writes a line. Nothing depends on it: the disk it lies on may be full, which is no reason to serve nobody. (The
/// standard library's own macros panic then.)
pub(super) fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// How many lines of a kind are said within how long.
const LINES_MAX: u32 = 20;
const LINES_WITHIN: Duration = Duration::from_secs(60);

/// Lines that anybody who connects can cause: few of them are said, the others counted.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    since: Option<Monotonic>,
    lines: u32,
    skipped: u64,
}

impl Seldom {
    /// Says a line, or counts it.
    pub(super) fn say(&self, now: Monotonic, line: Arguments<'_>) {
        let skipped = self.take(now);
        match skipped {
            Some(0) => say(line),
            Some(skipped) => say(format_args!("{line} ({skipped} lines like this were left out before)")),
            None => {}
        }
    }

    /// Whether a line is said, and how many were not before it.
    fn take(&self, now: Monotonic) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.since.is_none_or(|since| now.since(since) >= LINES_WITHIN) {
            (said.since, said.lines) = (Some(now), 0);
        }
        if said.lines >= LINES_MAX {
            said.skipped += 1;
            return None;
        }
        said.lines += 1;
        Some(std::mem::take(&mut said.skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_few_are_said_and_the_others_counted() {
        let seldom = Seldom::default();
        let said = (0..100).filter(|at| seldom.take(Monotonic(*at)) == Some(0)).count();
        assert_eq!(said, LINES_MAX as usize);
        let later = Monotonic(0).after(LINES_WITHIN);
        assert_eq!(seldom.take(later), Some(80));
        assert_eq!(seldom.take(later), Some(0));
    }
}
