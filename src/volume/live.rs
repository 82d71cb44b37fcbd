//! A volume that is open: read and written by any number of threads.
//!
//! Who waits for whom:
//!
//! - Every read and every change holds the state's lock shared; what exchanges the map (a snapshot, a new size, a map
//!   that has become long) holds it alone.
//! - The first touch of a chunk in a generation holds the lock of its stripe as well. Later ones need none: a chunk that
//!   is in the top stays there for as long as the map is not exchanged.
//! - A flush holds no lock while it waits for the disk.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::about::{Origin, VolumeAbout};
use super::chunk::range_in;
use super::error::{Damage, VolumeError};
use super::layer::Layer;
use super::log::Log;
use super::store::Parts;
use super::view::{StatusRun, View};
use crate::ids::VolumeId;

mod exchange;
mod flush;
mod touch;

use flush::Flushes;

pub(super) use exchange::{Frozen, MAP, MAP_NEW, write_image};

/// Locks for the first touch of chunks.
const STRIPES: usize = 64;

/// A volume, open for as long as its store is.
#[derive(Debug)]
pub struct Volume {
    id: VolumeId,
    subject: String,
    directory: PathBuf,
    parts: Arc<Parts>,
    about: Mutex<VolumeAbout>,
    state: RwLock<State>,
    stripes: [Mutex<()>; STRIPES],
    flushes: Flushes,
    trouble: Trouble,
    /// Chunks that are not in the top though something may lie there for them: a write failed half-way.
    stale: Mutex<BTreeSet<u32>>,
    /// Bytes of records after which the map is written anew.
    compact_after: AtomicU64,
}

/// What a volume is made of, exchanged as a whole.
#[derive(Debug)]
pub(super) struct State {
    pub(super) view: View,
    pub(super) generation: u32,
    pub(super) incomplete_to: u32,
    /// `None` for one that was damaged when it was opened.
    pub(super) live: Option<Live>,
}

/// What is written to.
#[derive(Debug, Clone)]
pub(super) struct Live {
    /// The number of the top in the map.
    pub(super) number: u16,
    pub(super) top: Arc<Layer>,
    pub(super) log: Arc<Log>,
}

/// What is wrong with a volume. Once something is, it is read only.
#[derive(Debug, Default)]
struct Trouble {
    is_any: AtomicBool,
    found: Mutex<Vec<Damage>>,
}

/// What can be said of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes on the disk that are its own: its top and its map. Layers below may be shared.
    pub allocated_bytes: u64,
    /// How many layers its chunks lie in, with its own.
    pub layers: usize,
    /// The generation of what is written now.
    pub generation: u32,
    /// Why it is not written to; empty when it is.
    pub damage: Vec<Damage>,
    /// When it was made, in ms since the Unix epoch.
    pub created_ms: u64,
    /// What it was made of.
    pub parent: Option<Origin>,
}

/// What was changed after a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Chunks of [`CHUNK_BYTES`](super::CHUNK_BYTES), ascending and apart.
    pub chunks: Vec<Range<u32>>,
    /// Whether these are all of them. After a loss of power nobody knows: all has to be compared.
    pub complete: bool,
    /// The generation of what is written now.
    pub generation: u32,
}

impl Volume {
    pub(super) fn new(parts: &Arc<Parts>, about: VolumeAbout, state: State, damage: Vec<Damage>) -> Self {
        let id = about.id.clone();
        let trouble = Trouble { is_any: AtomicBool::new(!damage.is_empty()), found: Mutex::new(damage) };
        Self {
            subject: id.to_string(),
            directory: PathBuf::from(id.as_str()),
            id,
            parts: Arc::clone(parts),
            about: Mutex::new(about),
            state: RwLock::new(state),
            stripes: [const { Mutex::new(()) }; STRIPES],
            flushes: Flushes::default(),
            trouble,
            stale: Mutex::default(),
            compact_after: AtomicU64::new(parts.compact_bytes),
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_alone(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn about(&self) -> MutexGuard<'_, VolumeAbout> {
        self.about.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its id.
    pub const fn id(&self) -> &VolumeId {
        &self.id
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.about().name.clone()
    }

    /// Its size in bytes. It only grows.
    pub fn size_bytes(&self) -> u64 {
        self.state().view.size_bytes
    }

    /// Why it is not written to; empty when it is.
    pub fn damage(&self) -> Vec<Damage> {
        self.trouble.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on nothing is written: it is not known what of it would be there after a crash.
    fn distrust(&self, file: PathBuf, what: String) {
        let mut found = self.trouble.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.push(Damage { file: file.display().to_string(), offset: 0, what });
        self.trouble.is_any.store(true, Ordering::Release);
        // Nor is it known which layers the map on the disk speaks of.
        self.parts.unknown.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether it is written to.
    fn check_writable(&self) -> Result<(), VolumeError> {
        if !self.trouble.is_any.load(Ordering::Acquire) {
            return Ok(());
        }
        let damage = self.damage().into_iter().next();
        let damage = damage.unwrap_or_else(|| Damage { file: String::new(), offset: 0, what: String::new() });
        Err(VolumeError::ReadOnly { subject: self.subject.clone(), damage })
    }

    /// The state's part that is written.
    fn live<'a>(&self, state: &'a State) -> Result<&'a Live, VolumeError> {
        self.check_writable()?;
        state.live.as_ref().ok_or_else(|| state.view.lost(0))
    }

    /// Reads as many bytes as the buffer has.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let state = self.state();
        range_in(&self.subject, offset, buffer.len() as u64, state.view.size_bytes)?;
        state.view.read(buffer, offset)
    }

    /// Which parts of a range are data, at most `runs_max` from its start on: fewer bytes than were asked for may be
    /// answered for.
    pub fn status(&self, offset: u64, length: u64, runs_max: usize) -> Result<Vec<StatusRun>, VolumeError> {
        let state = self.state();
        let range = range_in(&self.subject, offset, length, state.view.size_bytes)?;
        state.view.status(&range, runs_max)
    }

    /// What was written after a generation.
    pub fn changed_since(&self, generation: u32) -> Changed {
        let state = self.state();
        Changed {
            chunks: state.view.map.touched_after(generation),
            complete: generation >= state.incomplete_to && !self.trouble.is_any.load(Ordering::Acquire),
            generation: state.generation,
        }
    }

    /// What can be said of it.
    pub fn info(&self) -> Result<Info, VolumeError> {
        let state = self.state();
        let allocated_bytes = match &state.live {
            Some(Live { top, log, .. }) => top
                .file
                .allocated_bytes()
                .and_then(|bytes| Ok(bytes + log.allocated_bytes()?))
                .map_err(|error| state.view.io("look at", top, error))?,
            None => 0,
        };
        let about = self.about();
        Ok(Info {
            id: self.id.clone(),
            name: about.name.clone(),
            size_bytes: state.view.size_bytes,
            allocated_bytes,
            layers: state.view.slots.iter().filter(|slot| slot.layer.is_some()).count(),
            generation: state.generation,
            damage: self.damage(),
            created_ms: about.created_ms,
            parent: about.parent.clone(),
        })
    }

    /// Digest (blake3) of all its bytes. What is written meanwhile is in it or not.
    pub fn digest(&self, on_progress: super::OnProgress<'_>) -> Result<[u8; 32], VolumeError> {
        let status = |offset, length| self.status(offset, length, 1);
        super::digest::digest(self.size_bytes(), status, |buffer, offset| self.read_at(buffer, offset), on_progress)
    }
}
