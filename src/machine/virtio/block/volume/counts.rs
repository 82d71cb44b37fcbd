//! What a volume's backend counts.

use std::time::Duration;

/// Buckets of a histogram of latencies.
pub const LATENCY_BUCKETS: usize = 28;

/// Requests of one kind that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VolumeFlowCounts {
    /// How many.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long they took, all together, in microseconds.
    pub took_us: u64,
    /// How many took how long, from when the guest asked: bucket 0 counts those below 1 µs, bucket n those from 2^(n-1) µs
    /// to below 2^n µs, the last one all that took longer.
    pub latency_us: [u64; LATENCY_BUCKETS],
}

impl VolumeFlowCounts {
    /// Adds a request.
    pub(super) fn add(&mut self, bytes: u64, took: Duration) {
        self.requests += 1;
        self.bytes += bytes;
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.took_us = self.took_us.saturating_add(micros);
        self.latency_us[bucket.min(LATENCY_BUCKETS - 1)] += 1;
    }
}

/// A volume slot as it is, and what passed since its volume was attached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeCounts {
    /// The volume's size in bytes; 0: nothing is attached.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Connections that carry requests.
    pub connections: u8,
    /// Requests that are not finished.
    pub waiting: u32,
    /// Connections that were made and broke.
    pub reconnects: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Whether the server's last word was that this client may not.
    pub fenced: bool,
    /// What came from the volume.
    pub read: VolumeFlowCounts,
    /// What went to it, without discards and zeroes.
    pub write: VolumeFlowCounts,
    /// Flushes.
    pub flush: VolumeFlowCounts,
    /// Why the last connection was refused or given up, if none was taken since.
    pub trouble: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_their_buckets() {
        let mut flow = VolumeFlowCounts::default();
        for (micros, bucket) in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (u64::MAX, 27)] {
            let before = flow.latency_us[bucket];
            flow.add(512, Duration::from_micros(micros));
            assert_eq!(flow.latency_us[bucket], before + 1, "{micros} µs");
        }
        assert_eq!((flow.requests, flow.bytes), (8, 4096));
    }
}
