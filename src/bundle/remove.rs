//! Removing a bundle: out of sight first, by one rename, then from the disk.

use std::io;
use std::path::{Path, PathBuf};

use super::store::{Store, StoreError};
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

/// Why a bundle was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is none of this id.
    #[error("there is no bundle {bundle}")]
    Unknown {
        /// The id.
        bundle: BundleId,
    },
    /// Others build on it.
    #[error(
        "bundle {bundle} is built on by {}",
        children.iter().map(BundleId::as_str).collect::<Vec<_>>().join(", ")
    )]
    HasChildren {
        /// The id.
        bundle: BundleId,
        /// Those that do.
        children: Vec<BundleId>,
    },
    /// It is being written into a file.
    #[error("bundle {bundle} is being exported")]
    Exported {
        /// The id.
        bundle: BundleId,
    },
    /// It is not known whether others build on it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk did not answer. It is gone, and what is left of it is swept, or it is still there.
    #[error("remove bundle {bundle}: {}", path.display())]
    File {
        /// The id.
        bundle: BundleId,
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl RemoveError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unknown { .. } => Retry::Never,
            Self::HasChildren { .. } => Retry::WithChange,
            Self::Exported { .. } => Retry::Later,
            Self::Store(error) => error.retry(),
            Self::File { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Removes a bundle no other builds on. Whether VMs run from it is for the caller to know; those that do go on, as
    /// their files stay until they are closed.
    pub fn remove(&self, id: &BundleId) -> Result<(), RemoveError> {
        let (place, removing) = (self.places().bundle(id), self.places().removing(id));
        let failed = |path: &Path| {
            let (bundle, path) = (id.clone(), path.to_owned());
            move |source| RemoveError::File { bundle, path, source }
        };
        {
            let _changes = self.lock_changes();
            if !place.is_dir() {
                return Err(RemoveError::Unknown { bundle: id.clone() });
            }
            if self.lock_exported().contains_key(id) {
                return Err(RemoveError::Exported { bundle: id.clone() });
            }
            let children = self.children(id)?;
            if !children.is_empty() {
                return Err(RemoveError::HasChildren { bundle: id.clone(), children });
            }
            // Left by a removal that failed half-way, of a bundle that was made again since.
            file::remove_tree(&removing).map_err(failed(&removing))?;
            std::fs::rename(&place, &removing).and_then(|()| file::sync_parent(&removing)).map_err(failed(&place))?;
            self.lock_known().remove(id);
            // Not later: the same bundle may come again, with signatures of its own.
            for path in self.beside_paths(id) {
                remove_file(&path).map_err(failed(&path))?;
            }
        }
        let flat = self.places().flat_image(id);
        remove_file(&flat).map_err(failed(&flat))?;
        // What is left of it is swept.
        let _ = self.forget_working_set(id);
        file::remove_tree(&removing).map_err(failed(&removing))
    }
}

impl Store {
    /// What lies beside a bundle and goes with it: nothing, as long as there is a part of it. The lock of changes is held.
    pub(super) fn beside_paths(&self, id: &BundleId) -> Vec<PathBuf> {
        if self.places().has_any_of(id) {
            return Vec::new();
        }
        vec![self.places().signatures_of(id), self.places().fetched_note(id)]
    }
}

/// Removes a file; that there is none is fine.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
