//! Memory that is in use and compresses to nothing: filled with random words once, then kept.

use std::num::NonZero;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hearth_guest_probe::datagram::mixed;

use crate::ProbeError;
use crate::report::Report;
use crate::stdin::{self, Stdin};
use crate::words::Words;

/// Words of a part that is filled in one go: 1 MiB.
const PART_WORDS: usize = 1 << 17;

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let mib: usize = words.option_needed("mib")?;
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let stdin = Stdin::of(&mut words)?;
    words.end()?;
    let begun = Instant::now();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // A page's first use is what takes the time, and each processor makes pages by itself.
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let filled: Vec<Option<Vec<u64>>> = thread::scope(|scope| {
        let share = |number: usize| mib * (number + 1) / threads - mib * number / threads;
        let fill = |number: usize| scope.spawn(move || fill(mixed(seed ^ number as u64), share(number), begun + limit));
        let filling: Vec<_> = (0..threads).map(fill).collect();
        filling.into_iter().map(|filling| filling.join().ok().flatten()).collect()
    });
    let is_full = filled.iter().all(Option::is_some);
    let took = begun.elapsed();
    Report::new("hold").number("filled", is_full).number("mib", mib).number("ms", took.as_millis()).print();
    let left = limit.saturating_sub(took);
    if !is_full {
        return Ok(false);
    }
    if stdin.is_asked() {
        stdin::wait_for_end(left)?;
    } else {
        thread::sleep(left);
    }
    // Looked at in the end, so that it has to be there until then.
    Ok(filled.iter().flatten().all(|part| part.last() != Some(&0)))
}

/// Random words; `None` when it takes too long.
fn fill(seed: u64, mib: usize, deadline: Instant) -> Option<Vec<u64>> {
    let mut filled = Vec::with_capacity(mib * PART_WORDS);
    for part in 0..mib {
        let first = part * PART_WORDS;
        filled.extend((first..first + PART_WORDS).map(|place| mixed(seed ^ place as u64)));
        if Instant::now() >= deadline {
            return None;
        }
    }
    Some(filled)
}
