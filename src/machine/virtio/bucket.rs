//! Token buckets: how much may pass now, and when more may. Pure values; the time is handed in.
//!
//! A bucket holds at most its burst and gains its rate. What passes is taken out. Something larger than the burst
//! passes when the bucket is full and leaves a debt, which is paid off before anything else passes: so whatever the
//! sizes, no more than rate times duration plus one burst (or one such large thing) passes in any stretch of time, and
//! nothing waits for ever.

use std::time::Duration;

use crate::clock::Monotonic;
use crate::units::{FlowLimits, Rate};

/// Fractions of a token that are counted: a rate of one token per second gains one of them each nanosecond, so nothing
/// is lost by rounding, however often the bucket is looked at.
const FRACTIONS: i128 = 1_000_000_000;

/// A bucket of tokens.
#[derive(Debug, Clone)]
struct Bucket {
    /// Fractions of a token gained each nanosecond, which is tokens per second.
    gain: u64,
    /// Fractions of a token in a full bucket.
    full: i128,
    /// Fractions of a token now; below zero is debt. At most 2^64 tokens of 2^30 fractions on either side: far from
    /// the type's bounds.
    level: i128,
    /// When `level` was right.
    at: Monotonic,
}

impl Bucket {
    /// A full bucket.
    fn new(rate: Rate, now: Monotonic) -> Self {
        let full = i128::from(rate.burst.max(1)) * FRACTIONS;
        Self { gain: rate.per_s, full, level: full, at: now }
    }

    /// How long until `tokens` may pass; zero is now.
    fn wait(&mut self, tokens: u64, now: Monotonic) -> Duration {
        let elapsed = now.0.saturating_sub(self.at.0);
        let gained = u128::from(elapsed) * u128::from(self.gain);
        let missing = u128::try_from(self.full - self.level).unwrap_or(0);
        self.level = if gained >= missing { self.full } else { self.level.saturating_add_unsigned(gained) };
        // A clock that went back changes nothing.
        self.at = self.at.max(now);
        let needed = (i128::from(tokens) * FRACTIONS).min(self.full);
        match u128::try_from(needed - self.level) {
            Ok(lacking) if lacking > 0 => {
                // A rate of nothing is refused where limits come in; here it means never.
                let wait = lacking.div_ceil(u128::from(self.gain.max(1)));
                Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX))
            }
            Ok(_) | Err(_) => Duration::ZERO,
        }
    }

    /// Takes out what passed.
    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * FRACTIONS);
    }
}

/// What may pass in one direction: bytes and frames, each if it is limited.
#[derive(Debug, Clone)]
pub(super) struct Limiter {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Limiter {
    /// Full buckets.
    pub(super) fn new(limits: FlowLimits, now: Monotonic) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self { bytes: bucket(limits.bytes), frames: bucket(limits.frames) }
    }

    /// Whether anything is limited at all; if not, nobody has to look at a clock.
    pub(super) fn is_limiting(&self) -> bool {
        self.bytes.is_some() || self.frames.is_some()
    }

    /// How long until a frame of this many bytes may pass; zero is now.
    pub(super) fn wait(&mut self, bytes: u64, now: Monotonic) -> Duration {
        let by_bytes = self.bytes.as_mut().map(|bucket| bucket.wait(bytes, now));
        let by_frames = self.frames.as_mut().map(|bucket| bucket.wait(1, now));
        by_bytes.max(by_frames).unwrap_or_default()
    }

    /// A frame of this many bytes has passed.
    pub(super) fn passed(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.frames {
            bucket.take(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limiter(bytes: Option<Rate>, frames: Option<Rate>) -> Limiter {
        Limiter::new(FlowLimits { bytes, frames }, Monotonic(0))
    }

    fn passes(limiter: &mut Limiter, bytes: u64, now: Monotonic) -> bool {
        let passes = limiter.wait(bytes, now).is_zero();
        if passes {
            limiter.passed(bytes);
        }
        passes
    }

    #[test]
    fn a_full_burst_passes_at_once_and_no_more() {
        let mut limiter = limiter(Some(Rate { per_s: 1_000_000, burst: 15_000 }), None);
        let now = Monotonic(7);
        assert_eq!((0..100).filter(|_| passes(&mut limiter, 1_500, now)).count(), 10);
        assert_eq!(limiter.wait(1_500, now), Duration::from_micros(1_500));
        assert!(!passes(&mut limiter, 1_500, Monotonic(7 + 1_499_999)));
        assert!(passes(&mut limiter, 1_500, Monotonic(7 + 1_500_000)));
    }

    #[test]
    fn bytes_and_frames_both_have_to_allow_it() {
        let mut limiter = limiter(Some(Rate { per_s: 1_000, burst: 10_000 }), Some(Rate { per_s: 10, burst: 2 }));
        let now = Monotonic(0);
        assert!(passes(&mut limiter, 100, now) && passes(&mut limiter, 100, now));
        assert_eq!(limiter.wait(100, now), Duration::from_millis(100));
        assert_eq!(limiter.wait(10_000, now), Duration::from_millis(200));
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_and_is_paid_for() {
        let mut limiter = limiter(Some(Rate { per_s: 1_000, burst: 2_000 }), None);
        let now = Monotonic(0);
        assert!(passes(&mut limiter, 64_000, now));
        // 62,000 of debt and one of credit.
        assert_eq!(limiter.wait(1, now), Duration::from_millis(62_001));
    }

    #[test]
    fn ends_of_time_and_of_numbers_are_no_trouble() {
        for rate in [0, 1, u64::MAX] {
            let mut limiter =
                limiter(Some(Rate { per_s: rate, burst: u64::MAX }), Some(Rate { per_s: rate, burst: 0 }));
            for bytes in [u64::MAX, u64::MAX, 0] {
                limiter.passed(bytes);
            }
            let _ = limiter.wait(u64::MAX, Monotonic(u64::MAX));
            limiter.passed(1);
            // The clock goes back: nothing is gained by it, and nothing by its coming forward again.
            let wait = limiter.wait(1, Monotonic(0));
            assert_eq!(limiter.wait(1, Monotonic(u64::MAX)), wait);
        }
    }

    fn sizes_and_pauses() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let pause = prop_oneof![Just(0), 0..1_000_u64, 0..50_000_000_u64, Just(1 << 62)];
        proptest::collection::vec((1..70_000_u64, pause), 1..80)
    }

    proptest! {
        /// The promise, for every stretch of time between two frames that passed.
        #[test]
        fn no_stretch_of_time_sees_more_than_rate_and_burst(
            per_s in 1..5_000_000_000_u64,
            burst in 1..200_000_u64,
            frames in sizes_and_pauses(),
        ) {
            let mut limiter = limiter(Some(Rate { per_s, burst }), None);
            let (mut now, mut passed) = (0_u64, Vec::new());
            for (bytes, pause) in frames {
                now = now.saturating_add(pause);
                if passes(&mut limiter, bytes, Monotonic(now)) {
                    passed.push((now, bytes));
                }
            }
            for (first, (from, _)) in passed.iter().enumerate() {
                let (mut sum, mut largest) = (0_u128, 0);
                for (at, bytes) in &passed[first..] {
                    sum += u128::from(*bytes);
                    largest = largest.max(*bytes);
                    let gained = u128::from(at - from) * u128::from(per_s) / 1_000_000_000 + 1;
                    prop_assert!(sum <= gained + u128::from(burst.max(largest)));
                }
            }
        }

        /// Waiting as long as was said is enough, and any shorter is not.
        #[test]
        fn the_wait_is_exact(
            per_s in 1..5_000_000_000_u64,
            burst in 1..200_000_u64,
            frames in sizes_and_pauses(),
            next in 1..70_000_u64,
        ) {
            let mut limiter = limiter(Some(Rate { per_s, burst }), Some(Rate { per_s, burst }));
            let mut now = 0_u64;
            for (bytes, pause) in frames {
                now = now.saturating_add(pause);
                passes(&mut limiter, bytes, Monotonic(now));
            }
            let wait = limiter.wait(next, Monotonic(now));
            if !wait.is_zero() && u128::from(now) + wait.as_nanos() < u128::from(u64::MAX) {
                let then = Monotonic(now).after(wait);
                prop_assert!(!limiter.clone().wait(next, Monotonic(then.0 - 1)).is_zero());
                prop_assert!(limiter.wait(next, then).is_zero());
            }
        }
    }
}
