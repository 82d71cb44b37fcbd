//! Where things lie below a store's root, and how they are opened. What starts with a dot is no bundle.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::damage::{Damage, ReadBundleError};
use super::manifest::is_label;
use crate::ids::BundleId;
use crate::sys::file;

/// The manifest of a bundle. Written last.
pub(super) const MANIFEST: &str = "manifest.json";
/// Saved state of everything but memory.
pub(super) const STATE: &str = "state.bin";
/// Guest memory.
pub(super) const MEMORY: &str = "memory.img";
/// All files of a bundle.
pub(super) const FILES: [&str; 3] = [MANIFEST, STATE, MEMORY];

/// Start of a staging directory's name; the token follows.
pub(super) const STAGING: &str = ".staging-";
/// Start of the name of a bundle that is being removed; its id follows.
pub(super) const REMOVING: &str = ".removing-";
/// Directory of memory images composed of a chain of diffs.
const FLAT: &str = ".flat";
/// Directory of what is known of bundles and is no part of them: who signed them, and which were made here.
pub(super) const SIGNATURES: &str = ".signatures";

/// Directory of working sets.
const WORKING_SETS: &str = ".working-sets";

/// Directory of bundles of which a part is here.
const PARTIALS: &str = ".partial";

/// Directory of what is known of bundles that were fetched.
const FETCHED: &str = ".fetched";

/// Where the rest of a partial bundle comes from.
pub(super) const SOURCE: &str = "source.json";

/// The paths of a store.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) root: PathBuf,
}

impl Places {
    pub(super) fn bundle(&self, id: &BundleId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// A token is a label, so it leads nowhere else.
    pub(super) fn staging(&self, token: &str) -> Option<PathBuf> {
        is_label(token).then(|| self.root.join(format!("{STAGING}{token}")))
    }

    pub(super) fn removing(&self, id: &BundleId) -> PathBuf {
        self.root.join(format!("{REMOVING}{id}"))
    }

    pub(super) fn flat_images(&self) -> PathBuf {
        self.root.join(FLAT)
    }

    pub(super) fn flat_image(&self, id: &BundleId) -> PathBuf {
        self.flat_images().join(format!("{id}.img"))
    }

    /// A flat image that is being composed.
    pub(super) fn flat_image_new(&self, id: &BundleId) -> PathBuf {
        self.flat_images().join(format!(".{id}.new"))
    }

    pub(super) fn working_sets(&self) -> PathBuf {
        self.root.join(WORKING_SETS)
    }

    pub(super) fn working_set(&self, id: &BundleId) -> PathBuf {
        self.working_sets().join(format!("{id}.json"))
    }

    pub(super) fn signatures(&self) -> PathBuf {
        self.root.join(SIGNATURES)
    }

    pub(super) fn signatures_of(&self, id: &BundleId) -> PathBuf {
        self.signatures().join(format!("{id}.json"))
    }

    pub(super) fn partials(&self) -> PathBuf {
        self.root.join(PARTIALS)
    }

    pub(super) fn partial(&self, id: &BundleId) -> PathBuf {
        self.partials().join(id.as_str())
    }

    /// A partial bundle that is being made.
    pub(super) fn partial_new(&self, id: &BundleId) -> PathBuf {
        self.partials().join(format!(".new-{id}"))
    }

    /// A partial bundle that is being removed.
    pub(super) fn partial_removing(&self, id: &BundleId) -> PathBuf {
        self.partials().join(format!("{REMOVING}{id}"))
    }

    pub(super) fn fetched(&self) -> PathBuf {
        self.root.join(FETCHED)
    }

    pub(super) fn fetched_note(&self, id: &BundleId) -> PathBuf {
        self.fetched().join(format!("{id}.json"))
    }

    /// Whether there is a bundle of this id, or a part of one.
    pub(super) fn has_any_of(&self, id: &BundleId) -> bool {
        self.bundle(id).is_dir() || self.partial(id).is_dir()
    }

    /// Opens one of a bundle's files for reading.
    pub(super) fn open(&self, bundle: &BundleId, name: &'static str) -> Result<File, ReadBundleError> {
        Self::open_in(&self.bundle(bundle), bundle, name)
    }

    /// Opens one of the files of a bundle that lies in this directory.
    pub(super) fn open_in(directory: &Path, bundle: &BundleId, name: &'static str) -> Result<File, ReadBundleError> {
        let path = directory.join(name);
        let damaged = |damage| Err(ReadBundleError::Damaged { bundle: bundle.clone(), damage });
        match file::open_regular(&path) {
            Ok(Some(file)) => Ok(file),
            Ok(None) => damaged(Damage::NotRegular { file: name }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory.is_dir() => {
                damaged(Damage::Missing { file: name })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ReadBundleError::Unknown { bundle: bundle.clone() })
            }
            Err(source) => Err(ReadBundleError::File { bundle: bundle.clone(), path, source }),
        }
    }

    /// Names in a directory, sorted, as far as they are text.
    pub(super) fn names(directory: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}
