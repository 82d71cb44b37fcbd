//! Bundles out of one stream of bytes. Each is staged as one that is made here; when the stream has ended as it has to,
//! and all of it is what its manifests say, they become visible, parents first. Otherwise nothing is left.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::archive::{ArchiveError, Part, Reader};
use super::commit::{CommitError, Committed};
use super::damage::Damage;
use super::digest::Digest;
use super::export::view;
use super::image::{Image, OnProgress, compare};
use super::launch::misfit;
use super::manifest::{self, Manifest, ReadManifestError};
use super::places::{MEMORY, STATE};
use super::signatures::{Beside, BundleSignature, SIGNATURES_MAX};
use super::stage::{StageError, Staging, is_no_space};
use super::store::Store;
use super::verify::{check_state, not_held};
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

/// Why no bundle came of a stream.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The stream is not what was exported.
    #[error("import a bundle")]
    Archive(#[from] ArchiveError),
    /// A manifest in it is none.
    #[error("import a bundle: its manifest")]
    Manifest(#[from] ReadManifestError),
    /// What a bundle builds on does not come before it.
    #[error("import a bundle: {bundle} builds on {parent}, which does not come before it")]
    Parent {
        /// The bundle.
        bundle: BundleId,
        /// What it builds on.
        parent: BundleId,
    },
    /// A bundle in it does not build on the one before it.
    #[error("import a bundle: {bundle} is not built on by what comes after it")]
    Unrelated {
        /// The bundle before.
        bundle: BundleId,
    },
    /// A bundle is not what its manifest says.
    #[error("import a bundle: {bundle} is not what its manifest says")]
    Damaged {
        /// The bundle.
        bundle: BundleId,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// A signature is none.
    #[error("import a bundle: a signature of {bundle} is not one of its key")]
    Signature {
        /// The bundle.
        bundle: BundleId,
    },
    /// There is no place to put it.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// It could not be kept.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The disk is full.
    #[error("import a bundle: no space left for {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("import a bundle: {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ImportError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Archive(ArchiveError::Version { .. } | ArchiveError::Magic) => Retry::Never,
            // The file that it came from may be whole.
            Self::Archive(_) => Retry::WithChange,
            Self::Manifest(_)
            | Self::Parent { .. }
            | Self::Unrelated { .. }
            | Self::Damaged { .. }
            | Self::Signature { .. } => Retry::Never,
            Self::Stage(error) => error.retry(),
            Self::Commit(error) => error.retry(),
            Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }
}

/// A bundle that has come, or is coming.
struct Coming {
    id: BundleId,
    manifest: Manifest,
    manifest_digest: Digest,
    staging: Staging,
    memory: File,
    signatures: Vec<BundleSignature>,
}

impl Store {
    /// Has the bundles that `from` holds, parents first: the last one is what was exported. Stages them as `token` with a
    /// number.
    pub fn import(
        &self,
        from: impl Read,
        token: &str,
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<Committed>, ImportError> {
        let mut coming = Vec::new();
        let taken = self.take_in(from, token, &mut coming).and_then(|()| {
            for at in 0..coming.len() {
                check_memory(&coming[..=at], on_progress)?;
            }
            Ok(())
        });
        let directories: Vec<PathBuf> = coming.iter().map(|one: &Coming| one.staging.directory.clone()).collect();
        let imported = taken.and_then(|()| self.publish_all(coming));
        for directory in directories {
            // Those that became bundles have other names now; what cannot be removed is swept.
            let _ = file::remove_tree(&directory);
        }
        imported
    }

    /// Makes bundles of them, or of none.
    fn publish_all(&self, coming: Vec<Coming>) -> Result<Vec<Committed>, ImportError> {
        let mut published: Vec<Committed> = Vec::new();
        for one in coming {
            match one.publish() {
                Ok(done) => published.push(done),
                Err(error) => {
                    for made in published.iter().rev().filter(|made| !made.existed) {
                        // What somebody has used since is somebody's.
                        let _ = self.remove(&made.id);
                    }
                    return Err(error);
                }
            }
        }
        Ok(published)
    }

    /// Reads all of the stream into staging directories.
    fn take_in(&self, from: impl Read, token: &str, coming: &mut Vec<Coming>) -> Result<(), ImportError> {
        let mut reader = Reader::open(from)?;
        loop {
            match reader.next_part()? {
                Part::Manifest(bytes) => {
                    let number = coming.len();
                    coming.push(self.begin(bytes, &format!("{token}-{number}"), coming.last())?);
                }
                // The reader has these come after a manifest.
                Part::State(bytes) => coming.last().map_or(Ok(()), |one| one.state(bytes))?,
                Part::Memory { offset, bytes } => coming.last().map_or(Ok(()), |one| one.memory(offset, bytes))?,
                Part::Signature(one) => coming.last_mut().map_or(Ok(()), |last| last.signature(one))?,
                Part::End => return Ok(()),
            }
        }
    }

    /// A bundle begins: by its manifest it is one, and fits the one before.
    fn begin(&self, bytes: &[u8], token: &str, before: Option<&Coming>) -> Result<Coming, ImportError> {
        let manifest = manifest::read(bytes)?;
        let id = manifest::id_of(bytes);
        match (before, &manifest.parent) {
            (None, None) => {}
            (Some(before), Some(parent)) if parent.bundle == before.id => {
                if let Some(damage) = misfit(&manifest, parent, &before.manifest) {
                    return Err(ImportError::Damaged { bundle: id, damage });
                }
            }
            (_, Some(parent)) => {
                return Err(ImportError::Parent { bundle: id, parent: parent.bundle.clone() });
            }
            (Some(before), None) => return Err(ImportError::Unrelated { bundle: before.id.clone() }),
        }
        // By their depths, which grow by one and have a bound, there are only so many.
        let staging = self.stage(token, manifest.machine.memory_bytes)?;
        let opened = staging.write_manifest(bytes).map_err(ImportError::from).and_then(|()| Ok(staging.memory_file()?));
        let memory = match opened {
            Ok(memory) => memory,
            Err(error) => {
                // The first error is the one to tell; the next sweep tries again.
                let _ = staging.discard();
                return Err(error);
            }
        };
        Ok(Coming { id, manifest, manifest_digest: Digest::of(bytes), staging, memory, signatures: Vec::new() })
    }
}

impl Coming {
    fn damaged<T>(&self, damage: Damage) -> Result<T, ImportError> {
        Err(ImportError::Damaged { bundle: self.id.clone(), damage })
    }

    fn failed(&self, name: &str, source: io::Error) -> ImportError {
        let path = self.staging.directory.join(name);
        if is_no_space(&source) { ImportError::NoSpace { path } } else { ImportError::File { path, source } }
    }

    fn state(&self, bytes: &[u8]) -> Result<(), ImportError> {
        if let Err(damage) = check_state(bytes, &self.manifest) {
            return self.damaged(damage);
        }
        let written = self.staging.open(STATE).and_then(|file| {
            file.write_all_at(bytes, 0)?;
            file.sync_all()?;
            file::make_read_only(&file)
        });
        written.map_err(|source| self.failed(STATE, source))
    }

    fn memory(&self, offset: u64, bytes: &[u8]) -> Result<(), ImportError> {
        let wanted = self.manifest.machine.memory_bytes;
        // Cannot be too large: the reader added the two.
        let found = offset.saturating_add(bytes.len() as u64);
        if found > wanted {
            return self.damaged(Damage::Length { file: MEMORY, found, wanted });
        }
        // A hole stays one.
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        self.memory.write_all_at(bytes, offset).map_err(|source| self.failed(MEMORY, source))
    }

    fn signature(&mut self, signature: BundleSignature) -> Result<(), ImportError> {
        if !signature.is_of(&self.manifest_digest) || self.signatures.len() >= SIGNATURES_MAX {
            return Err(ImportError::Signature { bundle: self.id.clone() });
        }
        self.signatures.push(signature);
        Ok(())
    }

    fn publish(self) -> Result<Committed, ImportError> {
        let Self { id, manifest, manifest_digest, staging, memory, signatures } = self;
        drop(memory);
        Ok(staging.publish((id, manifest_digest), manifest, Beside { made_here: false, signatures })?)
    }
}

/// Compares the memory of the last of a chain with its manifest, and makes it durable.
fn check_memory(chain: &[Coming], on_progress: OnProgress<'_>) -> Result<(), ImportError> {
    let Some((one, below)) = chain.split_last() else { return Ok(()) };
    let failed = |source| one.failed(MEMORY, source);
    let own = Image::new(&one.memory, one.manifest.machine.memory_bytes, one.manifest.memory.chunk_bytes);
    let own = own.map_err(failed)?;
    let outside = if one.manifest.is_diff() { not_held(&own, &one.manifest).map_err(failed)? } else { Vec::new() };
    if let Some(damage) = outside.into_iter().next() {
        return one.damaged(damage);
    }
    let view = view(chain.iter().map(|one| (&one.manifest, &one.memory))).map_err(failed)?;
    let parent = below.last().map(|below| &below.manifest.memory);
    let found = compare(view, &one.manifest, parent, 1, on_progress).map_err(failed)?;
    if let Some(damage) = found.into_iter().next() {
        return one.damaged(damage);
    }
    one.memory.sync_all().and_then(|()| file::make_read_only(&one.memory)).map_err(failed)
}

#[cfg(test)]
mod tests;
