//! How long a guest stands still, as it sees it itself: one who looks at the time stamp counter all the time, and writes
//! down when it did not get to look for a while.
//!
//! The counter is the processor's and goes on while a guest is held; a hypervisor that restores a guest elsewhere sets
//! it to where it would be. So a gap in it is the whole time in which no program ran, whatever the kernel's clocks make
//! of that. What those make of it is written down as well.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hearth_guest_probe::gaps::{Gap, Gaps};
use nix::time::{ClockId, clock_gettime};

use crate::report::Report;
use crate::stdin::Stdin;
use crate::words::Words;
use crate::{ProbeError, cpu, failed, tsc};

/// From here on a time without a look is a gap, in microseconds.
const GAP_US: u64 = 1000;

/// How long the counter's rate is measured for, before anything else.
const CALIBRATION: Duration = Duration::from_millis(500);

/// So many pairs of counter and clock are read for one: the one that was read fastest counts.
const PAIRS: usize = 32;

/// Looks between two of the other clock, when there is no gap: its reading may be a system call.
const LOOKS: u32 = 1 << 22;

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let gap_us: u64 = words.option("gap-us")?.unwrap_or(GAP_US);
    let cpus: String = words.option("cpus")?.unwrap_or_else(|| "0".to_owned());
    let stdin = Stdin::of(&mut words)?;
    words.end()?;
    let cpus: Result<Vec<usize>, _> = cpus.split(',').map(str::parse).collect();
    let cpus = cpus.map_err(|error| ProbeError::Words(format!("--cpus: {error}")))?;
    let khz = calibrate(ClockId::CLOCK_MONOTONIC_RAW)?;
    let beginning = AtomicUsize::new(cpus.len());
    // Said by the last to begin, so that whoever reads it knows that what happens from then on is seen.
    let has_begun = || {
        if beginning.fetch_sub(1, Ordering::AcqRel) == 1 {
            Report::new("stall").number("watching", true).number("tsc_khz", khz).print();
        }
    };
    let look = |cpu: usize| Look { khz, limit, gap_cycles: gap_us.saturating_mul(khz) / 1000, cpu };
    let seen: Vec<Result<Seen, ProbeError>> = thread::scope(|scope| {
        let looking: Vec<_> = cpus.iter().map(|cpu| scope.spawn(|| look(*cpu).all(stdin, has_begun))).collect();
        looking.into_iter().filter_map(|looking| looking.join().ok()).collect()
    });
    let mut is_right = seen.len() == cpus.len();
    for (cpu, seen) in cpus.iter().zip(seen) {
        let seen = seen?;
        is_right &= seen.backwards == 0 && seen.clock_backwards == 0;
        seen.print(*cpu, khz);
    }
    Ok(is_right)
}

/// Reads a clock, in nanoseconds.
fn nanoseconds(clock: ClockId) -> Result<i64, ProbeError> {
    let now = clock_gettime(clock).map_err(failed("read a clock"))?;
    Ok(now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()))
}

/// Counter and clock of one moment, as nearly as can be.
fn pair(clock: ClockId) -> Result<(u64, i64), ProbeError> {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..PAIRS {
        let before = tsc::read();
        let now = nanoseconds(clock)?;
        let took = tsc::read().saturating_sub(before);
        if took < best.0 {
            best = (took, before + took / 2, now);
        }
    }
    Ok((best.1, best.2))
}

/// The counter's rate, in kHz.
fn calibrate(clock: ClockId) -> Result<u64, ProbeError> {
    let (began, from) = pair(clock)?;
    thread::sleep(CALIBRATION);
    let (ended, to) = pair(clock)?;
    let took = u64::try_from(to - from).ok().filter(|took| *took > 0);
    let took = took.ok_or_else(|| failed("measure the counter's rate")(std::io::Error::other("the clock stands")))?;
    let khz = u128::from(ended.saturating_sub(began)) * 1_000_000 / u128::from(took);
    u64::try_from(khz)
        .ok()
        .filter(|khz| *khz > 0)
        .ok_or_else(|| failed("measure the counter's rate")(std::io::Error::other("the time stamp counter stands")))
}

/// One who looks, on one processor.
#[derive(Clone, Copy)]
struct Look {
    khz: u64,
    limit: Duration,
    gap_cycles: u64,
    cpu: usize,
}

#[derive(Default)]
struct Seen {
    gaps: Gaps,
    began: u64,
    began_unix_ns: u128,
    ended: u64,
    looks: u64,
    backwards: u64,
    clock_backwards: u64,
    /// How far the clock went, all in all.
    clock_ns: i64,
}

impl Look {
    fn all(self, mut stdin: Stdin, has_begun: impl Fn()) -> Result<Seen, ProbeError> {
        cpu::take(self.cpu)?;
        let (began, clock_began) = pair(ClockId::CLOCK_MONOTONIC)?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut seen = Seen { began, began_unix_ns: wall.as_nanos(), ended: began, ..Seen::default() };
        let most = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX).saturating_mul(self.khz);
        // Where both were when the clock was read last.
        let mut known = (began, clock_began);
        let mut last = began;
        has_begun();
        // By either: one of them may be wrong.
        while last.saturating_sub(began) < most
            && self.limit.as_nanos() > (known.1 - clock_began).max(0).cast_unsigned().into()
            && !stdin.has_ended()?
        {
            for _ in 0..LOOKS {
                let now = tsc::read();
                seen.backwards += u64::from(now < last);
                let cycles = now.saturating_sub(last);
                if cycles >= self.gap_cycles {
                    let clock = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
                    // Where the clock was when the gap began, by the counter.
                    let from = known.1 + self.nanoseconds(last.saturating_sub(known.0));
                    seen.gaps.take(Gap { cycles, began: last, clock_ns: clock - from });
                    seen.clock_backwards += u64::from(clock < known.1);
                    known = (now, clock);
                    last = now;
                    break;
                }
                last = now;
                seen.looks += 1;
            }
            let clock = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
            seen.clock_backwards += u64::from(clock < known.1);
            let now = tsc::read();
            if now.saturating_sub(last) < self.gap_cycles {
                seen.backwards += u64::from(now < last);
                known = (now, clock);
                last = now;
            }
            // Else it is a gap, which the next look finds.
        }
        let (ended, clock_ended) = pair(ClockId::CLOCK_MONOTONIC)?;
        (seen.ended, seen.clock_ns) = (ended, clock_ended - clock_began);
        Ok(seen)
    }

    fn nanoseconds(self, cycles: u64) -> i64 {
        i64::try_from(u128::from(cycles) * 1_000_000 / u128::from(self.khz)).unwrap_or(i64::MAX)
    }
}

impl Seen {
    fn print(&self, cpu: usize, khz: u64) {
        let ms = |cycles: u64| format!("{:.3}", Duration::from_nanos(nanoseconds_of(cycles, khz)).as_secs_f64() * 1e3);
        let longest = self.gaps.longest().iter().map(|gap| {
            let after = nanoseconds_of(gap.began.saturating_sub(self.began), khz);
            let began = (self.began_unix_ns + u128::from(after)) / 1000;
            let clock = format!("{:.3}", Duration::from_nanos(gap.clock_ns.unsigned_abs()).as_secs_f64() * 1e3);
            let sign = if gap.clock_ns < 0 { "-" } else { "" };
            let (after, cycles) = (ms(gap.began.saturating_sub(self.began)), ms(gap.cycles));
            format!(r#"{{"after_ms":{after},"unix_us":{began},"ms":{cycles},"clock_ms":{sign}{clock}}}"#)
        });
        let longest: Vec<String> = longest.collect();
        let elapsed = self.ended.saturating_sub(self.began);
        Report::new("stall")
            .number("cpu", cpu)
            .number("looks", self.looks)
            .number("elapsed_ms", ms(elapsed))
            .number(
                "clock_elapsed_ms",
                format!("{:.3}", Duration::from_nanos(self.clock_ns.unsigned_abs()).as_secs_f64() * 1e3),
            )
            .number("gaps", self.gaps.count())
            .number("gaps_ms", ms(self.gaps.cycles()))
            .number("backwards", self.backwards)
            .number("clock_backwards", self.clock_backwards)
            .number("longest", format!("[{}]", longest.join(",")))
            .print();
    }
}

fn nanoseconds_of(cycles: u64, khz: u64) -> u64 {
    u64::try_from(u128::from(cycles) * 1_000_000 / u128::from(khz.max(1))).unwrap_or(u64::MAX)
}
