//! Many measurements → a few figures.

use serde::Serialize;

use crate::clock::{Clock, Monotonic, SystemClock};

/// A distribution, in the unit of what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    /// How many measurements.
    pub(super) count: usize,
    /// The smallest.
    pub(super) min: f64,
    /// Half are not above it.
    pub(super) p50: f64,
    /// 99 of 100 are not above it.
    pub(super) p99: f64,
    /// The largest.
    pub(super) max: f64,
}

impl Summary {
    /// Percentiles by nearest rank, so that each is a value that was measured; `None` without measurements.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let rank = |percent: usize| values.get((values.len() * percent).div_ceil(100).max(1) - 1).copied();
        Some(Self { count: values.len(), min: *values.first()?, p50: rank(50)?, p99: rank(99)?, max: *values.last()? })
    }

    /// A row under the columns `P50`, `P99`, `MIN`, `MAX`, behind what it is of.
    pub(super) fn row(&self, name: impl Into<String>, print: impl Fn(f64) -> String) -> Vec<String> {
        vec![name.into(), print(self.p50), print(self.p99), print(self.min), print(self.max)]
    }
}

/// Milliseconds since a moment, with fraction.
pub(super) fn milliseconds_since(clock: &SystemClock, from: Monotonic) -> f64 {
    clock.monotonic().since(from).as_secs_f64() * 1000.0
}

/// A size as a figure.
#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
pub(super) const fn float(bytes: u64) -> f64 {
    bytes as f64
}

/// Whole bytes of a figure made by [`float`].
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes that were whole and below 2^53")]
pub(super) const fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let of = |count: u32| Summary::of((1..=count).rev().map(f64::from)).unwrap();
        assert_eq!(of(1), Summary { count: 1, min: 1.0, p50: 1.0, p99: 1.0, max: 1.0 });
        assert_eq!(of(4), Summary { count: 4, min: 1.0, p50: 2.0, p99: 4.0, max: 4.0 });
        assert_eq!(of(200), Summary { count: 200, min: 1.0, p50: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of([f64::NAN]), None);
    }
}
