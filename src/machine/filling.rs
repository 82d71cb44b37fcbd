//! Guest memory that is made of a memory image of which parts are not here yet. The image is counted in chunks; one that
//! is missing is filled when somebody says that the file has it now, and until then whoever reaches it waits
//! (`sys/userfault`): a vCPU, a device, this process as it builds the machine.
//!
//! A chunk that is there stays there: what the guest wrote to it is nowhere else. Missing chunks have no page, so what
//! asks the kernel for this process's own pages (`super::image`) finds none in them. A balloon that gives back memory in
//! a missing chunk changes nothing: the chunk is asked for when it is reached, and shows the image then, as everywhere.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::image::in_guest;
use super::ram::{self, GuestRam, MakeRamError, MappedRegion, RamBacking};
use crate::sys::userfault::Userfault;
use crate::units::{Bytes, PAGE_BYTES};

/// Most chunks of an image: each that is there beside one that is not is a mapping of its own, of which a process may
/// have 65,530 (`vm.max_map_count`).
pub const CHUNKS_MAX: u32 = 30_000;

/// Largest chunk. A power of two up to it never lies in two regions of guest memory (`super::layout`).
const CHUNK_BYTES_MAX: u64 = 1 << 30;

/// Why an image cannot be counted in such chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunksError {
    /// No chunk has this size.
    #[error("chunks of {found} bytes: a power of two from {PAGE_BYTES} to {CHUNK_BYTES_MAX} is possible")]
    Size {
        /// The size.
        found: u64,
    },
    /// There would be too many.
    #[error(
        "{found} chunks of guest memory: at most {CHUNKS_MAX} can be missing, as each may become a mapping of its own, \
         of which the kernel allows a process 65530 (vm.max_map_count)"
    )]
    TooMany {
        /// How many.
        found: u64,
    },
}

/// Why such memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeFillingError {
    /// Not in these chunks.
    #[error(transparent)]
    Chunks(#[from] ChunksError),
    /// Not of this file.
    #[error("guest memory")]
    Ram(#[source] MakeRamError),
    /// The kernel tells nobody what is reached.
    #[error("have the kernel tell of missing memory that is reached")]
    Userfault(#[source] io::Error),
}

/// Why chunks were not mapped.
#[derive(Debug, thiserror::Error)]
pub enum PutChunksError {
    /// There are no such chunks.
    #[error("chunks {first} to {}: there are {chunks}", u64::from(*.first) + u64::from(*.count))]
    Beyond {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
        /// How many there are.
        chunks: u32,
    },
    /// The kernel refused.
    #[error("map chunks of the memory image")]
    Map(#[source] io::Error),
}

/// Which chunks of an image are there. Whoever maps them says so here, after each; others look.
#[derive(Debug)]
pub struct Presence {
    chunk: u64,
    memory: u64,
    missing: Mutex<Missing>,
}

#[derive(Debug)]
struct Missing {
    /// By chunk: whether it is missing.
    chunks: Vec<bool>,
    left: u32,
}

impl Presence {
    /// None is there.
    pub fn none(memory: Bytes, chunk: Bytes) -> Result<Self, ChunksError> {
        let (memory, chunk) = (memory.0, chunk.0);
        if !chunk.is_power_of_two() || !(PAGE_BYTES..=CHUNK_BYTES_MAX).contains(&chunk) {
            return Err(ChunksError::Size { found: chunk });
        }
        let found = memory.div_ceil(chunk);
        let left = u32::try_from(found).ok().filter(|count| *count <= CHUNKS_MAX);
        let left = left.ok_or(ChunksError::TooMany { found })?;
        Ok(Self { chunk, memory, missing: Mutex::new(Missing { chunks: vec![true; left as usize], left }) })
    }

    fn lock(&self) -> MutexGuard<'_, Missing> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many chunks there are in all. The last one may be shorter than the others.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.memory.div_ceil(self.chunk)).unwrap_or(CHUNKS_MAX)
    }

    /// How many of them are missing.
    pub fn missing(&self) -> u32 {
        self.lock().left
    }

    /// Whether this one is.
    pub fn is_missing(&self, chunk: u32) -> bool {
        self.lock().chunks.get(chunk as usize).is_some_and(|missing| *missing)
    }

    /// The parts of these bytes of the image that are there: where each begins, and how long it is.
    pub fn there(&self, offset: u64, bytes: u64) -> Vec<(u64, u64)> {
        let end = offset.saturating_add(bytes).min(self.memory);
        let missing = self.lock();
        let mut there: Vec<(u64, u64)> = Vec::new();
        let mut at = offset;
        while at < end {
            let next = (at / self.chunk + 1).saturating_mul(self.chunk).min(end);
            let chunk = usize::try_from(at / self.chunk).unwrap_or(usize::MAX);
            if missing.chunks.get(chunk).is_some_and(|missing| !missing) {
                match there.last_mut() {
                    Some((start, length)) if *start + *length == at => *length += next - at,
                    Some(_) | None => there.push((at, next - at)),
                }
            }
            at = next;
        }
        there
    }

    /// Runs of chunks that are missing, of those from `first` up to `end`.
    fn missing_runs(&self, first: u32, end: u32) -> Vec<Range<u32>> {
        let missing = self.lock();
        let mut runs: Vec<Range<u32>> = Vec::new();
        for chunk in (first..end).filter(|chunk| missing.chunks.get(*chunk as usize).is_some_and(|missing| *missing)) {
            match runs.last_mut() {
                Some(last) if last.end == chunk => last.end = chunk + 1,
                Some(_) | None => runs.push(chunk..chunk + 1),
            }
        }
        runs
    }

    /// These bytes of the image, which are whole chunks, are there from here on.
    fn arrived(&self, bytes: Range<u64>) {
        let mut missing = self.lock();
        let chunk = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let (first, end) = (chunk(bytes.start / self.chunk), chunk(bytes.end.div_ceil(self.chunk)));
        let mut arrived = 0;
        for chunk in missing.chunks.iter_mut().take(end).skip(first).filter(|missing| **missing) {
            *chunk = false;
            arrived += 1;
        }
        missing.left -= arrived;
    }
}

/// Guest memory that is being filled. Dropped only when no chunk is missing or nobody has the memory any more: what is
/// missing then reads as zeroes.
#[derive(Debug)]
pub struct FillingRam {
    // Before what tells of it: memory is gone by then, if nobody else has it.
    ram: GuestRam,
    regions: Vec<MappedRegion>,
    presence: Arc<Presence>,
    userfault: Userfault,
}

impl FillingRam {
    /// Memory of which every chunk of `image` is missing. `device` is `/dev/userfaultfd`.
    pub fn make(image: File, memory: Bytes, chunk: Bytes, device: &File) -> Result<Self, MakeFillingError> {
        let presence = Arc::new(Presence::none(memory, chunk)?);
        let ram = ram::make(RamBacking::PrivateFile(image), memory).map_err(MakeFillingError::Ram)?;
        let userfault = Userfault::new(device).map_err(MakeFillingError::Userfault)?;
        for (at, bytes) in in_guest(&ram, 0, memory.0) {
            userfault.withhold(&ram, at, bytes).map_err(MakeFillingError::Userfault)?;
        }
        Ok(Self { regions: ram::mapped_regions(&ram), ram, presence, userfault })
    }

    /// The memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What of it is there.
    pub fn presence(&self) -> &Arc<Presence> {
        &self.presence
    }

    /// Appends missing chunks that somebody waits for, some at a time; none if nobody does. Does not block.
    pub fn reached(&self, chunks: &mut Vec<u32>) -> io::Result<()> {
        let mut addresses = Vec::new();
        self.userfault.faults(&mut addresses)?;
        for offset in addresses.into_iter().filter_map(|address| self.in_image(address)) {
            let chunk = offset / self.presence.chunk;
            match u32::try_from(chunk).ok().filter(|chunk| self.presence.is_missing(*chunk)) {
                Some(chunk) => chunks.push(chunk),
                // It came as this was told.
                None => self.wake(chunk * self.presence.chunk)?,
            }
        }
        Ok(())
    }

    fn wake(&self, offset: u64) -> io::Result<()> {
        let bytes = self.presence.chunk.min(self.presence.memory - offset);
        in_guest(&self.ram, offset, bytes).try_for_each(|(at, bytes)| self.userfault.wake(&self.ram, at, bytes))
    }

    /// Where an address of this process lies in the image.
    fn in_image(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = address.checked_sub(region.host_address as u64).filter(|offset| *offset < region.bytes.0)?;
            Some(region.file_offset.0 + within)
        })
    }

    /// The file has these chunks: those that are missing are mapped, and who waits for them goes on. Others stay as they
    /// are, with what the guest wrote to them.
    pub fn put(&self, first: u32, count: u32) -> Result<(), PutChunksError> {
        let chunks = self.presence.chunks();
        let end = first.checked_add(count).filter(|end| *end <= chunks);
        let end = end.ok_or(PutChunksError::Beyond { first, count, chunks })?;
        for run in self.presence.missing_runs(first, end) {
            let mut offset = u64::from(run.start) * self.presence.chunk;
            let length = (u64::from(run.end) * self.presence.chunk).min(self.presence.memory) - offset;
            // Regions follow each other in the image, and each begins with a chunk.
            for (at, bytes) in in_guest(&self.ram, offset, length) {
                self.userfault.provide(&self.ram, at, bytes).map_err(PutChunksError::Map)?;
                self.presence.arrived(offset..offset + bytes);
                offset += bytes;
            }
        }
        Ok(())
    }
}

/// Readable when somebody waits for a chunk.
impl AsFd for FillingRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::machine::image::{self, Pages};
    use crate::sys::ram::memfd;
    use crate::units::MIB;

    const CHUNK: u64 = 64 << 10;

    fn device() -> File {
        File::options().read(true).write(true).open("/dev/userfaultfd").expect("needs root and Linux 6.1")
    }

    /// The first chunk that somebody waits for.
    fn reached(filling: &FillingRam) -> u32 {
        let mut source = [PollFd::new(filling.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut source, PollTimeout::from(10_000_u16)), Ok(1), "nobody waits");
        let mut chunks = Vec::new();
        filling.reached(&mut chunks).unwrap();
        chunks[0]
    }

    #[test]
    fn chunks_are_counted_and_bounded() {
        let presence = |memory, chunk| Presence::none(Bytes(memory), Bytes(chunk)).map(|presence| presence.chunks());
        assert_eq!(presence(4 * MIB, CHUNK), Ok(64));
        assert_eq!(presence(4 * MIB + PAGE_BYTES, CHUNK), Ok(65));
        assert_eq!(presence(30_000 * CHUNK, CHUNK), Ok(CHUNKS_MAX));
        let many = presence(30_000 * CHUNK + PAGE_BYTES, CHUNK).unwrap_err();
        assert_eq!(many, ChunksError::TooMany { found: 30_001 });
        assert!(many.to_string().contains("at most 30000"), "{many}");
        for chunk in [0, 1, 2048, 3 * PAGE_BYTES, 2 << 30, 1 << 63] {
            assert_eq!(presence(4 * MIB, chunk), Err(ChunksError::Size { found: chunk }));
        }
    }

    #[test]
    fn memory_is_filled_as_it_is_reached_and_what_was_written_stays() {
        // The last chunk is one page.
        let bytes = 4 * MIB + PAGE_BYTES;
        let file = memfd(Bytes(bytes)).unwrap();
        let filling = FillingRam::make(file.try_clone().unwrap(), Bytes(bytes), Bytes(CHUNK), &device()).unwrap();
        let ram = filling.ram().clone();
        let last = GuestAddress(4 * MIB);
        let reader = std::thread::spawn({
            let ram = ram.clone();
            move || [last, GuestAddress(CHUNK)].map(|at| ram.read_obj::<u8>(at).unwrap())
        });
        assert_eq!(reached(&filling), 64);
        file.write_all_at(&[64], last.0).unwrap();
        filling.put(64, 1).unwrap();
        assert_eq!(reached(&filling), 1);
        assert_eq!((filling.presence().missing(), filling.presence().is_missing(64)), (64, false));
        file.write_all_at(&[1], CHUNK).unwrap();
        filling.put(0, 4).unwrap();
        assert_eq!(reader.join().unwrap(), [64, 1]);
        ram.write_obj(9_u8, GuestAddress(CHUNK)).unwrap();
        // Said again, also together with others: what is there is left alone.
        filling.put(1, 1).unwrap();
        filling.put(0, 8).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(CHUNK)).unwrap(), 9);
        for (first, count) in [(65, 1), (0, 66), (u32::MAX, 1), (1, u32::MAX)] {
            let error = filling.put(first, count).unwrap_err();
            assert!(matches!(error, PutChunksError::Beyond { chunks: 65, .. }), "{error}");
        }
        filling.put(0, 65).unwrap();
        assert_eq!(filling.presence().missing(), 0);
        let difference = tempfile::tempfile().unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let written = image::write(&ram, Pages::Changed, &pagemap, &difference).unwrap();
        assert_eq!(written.bytes, Bytes(PAGE_BYTES), "the page that was written, and no other");
        drop(filling);
        assert_eq!(ram.read_obj::<u8>(last).unwrap(), 64);
    }

    #[test]
    fn a_run_of_chunks_may_lie_in_two_regions() {
        let low = 3 << 30;
        let bytes = low + 4 * MIB;
        let file = memfd(Bytes(bytes)).unwrap();
        let filling = FillingRam::make(file.try_clone().unwrap(), Bytes(bytes), Bytes(512 << 10), &device()).unwrap();
        let boundary = u32::try_from(low >> 19).unwrap();
        let high = GuestAddress(4 << 30);
        let reader = std::thread::spawn({
            let ram = filling.ram().clone();
            move || [high, GuestAddress(low - 1)].map(|at| ram.read_obj::<u8>(at).unwrap())
        });
        assert_eq!(reached(&filling), boundary);
        file.write_all_at(&[5, 6], low - 1).unwrap();
        filling.put(boundary - 2, 4).unwrap();
        assert_eq!(reader.join().unwrap(), [6, 5]);
        assert_eq!(filling.presence().missing(), filling.presence().chunks() - 4);
    }

    proptest! {
        #[test]
        fn presence_is_what_arrived(
            pages in 1_u64..400,
            arrivals in proptest::collection::vec((0_u32..120, 1_u32..20), 0..20),
            (offset, bytes) in (0_u64..500 * 4096, 0_u64..500 * 4096),
        ) {
            let (memory, chunk) = (pages * PAGE_BYTES, 4 * PAGE_BYTES);
            let presence = Presence::none(Bytes(memory), Bytes(chunk)).unwrap();
            let mut there = vec![false; usize::try_from(memory.div_ceil(chunk)).unwrap()];
            for (first, count) in arrivals {
                let end = (first + count).min(presence.chunks());
                for run in presence.missing_runs(first, end) {
                    prop_assert!(run.clone().all(|chunk| !there[chunk as usize]));
                    presence.arrived(u64::from(run.start) * chunk..(u64::from(run.end) * chunk).min(memory));
                    run.for_each(|chunk| there[chunk as usize] = true);
                }
                prop_assert!((first..end).all(|chunk| there[chunk as usize] && !presence.is_missing(chunk)));
            }
            prop_assert_eq!(presence.missing() as usize, there.iter().filter(|there| !**there).count());
            let parts = presence.there(offset, bytes);
            for at in (offset..(offset + bytes).min(memory)).step_by(1021) {
                let found = parts.iter().any(|(start, length)| (*start..start + length).contains(&at));
                prop_assert_eq!(found, there[usize::try_from(at / chunk).unwrap()]);
            }
            let end = offset.saturating_add(bytes).min(memory);
            prop_assert!(parts.iter().all(|(start, length)| *start >= offset && start + length <= end && *length > 0));
        }
    }
}
