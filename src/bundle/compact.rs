//! A chain of diffs made into one flat bundle, which needs no other.

use std::io;
use std::path::PathBuf;

use super::commit::{CommitError, Committed, Contents};
use super::image::OnProgress;
use super::launch::OpenBundleError;
use super::manifest::ManifestDraft;
use super::places::{MEMORY, STATE};
use super::signatures::{Beside, SignError};
use super::stage::StageError;
use super::store::Store;
use crate::clock::UnixNanos;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::sparse;

/// How the flat bundle is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compaction {
    /// What to stage it under.
    pub token: String,
    /// Its label.
    pub name: Option<String>,
    /// Now.
    pub built_at: UnixNanos,
}

/// Why a diff could not be made flat.
#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    /// It is flat.
    #[error("bundle {bundle} has no parent: it is flat")]
    Flat {
        /// The id.
        bundle: BundleId,
    },
    /// Its memory is not to be had.
    #[error(transparent)]
    Open(#[from] OpenBundleError),
    /// There is no place to put it.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// It could not be copied.
    #[error("bundle {bundle}: copy to {}", path.display())]
    Copy {
        /// The id.
        bundle: BundleId,
        /// Where to.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Whether it was made here could not be found out.
    #[error(transparent)]
    Signatures(#[from] SignError),
    /// The flat bundle could not be committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl CompactError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Flat { .. } => Retry::WithChange,
            Self::Open(error) => error.retry(),
            Self::Stage(error) => error.retry(),
            Self::Copy { .. } => Retry::Later,
            Self::Signatures(error) => error.retry(),
            Self::Commit(error) => error.retry(),
        }
    }
}

impl Store {
    /// A flat bundle with the content of this diff. The diff stays.
    pub fn compact(
        &self,
        id: &BundleId,
        compaction: Compaction,
        on_progress: OnProgress<'_>,
    ) -> Result<Committed, CompactError> {
        let Compaction { token, name, built_at } = compaction;
        if !self.manifest(id).map_err(OpenBundleError::from)?.is_diff() {
            return Err(CompactError::Flat { bundle: id.clone() });
        }
        // What came from elsewhere is not made here by being copied.
        let beside = Beside { made_here: self.signed(id)?.made_here, signatures: Vec::new() };
        let files = self.open_for_launch(id)?;
        let memory_bytes = files.manifest.machine.memory_bytes;
        let staging = self.stage(&token, memory_bytes)?;
        let copied = staging
            .open(MEMORY)
            .and_then(|memory| sparse::copy_sparse(&files.memory, &memory, memory_bytes))
            .and_then(|()| io::copy(&mut &files.state, &mut staging.open(STATE)?));
        if let Err(source) = copied {
            let path = staging.directory.clone();
            // The first error is the one to tell; the next sweep tries again.
            let _ = staging.discard();
            return Err(CompactError::Copy { bundle: id.clone(), path, source });
        }
        let mut draft = ManifestDraft::of(&files.manifest);
        draft.name = name;
        draft.provenance.built_at = built_at;
        draft.provenance.compacted_from = Some(id.clone());
        Ok(staging.commit_with(draft, Contents::Full, beside, on_progress)?)
    }
}
