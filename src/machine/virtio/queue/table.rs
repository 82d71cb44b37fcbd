//! A descriptor chain by its head, without the available ring: that names a chain only until it is taken, and what was
//! under way when a machine was saved had been taken. The rules are those of `Queue::pop`.

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::RingError;
use crate::machine::ram::GuestRam;
use crate::machine::virtio::chain::{CHAIN_SEGMENTS_MAX, Chain, Segment};

/// Bytes of a descriptor (virtio 1.2 section 2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;

// Descriptor flags (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    /// Guest-physical address.
    pub(super) at: u64,
    /// Number of its entries.
    pub(super) entries: u32,
}

struct Descriptor {
    address: GuestAddress,
    bytes: u32,
    flags: u16,
    next: u16,
}

impl Table {
    fn descriptor(self, ram: &GuestRam, index: u16) -> Result<Descriptor, RingError> {
        if u32::from(index) >= self.entries {
            return Err(RingError::Chain);
        }
        let at = self.at.checked_add(u64::from(DESCRIPTOR_BYTES) * u64::from(index)).ok_or(RingError::Chain)?;
        let mut raw = [0; DESCRIPTOR_BYTES as usize];
        ram.read_slice(&mut raw, GuestAddress(at)).map_err(|_| RingError::Chain)?;
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        Ok(Descriptor {
            address: GuestAddress(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// The chain that begins at `head` of a queue's table.
pub(super) fn chain(ram: &GuestRam, queue: Table, head: u16) -> Result<Chain, RingError> {
    let (mut table, mut index, mut is_indirect) = (queue, head, false);
    let (mut segments, mut readable, mut total) = (Vec::with_capacity(4), 0, 0_u32);
    // One more for the descriptor that is no buffer; a chain that loops ends here too.
    for _ in 0..=CHAIN_SEGMENTS_MAX {
        let Descriptor { address, bytes, flags, next } = table.descriptor(ram, index)?;
        if flags & INDIRECT != 0 {
            // 2.7.5.3.1: one level. What would follow it is not looked at.
            let entries = bytes / DESCRIPTOR_BYTES;
            if is_indirect || !bytes.is_multiple_of(DESCRIPTOR_BYTES) || entries > u16::MAX.into() {
                return Err(RingError::Chain);
            }
            (table, index, is_indirect) = (Table { at: address.0, entries }, 0, true);
            continue;
        }
        // 2.7.5.2: no chain is longer than 2^32 bytes.
        total = total.checked_add(bytes).ok_or(RingError::Chain)?;
        if !ram.check_range(address, bytes as usize, Permissions::ReadWrite) {
            return Err(RingError::Buffer);
        }
        if flags & WRITE == 0 {
            if readable != segments.len() {
                return Err(RingError::Chain);
            }
            readable += 1;
        }
        segments.push(Segment { address, bytes });
        if flags & NEXT == 0 {
            return if segments.len() > CHAIN_SEGMENTS_MAX {
                Err(RingError::Chain)
            } else {
                Ok(Chain::new(head, segments, readable))
            };
        }
        index = next;
    }
    Err(RingError::Chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::queue::Queue;
    use proptest::prelude::*;

    const AT: u64 = 0x1000;
    const ENTRIES: u16 = 8;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap()
    }

    fn put(ram: &GuestRam, table: u64, index: u16, (address, bytes): (u64, u32), (flags, next): (u16, u16)) {
        let raw =
            [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        ram.write_slice(&raw, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// A queue that has this head available.
    fn queue(ram: &GuestRam, head: u16) -> Queue {
        let (available, used) = (0x2000, 0x3000);
        ram.write_slice(&[[0; 2], 1_u16.to_le_bytes(), head.to_le_bytes()].concat(), GuestAddress(available)).unwrap();
        let mut queue = Queue::new(ram.clone(), ENTRIES);
        let setup = queue.setup_mut().unwrap();
        (setup.descriptors, setup.available, setup.used) = (AT, available, used);
        queue.enable(false).unwrap();
        queue
    }

    #[test]
    fn a_chain_is_the_one_that_was_taken() {
        let ram = ram();
        put(&ram, AT, 3, (0x4000, 16), (NEXT, 1));
        put(&ram, AT, 1, (0x5000, 512), (NEXT | WRITE, 0));
        put(&ram, AT, 0, (0x6000, 1), (WRITE, 0));
        let mut plain = queue(&ram, 3);
        let taken = plain.pop().unwrap().unwrap();
        assert_eq!(plain.taken_before(3).unwrap(), taken);
        put(&ram, AT, 2, (0x7000, 48), (INDIRECT, 0));
        put(&ram, 0x7000, 0, (0x4000, 16), (NEXT, 2));
        put(&ram, 0x7000, 2, (0x5000, 512), (NEXT | WRITE, 1));
        put(&ram, 0x7000, 1, (0x6000, 1), (WRITE, 0));
        let mut indirect = queue(&ram, 2);
        let taken = indirect.pop().unwrap().unwrap();
        assert_eq!(indirect.taken_before(2).unwrap(), taken);
        assert_eq!(indirect.taken_before(8), Err(RingError::Chain));
    }

    proptest! {
        /// Whatever the table says, both ways to read it come to the same chain, or to none.
        #[test]
        fn both_ways_agree(
            raw in proptest::collection::vec((0_u64..0x8000, 0_u32..64, 0_u16..8, 0_u16..9), usize::from(ENTRIES)),
            head in 0_u16..ENTRIES,
        ) {
            let ram = ram();
            for (index, (address, bytes, flags, next)) in (0..).zip(&raw) {
                put(&ram, AT, index, (*address, *bytes), (*flags, *next));
            }
            let mut queue = queue(&ram, head);
            let again = queue.taken_before(head);
            if let Ok(Some(taken)) = queue.pop() {
                prop_assert_eq!(again, Ok(taken));
            } else {
                prop_assert!(again.is_err());
            }
        }
    }
}
