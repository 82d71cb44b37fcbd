//! Time, handed in: everything that needs a clock takes a [`Clock`], so that a simulation can turn it.
//! `Instant::now` and `SystemTime::now` are called here and nowhere else.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A point on a clock that never goes back, as nanoseconds since an origin that is fixed for the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Monotonic(pub u64);

impl Monotonic {
    /// Time from `earlier` to this point; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This point moved back by `time`, capped at the beginning of time.
    pub fn before(self, time: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// This point moved on by `delay`, capped at the end of time.
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// Wall-clock time: nanoseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct UnixNanos(pub u64);

/// A point in time by which things rest and run out while agents come and go: nanoseconds since the Unix epoch as the
/// wall clock had them when this host's clock was first read after it booted, counted on by a clock that nobody sets. So
/// it is about the wall clock's time, but a wall clock that is set, by a day say, ends no rest too early and makes none
/// last a day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Steady(pub u64);

impl Steady {
    /// This point moved on by `delay`, capped at the end of time.
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time from this point to `later`; zero when it is past.
    pub const fn until(self, later: Self) -> Duration {
        Duration::from_nanos(later.0.saturating_sub(self.0))
    }
}

/// How long a host has been up, and which of its boots that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uptime {
    /// A number that is another after each boot.
    pub boot: u64,
    /// Time since the boot, including what it slept.
    pub since_boot: Duration,
}

/// Where time comes from.
pub trait Clock: Send + Sync + 'static {
    /// Now, on the clock that never goes back.
    fn monotonic(&self) -> Monotonic;
    /// Now, for people and for guests.
    fn wall(&self) -> UnixNanos;
}

/// The host's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    /// A clock whose monotonic origin is now.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the host's monotonic clock")]
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads the host's wall clock")]
    fn wall(&self) -> UnixNanos {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        UnixNanos(u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX))
    }
}
