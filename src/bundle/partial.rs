//! Bundles of which only a part is here, in `.partial/<id>/`: manifest and state are whole, of the memory some chunks are
//! there, and `source.json` says where the others come from. A name that begins with a dot is no bundle, so nobody launches
//! or lists one by mistake.
//!
//! Which chunks are there is nowhere written: a chunk is there if it is what the manifest's digest was made of. So nothing
//! can say that a chunk is there which is not, and a crash at any moment costs at most the chunks that were on their way.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::commit::CommitError;
use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::manifest::{self, Manifest, ReadManifestError};
use super::places::{MANIFEST, MEMORY, Places, SOURCE, STATE};
use super::remove::remove_file;
use super::signatures::{Beside, BundleSignature, SIGNATURES_MAX, SignError};
use super::stage::is_no_space;
use super::store::{FindError, Store, StoreError, found};
use super::verify::check_state;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

mod install;
mod publish;

pub(super) use install::range_of;
pub use install::{InstallError, Installed, Partial};

/// Version of `source.json`.
const SOURCE_FORMAT: u32 = 1;

/// Longest description of a source in bytes.
pub const FROM_BYTES_MAX: usize = 4096;

/// Longest `source.json`: each byte of the description may be written as six.
const SOURCE_BYTES_MAX: u64 = 32 << 10;

/// `source.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    format: u32,
    from: String,
}

/// Why something was not done with a bundle of which a part is here.
#[derive(Debug, thiserror::Error)]
pub enum PartialError {
    /// There is no part of it.
    #[error("of bundle {bundle} no part is here")]
    Unknown {
        /// The id.
        bundle: BundleId,
    },
    /// All of it is here.
    #[error("bundle {bundle} is here, all of it")]
    Whole {
        /// The id.
        bundle: BundleId,
    },
    /// It builds on another bundle.
    #[error(
        "bundle {bundle} builds on {parent}, and only bundles that build on no other are fetched in parts: compact it first"
    )]
    Diff {
        /// The id.
        bundle: BundleId,
        /// What it builds on.
        parent: BundleId,
    },
    /// Its manifest cannot be read by this program.
    #[error("the manifest of bundle {bundle}")]
    Manifest {
        /// The id.
        bundle: BundleId,
        /// Why not.
        #[source]
        source: ReadManifestError,
    },
    /// It is not what its id or its manifest says.
    #[error("bundle {bundle} is not what it has to be")]
    Damaged {
        /// The id.
        bundle: BundleId,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// A signature is none.
    #[error("a signature of bundle {bundle} is not one of its key")]
    Signature {
        /// The id.
        bundle: BundleId,
    },
    /// What describes its source is too long.
    #[error("the source of bundle {bundle} has {bytes} bytes, {FROM_BYTES_MAX} are possible")]
    From {
        /// The id.
        bundle: BundleId,
        /// How many it has.
        bytes: usize,
    },
    /// Its signatures cannot be kept or read.
    #[error(transparent)]
    Signatures(#[from] SignError),
    /// It cannot become a whole one yet.
    #[error("of bundle {bundle} {chunks} chunks of memory are not here")]
    Missing {
        /// The id.
        bundle: BundleId,
        /// How many.
        chunks: u32,
    },
    /// It could not be made a whole one.
    #[error("bundle {bundle} is here, and did not become a bundle")]
    Commit {
        /// The id.
        bundle: BundleId,
        /// Why not.
        #[source]
        source: Box<CommitError>,
    },
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk is full.
    #[error("bundle {bundle}: no space left for {}", path.display())]
    NoSpace {
        /// The id.
        bundle: BundleId,
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("bundle {bundle}: {}", path.display())]
    File {
        /// The id.
        bundle: BundleId,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl PartialError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unknown { .. } | Self::Whole { .. } | Self::Diff { .. } | Self::From { .. } => Retry::WithChange,
            // Another source may have the right one.
            Self::Damaged { .. } | Self::Signature { .. } => Retry::WithChange,
            Self::Manifest { .. } => Retry::Never,
            Self::Signatures(error) => error.retry(),
            Self::Commit { source, .. } => source.retry(),
            Self::Store(error) => error.retry(),
            Self::Missing { .. } | Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }

    fn file(bundle: &BundleId, path: PathBuf, source: io::Error) -> Self {
        let bundle = bundle.clone();
        if is_no_space(&source) { Self::NoSpace { bundle, path } } else { Self::File { bundle, path, source } }
    }
}

impl From<ReadBundleError> for PartialError {
    fn from(error: ReadBundleError) -> Self {
        match error {
            ReadBundleError::Unknown { bundle } => Self::Unknown { bundle },
            ReadBundleError::Damaged { bundle, damage } => Self::Damaged { bundle, damage },
            ReadBundleError::File { bundle, path, source } => Self::File { bundle, path, source },
        }
    }
}

/// Checks a manifest by its id: that of a bundle which can be here in part.
pub(super) fn checked(id: &BundleId, bytes: &[u8]) -> Result<Manifest, PartialError> {
    let found = manifest::id_of(bytes);
    if found != *id {
        return Err(PartialError::Damaged { bundle: id.clone(), damage: Damage::Id { found } });
    }
    let manifest = manifest::read(bytes).map_err(|source| PartialError::Manifest { bundle: id.clone(), source })?;
    match &manifest.parent {
        None => Ok(manifest),
        Some(parent) => Err(PartialError::Diff { bundle: id.clone(), parent: parent.bundle.clone() }),
    }
}

impl Store {
    /// Has a partial bundle, of whose memory nothing has to be here, and whose rest comes from `from`. One that is here
    /// already keeps what it has, gets the signatures, and goes on from `from`.
    pub fn begin_partial(
        &self,
        id: &BundleId,
        manifest: &[u8],
        state: &[u8],
        signatures: Vec<BundleSignature>,
        from: &str,
    ) -> Result<(), PartialError> {
        let checked = checked(id, manifest)?;
        let damaged = |damage| PartialError::Damaged { bundle: id.clone(), damage };
        check_state(state, &checked).map_err(damaged)?;
        let digest = Digest::of(manifest);
        if signatures.len() > SIGNATURES_MAX || !signatures.iter().all(|one| one.is_of(&digest)) {
            return Err(PartialError::Signature { bundle: id.clone() });
        }
        if from.len() > FROM_BYTES_MAX {
            return Err(PartialError::From { bundle: id.clone(), bytes: from.len() });
        }
        // Two that begin the same one do that in turn.
        let lock = self.memory_lock(id);
        let _busy = lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.places().bundle(id).is_dir() {
            return Err(PartialError::Whole { bundle: id.clone() });
        }
        let (place, new) = (self.places().partial(id), self.places().partial_new(id));
        let files = Files { bundle: id, manifest, state, from, memory_bytes: checked.machine.memory_bytes };
        if place.is_dir() {
            files.write(&place)?;
            let _changes = self.lock_changes();
            return Ok(self.add_beside(id, Beside { made_here: false, signatures })?);
        }
        let failed = |path: &Path, source| PartialError::file(id, path.to_owned(), source);
        // The store's disk may have been mounted since it was opened.
        file::make_directories(&self.places().partials())
            .map_err(|source| failed(&self.places().partials(), source))?;
        let begun = file::remove_tree(&new)
            .and_then(|()| std::fs::create_dir(&new))
            .map_err(|source| failed(&new, source))
            .and_then(|()| files.write(&new))
            .and_then(|()| {
                let _changes = self.lock_changes();
                // Before it: whoever sees it sees who signed it. What stays of a crash here is swept.
                self.add_beside(id, Beside { made_here: false, signatures })?;
                std::fs::rename(&new, &place)
                    .and_then(|()| file::sync_parent(&place))
                    .map_err(|source| failed(&place, source))
            });
        if begun.is_err() {
            // The first error is the one to tell; the next try, or the next sweep, tries again.
            let _ = file::remove_tree(&new);
        }
        begun
    }

    /// The bundles of which a part is here, by id.
    pub fn partials(&self) -> Result<Vec<BundleId>, StoreError> {
        let directory = self.places().partials();
        match Places::names(&directory) {
            Ok(names) => Ok(names.into_iter().filter_map(|name| name.parse().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(StoreError { path: directory, source }),
        }
    }

    /// The bundle of which a part is here that a word means: an id, the start of one, or a name. `None`: there is no such
    /// one.
    pub fn find_partial(&self, word: &str) -> Result<Option<BundleId>, FindError> {
        let named =
            |id: &BundleId| self.partial_manifest(id).is_ok_and(|(manifest, _)| manifest.name.as_deref() == Some(word));
        match found(word, &self.partials()?, named) {
            Ok(id) => Ok(Some(id)),
            Err(FindError::Unknown { .. }) => Ok(None),
            Err(error @ (FindError::Ambiguous { .. } | FindError::Store(_))) => Err(error),
        }
    }

    /// The manifest of a bundle of which a part is here, and the digest of its bytes.
    pub(super) fn partial_manifest(&self, id: &BundleId) -> Result<(Manifest, Digest), ReadBundleError> {
        let mut file = Places::open_in(&self.places().partial(id), id, MANIFEST)?;
        self.read_manifest(id, &mut file)
    }

    /// The saved state of a bundle of which a part is here, verified.
    pub(super) fn partial_state(&self, id: &BundleId, manifest: &Manifest) -> Result<Vec<u8>, ReadBundleError> {
        let file = Places::open_in(&self.places().partial(id), id, STATE)?;
        let mut bytes = Vec::new();
        // One more, so that what is too long differs.
        let read = file.take(manifest.state.bytes.saturating_add(1)).read_to_end(&mut bytes);
        let path = self.places().partial(id).join(STATE);
        read.map_err(|source| ReadBundleError::File { bundle: id.clone(), path, source })?;
        match check_state(&bytes, manifest) {
            Ok(_) => Ok(bytes),
            Err(damage) => Err(ReadBundleError::Damaged { bundle: id.clone(), damage }),
        }
    }

    /// Removes the part of a bundle that is here. Whether VMs run from it is for the caller to know: they keep what they
    /// have, and get no more.
    pub fn remove_partial(&self, id: &BundleId) -> Result<(), PartialError> {
        let (place, removing) = (self.places().partial(id), self.places().partial_removing(id));
        let failed = |path: &Path, source| PartialError::file(id, path.to_owned(), source);
        {
            let _changes = self.lock_changes();
            if !place.is_dir() {
                return Err(PartialError::Unknown { bundle: id.clone() });
            }
            // Left by a removal that failed half-way, of one that was begun again since.
            file::remove_tree(&removing).map_err(|source| failed(&removing, source))?;
            std::fs::rename(&place, &removing)
                .and_then(|()| file::sync_parent(&removing))
                .map_err(|source| failed(&place, source))?;
            for path in self.beside_paths(id) {
                remove_file(&path).map_err(|source| failed(&path, source))?;
            }
        }
        if !self.places().has_any_of(id) {
            // What is left of it is swept.
            let _ = self.forget_working_set(id);
        }
        file::remove_tree(&removing).map_err(|source| failed(&removing, source))
    }
}

/// What a partial bundle begins with.
struct Files<'a> {
    bundle: &'a BundleId,
    manifest: &'a [u8],
    state: &'a [u8],
    from: &'a str,
    memory_bytes: u64,
}

impl Files<'_> {
    /// Has them in a directory, durable. A memory image that is there stays as it is.
    fn write(&self, directory: &Path) -> Result<(), PartialError> {
        let source = Source { format: SOURCE_FORMAT, from: self.from.to_owned() };
        let failed = |name: &str| {
            let path = directory.join(name);
            move |source| PartialError::file(self.bundle, path, source)
        };
        let source = serde_json::to_vec(&source).map_err(io::Error::from).map_err(failed(SOURCE))?;
        for (name, bytes) in [(STATE, self.state), (MANIFEST, self.manifest)] {
            write_read_only(&directory.join(name), bytes).map_err(failed(name))?;
        }
        let memory = directory.join(MEMORY);
        let made = match file::open_regular(&memory) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => file::create(&memory).and_then(|file| {
                file.set_len(self.memory_bytes)?;
                file.sync_all()
            }),
            Err(error) => Err(error),
        };
        made.map_err(failed(MEMORY))?;
        file::replace(&directory.join(SOURCE), &source).map_err(failed(SOURCE))
    }
}

/// Has a file of these bytes that nobody is to change. One that is there is left alone if it has them.
fn write_read_only(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Ok(Some(file)) = file::open_regular(path)
        && holds(&file, bytes)?
    {
        return file::make_read_only(&file);
    }
    file::replace(path, bytes)?;
    file::make_read_only(&File::open(path)?)
}

fn holds(file: &File, bytes: &[u8]) -> io::Result<bool> {
    let mut found = Vec::new();
    file.take(bytes.len() as u64 + 1).read_to_end(&mut found)?;
    Ok(found == bytes)
}

/// Where the rest of the bundle in this directory comes from; empty when that is not known: it is told last and removed
/// first.
fn source_in(directory: &Path) -> String {
    let Ok(Some(file)) = file::open_regular(&directory.join(SOURCE)) else { return String::new() };
    let mut bytes = Vec::new();
    if file.take(SOURCE_BYTES_MAX).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    match serde_json::from_slice(&bytes) {
        Ok(Source { format: SOURCE_FORMAT, from }) if from.len() <= FROM_BYTES_MAX => from,
        Ok(_) | Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests;
