//! What a guest's clocks show after it stood still: pure arithmetic, no clock is read here.
//!
//! A guest has two clocks of KVM's: kvmclock, in nanoseconds since it booted, and the TSC, in cycles, which is the host's
//! TSC plus an offset. Both were read at one moment when the guest was paused ([`Stopped`]); the host is read again when
//! it goes on ([`HostNow`]).
//!
//! A worked example: a guest of 2,000,000 kHz paused 10 s after its boot, with its TSC at 20,000,000,000; it goes on
//! 3 s later, on another host, whose TSC is at 700,000,000,000:
//!
//! | | [`GuestTime::Stands`] | [`GuestTime::Passes`], if it can have stopped so long |
//! |---|---|---|
//! | kvmclock | 10 s | 10 s + 3 s = 13 s |
//! | guest TSC | 20,000,000,000 | 20,000,000,000 + 3 s * 2,000,000 kHz = 26,000,000,000 |
//! | TSC offset | 20,000,000,000 - 700,000,000,000 | 26,000,000,000 - 700,000,000,000 |
//!
//! Neither clock ever goes back, and neither leaps: two hosts' real-time clocks may differ by anything, so what they say is
//! believed only within what the host has measured by itself.

/// Whether a pause is part of the guest's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GuestTime {
    /// The guest's clocks go on from where they stopped (launch, resume, wake: its wall clock is set by its agent).
    #[default]
    Stands,
    /// The guest's clocks jump over the pause (migration: the pause is short and the wall clock stays right).
    Passes {
        /// The shortest pause there can have been, in nanoseconds by this host's monotonic clock.
        at_least_ns: u64,
        /// The longest. What two hosts' real-time clocks say between the two counts; beyond them they differ, and that is
        /// no time of the guest's.
        at_most_ns: u64,
    },
    /// The same within one host, whose real-time clock is the same before and after.
    PassesHere {
        /// The longest pause there can have been, in nanoseconds. One that is longer began before: somebody had paused the
        /// guest, and for as long its clocks stand.
        at_most_ns: u64,
    },
}

/// A guest's clocks at the moment it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// kvmclock, nanoseconds.
    pub kvmclock_ns: u64,
    /// Real time of the host, nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
    /// TSC of the guest, cycles.
    pub guest_tsc: u64,
    /// Frequency of the guest's TSC, kHz.
    pub tsc_khz: u32,
}

/// The host's clocks at the moment a guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostNow {
    /// Real time, nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
    /// TSC of the host, cycles at the guest's frequency.
    pub host_tsc: u64,
}

/// What to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adjusted {
    /// kvmclock, nanoseconds.
    pub kvmclock_ns: u64,
    /// What to add to the host's TSC, modulo 2^64.
    pub tsc_offset: u64,
}

/// Elapsed time does not fit the guest's clocks: more than five centuries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{elapsed_ns} ns passed since the guest stopped, which its clocks cannot hold")]
pub struct ClockOverflow {
    /// Nanoseconds since it stopped.
    pub elapsed_ns: u64,
}

/// The guest's clocks for going on at `now`.
pub fn adjust(stopped: Stopped, now: HostNow, time: GuestTime) -> Result<Adjusted, ClockOverflow> {
    let elapsed_ns = match time {
        GuestTime::Stands => 0,
        GuestTime::Passes { at_least_ns, at_most_ns } => {
            now.realtime_ns.saturating_sub(stopped.realtime_ns).min(at_most_ns).max(at_least_ns)
        }
        GuestTime::PassesHere { at_most_ns } => {
            let elapsed = now.realtime_ns.saturating_sub(stopped.realtime_ns);
            if elapsed > at_most_ns { 0 } else { elapsed }
        }
    };
    let overflow = ClockOverflow { elapsed_ns };
    // cycles = ns * kHz / 10^6; the product needs 96 bits.
    let cycles = u128::from(elapsed_ns) * u128::from(stopped.tsc_khz) / 1_000_000;
    let cycles = u64::try_from(cycles).map_err(|_| overflow)?;
    let guest_tsc = stopped.guest_tsc.checked_add(cycles).ok_or(overflow)?;
    Ok(Adjusted {
        kvmclock_ns: stopped.kvmclock_ns.checked_add(elapsed_ns).ok_or(overflow)?,
        tsc_offset: guest_tsc.wrapping_sub(now.host_tsc),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;
    const PASSES: GuestTime = GuestTime::Passes { at_least_ns: 0, at_most_ns: u64::MAX };

    fn example() -> (Stopped, HostNow) {
        let stopped =
            Stopped { kvmclock_ns: 10 * SECOND, realtime_ns: 50 * SECOND, guest_tsc: 20 * SECOND, tsc_khz: 2_000_000 };
        (stopped, HostNow { realtime_ns: 53 * SECOND, host_tsc: 700 * SECOND })
    }

    #[test]
    fn the_worked_example() {
        let (stopped, now) = example();
        let stands = adjust(stopped, now, GuestTime::Stands).unwrap();
        assert_eq!(stands.kvmclock_ns, 10 * SECOND);
        assert_eq!(stands.tsc_offset.wrapping_add(700 * SECOND), 20 * SECOND);
        let passes = adjust(stopped, now, PASSES).unwrap();
        assert_eq!(passes.kvmclock_ns, 13 * SECOND);
        assert_eq!(passes.tsc_offset.wrapping_add(700 * SECOND), 26 * SECOND);
    }

    #[test]
    fn a_clock_that_was_set_back_counts_as_no_time() {
        let (stopped, now) = example();
        let earlier = HostNow { realtime_ns: 1, ..now };
        assert_eq!(adjust(stopped, earlier, PASSES).unwrap(), adjust(stopped, now, GuestTime::Stands).unwrap());
    }

    #[test]
    fn what_two_hosts_clocks_say_counts_within_what_this_one_measured() {
        let (stopped, now) = example();
        let earlier = HostNow { realtime_ns: 1, ..now };
        for (now, at_least_s, at_most_s, passed_s) in
            [(now, 0, 9, 3), (now, 2, 3, 3), (now, 1, 2, 2), (now, 4, 5, 4), (earlier, 1, 2, 1), (now, 4, 2, 4)]
        {
            let time = GuestTime::Passes { at_least_ns: at_least_s * SECOND, at_most_ns: at_most_s * SECOND };
            let adjusted = adjust(stopped, now, time).unwrap();
            assert_eq!(adjusted.kvmclock_ns, stopped.kvmclock_ns + passed_s * SECOND, "{time:?}");
        }
    }

    #[test]
    fn a_guest_that_somebody_had_paused_does_not_leap() {
        let (stopped, now) = example();
        for (at_most_ns, passed) in [(3 * SECOND, 3 * SECOND), (3 * SECOND - 1, 0)] {
            let adjusted = adjust(stopped, now, GuestTime::PassesHere { at_most_ns }).unwrap();
            assert_eq!(adjusted.kvmclock_ns, stopped.kvmclock_ns + passed);
        }
    }

    proptest! {
        #[test]
        fn no_clock_goes_back(
            kvmclock_ns: u64, realtime_ns: u64, guest_tsc: u64, tsc_khz: u32, later_ns: u64, host_tsc: u64, passes: bool,
        ) {
            let time = if passes { PASSES } else { GuestTime::Stands };
            let stopped = Stopped { kvmclock_ns, realtime_ns, guest_tsc, tsc_khz };
            let now = HostNow { realtime_ns: later_ns, host_tsc };
            if let Ok(adjusted) = adjust(stopped, now, time) {
                prop_assert!(adjusted.kvmclock_ns >= kvmclock_ns);
                prop_assert!(adjusted.tsc_offset.wrapping_add(host_tsc) >= guest_tsc);
            }
        }
    }
}
