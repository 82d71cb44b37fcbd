//! A buffer that is written again and again, and looked at each time before: every word of it follows from a secret that
//! only this program's memory holds, from its place and from how often it was written.

use std::io::Read as _;
use std::thread;
use std::time::{Duration, Instant};

use hearth_guest_probe::datagram::mixed;

use crate::report::Report;
use crate::stdin::Stdin;
use crate::words::Words;
use crate::{ProbeError, failed};

/// Words of a part that is looked at and written in one go: 256 KiB.
const PART_WORDS: usize = 32_768;

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let mib: usize = words.option_needed("mib")?;
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let rest = Duration::from_millis(words.option("every-ms")?.unwrap_or(10));
    let mut stdin = Stdin::of(&mut words)?;
    words.end()?;
    let mut secret = [0; 8];
    let mut random = std::fs::File::open("/dev/urandom").map_err(failed("open the source of randomness"))?;
    random.read_exact(&mut secret).map_err(failed("read randomness"))?;
    let secret = u64::from_le_bytes(secret);
    let mut buffer: Vec<u64> = vec![0; mib << 17];
    let begun = Instant::now();
    let (mut pass, mut wrong): (u64, u64) = (0, 0);
    loop {
        for (number, part) in buffer.chunks_mut(PART_WORDS).enumerate() {
            if begun.elapsed() >= limit || stdin.has_ended()? {
                report(secret, pass, wrong);
                return Ok(wrong == 0 && pass > 1);
            }
            for (at, word) in part.iter_mut().enumerate() {
                let place = (number * PART_WORDS + at) as u64;
                // The first time there is nothing to look at.
                wrong += u64::from(pass > 0 && *word != expected(secret, pass, place));
                *word = expected(secret, pass + 1, place);
            }
            if pass > 0 {
                thread::sleep(rest);
            }
        }
        pass += 1;
        report(secret, pass, wrong);
    }
}

const fn expected(secret: u64, pass: u64, place: u64) -> u64 {
    mixed(secret ^ pass.rotate_left(40) ^ place)
}

fn report(secret: u64, pass: u64, wrong: u64) {
    // The secret itself stays here: that it is the same one still, its image tells.
    Report::new("rewrite").number("secret", mixed(!secret)).number("passes", pass).number("wrong", wrong).print();
}
