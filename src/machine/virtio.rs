//! virtio-mmio devices (virtio 1.2) and the thread that serves them.
//!
//! ```text
//!  vCPU threads                                  │ thread "devices"                    │ threads "disk-N", "volume-N"
//!  mmio: registers ─ notify (eventfd) ──────────▶│ device_loop ─▶ slot ─▶ model.serve   │ block/worker, block/volume, block/volume
//!        status, queue setup ─ lock ─▶ slot      │   model = rng | vsock | net | block ─┼─▶ pread, pwrite; NBD
//!  irqfd ◀────────── interrupt (eventfd) ────────│   queue, chain ⇄ guest memory        │
//!                                                │   block/uring ⇄ kernel: io_uring    │
//! ```
//! `spec` has the specification's numbers, `status` its state machine, `saved` what survives. A slot is put together
//! here, by the machine that owns it. What can go wrong: the host may lack a descriptor while a device is made
//! ([`BuildDeviceError`]); afterwards only a driver can break its own device, which then asks it for a reset.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::block::saved::{BlockV1, BlockV2};
use self::block::volume::{Attachment, Tell, VolumeCounts, VolumeLimits};
use self::block::{Block, OtherDisk, VolumeError};
use self::interrupt::Interrupt;
use self::mmio::{RegisterFile, Registers, TRANSPORT_FEATURES};
use self::model::{Counters, Model, QUEUE_TOKENS, Turn, Watch};
use self::queue::Queue;
use self::saved::TransportV1;
use self::slot::{Cell, Shared, queues_from_saved};
use super::bus::SharedBusDevice;
use super::layout::Slot;
use super::ram::{self, GuestRam};
use crate::clock::{Clock, SystemClock};
use crate::saved::{Saved, SectionName, Sections, TakeSectionError};
use crate::sys::uring::Ring;
use crate::units::{NetLimits, PAGE_BYTES, PageCount};

mod balloon;
pub mod block;
mod bucket;
pub mod chain;
mod device_loop;
mod interrupt;
mod mmio;
mod model;
mod net;
pub mod queue;
mod rng;
pub mod saved;
mod slot;
pub mod spec;
pub mod status;
pub mod vsock;

pub use self::balloon::{BalloonCounts, GuestMemoryStats};
pub use self::device_loop::DeviceLoop;
pub use self::net::traffic::{FlowCounts, NetCounts};

/// What a device works on; the kind of the device with it.
#[derive(Debug)]
pub enum Backend {
    /// vsock: host programs connect to this socket and say `CONNECT <port>\n`.
    Vsock {
        /// Listening socket, made by the agent.
        listener: UnixListener,
    },
    /// Entropy from the host's random pool.
    Rng,
    /// The balloon: memory the guest gives back for a while.
    Balloon,
    /// A block device on a raw file.
    Block {
        /// The file; its size in 512-byte sectors is the disk's.
        file: File,
        /// Refuse writes.
        read_only: bool,
        /// Its ring; without one the disk has a thread.
        ring: Option<Ring>,
    },
    /// A block device on a volume, or a slot for one.
    Volume {
        /// Listening socket, made by the agent: the volume's server connects to it.
        listener: UnixListener,
        /// What is attached from the beginning, if anything is.
        attached: Option<Attachment>,
        /// Tell the guest that the slot is read-only.
        read_only: bool,
        /// Where trouble with connections is told.
        tell: Tell,
    },
    /// A network interface on a tap.
    Net {
        /// The tap's queue, with vnet header, non-blocking.
        tap: File,
        /// Hardware address.
        mac: [u8; 6],
        /// Longest packet the guest may send, if it is told one; at least 68.
        mtu: Option<u16>,
        /// What may pass.
        limits: NetLimits,
    },
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildDeviceError {
    /// The host refused something the device needs.
    #[error("slot {}: {what}", .slot.number())]
    Host {
        /// The slot.
        slot: Slot,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Its saved state is not usable.
    #[error("slot {}", .slot.number())]
    Saved {
        /// The slot.
        slot: Slot,
        /// What is wrong with it.
        #[source]
        source: TakeSectionError,
    },
}

/// One announced virtio-mmio device: registers, queues and backend.
#[derive(Debug)]
pub struct VirtioSlot {
    shared: Arc<Shared>,
    registers: Arc<Mutex<Registers>>,
}

/// What a device has counted since it was made. The VMM writes no log line that a guest could cause without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceCounts {
    /// Requests, packets and frames that were carried out.
    pub done: u64,
    /// Requests that were answered with an error.
    pub failed: u64,
    /// Packets and frames that were thrown away.
    pub dropped: u64,
    /// Times a driver broke its rings and had to reset the device.
    pub broken: u64,
    /// Register accesses that have no meaning, or not in this state.
    pub refused: u64,
}

impl VirtioSlot {
    /// A device as after reset.
    pub fn new(slot: Slot, backend: Backend, ram: &GuestRam) -> Result<Self, BuildDeviceError> {
        Self::with_clock(slot, backend, ram, system_clock())
    }

    /// The same with the time from elsewhere: limits are kept by it.
    pub fn with_clock(
        slot: Slot,
        backend: Backend,
        ram: &GuestRam,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BuildDeviceError> {
        let (epoll, model) = build(slot, backend, ram, clock, None)?;
        let face = model.face();
        let registers = RegisterFile::new(face.features | TRANSPORT_FEATURES);
        let queues = face.queue_sizes.iter().map(|size| Queue::new(ram.clone(), *size)).collect();
        Self::assemble(slot, epoll, Cell::new(registers, queues, model, ram.clone()), 0)
    }

    /// A device as it was saved; paused.
    pub fn from_saved(
        slot: Slot,
        backend: Backend,
        ram: &GuestRam,
        from: &mut Sections,
    ) -> Result<Self, BuildDeviceError> {
        let transport: TransportV1 =
            from.take(u16::from(slot.number())).map_err(|source| BuildDeviceError::Saved { slot, source })?;
        let invalid = |reason| invalid::<TransportV1>(slot, reason);
        let (epoll, model) = build(slot, backend, ram, system_clock(), Some(from))?;
        let face = model.face();
        if transport.device_id != face.device_id {
            return Err(invalid("the slot held another kind of device"));
        }
        let offered = face.features | TRANSPORT_FEATURES;
        let registers = RegisterFile::from_saved(&transport, offered).map_err(invalid)?;
        let queues = queues_from_saved(ram, &transport, face.queue_sizes).map_err(invalid)?;
        let cell = Cell::new(registers, queues, model, ram.clone());
        Self::assemble(slot, epoll, cell, transport.interrupt_status)
    }

    fn assemble(slot: Slot, epoll: Arc<Epoll>, cell: Cell, interrupt_status: u32) -> Result<Self, BuildDeviceError> {
        let host = |what| move |source| BuildDeviceError::Host { slot, what, source };
        let interrupt = Interrupt::new().map_err(host("make the interrupt event"))?;
        interrupt.set_status(interrupt_status);
        let watch = Watch::new(epoll.clone());
        let mut notify = Vec::with_capacity(cell.queues.len());
        for (token, _) in (QUEUE_TOKENS..).zip(&cell.queues) {
            let event = EventFd::new(EFD_NONBLOCK).map_err(host("make a queue event"))?;
            watch.add(&event, token, EventSet::IN).map_err(host("watch a queue event"))?;
            notify.push(event);
        }
        let shared = Arc::new(Shared::new(slot, interrupt, notify, epoll, cell));
        let registers = Arc::new(Mutex::new(Registers::new(shared.clone())));
        Ok(Self { shared, registers })
    }

    /// Which slot it is.
    pub fn slot(&self) -> Slot {
        self.shared.slot
    }

    /// Its registers, for the MMIO bus.
    pub fn registers(&self) -> SharedBusDevice {
        self.registers.clone()
    }

    /// Event that raises its interrupt line; becomes the irqfd of [`Slot::gsi`].
    pub fn interrupt(&self) -> &EventFd {
        self.shared.interrupt.event()
    }

    /// One event per queue; becomes the ioeventfd of a 4-byte write of the queue's index to QueueNotify.
    pub fn queue_notify(&self) -> &[EventFd] {
        &self.shared.notify
    }

    /// One turn of the device on the calling thread, for a machine that is stepped and has no [`DeviceLoop`]; resumes it
    /// first. Returns whether there is work left that no event will announce.
    pub fn step(&self) -> bool {
        let resumed = self.shared.resume();
        (self.shared.turn() == Turn::More) | (resumed == Turn::More)
    }

    /// What passed, if it is a network device.
    pub fn net_counts(&self) -> Option<NetCounts> {
        self.shared.traffic.as_ref().map(|traffic| traffic.counts())
    }

    /// Sets the target of the balloon, if `target` says so, and has the guest asked for new statistics. `None` if it is
    /// no balloon.
    pub fn balloon(&self, target: Option<PageCount>) -> Option<BalloonCounts> {
        self.shared.balloon(target)
    }

    /// Attaches a volume to this slot.
    pub fn attach_volume(&self, attachment: Attachment) -> Result<(), VolumeError> {
        self.volume(|block| block.attach(attachment))
    }

    /// Leaves this slot without a volume; with `force` also while requests are under way, which fail.
    pub fn detach_volume(&self, force: bool) -> Result<(), VolumeError> {
        self.volume(|block| block.detach(force))
    }

    /// The volume of this slot has become larger.
    pub fn resize_volume(&self, bytes: u64) -> Result<(), VolumeError> {
        self.volume(|block| block.resize(bytes))
    }

    /// Bounds what the guest may do with this slot's volume.
    pub fn limit_volume(&self, limits: VolumeLimits) -> Result<(), VolumeError> {
        self.volume(|block| block.limit(limits))
    }

    /// How this slot is, if it is a volume's.
    pub fn volume_counts(&self) -> Option<VolumeCounts> {
        self.shared.block(|block| block.volume_counts()).flatten()
    }

    fn volume(&self, change: impl FnOnce(&mut Block) -> Result<(), VolumeError>) -> Result<(), VolumeError> {
        self.shared.block(change).unwrap_or(Err(VolumeError::NotAttached))
    }

    /// Gives a network device another tap in the place of one that was deleted, at any time: rings and negotiated
    /// offloads stay, the guest sees its link come up. On an error the device is as it was.
    pub fn replace_tap(&self, tap: File) -> io::Result<()> {
        self.shared.replace_tap(tap)
    }

    /// Takes the next packet, with its header, that waits for the guest of a paused network device.
    pub fn take_packet(&self) -> io::Result<Option<Box<[u8]>>> {
        self.shared.take_packet()
    }

    /// Gives a network device a packet, with its header, that goes before those of its tap; false if it cannot have it.
    pub fn add_packet(&self, packet: &[u8]) -> bool {
        self.shared.add_packet(packet)
    }

    /// Whether the tap of a network device has to wait for such packets.
    pub fn expect_packets(&self, more: bool) {
        self.shared.expect_packets(more);
    }

    /// What it has counted.
    pub fn counts(&self) -> DeviceCounts {
        let Counters { done, failed, dropped, broken, refused } = &self.shared.counters;
        let [done, failed, dropped, broken, refused] =
            [done, failed, dropped, broken, refused].map(|counter| counter.load(Ordering::Relaxed));
        DeviceCounts { done, failed, dropped, broken, refused }
    }
}

/// The model behind a slot, fresh or as it was saved.
fn build(
    slot: Slot,
    backend: Backend,
    ram: &GuestRam,
    clock: Arc<dyn Clock>,
    saved: Option<&mut Sections>,
) -> Result<(Arc<Epoll>, Box<dyn Model>), BuildDeviceError> {
    let host = |what| move |source| BuildDeviceError::Host { slot, what, source };
    let epoll = Arc::new(Epoll::new().map_err(host("make an epoll instance"))?);
    let watch = Watch::new(epoll.clone());
    let model: Box<dyn Model> = match backend {
        Backend::Vsock { listener } => {
            let saved = take(slot, saved)?;
            let vsock = vsock::Vsock::new(listener, Box::new(vsock::NoHostPorts), watch, saved.as_ref());
            Box::new(vsock.map_err(host("watch the vsock listener"))?)
        }
        Backend::Rng => Box::new(rng::Rng::new(take(slot, saved)?.as_ref())),
        Backend::Balloon => {
            let pages = PageCount(ram::size(ram).0 / PAGE_BYTES);
            let saved = take(slot, saved)?;
            let reason = "the target is larger than guest memory";
            let balloon = balloon::Balloon::new(pages, clock, saved.as_ref());
            Box::new(balloon.ok_or_else(|| invalid::<balloon::saved::BalloonV1>(slot, reason))?)
        }
        Backend::Block { file, read_only, ring } => {
            let on = block::DiskFile { file, read_only, ring };
            let block = Block::on_file(slot, on, ram, &watch).map_err(host("open the disk"))?;
            Box::new(go_on(slot, block, saved)?)
        }
        Backend::Volume { listener, attached, read_only, tell } => {
            let index = slot.block_index().unwrap_or_default();
            let setup = block::volume::Setup { index, listener, attached, tell };
            let made = block::VolumeSlot { setup, read_only };
            let block = Block::on_volume(slot, made, ram, &watch, clock);
            Box::new(go_on(slot, block.map_err(host("serve a volume"))?, saved)?)
        }
        Backend::Net { tap, mac, mtu, limits } => {
            let saved: Option<net::saved::NetV1> = take(slot, saved)?;
            let setup = net::Setup { mac, mtu, limits };
            let net = net::Net::new(tap, setup, clock, saved.as_ref(), watch);
            Box::new(net.map_err(host("use the tap"))?)
        }
    };
    Ok((epoll, model))
}

/// A block device as it was saved, if it was.
fn go_on(slot: Slot, mut block: Block, saved: Option<&mut Sections>) -> Result<Block, BuildDeviceError> {
    let Some(sections) = saved else { return Ok(block) };
    let failed = |source| BuildDeviceError::Saved { slot, source };
    let instance = u16::from(slot.number());
    // One that was saved on a file can go on on a volume, and the other way round.
    let saved: BlockV2 = match sections.version(BlockV1::KIND, instance) {
        Some(BlockV1::VERSION) => sections.take::<BlockV1>(instance).map_err(failed)?.into(),
        Some(_) | None => sections.take(instance).map_err(failed)?,
    };
    let gone_on = block.go_on_from(saved);
    gone_on.map_err(|other| {
        let reason = match other {
            OtherDisk::Differs => "the disk has another size or access",
            OtherDisk::UnderWay => "its requests under way are impossible",
        };
        invalid::<BlockV2>(slot, reason)
    })?;
    Ok(block)
}

fn system_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

fn invalid<T: Saved>(slot: Slot, reason: &str) -> BuildDeviceError {
    let name = SectionName { kind: T::KIND, instance: u16::from(slot.number()) };
    BuildDeviceError::Saved { slot, source: TakeSectionError::Invalid { name, reason: reason.to_owned() } }
}

fn take<T: Saved>(slot: Slot, saved: Option<&mut Sections>) -> Result<Option<T>, BuildDeviceError> {
    let Some(sections) = saved else { return Ok(None) };
    let section = sections.take(u16::from(slot.number()));
    section.map(Some).map_err(|source| BuildDeviceError::Saved { slot, source })
}
