//! One virtqueue: what the driver configured, and the rings behind it.
//!
//! A wrapper over `virtio_queue::Queue` that says why a ring is unusable instead of yielding nothing, never loops longer
//! than the ring is, and hands out checked [`Chain`]s. Owned by the device's cell; touched only under its lock.
//! Everything in the rings is the guest's word: an index, a descriptor or a length that cannot be ends in a
//! [`RingError`], after which the device asks for a reset.
//!
//! Serving a queue: `pop` until there is nothing, `add_used` for each chain that is done, then `wait_for_buffers`
//! once, and only if the device wants to be told about more. `owes_interrupt` at the end of a turn.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue as Ring, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::chain::{CHAIN_SEGMENTS_MAX, Chain, Segment};
use super::saved::QueueV1;
use crate::machine::ram::GuestRam;

mod table;

/// Why a ring cannot be worked with: the driver broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Size, alignment or address of the rings is impossible.
    #[error("the rings' size, alignment or address is impossible")]
    Setup,
    /// More chains are announced than the ring has entries.
    #[error("the available ring's index is impossible")]
    Index,
    /// A chain is empty, loops, is too long or leaves its table.
    #[error("malformed descriptor chain")]
    Chain,
    /// A buffer is not in guest memory.
    #[error("a buffer is outside of memory")]
    Buffer,
}

/// How often [`Queue::tell_next_added`] follows a guest that is adding buffers at the same moment. Each round costs the
/// guest at least one entry, and rings of the queues it is used for have 16.
const TELL_ATTEMPTS: usize = 16;

/// Whether the guest will tell when it adds buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// It will.
    Told,
    /// There are buffers already; look again.
    MoreThere,
}

/// What the driver wrote to a queue's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// Size in entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
}

/// A virtqueue.
#[derive(Debug)]
pub struct Queue {
    ram: GuestRam,
    size_max: u16,
    setup: QueueSetup,
    /// The rings, while the queue is ready.
    ring: Option<Ring>,
    /// Whether chains were used since the guest was last considered for an interrupt.
    added: bool,
    /// Whether some of them were added behind the ring's back.
    added_unseen: bool,
}

impl Queue {
    /// A queue as after reset. `size_max` is a power of two.
    pub fn new(ram: GuestRam, size_max: u16) -> Self {
        let setup = QueueSetup { size: size_max, descriptors: 0, available: 0, used: 0 };
        Self { ram, size_max, setup, ring: None, added: false, added_unseen: false }
    }

    /// Largest size the driver may choose.
    pub fn size_max(&self) -> u16 {
        self.size_max
    }

    /// Whether the driver has handed the queue over.
    pub fn is_ready(&self) -> bool {
        self.ring.is_some()
    }

    /// What the driver may still change; nothing once the queue is ready.
    pub fn setup_mut(&mut self) -> Option<&mut QueueSetup> {
        if self.is_ready() { None } else { Some(&mut self.setup) }
    }

    /// Takes the queue over with what was set up.
    pub fn enable(&mut self, event_idx: bool) -> Result<(), RingError> {
        if self.ring.is_none() {
            self.ring = Some(self.ring_at(0, 0, event_idx)?);
        }
        Ok(())
    }

    /// Gives the queue back: it is not touched any more.
    pub fn disable(&mut self) {
        self.ring = None;
        (self.added, self.added_unseen) = (false, false);
    }

    /// Back to the state after reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.ram.clone(), self.size_max);
    }

    fn ring_at(&self, next_avail: u16, next_used: u16, event_idx_enabled: bool) -> Result<Ring, RingError> {
        let QueueSetup { size, descriptors, available, used } = self.setup;
        let entries = usize::from(size);
        // Sizes of the three parts: virtio 1.2 section 2.7, with the event field at the end of both rings. Checked here
        // and not by `is_valid`, which writes a log line for each failure: the guest decides how often that is.
        let inside = |address, bytes, access| self.ram.check_range(GuestAddress(address), bytes, access);
        let fits = inside(descriptors, 16 * entries, Permissions::Read)
            && inside(available, 6 + 2 * entries, Permissions::Read)
            && inside(used, 6 + 8 * entries, Permissions::Write);
        if !fits || available == 0 {
            return Err(RingError::Setup);
        }
        let max_size = self.size_max;
        let (desc_table, avail_ring, used_ring) = (descriptors, available, used);
        let ready = true;
        Ring::try_from(QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        })
        .map_err(|_| RingError::Setup)
    }

    /// The next chain the guest made available, if there is one and the queue is ready.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let mut available = ring.iter(&self.ram).map_err(|_| RingError::Index)?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let (mut segments, mut readable) = (Vec::with_capacity(4), 0);
        // Indirect tables: the iterator follows one and ends early, without a word, where anything is wrong. The last
        // descriptor it gave then still says that another follows.
        let mut another_follows = true;
        for descriptor in descriptors.take(CHAIN_SEGMENTS_MAX + 1) {
            let (address, bytes) = (descriptor.addr(), descriptor.len());
            another_follows = descriptor.has_next();
            if !self.ram.check_range(address, bytes as usize, Permissions::ReadWrite) {
                return Err(RingError::Buffer);
            }
            if !descriptor.is_write_only() {
                if readable != segments.len() {
                    // 2.7.4.2: buffers to be written come after all buffers to be read.
                    return Err(RingError::Chain);
                }
                readable += 1;
            }
            segments.push(Segment { address, bytes });
        }
        if another_follows || segments.len() > CHAIN_SEGMENTS_MAX {
            return Err(RingError::Chain);
        }
        Ok(Some(Chain::new(head, segments, readable)))
    }

    /// A chain that was taken before the machine was saved and is not used yet, read again from where it begins. The guest
    /// may not change it until it is used.
    pub fn taken_before(&self, head: u16) -> Result<Chain, RingError> {
        if self.ring.is_none() {
            return Err(RingError::Setup);
        }
        let QueueSetup { size, descriptors, .. } = self.setup;
        table::chain(&self.ram, table::Table { at: descriptors, entries: size.into() }, head)
    }

    /// Takes the last `pop` back: the chain is available again.
    pub fn undo_pop(&mut self, chain: Chain) {
        let Chain { .. } = chain;
        if let Some(ring) = &mut self.ring {
            ring.go_to_previous_position();
        }
    }

    /// Gives a chain back to the guest with `written` bytes in its writable part.
    pub fn add_used(&mut self, chain: Chain, written: usize) -> Result<(), RingError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        ring.add_used(&self.ram, chain.head(), written).map_err(|_| RingError::Setup)?;
        self.added = true;
        Ok(())
    }

    /// Gives several chains back at once, each with the bytes written: the guest sees all of them or none, as the parts
    /// of one network packet have to be (2.7.8.2: the index is what publishes entries).
    pub fn add_used_together(&mut self, mut chains: Vec<(Chain, usize)>) -> Result<(), RingError> {
        let Some((last, last_written)) = chains.pop() else { return Ok(()) };
        let Some(ring) = &mut self.ring else { return Ok(()) };
        for (chain, written) in chains {
            let at = u64::from(ring.next_used() % self.setup.size);
            let entry = GuestAddress(self.setup.used + 4 + 8 * at);
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            let bytes = (u64::from(written) << 32 | u64::from(chain.head())).to_le_bytes();
            self.ram.write_slice(&bytes, entry).map_err(|_| RingError::Setup)?;
            ring.set_next_used(ring.next_used().wrapping_add(1));
            // The ring only counts what it adds itself, so its answer would be about the last entry.
            self.added_unseen = true;
        }
        self.add_used(last, last_written)
    }

    /// Asks the guest to tell when it adds buffers, and looks whether it did meanwhile.
    pub fn wait_for_buffers(&mut self) -> Result<Waiting, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(Waiting::Told) };
        match ring.enable_notification(&self.ram).map_err(|_| RingError::Setup)? {
            true => Ok(Waiting::MoreThere),
            false => Ok(Waiting::Told),
        }
    }

    /// Asks the guest to tell of the next buffer it adds, whether or not it still has others here. Best effort if the
    /// guest adds buffers all the while: then it is telling anyway.
    pub fn tell_next_added(&mut self) -> Result<(), RingError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if !ring.event_idx_enabled() {
            return ring.enable_notification(&self.ram).map(|_| ()).map_err(|_| RingError::Setup);
        }
        // 2.7.10: the guest notifies when it adds the entry whose index stands in avail_event, at the end of the used
        // ring. The index is read again after the fence: the guest may have gone past it meanwhile.
        let field = GuestAddress(self.setup.used + 4 + 8 * u64::from(self.setup.size));
        for _ in 0..TELL_ATTEMPTS {
            let count = self.added_count()?;
            self.ram.store(count.to_le(), field, Ordering::Relaxed).map_err(|_| RingError::Setup)?;
            fence(Ordering::SeqCst);
            if self.added_count()? == count {
                break;
            }
        }
        Ok(())
    }

    /// How many chains the guest has made available since the queue was set up (modulo 2^16).
    pub fn added_count(&self) -> Result<u16, RingError> {
        let Some(ring) = &self.ring else { return Ok(0) };
        Ok(ring.avail_idx(&self.ram, Ordering::Acquire).map_err(|_| RingError::Setup)?.0)
    }

    /// Whether the guest wants an interrupt for what was used since the last call.
    pub fn owes_interrupt(&mut self) -> Result<bool, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        if !std::mem::take(&mut self.added) {
            return Ok(false);
        }
        let unseen = std::mem::take(&mut self.added_unseen);
        Ok(ring.needs_notification(&self.ram).map_err(|_| RingError::Setup)? || unseen)
    }

    /// What must survive. Call [`Queue::owes_interrupt`] first: how many chains were used since then is not saved.
    pub fn save(&self) -> QueueV1 {
        let QueueSetup { size, descriptors, available, used } = self.setup;
        let (next_avail, next_used) = self.ring.as_ref().map_or((0, 0), |ring| (ring.next_avail(), ring.next_used()));
        let (size_max, ready) = (self.size_max, self.is_ready());
        QueueV1 { size_max, size, ready, descriptors, available, used, next_avail, next_used }
    }

    /// A queue as it was saved; refused if its rings cannot be.
    pub fn from_saved(ram: GuestRam, saved: &QueueV1, event_idx: bool) -> Result<Self, RingError> {
        let &QueueV1 { size_max, size, ready, descriptors, available, used, next_avail, next_used } = saved;
        let mut queue = Self::new(ram, size_max);
        queue.setup = QueueSetup { size, descriptors, available, used };
        if ready {
            queue.ring = Some(queue.ring_at(next_avail, next_used, event_idx)?);
        }
        Ok(queue)
    }
}
