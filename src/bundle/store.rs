//! The bundles of a host: one directory each below a root. Committed ones are never changed, so what was read of one is
//! kept in memory under the file's stamp.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::manifest::{self, MANIFEST_BYTES_MAX, Manifest};
use super::places::{MANIFEST, Places, REMOVING, STAGING};
use super::stamp::Stamp;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

/// The bundles below one directory. Clones are the same store. All calls block on the disk.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    places: Places,
    /// What this process read and verified. Held for look-ups only, never while reading a disk.
    known: Mutex<BTreeMap<BundleId, Known>>,
    /// One lock per bundle whose memory is being verified or composed, so that two launches at once do that once.
    busy: Mutex<BTreeMap<BundleId, Arc<Mutex<()>>>>,
    /// Held by whoever adds or removes a bundle: a parent stays while its child comes.
    changes: Mutex<()>,
    /// How often each bundle is being exported.
    exported: Mutex<BTreeMap<BundleId, usize>>,
}

/// What is known of a bundle.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) manifest: Arc<Manifest>,
    /// Digest of the bytes of `manifest.json`, of which the id is the start.
    pub(super) manifest_digest: Digest,
    pub(super) manifest_stamp: Stamp,
    /// `state.bin` as it was verified.
    pub(super) state: Option<Stamp>,
    /// `memory.img` as it was verified, and in a diff the image composed of it.
    pub(super) memory: Option<(Stamp, Option<Stamp>)>,
}

/// A committed bundle in a list.
#[derive(Debug)]
pub struct Listed {
    /// Its id.
    pub id: BundleId,
    /// Its manifest, or why there is none.
    pub manifest: Result<Arc<Manifest>, ReadBundleError>,
}

/// What a sweep did.
#[derive(Debug, Default)]
pub struct Swept {
    /// Directories that were removed.
    pub removed: Vec<PathBuf>,
    /// Those that could not be.
    pub failed: Vec<(PathBuf, io::Error)>,
}

/// Why a store cannot be used or listed.
#[derive(Debug, thiserror::Error)]
#[error("bundles in {}", path.display())]
pub struct StoreError {
    /// The directory.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

impl StoreError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        Retry::Later
    }
}

/// Why a word does not lead to one bundle.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// It leads to none.
    #[error("no bundle has the name or id {word:?}")]
    Unknown {
        /// The word.
        word: String,
    },
    /// It leads to several.
    #[error("{word:?} may be any of {}", candidates.iter().map(BundleId::as_str).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// The word.
        word: String,
        /// Those it may be.
        candidates: Vec<BundleId>,
    },
    /// The bundles could not be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FindError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unknown { .. } | Self::Ambiguous { .. } => Retry::WithChange,
            Self::Store(error) => error.retry(),
        }
    }
}

impl Store {
    /// The bundles below `root`; makes what directories are missing.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let places = Places { root: root.to_owned() };
        let directories =
            [places.fetched(), places.flat_images(), places.partials(), places.signatures(), places.working_sets()];
        for directory in directories {
            file::make_directories(&directory).map_err(|source| StoreError { path: root.to_owned(), source })?;
        }
        let shared = Shared {
            places,
            known: Mutex::default(),
            busy: Mutex::default(),
            changes: Mutex::default(),
            exported: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Removes what crashes left: staging directories but those of `kept` tokens, bundles whose removal had begun,
    /// images that were being composed, what of partial bundles is not one, and what is known of bundles that are not there.
    /// For the start, before anybody stages.
    pub fn sweep(&self, kept: &[&str]) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
        let mut remove = |path: PathBuf, removed: io::Result<()>| match removed {
            Ok(()) => swept.removed.push(path),
            Err(error) => swept.failed.push((path, error)),
        };
        for name in self.names(&self.places().root)? {
            let staging = name.strip_prefix(STAGING).is_some_and(|token| !kept.contains(&token));
            if staging || name.starts_with(REMOVING) {
                let path = self.places().root.join(name);
                let removed = file::remove_tree(&path);
                remove(path, removed);
            }
        }
        for name in self.names(&self.places().partials())? {
            if name.parse::<BundleId>().is_err() {
                let path = self.places().partials().join(name);
                let removed = file::remove_tree(&path);
                remove(path, removed);
            }
        }
        let derived = [
            (self.places().flat_images(), ".img"),
            (self.places().signatures(), ".json"),
            (self.places().working_sets(), ".json"),
            (self.places().fetched(), ".json"),
        ];
        for (directory, suffix) in derived {
            for name in self.names(&directory)? {
                let bundle = name.strip_suffix(suffix).and_then(|id| id.parse().ok());
                if !bundle.is_some_and(|id| self.places().has_any_of(&id)) {
                    let path = directory.join(name);
                    let removed = std::fs::remove_file(&path);
                    remove(path, removed);
                }
            }
        }
        Ok(swept)
    }

    /// The committed bundles, by id.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let listed = self.ids()?.into_iter().map(|id| Listed { manifest: self.manifest(&id), id });
        // Removed since the names were read: not there.
        Ok(listed.filter(|listed| !matches!(listed.manifest, Err(ReadBundleError::Unknown { .. }))).collect())
    }

    /// The bundle a word means: an id, the start of one id, or a name.
    pub fn find(&self, word: &str) -> Result<BundleId, FindError> {
        let named = |id: &BundleId| self.manifest(id).is_ok_and(|manifest| manifest.name.as_deref() == Some(word));
        found(word, &self.ids()?, named)
    }

    /// A bundle's manifest. It was read, checked and found to be the one the id was made of.
    pub fn manifest(&self, id: &BundleId) -> Result<Arc<Manifest>, ReadBundleError> {
        Ok(self.manifest_and_digest(id)?.0)
    }

    /// The same, and the digest of the file's bytes.
    pub(super) fn manifest_and_digest(&self, id: &BundleId) -> Result<(Arc<Manifest>, Digest), ReadBundleError> {
        let mut file = self.places().open(id, MANIFEST)?;
        let stamp = self.stamp(id, &file, MANIFEST)?;
        if let Some(known) = self.known(id).filter(|known| known.manifest_stamp == stamp) {
            return Ok((known.manifest, known.manifest_digest));
        }
        let (manifest, manifest_digest) = self.read_manifest(id, &mut file)?;
        let manifest = Arc::new(manifest);
        let known =
            Known { manifest: manifest.clone(), manifest_digest, manifest_stamp: stamp, state: None, memory: None };
        self.lock_known().insert(id.clone(), known);
        Ok((manifest, manifest_digest))
    }

    /// The diffs that build on this bundle directly. A bundle that is damaged builds on nothing; one that could not be
    /// read might, which is an error.
    pub fn children(&self, id: &BundleId) -> Result<Vec<BundleId>, StoreError> {
        let mut children = Vec::new();
        for Listed { id: child, manifest } in self.list()? {
            match manifest {
                Ok(manifest) if manifest.parent.as_ref().is_some_and(|parent| parent.bundle == *id) => {
                    children.push(child);
                }
                Ok(_) | Err(ReadBundleError::Unknown { .. } | ReadBundleError::Damaged { .. }) => {}
                Err(ReadBundleError::File { path, source, .. }) => return Err(StoreError { path, source }),
            }
        }
        Ok(children)
    }

    fn ids(&self) -> Result<Vec<BundleId>, StoreError> {
        Ok(self.names(&self.places().root)?.into_iter().filter_map(|name| name.parse().ok()).collect())
    }

    pub(super) fn names(&self, directory: &Path) -> Result<Vec<String>, StoreError> {
        Places::names(directory).map_err(|source| StoreError { path: directory.to_owned(), source })
    }

    /// Reads a manifest of this id, and the digest of its bytes.
    pub(super) fn read_manifest(&self, id: &BundleId, file: &mut File) -> Result<(Manifest, Digest), ReadBundleError> {
        let bytes = self.manifest_bytes(id, file)?;
        let manifest = manifest::read(&bytes)
            .map_err(|error| ReadBundleError::Damaged { bundle: id.clone(), damage: Damage::Manifest(error) })?;
        Ok((manifest, Digest::of(&bytes)))
    }

    /// The bytes that the id was made of.
    pub(super) fn manifest_bytes(&self, id: &BundleId, file: &mut File) -> Result<Vec<u8>, ReadBundleError> {
        let mut bytes = Vec::new();
        file.take(MANIFEST_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| self.unread(id, MANIFEST, source))?;
        let found = manifest::id_of(&bytes);
        if found != *id {
            return Err(ReadBundleError::Damaged { bundle: id.clone(), damage: Damage::Id { found } });
        }
        Ok(bytes)
    }

    pub(super) fn stamp(&self, id: &BundleId, file: &File, name: &str) -> Result<Stamp, ReadBundleError> {
        Stamp::of(file).map_err(|source| self.unread(id, name, source))
    }

    pub(super) fn unread(&self, id: &BundleId, name: &str, source: io::Error) -> ReadBundleError {
        ReadBundleError::File { bundle: id.clone(), path: self.places().bundle(id).join(name), source }
    }

    pub(super) fn places(&self) -> &Places {
        &self.shared.places
    }

    pub(super) fn known(&self, id: &BundleId) -> Option<Known> {
        self.lock_known().get(id).cloned()
    }

    pub(super) fn lock_known(&self) -> MutexGuard<'_, BTreeMap<BundleId, Known>> {
        self.shared.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a bundle is added or removed.
    pub(super) fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.shared.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often each bundle is being exported. Taken after the lock of changes.
    pub(super) fn lock_exported(&self) -> MutexGuard<'_, BTreeMap<BundleId, usize>> {
        self.shared.exported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundles that others build on.
    pub(super) fn built_on(&self) -> Result<BTreeSet<BundleId>, StoreError> {
        let manifests = self.list()?.into_iter().filter_map(|listed| listed.manifest.ok());
        Ok(manifests.filter_map(|manifest| Some(manifest.parent.as_ref()?.bundle.clone())).collect())
    }

    /// The lock of one bundle's memory. A diff's is taken before its parent's, and chains do not turn.
    pub(super) fn memory_lock(&self, id: &BundleId) -> Arc<Mutex<()>> {
        let mut busy = self.shared.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, lock| Arc::strong_count(lock) > 1);
        busy.entry(id.clone()).or_default().clone()
    }
}

/// The one of these bundles that a word means; `named`: whether one has it for its name.
pub(super) fn found(word: &str, ids: &[BundleId], named: impl Fn(&BundleId) -> bool) -> Result<BundleId, FindError> {
    if let Some(id) = ids.iter().find(|id| id.as_str() == word) {
        return Ok(id.clone());
    }
    let starts = |id: &&BundleId| word.len() > BundleId::PREFIX.len() && id.as_str().starts_with(word);
    let mut candidates: Vec<BundleId> = ids.iter().filter(starts).cloned().collect();
    for id in ids.iter().filter(|id| named(id)) {
        if !candidates.contains(id) {
            candidates.push(id.clone());
        }
    }
    match candidates.as_slice() {
        [] => Err(FindError::Unknown { word: word.to_owned() }),
        [one] => Ok(one.clone()),
        [_, ..] => Err(FindError::Ambiguous { word: word.to_owned(), candidates }),
    }
}

#[cfg(test)]
mod tests;
