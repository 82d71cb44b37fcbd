//! Where port and memory-mapped accesses go. The only per-device locks are here.
//!
//! A [`Bus`] is filled while a machine is built and never changes after, so vCPU threads share it without a lock; each
//! device has its own. Ranges that overlap are refused when they are added. An access that is not wholly inside one
//! range reads as 0xff bytes, writes nothing and is counted: a guest may try any address.

use std::sync::{Arc, Mutex, PoisonError};

/// A device behind an address range. Offsets are relative to its start. Data is 1, 2, 4 or 8 bytes; an access a
/// device does not know reads as 0xff bytes and writes nothing. Called on vCPU threads, under the device's lock.
pub trait BusDevice: Send {
    /// The guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a bus, shared by the vCPU threads and its owner.
pub type SharedBusDevice = Arc<Mutex<dyn BusDevice>>;

/// What a bus did with an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A device took it.
    Known,
    /// There is no device.
    Unknown,
}

/// Why a range could not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddRangeError {
    /// It is empty or ends after the last address.
    #[error("{bytes} addresses from {start:#x} are not a range")]
    NotARange {
        /// Its start.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// Another device has a part of it.
    #[error("{bytes} addresses from {start:#x} overlap the device at {other:#x}")]
    Overlap {
        /// Its start.
        start: u64,
        /// Its length.
        bytes: u64,
        /// Start of the range that is in the way.
        other: u64,
    },
}

struct Range {
    start: u64,
    last: u64,
    device: SharedBusDevice,
}

/// One address space with its devices.
#[derive(Default)]
pub struct Bus {
    // Ordered by start; no two overlap.
    ranges: Vec<Range>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_list().entries(self.ranges.iter().map(|range| (range.start, range.last))).finish()
    }
}

impl Bus {
    /// An address space without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `start`, `bytes` long.
    pub fn add(&mut self, start: u64, bytes: u64, device: SharedBusDevice) -> Result<(), AddRangeError> {
        let last = bytes.checked_sub(1).and_then(|more| start.checked_add(more));
        let last = last.ok_or(AddRangeError::NotARange { start, bytes })?;
        let at = self.ranges.partition_point(|range| range.start < start);
        let before = at.checked_sub(1).and_then(|before| self.ranges.get(before)).filter(|range| range.last >= start);
        let after = self.ranges.get(at).filter(|range| range.start <= last);
        if let Some(other) = before.or(after) {
            return Err(AddRangeError::Overlap { start, bytes, other: other.start });
        }
        self.ranges.insert(at, Range { start, last, device });
        Ok(())
    }

    /// The guest reads at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Access {
        data.fill(0xff);
        match self.find(address, data.len()) {
            None => Access::Unknown,
            Some((range, offset)) => {
                range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
                Access::Known
            }
        }
    }

    /// The guest writes at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Access {
        match self.find(address, data.len()) {
            None => Access::Unknown,
            Some((range, offset)) => {
                range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
                Access::Known
            }
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&Range, u64)> {
        let at = self.ranges.partition_point(|range| range.start <= address).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        let last = address.checked_add(u64::try_from(length).ok()?.checked_sub(1)?)?;
        (last <= range.last).then(|| (range, address - range.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Last(Vec<(u64, Vec<u8>)>);
    impl BusDevice for Last {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap_or(0));
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_they_are_inside_of() {
        let device = Arc::new(Mutex::new(Last::default()));
        let mut bus = Bus::new();
        bus.add(0x100, 8, device.clone()).unwrap();
        let mut data = [0; 2];
        assert_eq!(bus.read(0x103, &mut data), Access::Known);
        assert_eq!(data, [3, 3]);
        assert_eq!(bus.write(0x107, &[9]), Access::Known);
        assert_eq!(device.lock().unwrap().0, [(7, vec![9])]);
        for address in [0xff, 0x107, 0x108, u64::MAX] {
            assert_eq!(bus.read(address, &mut data), Access::Unknown);
            assert_eq!(data, [0xff; 2]);
        }
        assert_eq!(bus.write(0x100, &[]), Access::Unknown);
    }

    #[test]
    fn ranges_at_the_end_of_the_space() {
        let mut bus = Bus::new();
        let device: SharedBusDevice = Arc::new(Mutex::new(Last::default()));
        assert!(matches!(bus.add(1, 0, device.clone()), Err(AddRangeError::NotARange { .. })));
        assert!(matches!(bus.add(u64::MAX, 2, device.clone()), Err(AddRangeError::NotARange { .. })));
        bus.add(u64::MAX, 1, device).unwrap();
        assert_eq!(bus.write(u64::MAX, &[1]), Access::Known);
    }

    proptest! {
        #[test]
        fn overlap_is_refused_exactly_when_there_is_one(ranges in proptest::collection::vec((0_u64..64, 1_u64..16), 1..12)) {
            let mut bus = Bus::new();
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (start, bytes) in ranges {
                let device: SharedBusDevice = Arc::new(Mutex::new(Last::default()));
                let free = taken.iter().all(|(other, length)| start + bytes <= *other || other + length <= start);
                prop_assert_eq!(bus.add(start, bytes, device).is_ok(), free);
                if free {
                    taken.push((start, bytes));
                }
            }
            for address in 0..96 {
                let known = taken.iter().any(|(start, bytes)| (*start..start + bytes).contains(&address));
                let access = bus.write(address, &[0]);
                prop_assert_eq!(access == Access::Known, known);
            }
        }
    }
}
