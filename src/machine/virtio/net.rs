//! The network device (virtio 1.2 section 5.1) on a tap.
//!
//! Frames go between the rings and the tap with the header they have on both sides, so the tap's checksum and
//! segmentation offloads are the guest's. From the guest: gathered straight from its memory. To the guest: through one
//! buffer, since a frame's length is known only when it is read and it may need several of the guest's buffers.
//!
//! Runs on the device loop under the slot's lock. While the device is paused, or the guest has no buffers, frames wait
//! in the tap, which keeps its queue's length and drops the rest. Frames the guest has no room for, or that are none,
//! are dropped and counted; the network does that as well.

use std::fs::File;
use std::io::{self, Read};

use vmm_sys_util::epoll::EventSet;

use self::saved::NetV1;
use super::chain::Chain;
use super::model::{Counters, Face, Io, Model, Turn, Watch};
use super::queue::{RingError, Waiting};
use super::spec::{device_id, net as spec};
use crate::saved::{SaveSectionError, Section};
use crate::sys::tap::{self, Offloads};
use crate::sys::vectored;

/// Queue to the guest.
const RX: usize = 0;
/// Queue from the guest.
const TX: usize = 1;

/// What drivers and other devices use; a full ring of 1.5 KiB buffers takes a few hundred KiB of the guest's memory.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE, QUEUE_SIZE];

/// Shortest frame: an Ethernet header.
const FRAME_BYTES_MIN: usize = 14;

/// Longest frame: an Ethernet header, two VLAN tags, and the longest IP packet, which a segment to be cut may be.
const FRAME_BYTES_MAX: usize = 14 + 8 + 65535;

/// Most frames of one turn in each direction.
const TURN_FRAMES_MAX: usize = 64;

/// Token of the tap.
const TAP_TOKEN: u64 = 0;

const FEATURES: u64 = spec::F_MAC
    | spec::F_CSUM
    | spec::F_GUEST_CSUM
    | spec::F_GUEST_TSO4
    | spec::F_GUEST_TSO6
    | spec::F_HOST_TSO4
    | spec::F_HOST_TSO6
    | spec::F_MRG_RXBUF;

/// The network device.
#[derive(Debug)]
pub(crate) struct Net {
    face: Face,
    mac: [u8; 6],
    tap: File,
    /// Whether reading the tap may give a frame.
    readable: bool,
    /// Whether the tap may take a frame.
    writable: bool,
    /// What the tap was told that the guest takes.
    offloads: Offloads,
    /// The frame that was read last, with its header.
    frame: Box<[u8]>,
    /// Its length, while the guest has no room for it.
    held: Option<usize>,
}

impl Net {
    /// A device on an open tap.
    pub(crate) fn new(tap: File, mac: [u8; 6], watch: &Watch) -> io::Result<Self> {
        tap::prepare(&tap)?;
        let offloads = Offloads::default();
        tap::set_offloads(&tap, offloads)?;
        watch.add(&tap, TAP_TOKEN, EventSet::IN | EventSet::OUT)?;
        let config = mac.to_vec();
        let face = Face { device_id: device_id::NET, features: FEATURES, queue_sizes: &QUEUE_SIZES, config };
        let frame = vec![0; spec::HEADER_BYTES + FRAME_BYTES_MAX].into_boxed_slice();
        Ok(Self { face, mac, tap, readable: true, writable: true, offloads, frame, held: None })
    }

    /// Has the tap cut and checksum what this driver does not take. If it refuses, the kernel goes on doing it all.
    fn follow_features(&mut self, features: u64) {
        let has = |feature| features & feature != 0;
        let wanted = Offloads {
            checksum: has(spec::F_GUEST_CSUM),
            tso4: has(spec::F_GUEST_TSO4),
            tso6: has(spec::F_GUEST_TSO6),
            ..Offloads::default()
        };
        if wanted != self.offloads {
            self.offloads = wanted;
            let _ = tap::set_offloads(&self.tap, wanted);
        }
    }

    /// Frames from the guest.
    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        for _ in 0..TURN_FRAMES_MAX {
            if !self.writable {
                return Ok(Turn::Idle);
            }
            let Some(chain) = io.queues[TX].pop()? else {
                match io.queues[TX].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            let bytes = chain.readable_bytes();
            let is_frame = (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes.saturating_sub(spec::HEADER_BYTES));
            let sent = is_frame && {
                match vectored::write(&self.tap, &chain.readable_slices(io.ram, 0, bytes)?) {
                    Ok(_) => true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.writable = false;
                        io.queues[TX].undo_pop(chain);
                        return Ok(Turn::Idle);
                    }
                    // The interface is down, or the header makes no sense.
                    Err(_) => false,
                }
            };
            Counters::count(if sent { &io.counters.done } else { &io.counters.dropped });
            io.queues[TX].add_used(chain, 0)?;
        }
        Ok(Turn::More)
    }

    /// Frames to the guest.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        for _ in 0..TURN_FRAMES_MAX {
            if !self.readable && self.held.is_none() {
                return Ok(Turn::Idle);
            }
            let Some(first) = io.queues[RX].pop()? else {
                match io.queues[RX].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            let Some(bytes) = self.next_frame(io.counters) else {
                io.queues[RX].undo_pop(first);
                continue;
            };
            match self.gather(io, first, bytes)? {
                Gathered::Enough(chains) => self.deliver(io, chains, bytes)?,
                Gathered::NeverEnough => Counters::count(&io.counters.dropped),
                Gathered::NotYet => {
                    self.held = Some(bytes);
                    if io.queues[RX].wait_for_buffers()? == Waiting::Told {
                        return Ok(Turn::Idle);
                    }
                }
            }
        }
        Ok(Turn::More)
    }

    /// Length of the next frame in the buffer, with its header.
    fn next_frame(&mut self, counters: &Counters) -> Option<usize> {
        if let Some(bytes) = self.held.take() {
            return Some(bytes);
        }
        match (&self.tap).read(&mut self.frame) {
            Ok(bytes) if bytes >= spec::HEADER_BYTES + FRAME_BYTES_MIN => Some(bytes),
            Ok(_) => {
                Counters::count(&counters.dropped);
                None
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            // Nothing there for now, or the interface is gone.
            Err(_) => {
                self.readable = false;
                None
            }
        }
    }

    /// Finds buffers for a frame: one, or with merged buffers as many as it takes (5.1.6.4). What is not used is put
    /// back.
    fn gather(&mut self, io: &mut Io<'_>, first: Chain, bytes: usize) -> Result<Gathered, RingError> {
        if first.writable_bytes() < spec::HEADER_BYTES {
            // 5.1.6.3.1: every buffer holds at least a header.
            return Err(RingError::Chain);
        }
        let merge = io.features & spec::F_MRG_RXBUF != 0;
        let mut room = first.writable_bytes();
        let mut chains = vec![first];
        while room < bytes {
            let full = !merge || chains.len() >= usize::from(QUEUE_SIZE);
            let next = if full { None } else { io.queues[RX].pop()? };
            let Some(chain) = next else {
                chains.into_iter().rev().for_each(|chain| io.queues[RX].undo_pop(chain));
                return Ok(if full { Gathered::NeverEnough } else { Gathered::NotYet });
            };
            room += chain.writable_bytes();
            chains.push(chain);
        }
        Ok(Gathered::Enough(chains))
    }

    fn deliver(&mut self, io: &mut Io<'_>, chains: Vec<Chain>, bytes: usize) -> Result<(), RingError> {
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.frame[spec::NUM_BUFFERS_OFFSET..spec::HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.frame[..bytes];
        let mut used = Vec::with_capacity(chains.len());
        for chain in chains {
            let (part, later) = rest.split_at(rest.len().min(chain.writable_bytes()));
            chain.write(io.ram, 0, part)?;
            used.push((chain, part.len()));
            rest = later;
        }
        io.queues[RX].add_used_together(used)?;
        Counters::count(&io.counters.done);
        Ok(())
    }
}

/// What became of the search for buffers.
enum Gathered {
    /// They hold the frame.
    Enough(Vec<Chain>),
    /// The guest has to add some.
    NotYet,
    /// They would not, however many it adds.
    NeverEnough,
}

impl Model for Net {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, _token: u64, ready: EventSet) {
        self.readable |= ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
        self.writable |= ready.intersects(EventSet::OUT | EventSet::ERROR | EventSet::HANG_UP);
    }

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        if !io.live {
            return Ok(Turn::Idle);
        }
        self.follow_features(io.features);
        let turns = [self.transmit(io)?, self.receive(io)?];
        Ok(if turns.contains(&Turn::More) { Turn::More } else { Turn::Idle })
    }

    fn drain(&mut self, _io: &mut Io<'_>) -> Result<(), RingError> {
        // Every frame is finished in the turn it was begun in.
        Ok(())
    }

    fn reset(&mut self) {
        self.held = None;
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        Section::new(instance, &NetV1 { mac: self.mac })
    }
}

pub(crate) mod saved {
    //! What survives of a network device.

    use crate::saved::{Saved, SectionKind};
    use serde::{Deserialize, Serialize};

    /// The network device. Frames under way are lost, as networks may do.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub(crate) struct NetV1 {
        /// Hardware address the guest was told.
        pub(crate) mac: [u8; 6],
    }

    impl Saved for NetV1 {
        const KIND: SectionKind = SectionKind::Net;
        const VERSION: u16 = 1;
    }
}
