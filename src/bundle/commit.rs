//! From a staging directory to a bundle: measure memory, check the state, write the manifest last, rename.
//!
//! Each step is durable before the next. A crash at any of them leaves a staging directory, which is swept, or a whole
//! bundle. A failure leaves nothing.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::damage::ReadBundleError;
use super::digest::Digest;
use super::image::OnProgress;
use super::launch::OpenBundleError;
use super::manifest::{
    self, CHUNK_BYTES, InvalidManifest, Manifest, ManifestDraft, MemoryMap, Parent, ReadManifestError, StateFile,
};
use super::places::{FILES, MANIFEST, MEMORY, Places, STATE};
use super::run::Run;
use super::signatures::{Beside, SignError};
use super::stage::{Staging, is_no_space};
use super::stamp::Stamp;
use super::store::Known;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::saved::codec::CodecError;
use crate::sys::file;

mod measure;

/// What `memory.img` holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// All of guest memory.
    Full,
    /// Some pages; the others are as in the parent.
    Diff {
        /// The parent.
        parent: BundleId,
        /// Runs of guest-physical pages that are held, ascending. A page among them that is a hole is zero.
        pages: Vec<Run>,
    },
}

/// A bundle that is there.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its id.
    pub id: BundleId,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    /// Whether the very same bundle was there before.
    pub existed: bool,
}

/// Why no bundle came of it. The staging directory is gone.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// What the manifest would say cannot be true.
    #[error("staging {token}: the manifest")]
    Invalid {
        /// The token.
        token: String,
        /// What is wrong.
        #[source]
        source: InvalidManifest,
    },
    /// The manifest cannot be written.
    #[error("staging {token}: the manifest")]
    Manifest {
        /// The token.
        token: String,
        /// Why.
        #[source]
        source: ReadManifestError,
    },
    /// A file is not as long as it has to be.
    #[error("staging {token}: {file} has {found} bytes instead of {wanted}")]
    Length {
        /// The token.
        token: String,
        /// The file.
        file: &'static str,
        /// Bytes it has.
        found: u64,
        /// Bytes it may have.
        wanted: u64,
    },
    /// The state file holds no sections.
    #[error("staging {token}: state.bin")]
    State {
        /// The token.
        token: String,
        /// Why not.
        #[source]
        source: CodecError,
    },
    /// Somebody wrote the memory file while it was measured.
    #[error("staging {token}: memory.img was written while it was read")]
    Changed {
        /// The token.
        token: String,
    },
    /// The parent has another memory.
    #[error("staging {token}: the guest has {found} bytes of memory, its parent {parent} has {wanted}")]
    ParentMemory {
        /// The token.
        token: String,
        /// The parent.
        parent: BundleId,
        /// Bytes the guest has.
        found: u64,
        /// Bytes the parent has.
        wanted: u64,
    },
    /// The parent cannot be built on.
    #[error("staging {token}: the parent")]
    Parent {
        /// The token.
        token: String,
        /// Why not.
        #[source]
        source: OpenBundleError,
    },
    /// What is known beside the bundle cannot be kept.
    #[error("staging {token}: the signatures")]
    Signatures {
        /// The token.
        token: String,
        /// Why not.
        #[source]
        source: SignError,
    },
    /// The disk is full.
    #[error("staging {token}: no space left for {}", path.display())]
    NoSpace {
        /// The token.
        token: String,
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("staging {token}: {}", path.display())]
    File {
        /// The token.
        token: String,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl CommitError {
    /// Whether doing it all again may succeed.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Invalid { .. } | Self::Manifest { .. } | Self::ParentMemory { .. } => Retry::WithChange,
            Self::Length { .. } | Self::State { .. } => Retry::Never,
            Self::Changed { .. } | Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
            Self::Parent { source, .. } => source.retry(),
            Self::Signatures { source, .. } => source.retry(),
        }
    }
}

impl Staging {
    /// Makes a bundle of it, which was made here. Afterwards nothing is staged, whatever the outcome.
    pub fn commit(
        self,
        draft: ManifestDraft,
        contents: Contents,
        on_progress: OnProgress<'_>,
    ) -> Result<Committed, CommitError> {
        let beside = Beside { made_here: true, signatures: Vec::new() };
        self.commit_with(draft, contents, beside, on_progress)
    }

    /// The same, with what is to be known beside it.
    pub(super) fn commit_with(
        self,
        draft: ManifestDraft,
        contents: Contents,
        beside: Beside,
        on_progress: OnProgress<'_>,
    ) -> Result<Committed, CommitError> {
        let committed = self.make(draft, contents, beside, on_progress);
        if committed.as_ref().map_or(true, |committed| committed.existed) {
            // What stays is swept; the outcome is decided.
            let _ = file::remove_tree(&self.directory);
        }
        committed
    }

    fn make(
        &self,
        draft: ManifestDraft,
        contents: Contents,
        beside: Beside,
        on_progress: OnProgress<'_>,
    ) -> Result<Committed, CommitError> {
        let (base, pages) = match contents {
            Contents::Full => (None, None),
            Contents::Diff { parent, pages } => (Some(self.base(parent, &draft)?), Some(pages)),
        };
        let parent = base.as_ref().map(|base| Parent {
            bundle: base.id.clone(),
            depth: base.manifest.parent.as_ref().map_or(0, |parent| parent.depth).saturating_add(1),
        });
        // Before anything is read by them: pages and sizes are what the caller says.
        let empty = MemoryMap { chunk_bytes: CHUNK_BYTES, chunks: Vec::new(), zero_runs: Vec::new(), pages };
        let mut manifest = draft.complete(empty, StateFile::default(), parent);
        let whole = manifest.chunk_count();
        manifest.memory.zero_runs.push(Run { first: 0, count: whole });
        self.check(&manifest)?;

        manifest.memory = self.memory(&manifest, base.as_ref(), on_progress)?;
        manifest.state = self.state()?;
        self.check(&manifest)?;
        let bytes =
            manifest.to_bytes().map_err(|source| CommitError::Manifest { token: self.token.clone(), source })?;
        self.write_manifest(&bytes)?;
        self.publish((manifest::id_of(&bytes), Digest::of(&bytes)), manifest, beside)
    }

    fn check(&self, manifest: &Manifest) -> Result<(), CommitError> {
        manifest.check().map_err(|source| CommitError::Invalid { token: self.token.clone(), source })
    }

    pub(super) fn write_manifest(&self, bytes: &[u8]) -> Result<(), CommitError> {
        let path = self.directory.join(MANIFEST);
        file::replace(&path, bytes)
            .and_then(|()| file::make_read_only(&File::open(&path)?))
            .map_err(|source| self.failed(MANIFEST, source))
    }

    /// Gives the directory its name. All of its files are complete and durable.
    pub(super) fn publish(
        &self,
        id: (BundleId, Digest),
        manifest: Manifest,
        beside: Beside,
    ) -> Result<Committed, CommitError> {
        let _changes = self.store.lock_changes();
        self.publish_held(id, manifest, beside)
    }

    /// The same, with the lock of changes held.
    pub(super) fn publish_held(
        &self,
        (id, manifest_digest): (BundleId, Digest),
        manifest: Manifest,
        beside: Beside,
    ) -> Result<Committed, CommitError> {
        let store = &self.store;
        for name in Places::names(&self.directory).map_err(|source| self.failed(".", source))? {
            if !FILES.contains(&name.as_str()) {
                // Nobody but this program puts anything here: it is of an earlier, interrupted try.
                let removed = std::fs::remove_file(self.directory.join(&name));
                removed.map_err(|source| self.failed(&name, source))?;
            }
        }
        let manifest = Arc::new(manifest);
        let stamps = self.stamps(&manifest, manifest_digest).map_err(|source| self.failed(".", source))?;

        if let Some(parent) = &manifest.parent {
            // It may have been removed while this was measured.
            let there = store.manifest(&parent.bundle).map_err(OpenBundleError::from);
            there.map_err(|source| CommitError::Parent { token: self.token.clone(), source })?;
        }
        let signed = |source| CommitError::Signatures { token: self.token.clone(), source };
        match store.manifest(&id) {
            Ok(manifest) => {
                store.add_beside(&id, beside).map_err(signed)?;
                return Ok(Committed { id, manifest, existed: true });
            }
            Err(ReadBundleError::Unknown { .. }) => {}
            // A damaged one of this very content: the whole one takes its place.
            Err(ReadBundleError::Damaged { .. }) => {
                let removed = file::remove_tree(&store.places().bundle(&id));
                removed.map_err(|source| self.failed(".", source))?;
            }
            Err(ReadBundleError::File { path, source, .. }) => {
                return Err(CommitError::File { token: self.token.clone(), path, source });
            }
        }
        // Before the bundle: whoever sees it sees who signed it. What stays of a crash here is swept.
        store.add_beside(&id, beside).map_err(signed)?;
        let place = store.places().bundle(&id);
        std::fs::rename(&self.directory, &place).map_err(|source| self.failed(".", source))?;
        if let Err(source) = file::sync_parent(&place) {
            // It may not be there after a crash, so it is not there at all.
            let _ = file::remove_tree(&place);
            return Err(self.failed(".", source));
        }
        store.lock_known().insert(id.clone(), stamps);
        Ok(Committed { id, manifest, existed: false })
    }

    /// The files as they were just measured. Renaming the directory does not change them.
    fn stamps(&self, manifest: &Arc<Manifest>, manifest_digest: Digest) -> io::Result<Known> {
        let stamp = |name: &str| Stamp::of(&File::open(self.directory.join(name))?);
        Ok(Known {
            manifest: manifest.clone(),
            manifest_digest,
            manifest_stamp: stamp(MANIFEST)?,
            state: Some(stamp(STATE)?),
            // A diff's own file is looked at again when its flat image is composed.
            memory: if manifest.is_diff() { None } else { Some((stamp(MEMORY)?, None)) },
        })
    }

    pub(super) fn failed(&self, name: &str, source: io::Error) -> CommitError {
        let (token, path) = (self.token.clone(), self.directory.join(name));
        if is_no_space(&source) {
            CommitError::NoSpace { token, path }
        } else {
            CommitError::File { token, path, source }
        }
    }
}

#[cfg(test)]
mod tests;
