//! Opening a bundle to launch it. The first time in this process everything is verified; afterwards only that the files
//! are the same. A diff is launched from a flat image that is composed of its chain once.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::image::{self, Image, View};
use super::manifest::{Manifest, Parent};
use super::places::{MEMORY, STATE};
use super::run;
use super::stage::is_no_space;
use super::stamp::Stamp;
use super::store::{Known, Store};
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::{extent, file, sparse};
use crate::units::PAGE_BYTES;

/// What a VMM needs of a bundle.
#[derive(Debug)]
pub struct LaunchFiles {
    /// What the bundle says of itself.
    pub manifest: Arc<Manifest>,
    /// Saved state, open for reading from its start.
    pub state: File,
    /// Guest memory, all of it, open for reading: to be mapped privately.
    pub memory: File,
}

/// Why a bundle cannot be launched.
#[derive(Debug, thiserror::Error)]
pub enum OpenBundleError {
    /// It, or a bundle it builds on, cannot be read.
    #[error(transparent)]
    Read(#[from] ReadBundleError),
    /// There is no space for the image a diff is launched from.
    #[error("bundle {bundle}: no space left for {}", path.display())]
    NoSpace {
        /// The diff.
        bundle: BundleId,
        /// The image.
        path: PathBuf,
    },
    /// The image a diff is launched from could not be composed.
    #[error("bundle {bundle}: compose {}", path.display())]
    Compose {
        /// The diff.
        bundle: BundleId,
        /// The image.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl OpenBundleError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Read(error) => error.retry(),
            Self::NoSpace { .. } | Self::Compose { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Opens a bundle's files for a launch. None of them is handed out unverified.
    pub fn open_for_launch(&self, id: &BundleId) -> Result<LaunchFiles, OpenBundleError> {
        let manifest = self.manifest(id)?;
        let state = self.verified_state(id, &manifest)?;
        let memory = self.flat_memory(id, &manifest)?;
        Ok(LaunchFiles { manifest, state, memory })
    }

    /// Saved state, open for reading from its start.
    pub(super) fn verified_state(&self, id: &BundleId, manifest: &Manifest) -> Result<File, ReadBundleError> {
        let file = self.places().open(id, STATE)?;
        let stamp = self.stamp(id, &file, STATE)?;
        if self.known(id).is_some_and(|known| known.state == Some(stamp)) {
            return Ok(file);
        }
        let damaged = |damage| Err(ReadBundleError::Damaged { bundle: id.clone(), damage });
        let (found, wanted) = (stamp.bytes(), manifest.state.bytes);
        if found != wanted {
            return damaged(Damage::Length { file: STATE, found, wanted });
        }
        let mut bytes = Vec::new();
        (&file).take(wanted).read_to_end(&mut bytes).map_err(|source| self.unread(id, STATE, source))?;
        if Digest::of(&bytes) != manifest.state.digest {
            return damaged(Damage::State);
        }
        self.remember(id, |known| known.state = Some(stamp));
        (&file).rewind().map_err(|source| self.unread(id, STATE, source))?;
        Ok(file)
    }

    /// All of a bundle's guest memory as one verified file.
    pub(super) fn flat_memory(&self, id: &BundleId, manifest: &Manifest) -> Result<File, OpenBundleError> {
        let lock = self.memory_lock(id);
        let _busy = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let own = self.places().open(id, MEMORY)?;
        let own_stamp = self.stamp(id, &own, MEMORY)?;
        let known = self.known(id).and_then(|known| known.memory).filter(|(stamp, _)| *stamp == own_stamp);
        match &manifest.parent {
            None if known.is_some() => Ok(own),
            None => {
                self.check_length(id, &own_stamp, manifest)?;
                let damages = whole(&own, manifest).map_err(|source| self.unread(id, MEMORY, source))?;
                self.refuse(id, damages)?;
                self.remember(id, |known| known.memory = Some((own_stamp, None)));
                Ok(own)
            }
            Some(parent) => {
                if let Some((_, Some(stamp))) = known
                    && let Ok(Some(image)) = file::open_regular(&self.places().flat_image(id))
                    && Stamp::of(&image).is_ok_and(|found| found == stamp)
                {
                    return Ok(image);
                }
                self.check_length(id, &own_stamp, manifest)?;
                let below = self.parent_memory(id, manifest, parent)?;
                let image = self.compose(id, manifest, &own, &below)?;
                let stamp = Stamp::of(&image).map_err(|source| self.uncomposed(id, source))?;
                self.remember(id, |known| known.memory = Some((own_stamp, Some(stamp))));
                Ok(image)
            }
        }
    }

    fn parent_memory(&self, id: &BundleId, manifest: &Manifest, parent: &Parent) -> Result<File, OpenBundleError> {
        let below = self.parent_manifest(id, manifest, parent)?;
        self.flat_memory(&parent.bundle, &below)
    }

    /// The manifest of a diff's parent, if that fits the diff.
    pub(super) fn parent_manifest(
        &self,
        id: &BundleId,
        manifest: &Manifest,
        parent: &Parent,
    ) -> Result<Arc<Manifest>, ReadBundleError> {
        let below = self.manifest(&parent.bundle)?;
        match misfit(manifest, parent, &below) {
            None => Ok(below),
            Some(damage) => Err(ReadBundleError::Damaged { bundle: id.clone(), damage }),
        }
    }

    /// Makes the flat image of a diff over its parent's, verifies it and puts it in its place.
    fn compose(&self, id: &BundleId, manifest: &Manifest, own: &File, below: &File) -> Result<File, OpenBundleError> {
        let (new, place) = (self.places().flat_image_new(id), self.places().flat_image(id));
        let composed = file::make_directories(&self.places().flat_images())
            .and_then(|()| overlay(&new, manifest, own, below))
            .and_then(|image| Ok((whole(&image, manifest)?, image)))
            .map_err(|source| self.uncomposed(id, source))
            .and_then(|(damages, image)| {
                self.refuse(id, damages)?;
                file::make_read_only(&image)
                    .and_then(|()| std::fs::rename(&new, &place))
                    .and_then(|()| File::open(&place))
                    .map_err(|source| self.uncomposed(id, source))
            });
        if composed.is_err() {
            // The error that matters is the first one; the next try overwrites what stays.
            let _ = std::fs::remove_file(&new);
        }
        composed
    }

    pub(super) fn check_length(
        &self,
        id: &BundleId,
        stamp: &Stamp,
        manifest: &Manifest,
    ) -> Result<(), ReadBundleError> {
        let (found, wanted) = (stamp.bytes(), manifest.machine.memory_bytes);
        if found == wanted {
            return Ok(());
        }
        let damage = Damage::Length { file: MEMORY, found, wanted };
        Err(ReadBundleError::Damaged { bundle: id.clone(), damage })
    }

    fn refuse(&self, id: &BundleId, damages: Vec<Damage>) -> Result<(), ReadBundleError> {
        match damages.into_iter().next() {
            None => Ok(()),
            Some(damage) => Err(ReadBundleError::Damaged { bundle: id.clone(), damage }),
        }
    }

    fn uncomposed(&self, id: &BundleId, source: io::Error) -> OpenBundleError {
        let (bundle, path) = (id.clone(), self.places().flat_image(id));
        if is_no_space(&source) {
            OpenBundleError::NoSpace { bundle, path }
        } else {
            OpenBundleError::Compose { bundle, path, source }
        }
    }

    fn remember(&self, id: &BundleId, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock_known().get_mut(id) {
            change(known);
        }
    }
}

/// What of a diff does not fit its parent.
pub(super) fn misfit(manifest: &Manifest, parent: &Parent, below: &Manifest) -> Option<Damage> {
    let depth = below.parent.as_ref().map_or(0, |parent| parent.depth);
    let reason = if below.machine.memory_bytes != manifest.machine.memory_bytes {
        "another size of memory"
    } else if below.memory.chunk_bytes != manifest.memory.chunk_bytes {
        "another size of chunks"
    } else if depth.checked_add(1) != Some(parent.depth) {
        // So that chains end.
        "another depth"
    } else {
        return None;
    };
    Some(Damage::Parent { parent: parent.bundle.clone(), reason })
}

/// The first place where an image is not what the manifest says.
fn whole(image: &File, manifest: &Manifest) -> io::Result<Vec<Damage>> {
    let view = View::flat(Image::new(image, manifest.machine.memory_bytes, manifest.memory.chunk_bytes)?);
    image::compare(view, manifest, None, 1, &mut |_| ())
}

/// A new file: the parent's image with the pages the diff holds.
fn overlay(path: &Path, manifest: &Manifest, own: &File, below: &File) -> io::Result<File> {
    let memory_bytes = manifest.machine.memory_bytes;
    let image = file::create(path)?;
    sparse::copy_sparse(below, &image, memory_bytes)?;
    let data = sparse::data_ranges(own, memory_bytes)?;
    for run in manifest.memory.pages.iter().flatten() {
        let held = run.bytes(PAGE_BYTES);
        let data: Vec<_> = run::intersect(&data, &held).collect();
        for hole in run::subtract(std::slice::from_ref(&held), &data) {
            extent::punch_hole(&image, hole.start, hole.end - hole.start)?;
        }
        for range in data {
            sparse::copy_range(own, &image, range)?;
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests;
