//! Looking at all of a bundle again, whatever was seen before: finds a single changed byte and says where it is.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::image::{self, Image, OnProgress, View};
use super::launch::OpenBundleError;
use super::manifest::{Manifest, Parent};
use super::places::{FILES, MANIFEST, MEMORY, Places, STATE};
use super::run;
use super::stamp::Stamp;
use super::store::Store;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::saved::codec;
use crate::units::PAGE_BYTES;

/// Most damages that are told: a file of garbage would give as many as there are chunks.
const DAMAGES_MAX: usize = 64;

/// What was looked at, and found to be whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that were read. Those of a diff's parents are the parents' business.
    pub chunks: u64,
    /// Sections of saved state.
    pub sections: usize,
}

/// Why a bundle is not known to be whole.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is not whole.
    #[error("bundle {bundle} is damaged in {} places", others.len() + 1)]
    Damaged {
        /// The id.
        bundle: BundleId,
        /// The first thing that is wrong.
        #[source]
        first: Damage,
        /// The others, up to a limit.
        others: Vec<Damage>,
    },
    /// It could not be read.
    #[error(transparent)]
    Read(ReadBundleError),
    /// What it builds on cannot be used.
    #[error("bundle {bundle} builds on another")]
    Parent {
        /// The id.
        bundle: BundleId,
        /// Why not.
        #[source]
        source: OpenBundleError,
    },
}

impl VerifyError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Damaged { .. } => Retry::Never,
            Self::Read(error) => error.retry(),
            Self::Parent { source, .. } => source.retry(),
        }
    }
}

/// The bundle a diff builds on.
struct Below {
    manifest: Arc<Manifest>,
    memory: File,
}

impl Store {
    /// Reads all of a bundle and compares it with its id. What was known of it before does not count.
    pub fn verify(&self, id: &BundleId, on_progress: OnProgress<'_>) -> Result<Verified, VerifyError> {
        let mut damages = Vec::new();
        let verified = self.look(id, &mut damages, on_progress);
        let mut damages = damages.into_iter();
        match (damages.next(), verified) {
            (None, Ok(verified)) => Ok(verified),
            (None, Err(error)) => Err(error),
            (Some(first), _) => {
                // So that the next launch does not believe what was seen before.
                self.lock_known().remove(id);
                Err(VerifyError::Damaged { bundle: id.clone(), first, others: damages.collect() })
            }
        }
    }

    fn look(
        &self,
        id: &BundleId,
        damages: &mut Vec<Damage>,
        on_progress: OnProgress<'_>,
    ) -> Result<Verified, VerifyError> {
        let names = Places::names(&self.places().bundle(id)).map_err(|source| {
            VerifyError::Read(if source.kind() == io::ErrorKind::NotFound {
                ReadBundleError::Unknown { bundle: id.clone() }
            } else {
                self.unread(id, ".", source)
            })
        })?;
        let extra = names.into_iter().filter(|name| !FILES.contains(&name.as_str()));
        damages.extend(extra.take(DAMAGES_MAX).map(|file| Damage::Extra { file }));
        let manifest = self.places().open(id, MANIFEST).and_then(|mut file| self.read_manifest(id, &mut file));
        let Some((manifest, _)) = sort(manifest, damages)? else { return Ok(Verified { chunks: 0, sections: 0 }) };
        let sections = sort(self.look_at_state(id, &manifest), damages)?.unwrap_or(0);
        let chunks = self.look_at_memory(id, &manifest, damages, on_progress)?;
        Ok(Verified { chunks, sections })
    }

    fn look_at_state(&self, id: &BundleId, manifest: &Manifest) -> Result<usize, ReadBundleError> {
        let file = self.places().open(id, STATE)?;
        let damaged = |damage| Err(ReadBundleError::Damaged { bundle: id.clone(), damage });
        let (found, wanted) = (self.stamp(id, &file, STATE)?.bytes(), manifest.state.bytes);
        if found != wanted {
            return damaged(Damage::Length { file: STATE, found, wanted });
        }
        let mut bytes = Vec::new();
        file.take(wanted).read_to_end(&mut bytes).map_err(|source| self.unread(id, STATE, source))?;
        check_state(&bytes, manifest).or_else(damaged)
    }

    fn look_at_memory(
        &self,
        id: &BundleId,
        manifest: &Manifest,
        damages: &mut Vec<Damage>,
        on_progress: OnProgress<'_>,
    ) -> Result<u64, VerifyError> {
        let Some(file) = sort(self.places().open(id, MEMORY), damages)? else { return Ok(0) };
        let unread = |source| VerifyError::Read(self.unread(id, MEMORY, source));
        let stamp = Stamp::of(&file).map_err(unread)?;
        if sort(self.check_length(id, &stamp, manifest), damages)?.is_none() {
            return Ok(0);
        }
        let below = match &manifest.parent {
            None => None,
            Some(parent) => match self.look_below(id, manifest, parent, damages)? {
                Some(below) => Some(below),
                None => return Ok(0),
            },
        };
        let (memory_bytes, chunk_bytes) = (manifest.machine.memory_bytes, manifest.memory.chunk_bytes);
        let own = Image::new(&file, memory_bytes, chunk_bytes).map_err(unread)?;
        let parent_map = below.as_ref().map(|below| &below.manifest.memory);
        let view = match (&below, &manifest.memory.pages) {
            (Some(below), Some(pages)) => {
                damages.extend(not_held(&own, manifest).map_err(unread)?);
                View::over(Image::new(&below.memory, memory_bytes, chunk_bytes).map_err(unread)?, own, pages)
            }
            (None, _) | (_, None) => View::flat(own),
        };
        let chunks = (0..manifest.chunk_count()).filter(|index| view.holds(*index)).count() as u64;
        let found = image::compare(view, manifest, parent_map, DAMAGES_MAX, on_progress).map_err(unread)?;
        damages.extend(found);
        Ok(chunks)
    }

    /// The memory a diff builds on; `None` when the two do not fit.
    fn look_below(
        &self,
        id: &BundleId,
        manifest: &Manifest,
        parent: &Parent,
        damages: &mut Vec<Damage>,
    ) -> Result<Option<Below>, VerifyError> {
        let unusable = |source| VerifyError::Parent { bundle: id.clone(), source };
        let manifest = match self.parent_manifest(id, manifest, parent) {
            Ok(manifest) => manifest,
            Err(ReadBundleError::Damaged { bundle, damage }) if bundle == *id => {
                damages.push(damage);
                return Ok(None);
            }
            Err(error) => return Err(unusable(error.into())),
        };
        let memory = self.flat_memory(&parent.bundle, &manifest).map_err(unusable)?;
        Ok(Some(Below { manifest, memory }))
    }
}

/// Whether bytes are a bundle's saved state; the number of its sections.
pub(super) fn check_state(bytes: &[u8], manifest: &Manifest) -> Result<usize, Damage> {
    let (found, wanted) = (bytes.len() as u64, manifest.state.bytes);
    if found != wanted {
        return Err(Damage::Length { file: STATE, found, wanted });
    }
    if Digest::of(bytes) != manifest.state.digest {
        return Err(Damage::State);
    }
    codec::from_bytes(bytes).map(|sections| sections.len()).map_err(Damage::Sections)
}

/// Damage goes to the list, and `None` is left; other errors end it.
fn sort<T>(result: Result<T, ReadBundleError>, damages: &mut Vec<Damage>) -> Result<Option<T>, VerifyError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ReadBundleError::Damaged { damage, .. }) => {
            damages.push(damage);
            Ok(None)
        }
        Err(error @ (ReadBundleError::Unknown { .. } | ReadBundleError::File { .. })) => Err(VerifyError::Read(error)),
    }
}

/// Data of a diff outside the pages it holds.
pub(super) fn not_held(own: &Image<'_>, manifest: &Manifest) -> io::Result<Vec<Damage>> {
    let held: Vec<_> = manifest.memory.pages.iter().flatten().map(|run| run.bytes(PAGE_BYTES)).collect();
    let mut damages = Vec::new();
    for range in run::subtract(own.data(), &held) {
        if damages.len() < DAMAGES_MAX && !own.is_zero(&range)? {
            let (first_page, last_page) = (range.start / PAGE_BYTES, (range.end - 1) / PAGE_BYTES);
            damages.push(Damage::NotHeld { first_page, last_page });
        }
    }
    Ok(damages)
}

#[cfg(test)]
mod tests;
