//! The statistics queue (virtio 1.2 section 5.5.6.3): the driver leaves one buffer with numbers here, and gets it back
//! when the host wants newer ones.
//!
//! The buffer stays available in its ring until it is given back: nothing of it has to be saved. Whatever the driver
//! puts behind it waits for its turn.

use std::time::Duration;

use super::ASK_INTERVAL;
use crate::clock::Monotonic;
use crate::machine::virtio::model::{Counters, Io, Turn};
use crate::machine::virtio::queue::{RingError, Waiting};
use crate::machine::virtio::spec::balloon as numbers;

/// Entries looked at in one buffer: there are ten tags, and newer drivers have a few more.
const ENTRIES_MAX: usize = 64;

/// Buffers given back in one turn: one is wanted, and another may follow it at once.
const BUFFERS_PER_TURN: usize = 4;

/// What a guest says of its memory (5.5.6.4); `None` for what it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestMemoryStats {
    /// Bytes it read from its swap.
    pub swap_in_bytes: Option<u64>,
    /// Bytes it wrote to its swap.
    pub swap_out_bytes: Option<u64>,
    /// Faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes it uses for nothing.
    pub free_bytes: Option<u64>,
    /// Bytes it has.
    pub total_bytes: Option<u64>,
    /// Bytes programs could get without swapping.
    pub available_bytes: Option<u64>,
    /// Bytes of files it could drop.
    pub disk_caches_bytes: Option<u64>,
}

/// What was said last, and whether somebody wants to know more.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    last: Option<(GuestMemoryStats, Monotonic)>,
    /// Whether the buffer that is next in the queue was read already.
    is_read: bool,
    /// Whether it is to be given back.
    is_wanted: bool,
    asked: Option<Monotonic>,
}

impl Statistics {
    /// What was said last, and when.
    pub(super) const fn last(&self) -> Option<(GuestMemoryStats, Monotonic)> {
        self.last
    }

    /// Somebody wants newer numbers.
    pub(super) fn want(&mut self, now: Monotonic) {
        let since = |asked| now.since(asked);
        if self.asked.map(since).is_none_or(|since: Duration| since >= ASK_INTERVAL) {
            (self.asked, self.is_wanted) = (Some(now), true);
        }
    }

    pub(super) fn serve(&mut self, io: &mut Io<'_>, queue: usize, now: Monotonic) -> Result<Turn, RingError> {
        for _ in 0..BUFFERS_PER_TURN {
            let Some(chain) = io.queues[queue].pop()? else {
                self.is_read = false;
                match io.queues[queue].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            if !self.is_read {
                let mut bytes = [0; ENTRIES_MAX * numbers::STAT_BYTES];
                let read = chain.read(io.ram, 0, &mut bytes)?;
                self.last = Some((parse(&bytes[..read]), now));
                self.is_read = true;
            }
            if !self.is_wanted {
                io.queues[queue].undo_pop(chain);
                return Ok(Turn::Idle);
            }
            io.queues[queue].add_used(chain, 0)?;
            Counters::count(&io.counters.done);
            (self.is_read, self.is_wanted) = (false, false);
        }
        Ok(Turn::More)
    }
}

/// Tags that are unknown are passed over (5.5.6.4.1); of one that is there twice, the last counts.
fn parse(bytes: &[u8]) -> GuestMemoryStats {
    let mut stats = GuestMemoryStats::default();
    for entry in bytes.as_chunks::<{ numbers::STAT_BYTES }>().0 {
        let [tag @ .., _, _, _, _, _, _, _, _] = *entry;
        let [_, _, value @ ..] = *entry;
        let field = match u16::from_le_bytes(tag) {
            numbers::S_SWAP_IN => &mut stats.swap_in_bytes,
            numbers::S_SWAP_OUT => &mut stats.swap_out_bytes,
            numbers::S_MAJFLT => &mut stats.major_faults,
            numbers::S_MINFLT => &mut stats.minor_faults,
            numbers::S_MEMFREE => &mut stats.free_bytes,
            numbers::S_MEMTOT => &mut stats.total_bytes,
            numbers::S_AVAIL => &mut stats.available_bytes,
            numbers::S_CACHES => &mut stats.disk_caches_bytes,
            _ => continue,
        };
        *field = Some(u64::from_le_bytes(value));
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat()
    }

    #[test]
    fn unknown_tags_and_a_cut_entry_are_passed_over() {
        let mut bytes = [entry(4, 1), entry(999, 2), entry(5, 3), entry(4, 4)].concat();
        bytes.extend(&entry(6, 5)[..9]);
        let expected = GuestMemoryStats { free_bytes: Some(4), total_bytes: Some(3), ..GuestMemoryStats::default() };
        assert_eq!(parse(&bytes), expected);
        assert_eq!(parse(&[]), GuestMemoryStats::default());
    }
}
