//! A buffer that is written again and again, and looked at each time before: every word of it follows from a secret that
//! only this program's memory holds, from its place and from how often it was written.

use std::io::Read as _;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hearth_guest_probe::datagram::mixed;

use crate::report::Report;
use crate::stdin::Stdin;
use crate::words::Words;
use crate::{ProbeError, cpu, failed};

/// Words of a part that is looked at and written in one go: 256 KiB.
const PART_WORDS: usize = 32_768;

/// Bytes of a word.
const WORD_BYTES: u64 = 8;

/// Time between two lines of what was written so far.
const LINE_EVERY: Duration = Duration::from_millis(200);

/// A rest shorter than this is left for later: falling asleep and waking take a guest some milliseconds.
const REST_LEAST: Duration = Duration::from_millis(10);

/// When it rests.
#[derive(Clone, Copy)]
enum Pace {
    /// So long after each part.
    Rest(Duration),
    /// As long as it takes to write so many bytes a second.
    Rate(f64),
}

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let mib: usize = words.option_needed("mib")?;
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let rest: Option<u64> = words.option("every-ms")?;
    let rate: Option<f64> = words.option("mb-per-s")?;
    let pace = match (rest, rate) {
        (None, Some(rate)) if rate > 0.0 => Pace::Rate(rate * 1e6),
        (rest, None) => Pace::Rest(Duration::from_millis(rest.unwrap_or(10))),
        (_, Some(_)) => return Err(ProbeError::Words("--mb-per-s is above 0, and without --every-ms".to_owned())),
    };
    let on: Option<usize> = words.option("cpu")?;
    let mut stdin = Stdin::of(&mut words)?;
    words.end()?;
    on.map_or(Ok(()), cpu::take)?;
    let mut secret = [0; 8];
    let mut random = std::fs::File::open("/dev/urandom").map_err(failed("open the source of randomness"))?;
    random.read_exact(&mut secret).map_err(failed("read randomness"))?;
    let secret = u64::from_le_bytes(secret);
    let mut buffer: Vec<u64> = vec![0; mib << 17];
    let begun = Instant::now();
    let mut written = Written { secret, passes: 0, wrong: 0, bytes: 0, told: begun };
    // The first time it takes what it takes: the pages are made then.
    let mut paced_from = None;
    loop {
        for (number, part) in buffer.chunks_mut(PART_WORDS).enumerate() {
            if begun.elapsed() >= limit || stdin.has_ended()? {
                written.tell();
                return Ok(written.wrong == 0 && written.passes > 1);
            }
            written.part(number, part);
            if written.told.elapsed() >= LINE_EVERY {
                written.tell();
            }
            match (pace, paced_from) {
                (Pace::Rest(rest), Some(_)) => thread::sleep(rest),
                (Pace::Rate(rate), Some((began, before))) => rest_until_due(rate, began, written.bytes - before),
                (_, None) => {}
            }
        }
        written.passes += 1;
        if paced_from.is_none() {
            paced_from = Some((Instant::now(), written.bytes));
            written.tell();
        }
    }
}

/// Rests if more was written than the rate allows.
fn rest_until_due(rate: f64, began: Instant, bytes: u64) {
    let due = Duration::from_secs_f64(bytes as f64 / rate);
    let early = due.saturating_sub(began.elapsed());
    if early >= REST_LEAST {
        thread::sleep(early);
    }
}

/// What was written so far.
struct Written {
    secret: u64,
    passes: u64,
    wrong: u64,
    bytes: u64,
    /// When that was told last.
    told: Instant,
}

impl Written {
    fn part(&mut self, number: usize, part: &mut [u64]) {
        for (at, word) in part.iter_mut().enumerate() {
            let place = (number * PART_WORDS + at) as u64;
            // The first time there is nothing to look at.
            self.wrong += u64::from(self.passes > 0 && *word != expected(self.secret, self.passes, place));
            *word = expected(self.secret, self.passes + 1, place);
        }
        self.bytes += WORD_BYTES * part.len() as u64;
    }

    fn tell(&mut self) {
        self.told = Instant::now();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The secret itself stays here: that it is the same one still, its image tells.
        Report::new("rewrite")
            .number("secret", mixed(!self.secret))
            .number("passes", self.passes)
            .number("wrong", self.wrong)
            .number("bytes", self.bytes)
            .number("unix_us", wall.as_micros())
            .print();
    }
}

const fn expected(secret: u64, pass: u64, place: u64) -> u64 {
    mixed(secret ^ pass.rotate_left(40) ^ place)
}
