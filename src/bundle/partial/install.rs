//! An open partial bundle: which of its chunks are here, and how the others get here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{PartialError, source_in};
use crate::bundle::damage::ReadBundleError;
use crate::bundle::digest::Digest;
use crate::bundle::image::{Content, Image, Progress, View};
use crate::bundle::launch::LaunchFiles;
use crate::bundle::manifest::Manifest;
use crate::bundle::places::{MEMORY, Places, STATE};
use crate::bundle::run::{self, Run};
use crate::bundle::signatures::{Beside, SignError, Signed};
use crate::bundle::stage::is_no_space;
use crate::bundle::store::Store;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::{extent, file};
use crate::units::PAGE_BYTES;

/// A bundle of which a part is here. To be shared by threads.
#[derive(Debug)]
pub struct Partial {
    pub(super) store: Store,
    pub(super) id: BundleId,
    pub(super) manifest: Arc<Manifest>,
    pub(super) manifest_digest: Digest,
    from: String,
    state: File,
    /// For reading and writing, and the same file when it is a whole bundle's.
    pub(super) memory: File,
    /// Which chunks are here. Held for look-ups only, never while a disk is waited for.
    present: Mutex<Present>,
    /// Held while a chunk is written, so that each is written once.
    writing: Mutex<()>,
}

/// Which of the chunks with content are here, in the order of the manifest's list.
#[derive(Debug)]
struct Present {
    chunks: Vec<bool>,
    missing: u32,
    missing_bytes: u64,
}

/// What became of a chunk's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// The chunk is here now.
    New,
    /// It was here before.
    Already,
}

/// Why a chunk's bytes are not kept.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// There is no such chunk, or it is all zeros and comes from nowhere.
    #[error("bundle {bundle} has no chunk {chunk} with content")]
    NoContent {
        /// The bundle.
        bundle: BundleId,
        /// The chunk.
        chunk: u32,
    },
    /// Too few bytes, or too many.
    #[error("chunk {chunk} of bundle {bundle} has {wanted} bytes, not {found}")]
    Length {
        /// The bundle.
        bundle: BundleId,
        /// The chunk.
        chunk: u32,
        /// Bytes there were.
        found: usize,
        /// Bytes it has.
        wanted: u64,
    },
    /// Other bytes than the bundle was made of.
    #[error("what came as chunk {chunk} of bundle {bundle} is something else: its digest differs")]
    Digest {
        /// The bundle.
        bundle: BundleId,
        /// The chunk.
        chunk: u32,
    },
    /// The disk is full.
    #[error("no space left for chunk {chunk} of bundle {bundle}")]
    NoSpace {
        /// The bundle.
        bundle: BundleId,
        /// The chunk.
        chunk: u32,
    },
    /// The disk did not answer.
    #[error("write chunk {chunk} of bundle {bundle}")]
    File {
        /// The bundle.
        bundle: BundleId,
        /// The chunk.
        chunk: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl InstallError {
    /// Whether the same chunk may be kept later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoContent { .. } => Retry::Never,
            Self::Length { .. } | Self::Digest { .. } => Retry::WithChange,
            Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Opens what is here of a bundle, and finds out what that is: all of it is read, which may take seconds for each GiB.
    pub fn open_partial(&self, id: &BundleId) -> Result<Partial, PartialError> {
        let directory = self.places().partial(id);
        let (manifest, manifest_digest) = self.partial_manifest(id)?;
        self.partial_state(id, &manifest)?;
        let failed = |source| PartialError::file(id, directory.join(MEMORY), source);
        let state = Places::open_in(&directory, id, STATE)?;
        let found = Places::open_in(&directory, id, MEMORY)?;
        // A crash may have come between this and the name of a bundle.
        file::make_writable(&found).map_err(failed)?;
        // It is a regular file, and the directory is this program's own.
        let memory = File::options().read(true).write(true).open(directory.join(MEMORY)).map_err(failed)?;
        let present = scan(&memory, &manifest).map_err(failed)?;
        Ok(Partial {
            store: self.clone(),
            id: id.clone(),
            manifest: Arc::new(manifest),
            manifest_digest,
            from: source_in(&directory),
            state,
            memory,
            present: Mutex::new(present),
            writing: Mutex::default(),
        })
    }
}

/// Finds the chunks that are here, and makes the file what it has to be beside them: as long as memory, with holes where
/// that is zero.
fn scan(memory: &File, manifest: &Manifest) -> io::Result<Present> {
    let memory_bytes = manifest.machine.memory_bytes;
    if memory.metadata()?.len() != memory_bytes {
        // What is missing comes again.
        memory.set_len(memory_bytes)?;
    }
    let image = Image::new(memory, memory_bytes, manifest.memory.chunk_bytes)?;
    let data = image.data().to_vec();
    for run in &manifest.memory.zero_runs {
        for range in run::intersect(&data, &run.bytes(manifest.memory.chunk_bytes.into())) {
            make_hole(memory, &image, range)?;
        }
    }
    let mut view = View::flat(image);
    let mut present = Present { chunks: Vec::new(), missing: 0, missing_bytes: 0 };
    for chunk in &manifest.memory.chunks {
        let range = range_of(manifest, chunk.index);
        // What is all hole is not looked at: most of it is, when little has come.
        let is_here = run::intersect(&data, &range).next().is_some()
            && match view.chunk(chunk.index)? {
                Content::Data(bytes) => Digest::of(bytes) == chunk.digest,
                Content::Zero { .. } => false,
            };
        present.chunks.push(is_here);
        if !is_here {
            present.missing += 1;
            present.missing_bytes += range.end - range.start;
        }
    }
    Ok(present)
}

/// Makes a range a hole, or only zero where there are no holes.
fn make_hole(memory: &File, image: &Image<'_>, range: Range<u64>) -> io::Result<()> {
    match extent::punch_hole(memory, range.start, range.end - range.start) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
        done => return done,
    }
    let mut at = range.start;
    while at < range.end && !image.is_zero(&(at..range.end))? {
        let bytes = (range.end - at).min(ZEROS.len() as u64);
        memory.write_all_at(&ZEROS[..usize::try_from(bytes).unwrap_or(0)], at)?;
        at += bytes;
    }
    Ok(())
}

/// Writes what a chunk holds; pages of zeros become holes, as they are where the bundle was made. No page is ever something
/// that neither was there nor is to be: of a chunk that was damaged, guests may have the others mapped.
fn write_with_holes(memory: &File, bytes: &[u8], range: &Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    for pages in bytes.as_chunks::<PAGE>().0.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let content = pages.as_flattened();
        let hole = pages.first().is_some_and(is_zero);
        if !hole || extent::punch_hole(memory, at, content.len() as u64).is_err() {
            memory.write_all_at(content, at)?;
        }
        at += content.len() as u64;
    }
    Ok(())
}

/// A page in bytes; chunks hold whole ones.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

fn is_zero(page: &[u8; PAGE]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// What is written where there can be no hole.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where a chunk lies.
pub(in crate::bundle) fn range_of(manifest: &Manifest, index: u64) -> Range<u64> {
    let memory_bytes = manifest.machine.memory_bytes;
    let range = Run { first: index, count: 1 }.bytes(manifest.memory.chunk_bytes.into());
    range.start.min(memory_bytes)..range.end.min(memory_bytes)
}

/// A chunk's number in a list that goes beyond no memory: 1 TiB in chunks of 64 KiB are 2^24.
fn number(index: u64) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl Partial {
    /// Its id.
    pub const fn id(&self) -> &BundleId {
        &self.id
    }

    /// What it says of itself.
    pub const fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Where its rest comes from; empty when that is not known.
    pub fn from(&self) -> &str {
        &self.from
    }

    /// Who stands for it.
    pub fn signed(&self) -> Result<Signed, SignError> {
        let Beside { made_here, signatures } = self.store.beside(&self.id)?;
        Ok(Signed { manifest_digest: self.manifest_digest, made_here, signatures })
    }

    /// How many chunks its memory has, those of zeros as well.
    pub fn chunks(&self) -> u32 {
        number(self.manifest.chunk_count())
    }

    /// Whether a chunk is here. One of zeros always is; one beyond the end never is.
    pub fn is_present(&self, chunk: u32) -> bool {
        match self.place(chunk) {
            Some(place) => self.present().is_here(place),
            None => chunk < self.chunks(),
        }
    }

    /// The chunks that are here, those of zeros as well.
    pub fn present_runs(&self) -> Vec<Run> {
        let present = self.present();
        let missing = self.manifest.memory.chunks.iter().zip(&present.chunks).filter(|(_, is_here)| !**is_here);
        let (mut runs, mut next) = (Vec::new(), 0);
        let mut add = |first: u64, end: u64| {
            if end > first {
                runs.push(Run { first, count: end - first });
            }
        };
        for (chunk, _) in missing {
            add(next, chunk.index);
            next = chunk.index + 1;
        }
        add(next, self.manifest.chunk_count());
        runs
    }

    /// The chunks that are not here.
    pub fn missing_runs(&self) -> Vec<Run> {
        let present = self.present();
        let mut runs = Vec::new();
        for (chunk, is_here) in self.manifest.memory.chunks.iter().zip(&present.chunks) {
            if !is_here {
                run::push(&mut runs, chunk.index);
            }
        }
        runs
    }

    /// How many chunks are not here.
    pub fn missing(&self) -> u32 {
        self.present().missing
    }

    /// How many bytes of chunks with content are here, and how many there are.
    pub fn progress(&self) -> Progress {
        let chunks = self.manifest.memory.chunks.iter();
        let total_bytes =
            chunks.map(|chunk| range_of(&self.manifest, chunk.index)).map(|range| range.end - range.start);
        let total_bytes = total_bytes.sum::<u64>();
        Progress { done_bytes: total_bytes - self.present().missing_bytes, total_bytes }
    }

    /// Where a chunk's content lies in memory; `None` for one of zeros, or beyond the end.
    pub fn chunk_range(&self, chunk: u32) -> Option<Range<u64>> {
        self.place(chunk).map(|_| range_of(&self.manifest, chunk.into()))
    }

    /// Keeps a chunk, if these bytes are it. It is durable when the bundle is a whole one; until then a crash may cost it.
    pub fn install(&self, chunk: u32, bytes: &[u8]) -> Result<Installed, InstallError> {
        let bundle = || self.id.clone();
        let Some((place, range)) = self.place(chunk).zip(self.chunk_range(chunk)) else {
            return Err(InstallError::NoContent { bundle: bundle(), chunk });
        };
        let wanted = range.end - range.start;
        if bytes.len() as u64 != wanted {
            return Err(InstallError::Length { bundle: bundle(), chunk, found: bytes.len(), wanted });
        }
        // A chunk of zeros is in the other list. A manifest that says otherwise is nobody's of this program.
        let is_it = self.manifest.memory.chunks.get(place).is_some_and(|chunk| chunk.digest == Digest::of(bytes));
        if !is_it || bytes.iter().all(|byte| *byte == 0) {
            return Err(InstallError::Digest { bundle: bundle(), chunk });
        }
        if self.present().is_here(place) {
            return Ok(Installed::Already);
        }
        let _writing = self.writing();
        if self.present().is_here(place) {
            return Ok(Installed::Already);
        }
        if let Err(source) = write_with_holes(&self.memory, bytes, &range) {
            // Half of it is of no use, and takes space that may be short. It does not count as here in any case.
            let _ = extent::punch_hole(&self.memory, range.start, wanted);
            return Err(if is_no_space(&source) {
                InstallError::NoSpace { bundle: bundle(), chunk }
            } else {
                InstallError::File { bundle: bundle(), chunk, source }
            });
        }
        self.present().set(place, true, wanted);
        Ok(Installed::New)
    }

    /// The files for a VMM. Its memory is as it is: what of it is not here reads as zero, or as something else that is not
    /// it. Whoever maps it looks at [`Partial::is_present`] before anybody reads.
    pub fn launch_files(&self) -> Result<LaunchFiles, PartialError> {
        let failed =
            |name: &str, source| PartialError::file(&self.id, self.store.places().partial(&self.id).join(name), source);
        let manifest = Arc::clone(&self.manifest);
        // By what is open, so that it is the same files whatever became of their names.
        let state = file::reopen_to_read(&self.state).map_err(|source| failed(STATE, source))?;
        let memory = file::reopen_to_read(&self.memory).map_err(|source| failed(MEMORY, source))?;
        Ok(LaunchFiles { manifest, state, memory })
    }

    /// A chunk turned out not to be what it has to be: it comes again.
    pub(super) fn forget(&self, chunk: u32) {
        if let Some((place, range)) = self.place(chunk).zip(self.chunk_range(chunk)) {
            self.present().set(place, false, range.end - range.start);
        }
    }

    /// Held while a chunk is written.
    pub(super) fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk's place among those with content.
    fn place(&self, chunk: u32) -> Option<usize> {
        self.manifest.memory.chunks.binary_search_by_key(&u64::from(chunk), |chunk| chunk.index).ok()
    }

    pub(super) fn read_state(&self) -> Result<Vec<u8>, ReadBundleError> {
        self.store.partial_state(&self.id, &self.manifest)
    }
}

impl Present {
    fn is_here(&self, place: usize) -> bool {
        self.chunks.get(place).copied().unwrap_or(false)
    }

    fn set(&mut self, place: usize, is_here: bool, bytes: u64) {
        let Some(before) = self.chunks.get_mut(place) else { return };
        if std::mem::replace(before, is_here) == is_here {
            return;
        }
        if is_here {
            self.missing = self.missing.saturating_sub(1);
            self.missing_bytes = self.missing_bytes.saturating_sub(bytes);
        } else {
            self.missing += 1;
            self.missing_bytes += bytes;
        }
    }
}
