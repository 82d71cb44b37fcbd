//! Numbers of sets of connections. Another host's daemon refuses what came by an earlier set of a lease, so they only grow:
//! from one daemon to the next as well, and when the wall clock is set back.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::log::say;
use crate::report;
use crate::sys::file;

/// The file, in the daemon's own directory.
const FILE: &str = "sets.json";

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    format: u32,
    /// No number that was given is larger.
    bound: u64,
}

/// The only version.
const FORMAT: u32 = 1;

/// How far ahead of what is given the file's bound is, so that not every set waits for the disk: a minute, as numbers are
/// milliseconds if the clock goes on as it should.
const AHEAD: u64 = 60_000;

/// Gives numbers to sets.
#[derive(Debug)]
pub(super) struct SetNumbers {
    path: PathBuf,
    given: Mutex<Given>,
}

#[derive(Debug, Default)]
struct Given {
    last: u64,
    /// As in the file.
    bound: u64,
}

fn read(path: &Path) -> io::Result<u64> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let written: Written = serde_json::from_slice(&bytes)?;
            if written.format == FORMAT { Ok(written.bound) } else { Err(ErrorKind::InvalidData.into()) }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

impl SetNumbers {
    /// Goes on with the numbers that were given in this directory. If they are not known, the clock has to be right.
    pub(super) fn open(directory: &Path) -> Self {
        let path = directory.join(FILE);
        let bound = read(&path).unwrap_or_else(|error| {
            say(format_args!("{}: {}; sets are numbered by the clock alone", path.display(), report::chain(&error)));
            0
        });
        Self { path, given: Mutex::new(Given { last: bound, bound }) }
    }

    /// A number larger than all before it, and at least `now_ms`; also larger than what this daemon's `durable` ones of
    /// earlier lives were.
    pub(super) fn next(&self, now_ms: u64, durable: bool) -> u64 {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.last = given.last.saturating_add(1).max(now_ms);
        if durable && given.last > given.bound {
            let bound = given.last.saturating_add(AHEAD);
            let written = serde_json::to_vec(&Written { format: FORMAT, bound }).map_err(io::Error::other);
            match written.and_then(|bytes| file::replace(&self.path, &bytes)) {
                Ok(()) => given.bound = bound,
                // It matters only if the clock is set back as well.
                Err(error) => say(format_args!("{}: {}", self.path.display(), report::chain(&error))),
            }
        }
        given.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_grow_whatever_the_clock_does() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for now_ms in [1_000_000, 1_000_000, 5, 2_000_000, 3, 2_000_001] {
            let numbers = SetNumbers::open(dir.path());
            for durable in [true, false, true] {
                let next = numbers.next(now_ms, durable);
                assert!(next > last && next >= now_ms, "{next} after {last} at {now_ms}");
                last = next;
            }
        }
        let path = dir.path().join(FILE);
        let written = std::fs::read(&path).unwrap();
        SetNumbers::open(dir.path()).next(7, true);
        let numbers = SetNumbers::open(dir.path());
        let first = numbers.next(7, true);
        let after_first = std::fs::read(&path).unwrap();
        assert!(after_first != written && numbers.next(7, true) == first + 1);
        assert_eq!(std::fs::read(&path).unwrap(), after_first, "not every number waits for the disk");
        for damaged in [&b"{"[..], br#"{"format":2,"bound":9}"#] {
            file::replace(&path, damaged).unwrap();
            assert_eq!(SetNumbers::open(dir.path()).next(7, true), 7);
        }
        let nowhere = SetNumbers::open(&dir.path().join("absent"));
        assert!(nowhere.next(7, true) < nowhere.next(7, true));
    }
}
