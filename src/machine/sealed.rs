//! A paused machine in one encrypted file: its state, then the pages of its memory. For a VM whose process ends while it
//! is idle: what lies on disk meanwhile is of no use to who has the disk only, and a file that was touched is refused
//! before any vCPU runs.
//!
//! ```text
//! header 16 bytes: "HEARTH SEALED" | 0 | version u16        (little-endian; authenticated with every chunk)
//! chunks: 65,536 bytes of plaintext and a tag of 16 each; the last one is shorter or as long
//!
//! plaintext: length u64 | that many bytes of state | records
//! record:    kind u8 (0 end, 1 data, 2 zero) | first page u64 | pages u64 | with data: that many pages
//! ```
//! Chunks are AES-256-GCM under the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár 2015): the nonce holds the
//! chunk's number and whether it is the last, so that chunks can be neither changed, swapped, left out nor cut off. A
//! [`SealKey`] serves for one file only: so the rest of the nonce may be zero.
//!
//! Runs on the machine's thread, while it is paused.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};

use aead_stream::{DecryptorBE32, EncryptorBE32};
use aes_gcm::{Aes256Gcm, KeyInit};
use vm_memory::{Address, Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::dirty::PageRun;
use super::image::{self, PAGE, Pages, WriteImageError, is_zero};
use super::ram::GuestRam;
use crate::units::{Bytes, PAGE_BYTES, PageCount, PageIndex};

/// Key of one sealed file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SealKey(pub [u8; 32]);

impl std::fmt::Debug for SealKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("SealKey(..)")
    }
}

/// First bytes of a sealed file.
const MAGIC: [u8; 14] = *b"HEARTH SEALED\0";

/// Version of the format.
const VERSION: u16 = 1;

const HEADER_BYTES: usize = MAGIC.len() + 2;

/// Bytes of plaintext in a chunk: large enough that tags and calls cost nothing, small enough for a processor's cache.
const CHUNK_BYTES: usize = 64 * 1024;

/// Bytes of a tag (NIST SP 800-38D).
const TAG_BYTES: usize = 16;

/// Most bytes of state: a machine of 32 vCPUs and all devices has a tenth of this.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// Bytes of guest memory read or written at once.
const BUFFER_BYTES: usize = 256 * 1024;

const END: u8 = 0;
const DATA: u8 = 1;
const ZERO: u8 = 2;

/// Why a machine could not be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The pages could not be found or read.
    #[error(transparent)]
    Memory(#[from] WriteImageError),
    /// The file could not be written.
    #[error("write the sealed file")]
    Write(#[source] io::Error),
}

/// Why a sealed file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum UnsealError {
    /// The file could not be read.
    #[error("read the sealed file")]
    Read(#[source] io::Error),
    /// It begins otherwise than a sealed file of this version does.
    #[error("this is not a sealed machine of version {VERSION}")]
    Foreign,
    /// It was changed, cut off, or sealed with another key.
    #[error("chunk {chunk} of the sealed file was changed, or sealed with another key")]
    Damaged {
        /// Which one, from 0.
        chunk: u64,
    },
    /// It is whole, and says what cannot be.
    #[error("the sealed file does not make sense: {what}")]
    Nonsense {
        /// What.
        what: &'static str,
    },
    /// Guest memory could not be written.
    #[error("write guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

impl UnsealError {
    /// Whether the file itself is at fault, rather than the host.
    pub const fn is_damage(&self) -> bool {
        match self {
            Self::Foreign | Self::Damaged { .. } | Self::Nonsense { .. } => true,
            Self::Read(_) | Self::Memory(_) => false,
        }
    }
}

/// Writes a machine: its encoded state and, of its memory, what [`Pages`] says. `pagemap` is this process's
/// `/proc/PID/pagemap`. Gives the bytes of guest memory that were written.
pub fn seal(
    key: SealKey,
    state: &[u8],
    (ram, pages): (&GuestRam, Pages),
    pagemap: &File,
    out: &File,
) -> Result<Bytes, SealError> {
    let mut sealer = Sealer::new(key, out).map_err(SealError::Write)?;
    sealer.add(&(state.len() as u64).to_le_bytes()).map_err(SealError::Write)?;
    sealer.add(state).map_err(SealError::Write)?;
    let mut written = 0;
    for region in ram.iter() {
        let first = region.file_offset().map_or(0, |backing| backing.start()) / PAGE_BYTES;
        for run in image::pages_of(region, pages, pagemap)? {
            let guest = GuestAddress(region.start_addr().raw_value() + run.first.0 * PAGE_BYTES);
            let run = PageRun { first: PageIndex(first + run.first.0), count: run.count };
            written += add_run(&mut sealer, (ram, pages), guest, run)?;
        }
    }
    sealer.add_record(END, PageRun { first: PageIndex(0), count: PageCount(0) }).map_err(SealError::Write)?;
    sealer.finish().map_err(SealError::Write)?;
    Ok(Bytes(written))
}

/// Adds the pages of a run, those that are zero as such, or not at all when all that is not named is zero.
fn add_run(
    sealer: &mut Sealer<'_>,
    (ram, pages): (&GuestRam, Pages),
    guest: GuestAddress,
    run: PageRun,
) -> Result<u64, SealError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut done, bytes, mut written) = (0, run.count.0 * PAGE_BYTES, 0);
    while done < bytes {
        let length = usize::try_from(bytes - done).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let part = &mut buffer[..length];
        ram.read_slice(part, guest.unchecked_add(done)).map_err(WriteImageError::Read)?;
        let mut at = run.first.0 + done / PAGE_BYTES;
        let same_kind = |one: &[u8; PAGE], next: &[u8; PAGE]| is_zero(one) == is_zero(next);
        for same in part.as_chunks::<PAGE>().0.chunk_by(same_kind) {
            let run = PageRun { first: PageIndex(at), count: PageCount(same.len() as u64) };
            at += run.count.0;
            if same.first().is_some_and(is_zero) {
                if pages == Pages::Changed {
                    sealer.add_record(ZERO, run).map_err(SealError::Write)?;
                }
                continue;
            }
            sealer.add_record(DATA, run).map_err(SealError::Write)?;
            sealer.add(same.as_flattened()).map_err(SealError::Write)?;
            written += run.count.0 * PAGE_BYTES;
        }
        done += length as u64;
    }
    Ok(written)
}

fn header() -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..MAGIC.len()].copy_from_slice(&MAGIC);
    header[MAGIC.len()..].copy_from_slice(&VERSION.to_le_bytes());
    header
}

/// Plaintext in, encrypted chunks out.
struct Sealer<'a> {
    out: BufWriter<&'a File>,
    encryptor: EncryptorBE32<Aes256Gcm>,
    chunk: Vec<u8>,
}

impl<'a> Sealer<'a> {
    fn new(key: SealKey, out: &'a File) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
        out.write_all(&header())?;
        let encryptor = EncryptorBE32::from_aead(Aes256Gcm::new(&key.0.into()), &[0; 7].into());
        Ok(Self { out, encryptor, chunk: Vec::with_capacity(CHUNK_BYTES + TAG_BYTES) })
    }

    fn add(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.chunk.len() == CHUNK_BYTES {
                // There is more: this was not the last.
                let sealed = self.encryptor.encrypt_next_in_place(&header(), &mut self.chunk);
                sealed.map_err(|_| io::Error::other("more chunks than one key serves for"))?;
                self.out.write_all(&self.chunk)?;
                self.chunk.clear();
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.chunk.len()));
            self.chunk.extend_from_slice(taken);
            bytes = rest;
        }
        Ok(())
    }

    fn add_record(&mut self, kind: u8, run: PageRun) -> io::Result<()> {
        self.add(&[kind])?;
        self.add(&run.first.0.to_le_bytes())?;
        self.add(&run.count.0.to_le_bytes())
    }

    fn finish(mut self) -> io::Result<()> {
        let sealed = self.encryptor.encrypt_last_in_place(&header(), &mut self.chunk);
        sealed.map_err(|_| io::Error::other("more chunks than one key serves for"))?;
        self.out.write_all(&self.chunk)?;
        self.out.flush()
    }
}

/// A sealed file that is being read: its state is known, its memory comes next.
pub struct Sealed {
    unsealer: Unsealer,
    /// The machine's encoded state.
    pub state: Vec<u8>,
}

impl std::fmt::Debug for Sealed {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Sealed(..)")
    }
}

impl Sealed {
    /// Reads a sealed file up to its memory.
    pub fn open(key: SealKey, file: File) -> Result<Self, UnsealError> {
        let mut unsealer = Unsealer::new(key, file)?;
        let mut length = [0; 8];
        unsealer.take(&mut length)?;
        let length = u64::from_le_bytes(length);
        let length = usize::try_from(length).ok().filter(|_| length <= STATE_BYTES_MAX);
        let mut state = vec![0; length.ok_or(UnsealError::Nonsense { what: "more state than a machine has" })?];
        unsealer.take(&mut state)?;
        Ok(Self { unsealer, state })
    }

    /// Writes the pages into guest memory. When this is done, all of the file was there and as it was sealed.
    pub fn fill(mut self, ram: &GuestRam) -> Result<(), UnsealError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let (kind, run) = self.unsealer.take_record()?;
            if kind == END {
                return self.unsealer.finish();
            }
            let guest = guest_address(ram, run).ok_or(UnsealError::Nonsense { what: "pages beyond guest memory" })?;
            let (mut done, bytes) = (0, run.count.0 * PAGE_BYTES);
            while done < bytes {
                let length = usize::try_from(bytes - done).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
                let part = &mut buffer[..length];
                match kind {
                    DATA => self.unsealer.take(part)?,
                    ZERO => part.fill(0),
                    _ => return Err(UnsealError::Nonsense { what: "an unknown kind of record" }),
                }
                ram.write_slice(part, guest.unchecked_add(done)).map_err(UnsealError::Memory)?;
                done += length as u64;
            }
        }
    }
}

/// Where a run of pages of the image lies in the guest: all of it in one region, or nowhere.
fn guest_address(ram: &GuestRam, run: PageRun) -> Option<GuestAddress> {
    let end = run.first.0.checked_add(run.count.0)?;
    ram.iter().find_map(|region| {
        let first = region.file_offset().map_or(0, |backing| backing.start()) / PAGE_BYTES;
        let inside = run.first.0 >= first && end <= first + region.len() / PAGE_BYTES;
        inside.then(|| GuestAddress(region.start_addr().raw_value() + (run.first.0 - first) * PAGE_BYTES))
    })
}

/// Encrypted chunks in, plaintext out.
struct Unsealer {
    file: File,
    /// Encrypted bytes that were not read yet.
    left: u64,
    /// `None` after the last chunk.
    decryptor: Option<DecryptorBE32<Aes256Gcm>>,
    chunks: u64,
    chunk: Vec<u8>,
    /// How much of the chunk was taken.
    taken: usize,
}

impl Unsealer {
    fn new(key: SealKey, mut file: File) -> Result<Self, UnsealError> {
        let length = file.metadata().map_err(UnsealError::Read)?.len();
        let mut found = [0; HEADER_BYTES];
        match file.read_exact(&mut found) {
            Ok(()) if found == header() => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(UnsealError::Read(error)),
            Ok(()) | Err(_) => return Err(UnsealError::Foreign),
        }
        let decryptor = DecryptorBE32::from_aead(Aes256Gcm::new(&key.0.into()), &[0; 7].into());
        let left = length.saturating_sub(HEADER_BYTES as u64);
        Ok(Self { file, left, decryptor: Some(decryptor), chunks: 0, chunk: Vec::new(), taken: 0 })
    }

    fn take(&mut self, mut into: &mut [u8]) -> Result<(), UnsealError> {
        while !into.is_empty() {
            if self.taken == self.chunk.len() {
                self.next_chunk()?;
            }
            let count = into.len().min(self.chunk.len() - self.taken);
            let (now, later) = into.split_at_mut(count);
            now.copy_from_slice(&self.chunk[self.taken..self.taken + count]);
            self.taken += count;
            into = later;
        }
        Ok(())
    }

    fn take_record(&mut self) -> Result<(u8, PageRun), UnsealError> {
        let (mut kind, mut first, mut count) = ([0; 1], [0; 8], [0; 8]);
        self.take(&mut kind)?;
        self.take(&mut first)?;
        self.take(&mut count)?;
        let (first, count) = (u64::from_le_bytes(first), u64::from_le_bytes(count));
        Ok((kind[0], PageRun { first: PageIndex(first), count: PageCount(count) }))
    }

    fn next_chunk(&mut self) -> Result<(), UnsealError> {
        let damaged = UnsealError::Damaged { chunk: self.chunks };
        // It ended, and was to go on.
        let Some(mut decryptor) = self.decryptor.take() else { return Err(damaged) };
        let whole = (CHUNK_BYTES + TAG_BYTES) as u64;
        let length = usize::try_from(self.left.min(whole)).unwrap_or(CHUNK_BYTES + TAG_BYTES);
        self.chunk.resize(length, 0);
        self.file.read_exact(&mut self.chunk).map_err(UnsealError::Read)?;
        self.left -= length as u64;
        let opened = if self.left == 0 {
            decryptor.decrypt_last_in_place(&header(), &mut self.chunk)
        } else {
            let opened = decryptor.decrypt_next_in_place(&header(), &mut self.chunk);
            self.decryptor = Some(decryptor);
            opened
        };
        opened.map_err(|_| damaged)?;
        self.chunks += 1;
        self.taken = 0;
        Ok(())
    }

    /// Everything was taken, and the last chunk was the last.
    fn finish(self) -> Result<(), UnsealError> {
        if self.decryptor.is_some() || self.taken != self.chunk.len() {
            return Err(UnsealError::Nonsense { what: "something follows the end" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;
    use std::os::unix::fs::FileExt;

    use crate::machine::ram::{self, RamBacking};
    use crate::sys::ram::memfd;
    use crate::units::MIB;

    const KEY: SealKey = SealKey([7; 32]);

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    fn sealed(ram: &GuestRam, pages: Pages, state: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        seal(KEY, state, (ram, pages), &pagemap(), &file).unwrap();
        file.rewind().unwrap();
        file
    }

    fn open(mut file: &File, key: SealKey) -> Result<Sealed, UnsealError> {
        file.rewind().unwrap();
        Sealed::open(key, file.try_clone().unwrap())
    }

    fn byte(ram: &GuestRam, address: u64) -> u8 {
        ram.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn memory_comes_back_as_it_was() {
        let memory = ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap();
        memory.write_slice(&[1; 300_000], GuestAddress(0x1_0000)).unwrap();
        memory.write_slice(&[2], GuestAddress(4 * MIB - 1)).unwrap();
        let file = sealed(&memory, Pages::All, b"state");
        let opened = open(&file, KEY).unwrap();
        assert_eq!(opened.state, b"state");
        let other = ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap();
        opened.fill(&other).unwrap();
        let mut bytes = vec![0; 300_000];
        other.read_slice(&mut bytes, GuestAddress(0x1_0000)).unwrap();
        assert_eq!(bytes, vec![1; 300_000]);
        assert_eq!([0, 0xffff, 0x1_0000 + 300_000, 4 * MIB - 1].map(|at| byte(&other, at)), [0, 0, 0, 2]);
    }

    #[test]
    fn a_clone_is_sealed_as_what_it_changed() {
        let original = memfd(Bytes(4 * MIB)).unwrap();
        original.write_all_at(&[9; 3 * PAGE], 0x4000).unwrap();
        let clone = || {
            let file = original.try_clone().unwrap();
            ram::make(RamBacking::PrivateFile(file), Bytes(4 * MIB)).unwrap()
        };
        let memory = clone();
        memory.write_slice(&[0; PAGE], GuestAddress(0x5000)).unwrap();
        memory.write_slice(&[3], GuestAddress(0x9000)).unwrap();
        let file = sealed(&memory, Pages::Changed, b"");
        assert!(file.metadata().unwrap().len() < 3 * PAGE as u64, "only the pages that changed");
        let other = clone();
        open(&file, KEY).unwrap().fill(&other).unwrap();
        assert_eq!([0x4000, 0x5000, 0x6000, 0x9000].map(|at| byte(&other, at)), [9, 0, 9, 3]);
    }

    #[test]
    fn whatever_is_changed_is_refused() {
        let memory = ram::make(RamBacking::SharedMemfd, Bytes(2 * MIB)).unwrap();
        memory.write_slice(&[5; 200_000], GuestAddress(0)).unwrap();
        let file = sealed(&memory, Pages::All, &[8; 1000]);
        let length = file.metadata().unwrap().len();
        let take =
            |file: &File, key| open(file, key)?.fill(&ram::make(RamBacking::SharedMemfd, Bytes(2 * MIB)).unwrap());
        take(&file, KEY).unwrap();
        assert!(take(&file, SealKey([8; 32])).unwrap_err().is_damage(), "another key");
        for at in (0..length).step_by(997).chain([0, 15, 16, length - 1]) {
            let mut was = [0];
            file.read_exact_at(&mut was, at).unwrap();
            file.write_all_at(&[was[0] ^ 1], at).unwrap();
            assert!(take(&file, KEY).unwrap_err().is_damage(), "byte {at}");
            file.write_all_at(&was, at).unwrap();
        }
        for shorter in [0, 10, 16, 20, (HEADER_BYTES + CHUNK_BYTES + TAG_BYTES) as u64, length - 1] {
            let mut copy = tempfile::tempfile().unwrap();
            let mut whole = file.try_clone().unwrap();
            whole.rewind().unwrap();
            io::copy(&mut whole.take(shorter), &mut copy).unwrap();
            assert!(take(&copy, KEY).unwrap_err().is_damage(), "{shorter} bytes");
        }
        let mut longer = file.try_clone().unwrap();
        longer.seek(io::SeekFrom::End(0)).unwrap();
        longer.write_all(b"x").unwrap();
        assert!(take(&file, KEY).unwrap_err().is_damage(), "longer");
    }

    #[test]
    fn pages_of_a_smaller_machine_do_not_fit_beyond_it() {
        let memory = ram::make(RamBacking::SharedMemfd, Bytes(4 * MIB)).unwrap();
        memory.write_slice(&[5], GuestAddress(4 * MIB - 1)).unwrap();
        let file = sealed(&memory, Pages::All, b"");
        let smaller = ram::make(RamBacking::SharedMemfd, Bytes(2 * MIB)).unwrap();
        assert!(open(&file, KEY).unwrap().fill(&smaller).unwrap_err().is_damage());
    }
}
