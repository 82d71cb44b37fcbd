//! A paused machine to files, and back: state as sections, memory as a sparse image.
//!
//! Nothing is made durable here: the guest stands still meanwhile, and who handed the files over sees to that later.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::clock::{Clock, Monotonic};
use crate::machine::image::{self, Pages, WriteImageError, Written};
use crate::machine::sealed::{self, SealError};
use crate::machine::{Machine, SaveError, SealKey};
use crate::saved::{Sections, codec};
use crate::units::Bytes;
use crate::wire::control::{SavePhases, SavedPages};

/// Files to seal into.
#[derive(Debug)]
pub(super) struct SealFiles {
    pagemap: File,
    file: File,
}

impl SealFiles {
    /// Gives each descriptor its name.
    pub(super) fn new(descriptors: Vec<OwnedFd>) -> Result<Self, SaveRequestError> {
        let found = descriptors.len();
        let mut rest = descriptors.into_iter().map(File::from);
        match (rest.next(), rest.next(), rest.next()) {
            (Some(pagemap), Some(file), None) => Ok(Self { pagemap, file }),
            (..) => Err(SaveRequestError { found, wanted: 2 }),
        }
    }
}

/// Most bytes of saved state that are read: a machine of 32 vCPUs and all devices has a tenth of this.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// Files to save into.
#[derive(Debug)]
pub(super) struct SaveFiles {
    pagemap: File,
    state: File,
    memory: File,
    /// Where the pages are listed, if they are asked for.
    list: Option<File>,
}

/// Files to save into what was left by a copy of memory.
#[derive(Debug)]
pub(super) struct RestFiles {
    /// For the state.
    pub(super) state: File,
    /// Where all pages are listed, if they are asked for.
    pub(super) list: Option<File>,
}

impl RestFiles {
    /// Gives each descriptor its name.
    pub(super) fn new(pages: SavedPages, descriptors: Vec<OwnedFd>) -> Result<Self, SaveRequestError> {
        let (found, wanted) = (descriptors.len(), 1 + usize::from(pages == SavedPages::Changed));
        let mut rest = descriptors.into_iter().map(File::from);
        match (rest.next(), rest.next(), found == wanted) {
            (Some(state), list, true) => Ok(Self { state, list }),
            (..) => Err(SaveRequestError { found, wanted }),
        }
    }
}

/// Another number of descriptors than a save takes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found} descriptors came with the request, it names {wanted}")]
pub(super) struct SaveRequestError {
    found: usize,
    wanted: usize,
}

impl SaveFiles {
    /// Gives each descriptor its name.
    pub(super) fn new(pages: SavedPages, descriptors: Vec<OwnedFd>) -> Result<Self, SaveRequestError> {
        let listed = pages == SavedPages::Changed;
        let (found, wanted) = (descriptors.len(), 3 + usize::from(listed));
        let mut rest = descriptors.into_iter().map(File::from);
        match (rest.next(), rest.next(), rest.next(), rest.next(), found == wanted) {
            (Some(pagemap), Some(state), Some(memory), list, true) => Ok(Self { pagemap, state, memory, list }),
            (..) => Err(SaveRequestError { found, wanted }),
        }
    }
}

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveMachineError {
    /// Its state could not be collected.
    #[error("collect the machine's state")]
    Collect(#[source] SaveError),
    /// Its state does not become bytes.
    #[error("encode the machine's state")]
    Encode(#[source] codec::CodecError),
    /// The state or the list of pages could not be written.
    #[error("write the {what}")]
    Write {
        /// Which.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Its memory could not be written.
    #[error(transparent)]
    Memory(#[from] WriteImageError),
    /// It could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// Writes a paused machine.
pub(super) fn save(
    machine: &Machine,
    pages: SavedPages,
    files: SaveFiles,
    clock: &dyn Clock,
) -> Result<SavePhases, SaveMachineError> {
    let failed = |what| move |source| SaveMachineError::Write { what, source };
    let SaveFiles { pagemap, mut state, memory, list } = files;
    let begun = clock.monotonic();
    let sections = machine.save().map_err(SaveMachineError::Collect)?;
    let bytes = codec::to_bytes(&sections).map_err(SaveMachineError::Encode)?;
    state.write_all(&bytes).map_err(failed("state"))?;
    let collected = clock.monotonic();
    let written = image::write(machine.ram(), pages_of(pages), &pagemap, &memory)?;
    if let Some(list) = list {
        list_pages(&written, list).map_err(failed("list of pages"))?;
    }
    Ok(phases([begun, collected, clock.monotonic()], &bytes, written.bytes))
}

/// Writes a paused machine to one encrypted file.
pub(super) fn seal(
    machine: &Machine,
    (pages, key): (SavedPages, SealKey),
    files: SealFiles,
    clock: &dyn Clock,
) -> Result<SavePhases, SaveMachineError> {
    let SealFiles { pagemap, file } = files;
    let begun = clock.monotonic();
    let sections = machine.save().map_err(SaveMachineError::Collect)?;
    let bytes = codec::to_bytes(&sections).map_err(SaveMachineError::Encode)?;
    let collected = clock.monotonic();
    let written = sealed::seal(key, &bytes, (machine.ram(), pages_of(pages)), &pagemap, &file)?;
    Ok(phases([begun, collected, clock.monotonic()], &bytes, written))
}

/// The pages that a request names.
pub(super) const fn pages_of(pages: SavedPages) -> Pages {
    match pages {
        SavedPages::All => Pages::All,
        SavedPages::Changed => Pages::Changed,
    }
}

fn phases([begun, collected, ended]: [Monotonic; 3], state: &[u8], memory: Bytes) -> SavePhases {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    SavePhases {
        state_bytes: state.len() as u64,
        memory_bytes: memory.0,
        state_ns: nanos(collected.since(begun)),
        memory_ns: nanos(ended.since(collected)),
    }
}

fn list_pages(written: &Written, list: File) -> io::Result<()> {
    let mut list = BufWriter::new(list);
    for run in &written.pages {
        list.write_all(&run.first.0.to_le_bytes())?;
        list.write_all(&run.count.0.to_le_bytes())?;
    }
    list.flush()
}

/// Why saved state could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadStateError {
    /// The file could not be read.
    #[error("read the saved state")]
    Read(#[source] io::Error),
    /// It is not saved state, or not whole.
    #[error("decode the saved state")]
    Decode(#[source] codec::CodecError),
}

/// The sections that bytes of saved state are.
pub(super) fn decode_state(bytes: &[u8]) -> Result<Sections, ReadStateError> {
    codec::from_bytes(bytes).map_err(ReadStateError::Decode)
}

/// Reads saved state; what lies behind [`STATE_BYTES_MAX`] is cut off, which its digest then tells.
pub(super) fn read_state(state: File) -> Result<Sections, ReadStateError> {
    let mut bytes = Vec::new();
    state.take(STATE_BYTES_MAX).read_to_end(&mut bytes).map_err(ReadStateError::Read)?;
    decode_state(&bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    #[test]
    fn descriptors_are_counted() {
        let files = |count: usize| (0..count).map(|_| OwnedFd::from(tempfile::tempfile().unwrap())).collect();
        assert!(SaveFiles::new(SavedPages::All, files(3)).unwrap().list.is_none());
        assert!(SaveFiles::new(SavedPages::Changed, files(4)).unwrap().list.is_some());
        for (pages, found, wanted) in [(SavedPages::All, 4, 3), (SavedPages::Changed, 3, 4), (SavedPages::All, 0, 3)] {
            assert_eq!(SaveFiles::new(pages, files(found)).unwrap_err(), SaveRequestError { found, wanted });
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(matches!(read_state(file.try_clone().unwrap()), Err(ReadStateError::Decode(_))));
        file.write_all(b"HEARTHST and something else").unwrap();
        file.rewind().unwrap();
        assert!(matches!(read_state(file), Err(ReadStateError::Decode(_))));
    }
}
