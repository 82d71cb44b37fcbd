//! The network device (virtio 1.2 section 5.1) on a tap.
//!
//! Frames go between the rings and the tap with the header they have on both sides, so the tap's checksum and
//! segmentation offloads are the guest's. From the guest: gathered straight from its memory. To the guest: through one
//! buffer, since a frame's length is known only when it is read and it may need several of the guest's buffers.
//!
//! Runs on the device loop under the slot's lock. While the device is paused, the guest has no buffers or a limit is
//! reached, frames wait: from the guest in its ring, to the guest in the tap, which keeps its queue's length and drops
//! the rest. Frames the guest has no room for, or that are none, are dropped and counted; the network does that as well.
//!
//! The tap may be deleted by somebody. The guest then sees its link go down, its frames stay in the ring, and nothing is
//! read any more until the owner brings another tap ([`Model::replace_tap`]).

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use self::forwarded::Forwarded;
use self::pace::{Admission, Pace};
use self::saved::NetV1;
use self::traffic::Traffic;
use super::chain::Chain;
use super::model::{Counters, Face, Io, Model, Turn, Watch};
use super::queue::{RingError, Waiting};
use super::spec::{device_id, net as spec};
use crate::clock::Clock;
use crate::saved::{SaveSectionError, Section};
use crate::sys::tap::{self, Offloads};
use crate::sys::vectored;
use crate::units::NetLimits;

mod forwarded;
mod pace;
pub(crate) mod traffic;

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

/// Token of the timer that ends a wait for a limit.
const TIMER_TOKEN: u64 = 1;

/// What every tap of every kernel can do.
const FEATURES: u64 = spec::F_MAC
    | spec::F_CSUM
    | spec::F_GUEST_CSUM
    | spec::F_GUEST_TSO4
    | spec::F_GUEST_TSO6
    | spec::F_HOST_TSO4
    | spec::F_HOST_TSO6
    | spec::F_MRG_RXBUF
    | spec::F_STATUS;

/// What taps can do since Linux 6.2.
const FEATURES_USO: u64 = spec::F_GUEST_USO4 | spec::F_GUEST_USO6 | spec::F_HOST_USO;

/// What an interface is besides its tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Setup {
    /// Hardware address.
    pub(crate) mac: [u8; 6],
    /// Longest packet the guest may send, if it is told one.
    pub(crate) mtu: Option<u16>,
    /// What may pass.
    pub(crate) limits: NetLimits,
}

/// The network device.
#[derive(Debug)]
pub(crate) struct Net {
    face: Face,
    mac: [u8; 6],
    mtu: Option<u16>,
    watch: Watch,
    tap: File,
    /// Whether the tap is there.
    link_up: bool,
    /// Whether an event says that it may be gone.
    doubtful: bool,
    /// Whether the guest has to be told that the configuration space is another.
    config_changed: bool,
    /// Whether reading the tap may give a frame.
    readable: bool,
    /// Whether the tap may take a frame.
    writable: bool,
    /// What the tap was told that the guest takes.
    offloads: Offloads,
    /// The frame that was read last, with its header.
    frame: Box<[u8]>,
    /// Its length, while the guest has no room for it or a limit holds it.
    held: Option<usize>,
    /// Frames from the host the guest was on before, which go first.
    forwarded: Forwarded,
    pace: Pace,
    traffic: Arc<Traffic>,
}

impl Net {
    /// A device on an open tap, fresh or as it was saved.
    pub(crate) fn new(
        tap: File,
        setup: Setup,
        clock: Arc<dyn Clock>,
        saved: Option<&NetV1>,
        watch: Watch,
    ) -> io::Result<Self> {
        // The guest was told its address and MTU when it booted and keeps them; limits are the host's affair.
        let (mac, mtu) = saved.map_or((setup.mac, setup.mtu), |saved| (saved.mac, saved.mtu));
        tap::prepare(&tap)?;
        let mut features = FEATURES;
        if tap::has_udp_segmentation(&tap)? {
            features |= FEATURES_USO;
        }
        if mtu.is_some() {
            features |= spec::F_MTU;
        }
        watch.add(&tap, TAP_TOKEN, EventSet::IN | EventSet::OUT)?;
        let pace = Pace::new(setup.limits, clock, &watch, TIMER_TOKEN)?;
        let mut config = vec![0; spec::CONFIG_BYTES];
        config[..mac.len()].copy_from_slice(&mac);
        config[spec::CONFIG_MTU..].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
        let face = Face { device_id: device_id::NET, features, queue_sizes: &QUEUE_SIZES, config };
        let mut net = Self {
            face,
            mac,
            mtu,
            watch,
            tap,
            link_up: false,
            doubtful: false,
            config_changed: false,
            readable: true,
            writable: true,
            // As the probe for UDP segmentation left them.
            offloads: Offloads::default(),
            frame: vec![0; spec::HEADER_BYTES + FRAME_BYTES_MAX].into_boxed_slice(),
            held: None,
            forwarded: Forwarded::default(),
            pace,
            traffic: Arc::default(),
        };
        net.set_link(true);
        // A guest that was saved without a link learns that it has one again, and no other has to be told anything.
        net.config_changed = saved.is_some_and(|saved| !saved.link_up);
        Ok(net)
    }

    /// Changes the link in the configuration space.
    fn set_link(&mut self, up: bool) {
        if self.link_up != up {
            let status = if up { spec::S_LINK_UP } else { 0 };
            self.face.config[spec::CONFIG_STATUS..][..2].copy_from_slice(&status.to_le_bytes());
            (self.link_up, self.config_changed) = (up, true);
            self.traffic.set_link(up);
        }
    }

    /// The tap was deleted: no event of it means anything any more.
    fn lose_link(&mut self) {
        (self.readable, self.writable) = (false, false);
        self.set_link(false);
    }

    /// Has the tap cut and checksum what this driver does not take. If it refuses, the kernel does it all.
    fn follow_features(&mut self, features: u64) {
        let has = |feature| features & feature != 0;
        let wanted = Offloads {
            checksum: has(spec::F_GUEST_CSUM),
            tso4: has(spec::F_GUEST_TSO4),
            tso6: has(spec::F_GUEST_TSO6),
            uso4: has(spec::F_GUEST_USO4),
            uso6: has(spec::F_GUEST_USO6),
        };
        if wanted != self.offloads {
            self.offloads = wanted;
            self.offer_to_tap();
        }
    }

    fn offer_to_tap(&self) {
        if tap::set_offloads(&self.tap, self.offloads).is_err() {
            let _ = tap::set_offloads(&self.tap, Offloads::default());
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
            let size = bytes.saturating_sub(spec::HEADER_BYTES);
            let is_frame = (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&size);
            if is_frame && self.holds(Direction::Tx, size) {
                io.queues[TX].undo_pop(chain);
                return Ok(Turn::Idle);
            }
            let sent = is_frame && {
                match vectored::write(&self.tap, &chain.readable_slices(io.ram, 0, bytes)?) {
                    Ok(_) => true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.writable = false;
                        io.queues[TX].undo_pop(chain);
                        return Ok(Turn::Idle);
                    }
                    Err(error) if tap::is_gone(&error) => {
                        self.lose_link();
                        io.queues[TX].undo_pop(chain);
                        return Ok(Turn::Idle);
                    }
                    // The interface is down, or the header makes no sense.
                    Err(_) => false,
                }
            };
            if is_frame {
                self.pace.tx.passed(size);
            }
            if sent {
                self.traffic.tx.passed(size);
                Counters::count(&io.counters.done);
            } else {
                self.traffic.tx.dropped();
                Counters::count(&io.counters.dropped);
            }
            io.queues[TX].add_used(chain, 0)?;
        }
        Ok(Turn::More)
    }

    /// Frames to the guest.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        for _ in 0..TURN_FRAMES_MAX {
            let tap = self.readable && !self.forwarded.goes_first();
            if !tap && self.held.is_none() && !self.forwarded.has_some() {
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
            let size = bytes - spec::HEADER_BYTES;
            if self.holds(Direction::Rx, size) {
                self.held = Some(bytes);
                io.queues[RX].undo_pop(first);
                return Ok(Turn::Idle);
            }
            match self.gather(io, first, bytes)? {
                Gathered::One(chain) => {
                    self.number_buffers(1);
                    chain.write(io.ram, 0, &self.frame[..bytes])?;
                    io.queues[RX].add_used(chain, bytes)?;
                    self.received(io.counters, size);
                }
                Gathered::Several(chains) => {
                    self.deliver(io, chains, bytes)?;
                    self.received(io.counters, size);
                }
                Gathered::NeverEnough => self.drop_received(io.counters),
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
        if let Some(frame) = self.forwarded.pop() {
            self.frame[..frame.len()].copy_from_slice(&frame);
            return Some(frame.len());
        }
        match (&self.tap).read(&mut self.frame) {
            Ok(bytes) if bytes >= spec::HEADER_BYTES + FRAME_BYTES_MIN => Some(bytes),
            Ok(_) => {
                self.drop_received(counters);
                None
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) if tap::is_gone(&error) => {
                self.lose_link();
                None
            }
            // Nothing there for now, or nothing that can be read: an event tells when to look again.
            Err(_) => {
                self.readable = false;
                None
            }
        }
    }

    fn drop_received(&self, counters: &Counters) {
        self.traffic.rx.dropped();
        Counters::count(&counters.dropped);
    }

    /// Whether a limit keeps a frame of `size` bytes waiting.
    fn holds(&mut self, direction: Direction, size: usize) -> bool {
        let (admission, flow) = match direction {
            Direction::Rx => (self.pace.admits_rx(size), &self.traffic.rx),
            Direction::Tx => (self.pace.admits_tx(size), &self.traffic.tx),
        };
        if admission == Admission::NotYet {
            flow.throttled();
        }
        admission != Admission::Now
    }

    /// Finds buffers for a frame: one, or with merged buffers as many as it takes (5.1.6.4). What is not used is put
    /// back.
    fn gather(&mut self, io: &mut Io<'_>, first: Chain, bytes: usize) -> Result<Gathered, RingError> {
        if first.writable_bytes() < spec::HEADER_BYTES {
            // 5.1.6.3.1: every buffer holds at least a header.
            return Err(RingError::Chain);
        }
        if first.writable_bytes() >= bytes {
            return Ok(Gathered::One(first));
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
        Ok(Gathered::Several(chains))
    }

    fn deliver(&mut self, io: &mut Io<'_>, chains: Vec<Chain>, bytes: usize) -> Result<(), RingError> {
        self.number_buffers(u16::try_from(chains.len()).unwrap_or(u16::MAX));
        let mut rest = &self.frame[..bytes];
        let mut used = Vec::with_capacity(chains.len());
        for chain in chains {
            let (part, later) = rest.split_at(rest.len().min(chain.writable_bytes()));
            chain.write(io.ram, 0, part)?;
            used.push((chain, part.len()));
            rest = later;
        }
        io.queues[RX].add_used_together(used)
    }

    /// Writes into the frame's header how many buffers it takes.
    fn number_buffers(&mut self, count: u16) {
        self.frame[spec::NUM_BUFFERS_OFFSET..spec::HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
    }

    fn received(&mut self, counters: &Counters, size: usize) {
        self.pace.rx.passed(size);
        self.traffic.rx.passed(size);
        Counters::count(&counters.done);
    }
}

/// Which way a frame goes, as the guest sees it.
#[derive(Debug, Clone, Copy)]
enum Direction {
    Rx,
    Tx,
}

/// What became of the search for buffers.
enum Gathered {
    /// The first holds the frame: the usual case, and the one that allocates nothing.
    One(Chain),
    /// They hold it together.
    Several(Vec<Chain>),
    /// The guest has to add some.
    NotYet,
    /// They would not, however many it adds.
    NeverEnough,
}

impl Model for Net {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, token: u64, ready: EventSet) {
        if token == TIMER_TOKEN {
            self.pace.expired();
        } else if self.link_up {
            self.readable |= ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
            self.writable |= ready.intersects(EventSet::OUT | EventSet::ERROR | EventSet::HANG_UP);
            self.doubtful |= ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
        }
    }

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        // Found out here even when there is nothing to read or write.
        if std::mem::take(&mut self.doubtful) && self.link_up && !tap::is_attached(&self.tap) {
            self.lose_link();
        }
        if !io.live {
            return Ok(Turn::Idle);
        }
        self.follow_features(io.features);
        let turns = [self.transmit(io)?, self.receive(io)?];
        self.pace.rest();
        Ok(if turns.contains(&Turn::More) { Turn::More } else { Turn::Idle })
    }

    fn drain(&mut self, _io: &mut Io<'_>) -> Result<(), RingError> {
        // Every frame is finished in the turn it was begun in; one that waits for a limit has not begun.
        Ok(())
    }

    fn reset(&mut self) {
        self.held = None;
        self.forwarded.clear();
        self.pace.forget();
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        let &Self { mac, mtu, link_up, .. } = self;
        Section::new(instance, &NetV1 { mac, mtu, link_up })
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn traffic(&self) -> Option<Arc<Traffic>> {
        Some(Arc::clone(&self.traffic))
    }

    fn take_packet(&mut self) -> io::Result<Option<Box<[u8]>>> {
        if let Some(bytes) = self.held.take() {
            return Ok(Some(self.frame[..bytes].into()));
        }
        if let Some(frame) = self.forwarded.pop() {
            return Ok(Some(frame));
        }
        loop {
            match (&self.tap).read(&mut self.frame) {
                Ok(bytes) if bytes >= spec::HEADER_BYTES + FRAME_BYTES_MIN => {
                    return Ok(Some(self.frame[..bytes].into()));
                }
                Ok(_) => self.traffic.rx.dropped(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || tap::is_gone(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn add_packet(&mut self, packet: &[u8]) -> bool {
        let is_frame = (FRAME_BYTES_MIN + spec::HEADER_BYTES..=self.frame.len()).contains(&packet.len());
        let added = is_frame && self.forwarded.push(packet.into());
        if !added {
            self.traffic.rx.dropped();
        }
        added
    }

    fn expect_packets(&mut self, more: bool) {
        if more { self.forwarded.expect() } else { self.forwarded.end() }
    }

    fn replace_tap(&mut self, tap: File) -> io::Result<()> {
        tap::prepare(&tap)?;
        self.watch.add(&tap, TAP_TOKEN, EventSet::IN | EventSet::OUT)?;
        let old = std::mem::replace(&mut self.tap, tap);
        // Somebody else may hold it open: closing it here need not end its events.
        self.watch.remove(&old);
        self.offer_to_tap();
        (self.readable, self.writable, self.doubtful) = (true, true, false);
        self.set_link(true);
        Ok(())
    }
}

pub(crate) mod saved {
    //! What survives of a network device.

    use crate::saved::{Saved, SectionKind};
    use serde::{Deserialize, Serialize};

    /// The network device. The one frame that may be between tap and guest is lost, as networks may do. Limits and
    /// counters belong to the host and are not saved.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub(crate) struct NetV1 {
        /// Hardware address the guest was told.
        pub(crate) mac: [u8; 6],
        /// MTU the guest was told, if it was.
        pub(crate) mtu: Option<u16>,
        /// Whether the guest was told that its link is up.
        pub(crate) link_up: bool,
    }

    impl Saved for NetV1 {
        const KIND: SectionKind = SectionKind::Net;
        const VERSION: u16 = 1;
    }
}
