//! The block device (virtio 1.2 section 5.2) on a raw file or a block device of the host, or on a volume.
//!
//! The loop takes requests from the queue and checks them ([`request`]); a [`Carrier`] carries them out and moves the data:
//! [`uring`], the kernel on a file; [`worker`], a thread on a file where there is no io_uring; or [`volume`], one thread
//! for each volume slot. The loop writes the status and gives the buffers back. Requests under way are bounded by the ring's size. While the device is paused a file has none; a
//! volume's may be waiting for its server, and are part of the saved state: who goes on from it asks again. What can go
//! wrong on the host (no space, an I/O error, a file that became shorter) is an error of that request for the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use self::carrier::Carrier;
use self::request::{Buffers, Disk, Refusal};
use self::saved::{BlockV1, BlockV2};
use self::uring::UringDisk;
use self::volume::{Attachment, Volume, VolumeCounts, VolumeLimits};
use self::worker::{Done, Job, Worker};
use super::chain::Chain;
use super::model::{Counters, Face, Io, Model, Turn, Watch};
use super::queue::{RingError, Waiting};
use super::spec::{block as spec, device_id};
use crate::clock::Clock;
use crate::machine::layout::Slot;
use crate::machine::ram::GuestRam;
use crate::saved::{SaveSectionError, Section};
use crate::sys::uring::Ring;

mod carrier;
pub mod nbd;
pub mod request;
pub(crate) mod saved;
mod uring;
pub mod volume;
mod worker;

/// Enough to keep a disk busy, and as many as a ring takes; Linux allocates a request for each entry when it finds the
/// disk.
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

/// Most data buffers of a request: the ring's size less header and status, so that a request fits without an indirect
/// table.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// What a volume's size is a multiple of, in bytes.
pub const VOLUME_BLOCK_BYTES: u64 = 4096;

/// Token of the carrier's event.
const FINISHED_TOKEN: u64 = 0;

/// The block device.
#[derive(Debug)]
pub(crate) struct Block {
    face: Face,
    /// What the guest may ask of.
    disk: Disk,
    /// What it is called.
    id: [u8; spec::ID_BYTES],
    carrier: Carrier,
    /// First descriptors of the requests that the carrier has, or has finished and the guest has not been told of; in the
    /// order they came.
    under_way: VecDeque<u16>,
    /// Those of a machine that was saved, to be asked for again when it goes on.
    again: VecDeque<u16>,
    /// Whether the guest is to be told of another size.
    resized: bool,
}

/// Why a block device cannot go on from its saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtherDisk {
    /// It is another disk: the guest knows its size and does not ask again.
    Differs,
    /// The requests under way cannot be.
    UnderWay,
}

/// What a disk on a file is made with.
#[derive(Debug)]
pub(crate) struct DiskFile {
    /// The file.
    pub(crate) file: File,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Its ring; without one it has a thread.
    pub(crate) ring: Option<Ring>,
}

/// What a volume slot is made with.
#[derive(Debug)]
pub(crate) struct VolumeSlot {
    /// The thread's share of it.
    pub(crate) setup: volume::Setup,
    /// Whether the guest is told that the slot is read-only.
    pub(crate) read_only: bool,
}

/// Why a volume slot is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// The machine has no such slot.
    #[error("there is no volume slot {index}")]
    NoSlot {
        /// The index.
        index: u8,
    },
    /// There is one.
    #[error("a volume is attached already")]
    Attached,
    /// There is none.
    #[error("no volume is attached")]
    NotAttached,
    /// No volume has such a size.
    #[error("{found} bytes: a volume has a multiple of {VOLUME_BLOCK_BYTES} bytes")]
    Bytes {
        /// The size.
        found: u64,
    },
    /// Volumes do not shrink.
    #[error("the volume has {has} bytes and cannot be made to have {wanted}")]
    Shrinks {
        /// Its size in bytes.
        has: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// The guest still waits for something.
    #[error("{requests} requests are under way")]
    InUse {
        /// How many.
        requests: usize,
    },
    /// The guest was told when the slot was made.
    #[error("the slot is read-only: what is attached to it is too")]
    ReadOnlySlot,
    /// With such a limit nothing would ever pass.
    #[error("a limit of 0")]
    Limit,
}

fn features(read_only: bool) -> u64 {
    let features = spec::F_SEG_MAX | spec::F_BLK_SIZE | spec::F_FLUSH;
    features | if read_only { spec::F_RO } else { spec::F_DISCARD | spec::F_WRITE_ZEROES }
}

/// Checks the size of a volume.
pub fn check_volume_bytes(bytes: u64) -> Result<(), VolumeError> {
    let is_size = bytes > 0 && bytes.is_multiple_of(VOLUME_BLOCK_BYTES) && i64::try_from(bytes).is_ok();
    if is_size { Ok(()) } else { Err(VolumeError::Bytes { found: bytes }) }
}

impl Block {
    fn with(slot: Slot, disk: Disk, told_read_only: bool, carrier: Carrier) -> Self {
        let mut id = [0; spec::ID_BYTES];
        for (to, from) in id.iter_mut().zip(format!("disk-{}", slot.number()).bytes()) {
            *to = from;
        }
        let (device_id, features) = (device_id::BLOCK, features(told_read_only));
        let face = Face { device_id, features, queue_sizes: &QUEUE_SIZES, config: config(disk) };
        let (under_way, again) = (VecDeque::new(), VecDeque::new());
        Self { face, disk, id, carrier, under_way, again, resized: false }
    }

    /// A device on a file.
    pub(crate) fn on_file(slot: Slot, mut on: DiskFile, ram: &GuestRam, watch: &Watch) -> io::Result<Self> {
        let sectors = on.file.seek(SeekFrom::End(0))? / spec::SECTOR_BYTES;
        let carrier = match on.ring {
            Some(ring) => {
                let disk = UringDisk::new(ring, &on.file, ram.clone())?;
                watch.add(disk.finished(), FINISHED_TOKEN, EventSet::IN)?;
                Carrier::Uring(Box::new(disk))
            }
            None => {
                let worker = Worker::start(on.file, ram.clone(), format!("disk-{}", slot.number()))?;
                watch.add(worker.finished(), FINISHED_TOKEN, EventSet::IN)?;
                Carrier::Thread(worker)
            }
        };
        Ok(Self::with(slot, Disk { sectors, read_only: on.read_only }, on.read_only, carrier))
    }

    /// A device on a volume, or a slot for one.
    pub(crate) fn on_volume(
        slot: Slot,
        made: VolumeSlot,
        ram: &GuestRam,
        watch: &Watch,
        clock: Arc<dyn Clock>,
    ) -> io::Result<Self> {
        let VolumeSlot { setup, read_only } = made;
        let disk = setup.attached.map_or(Disk { sectors: 0, read_only }, disk_of);
        let volume = Volume::start(setup, ram.clone(), clock)?;
        watch.add(volume.finished(), FINISHED_TOKEN, EventSet::IN)?;
        Ok(Self::with(slot, disk, read_only, Carrier::Volume(volume)))
    }

    /// Goes on from what was saved, if this is the disk it was saved with.
    pub(crate) fn go_on_from(&mut self, saved: BlockV2) -> Result<(), OtherDisk> {
        let BlockV2 { sectors, read_only, told_read_only, resized, under_way } = saved;
        if (Disk { sectors, read_only }) != self.disk {
            return Err(OtherDisk::Differs);
        }
        let is_twice = |at: usize| under_way[..at].contains(&under_way[at]);
        if under_way.len() > usize::from(QUEUE_SIZE) || (0..under_way.len()).any(is_twice) {
            return Err(OtherDisk::UnderWay);
        }
        // What the guest was told once holds, whatever is attached by now.
        self.face.features = features(told_read_only);
        (self.resized, self.again) = (resized, under_way.into());
        Ok(())
    }

    fn volume(&self) -> Result<&Volume, VolumeError> {
        self.carrier.volume().ok_or(VolumeError::NotAttached)
    }

    fn told_read_only(&self) -> bool {
        self.face.features & spec::F_RO != 0
    }

    fn set_disk(&mut self, disk: Disk) {
        self.resized |= disk.sectors != self.disk.sectors;
        self.disk = disk;
        self.face.config = config(disk);
    }

    /// Attaches a volume to a slot that has none.
    pub(crate) fn attach(&mut self, attachment: Attachment) -> Result<(), VolumeError> {
        let volume = self.volume()?;
        check_volume_bytes(attachment.bytes)?;
        if self.disk.sectors != 0 {
            return Err(VolumeError::Attached);
        }
        if self.told_read_only() && !attachment.read_only {
            return Err(VolumeError::ReadOnlySlot);
        }
        volume.attach(attachment);
        self.set_disk(disk_of(attachment));
        Ok(())
    }

    /// Leaves the slot without a volume.
    pub(crate) fn detach(&mut self, force: bool) -> Result<(), VolumeError> {
        let requests = self.under_way.len() + self.again.len();
        if self.disk.sectors == 0 {
            return Err(VolumeError::NotAttached);
        }
        if requests > 0 && !force {
            return Err(VolumeError::InUse { requests });
        }
        self.volume()?.detach();
        self.set_disk(Disk { sectors: 0, read_only: self.told_read_only() });
        Ok(())
    }

    /// The volume has become larger.
    pub(crate) fn resize(&mut self, bytes: u64) -> Result<(), VolumeError> {
        check_volume_bytes(bytes)?;
        let has = self.disk.sectors * spec::SECTOR_BYTES;
        if has == 0 {
            return Err(VolumeError::NotAttached);
        }
        if bytes < has {
            return Err(VolumeError::Shrinks { has, wanted: bytes });
        }
        self.volume()?.resize(bytes);
        self.set_disk(Disk { sectors: bytes / spec::SECTOR_BYTES, ..self.disk });
        Ok(())
    }

    /// Bounds what the guest may do with the volume.
    pub(crate) fn limit(&self, limits: VolumeLimits) -> Result<(), VolumeError> {
        if limits.iops == Some(0) || limits.bytes_per_s == Some(0) {
            return Err(VolumeError::Limit);
        }
        self.volume()?.limit(limits);
        Ok(())
    }

    /// How the volume slot is, if it is one.
    pub(crate) fn volume_counts(&self) -> Option<VolumeCounts> {
        Some(self.carrier.volume()?.counts())
    }

    /// Gives finished requests back to the guest.
    fn complete(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        for Done { chain, status } in self.carrier.take_done() {
            self.under_way.retain(|head| *head != chain.head());
            Counters::count(if status == spec::S_OK { &io.counters.done } else { &io.counters.failed });
            answer(io, chain, status)?;
        }
        Ok(())
    }

    /// Asks again for what was under way when the machine was saved.
    fn begin_again(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        while let Some(head) = self.again.pop_front() {
            let chain = io.queues[0].taken_before(head)?;
            self.begin(io, chain)?;
        }
        Ok(())
    }

    fn begin(&mut self, io: &mut Io<'_>, chain: Chain) -> Result<(), RingError> {
        match self.read_request(io, &chain)? {
            Ok(request::Request::Id) => {
                chain.write(io.ram, 0, &self.id)?;
                Counters::count(&io.counters.done);
                answer(io, chain, spec::S_OK)
            }
            Ok(request) => {
                self.under_way.push_back(chain.head());
                self.carrier.submit(Job { chain, request });
                Ok(())
            }
            Err(refusal) => {
                Counters::count(&io.counters.failed);
                answer(io, chain, refusal.status())
            }
        }
    }

    /// Takes requests from the queue, as far as there are any and they may be under way.
    fn take_requests(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        // A ring announces at most its size; a guest that reuses buffers under way is made to wait for them.
        for _ in 0..QUEUE_SIZE {
            if self.under_way.len() >= usize::from(QUEUE_SIZE) {
                return Ok(Turn::Idle);
            }
            match io.queues[0].pop()? {
                Some(chain) => self.begin(io, chain)?,
                None => match io.queues[0].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => {}
                },
            }
        }
        Ok(Turn::More)
    }

    fn read_request(&self, io: &Io<'_>, chain: &Chain) -> Result<Result<request::Request, Refusal>, RingError> {
        // 5.2.6: the last byte is the status. Without it there is no way to answer.
        let to_guest = chain.writable_bytes().checked_sub(1).ok_or(RingError::Chain)?;
        let mut header = [0; spec::HEADER_BYTES];
        let read = chain.read(io.ram, 0, &mut header)?;
        if read < spec::HEADER_BYTES {
            return Ok(Err(Refusal::Failed));
        }
        let from_guest = chain.readable_bytes() - spec::HEADER_BYTES;
        let mut ranges = vec![0; request::range_bytes(from_guest)];
        chain.read(io.ram, spec::HEADER_BYTES, &mut ranges)?;
        Ok(request::parse(&header, Buffers { from_guest, to_guest }, &ranges, self.disk))
    }
}

/// Writes the status byte and gives the buffers back.
fn answer(io: &mut Io<'_>, chain: Chain, status: u8) -> Result<(), RingError> {
    let bytes = chain.writable_bytes();
    chain.write(io.ram, bytes.saturating_sub(1), &[status])?;
    io.queues[0].add_used(chain, bytes)
}

/// The configuration space (5.2.4).
fn config(disk: Disk) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(12, SEGMENTS_MAX);
    put(20, 512);
    put(36, request::DISCARD_SECTORS_MAX);
    put(40, request::DISCARD_RANGES_MAX);
    // discard_sector_alignment: the page size of common file systems.
    put(44, 8);
    put(48, request::ZEROES_SECTORS_MAX);
    put(52, request::ZEROES_RANGES_MAX);
    // write_zeroes_may_unmap
    put(56, 1);
    config[..8].copy_from_slice(&disk.sectors.to_le_bytes());
    config
}

impl Model for Block {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, _token: u64, _ready: EventSet) {}

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        self.carrier.work();
        if !io.live {
            return Ok(Turn::Idle);
        }
        self.begin_again(io)?;
        self.complete(io)?;
        let turn = self.take_requests(io)?;
        self.carrier.commit();
        // Those that did not have to wait for the disk.
        self.complete(io)?;
        Ok(turn)
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        self.carrier.end_all();
        // The queue goes: nobody can be told of these any more.
        self.again.clear();
        if io.live { self.complete(io) } else { Ok(()) }
    }

    fn pause(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        self.carrier.pause();
        if io.live { self.complete(io) } else { Ok(()) }
    }

    fn reset(&mut self) {
        self.carrier.end_all();
        // The buffers belong to the driver again, which has forgotten about them.
        drop(self.carrier.take_done());
        self.under_way.clear();
        self.again.clear();
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        let Disk { sectors, read_only } = self.disk;
        if self.carrier.volume().is_none() {
            return Section::new(instance, &BlockV1 { sectors, read_only });
        }
        let under_way = self.under_way.iter().chain(&self.again).copied().collect();
        let (told_read_only, resized) = (self.told_read_only(), self.resized);
        Section::new(instance, &BlockV2 { sectors, read_only, told_read_only, resized, under_way })
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.resized)
    }

    fn block(&mut self) -> Option<&mut Block> {
        Some(self)
    }
}

fn disk_of(attachment: Attachment) -> Disk {
    Disk { sectors: attachment.bytes / spec::SECTOR_BYTES, read_only: attachment.read_only }
}
