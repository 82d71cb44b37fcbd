//! How fast something may go: a rate with a burst, and the limits of a network interface made of them.
//!
//! Values of a request, a record and the control protocol alike; whoever takes them in calls [`NetLimits::check`].

use serde::{Deserialize, Serialize};

/// Bytes per second that can be asked for: slower than a modem, or faster than memory, is a mistake.
pub const BYTES_PER_S: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000;

/// Bytes that can be asked to pass at once. The least is an ordinary frame.
pub const BURST_BYTES: std::ops::RangeInclusive<u64> = 1_514..=1 << 40;

/// Frames per second, and frames at once, that can be asked for.
pub const FRAMES: std::ops::RangeInclusive<u64> = 1..=1_000_000_000;

/// Least burst of bytes when none is named: the longest frame, a segment of 64 KiB with its headers, passes at once.
const BURST_BYTES_DEFAULT_MIN: u64 = 66_000;

/// Least burst of frames when none is named.
const BURST_FRAMES_DEFAULT_MIN: u64 = 32;

/// So much per second in the long run, and so much at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Units per second.
    pub per_s: u64,
    /// Units at once.
    pub burst: u64,
}

impl Rate {
    /// Bytes per second; without a burst, a tenth of a second's worth, and at least the longest frame.
    pub fn bytes(per_s: u64, burst: Option<u64>) -> Self {
        let usual = (per_s / 10).clamp(BURST_BYTES_DEFAULT_MIN, *BURST_BYTES.end());
        Self { per_s, burst: burst.unwrap_or(usual) }
    }

    /// Frames per second; without a burst, a tenth of a second's worth, and at least a few.
    pub fn frames(per_s: u64, burst: Option<u64>) -> Self {
        let usual = (per_s / 10).clamp(BURST_FRAMES_DEFAULT_MIN, *FRAMES.end());
        Self { per_s, burst: burst.unwrap_or(usual) }
    }
}

/// What may pass a network interface in one direction; what is `None` is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowLimits {
    /// Bytes of Ethernet frames. A segment that the host cuts counts with the bytes it has before.
    pub bytes: Option<Rate>,
    /// Frames, as guest and host hand them over: a segment that the host cuts is one.
    pub frames: Option<Rate>,
}

/// What may pass a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetLimits {
    /// To the guest.
    pub rx: FlowLimits,
    /// From the guest.
    pub tx: FlowLimits,
}

/// A limit nobody can mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("network limit {direction}.{what} {found}: {min} to {max} are possible")]
pub struct NetLimitError {
    /// `rx` or `tx`.
    pub direction: &'static str,
    /// Which of its numbers.
    pub what: &'static str,
    /// What was asked for.
    pub found: u64,
    /// The least that is possible.
    pub min: u64,
    /// The most that is possible.
    pub max: u64,
}

impl NetLimits {
    /// Whether all numbers are such as somebody can mean.
    pub fn check(&self) -> Result<(), NetLimitError> {
        for (direction, limits) in [("rx", self.rx), ("tx", self.tx)] {
            let bytes = limits
                .bytes
                .map(|rate| [("bytes_per_s", rate.per_s, BYTES_PER_S), ("burst_bytes", rate.burst, BURST_BYTES)]);
            let frames = limits
                .frames
                .map(|rate| [("packets_per_s", rate.per_s, FRAMES), ("burst_packets", rate.burst, FRAMES)]);
            for (what, found, possible) in bytes.into_iter().chain(frames).flatten() {
                if !possible.contains(&found) {
                    let (min, max) = possible.into_inner();
                    return Err(NetLimitError { direction, what, found, min, max });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_nobody_can_mean_are_refused_by_name() {
        let rx = |bytes, frames| NetLimits { rx: FlowLimits { bytes, frames }, tx: FlowLimits::default() };
        assert_eq!(NetLimits::default().check(), Ok(()));
        assert_eq!(rx(Some(Rate::bytes(1_000, None)), Some(Rate::frames(1, None))).check(), Ok(()));
        for (limits, what) in [
            (rx(Some(Rate::bytes(999, None)), None), "bytes_per_s"),
            (rx(Some(Rate::bytes(0, Some(10_000))), None), "bytes_per_s"),
            (rx(Some(Rate::bytes(u64::MAX, None)), None), "bytes_per_s"),
            (rx(Some(Rate::bytes(1_000, Some(1_513))), None), "burst_bytes"),
            (rx(Some(Rate::bytes(1_000, Some(u64::MAX))), None), "burst_bytes"),
            (rx(None, Some(Rate::frames(0, None))), "packets_per_s"),
            (rx(None, Some(Rate::frames(1, Some(0)))), "burst_packets"),
        ] {
            let error = limits.check().unwrap_err();
            assert_eq!((error.direction, error.what), ("rx", what));
            let tx = NetLimits { rx: limits.tx, tx: limits.rx };
            assert!(tx.check().unwrap_err().to_string().starts_with(&format!("network limit tx.{what} ")));
        }
    }
}
