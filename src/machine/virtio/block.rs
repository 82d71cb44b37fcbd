//! The block device (virtio 1.2 section 5.2) on a raw file or a block device of the host.
//!
//! The loop takes requests from the ring and checks them ([`request`]); [`worker`], one thread for each disk, carries
//! them out and writes the data; the loop writes the status and gives the buffers back. Requests under way are bounded
//! by the ring's size, and there are none while the device is paused. What can go wrong on the host (no space, an I/O
//! error, a file that became shorter) is an error of that request for the guest.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use vmm_sys_util::epoll::EventSet;

use self::request::{Buffers, Disk, Refusal};
use self::saved::BlockV1;
use self::worker::{Done, Job, Worker};
use super::chain::Chain;
use super::model::{Counters, Face, Io, Model, Turn, Watch};
use super::queue::{RingError, Waiting};
use super::spec::{block as spec, device_id};
use crate::machine::layout::Slot;
use crate::machine::ram::GuestRam;
use crate::saved::{SaveSectionError, Section};

pub mod request;
mod worker;

/// Enough to keep one worker busy; Linux allocates a request for each entry when it finds the disk.
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

/// Most data buffers of a request: the ring's size less header and status, so that a request fits without an indirect
/// table.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Token of the worker's event.
const FINISHED_TOKEN: u64 = 0;

/// The block device.
#[derive(Debug)]
pub(crate) struct Block {
    face: Face,
    disk: Disk,
    worker: Worker,
    /// Requests the worker has, or has finished and the guest has not been told of.
    under_way: usize,
}

/// Why a block device cannot go on from its saved state.
#[derive(Debug)]
pub(crate) struct OtherDisk;

impl Block {
    /// A device on `file`.
    pub(crate) fn new(slot: Slot, mut file: File, read_only: bool, ram: &GuestRam, watch: &Watch) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / spec::SECTOR_BYTES;
        let disk = Disk { sectors, read_only };
        let worker = Worker::start(file, ram.clone(), format!("disk-{}", slot.number()))?;
        watch.add(worker.finished(), FINISHED_TOKEN, EventSet::IN)?;
        let mut features = spec::F_SEG_MAX | spec::F_BLK_SIZE | spec::F_FLUSH;
        features |= if read_only { spec::F_RO } else { spec::F_DISCARD | spec::F_WRITE_ZEROES };
        let face = Face { device_id: device_id::BLOCK, features, queue_sizes: &QUEUE_SIZES, config: config(disk) };
        Ok(Self { face, disk, worker, under_way: 0 })
    }

    /// Checks that this is the disk the state was saved with: the guest knows its size and does not ask again.
    pub(crate) fn check_saved(&self, saved: &BlockV1) -> Result<(), OtherDisk> {
        let &BlockV1 { sectors, read_only } = saved;
        if (Disk { sectors, read_only }) == self.disk { Ok(()) } else { Err(OtherDisk) }
    }

    /// Gives finished requests back to the guest.
    fn complete(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        for Done { chain, status } in self.worker.take_done() {
            self.under_way -= 1;
            Counters::count(if status == spec::S_OK { &io.counters.done } else { &io.counters.failed });
            answer(io, chain, status)?;
        }
        Ok(())
    }

    fn begin(&mut self, io: &mut Io<'_>, chain: Chain) -> Result<(), RingError> {
        match self.read_request(io, &chain)? {
            Ok(request) => {
                self.under_way += 1;
                self.worker.submit(Job { chain, request });
                Ok(())
            }
            Err(refusal) => {
                Counters::count(&io.counters.failed);
                answer(io, chain, refusal.status())
            }
        }
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
        if !io.live {
            return Ok(Turn::Idle);
        }
        self.complete(io)?;
        // A ring announces at most its size; a guest that reuses buffers under way is made to wait for them.
        for _ in 0..QUEUE_SIZE {
            if self.under_way >= usize::from(QUEUE_SIZE) {
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

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        self.worker.wait_idle();
        if io.live { self.complete(io) } else { Ok(()) }
    }

    fn reset(&mut self) {
        self.worker.wait_idle();
        // The buffers belong to the driver again, which has forgotten about them.
        drop(self.worker.take_done());
        self.under_way = 0;
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        let Disk { sectors, read_only } = self.disk;
        Section::new(instance, &BlockV1 { sectors, read_only })
    }
}

pub(crate) mod saved {
    //! What survives of a block device.

    use crate::saved::{Saved, SectionKind};
    use serde::{Deserialize, Serialize};

    /// The block device. Requests under way are finished before it is saved.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub(crate) struct BlockV1 {
        /// Size of the disk.
        pub(crate) sectors: u64,
        /// Whether writes are refused.
        pub(crate) read_only: bool,
    }

    impl Saved for BlockV1 {
        const KIND: SectionKind = SectionKind::Block;
        const VERSION: u16 = 1;
    }
}
