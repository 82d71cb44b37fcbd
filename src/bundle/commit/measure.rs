//! What a commit finds out about the files a VMM left: the map of memory and the sections of the state. Both files are
//! durable and read-only afterwards.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use super::CommitError;
use crate::bundle::digest::Digest;
use crate::bundle::image::{self, Image, Measured, OnProgress, View};
use crate::bundle::manifest::{Manifest, ManifestDraft, MemoryMap, STATE_BYTES_MAX, SectionEntry, StateFile};
use crate::bundle::places::{MEMORY, STATE};
use crate::bundle::run;
use crate::bundle::stage::Staging;
use crate::bundle::stamp::Stamp;
use crate::ids::BundleId;
use crate::saved::codec;
use crate::sys::{extent, file};
use crate::units::PAGE_BYTES;

/// The parent of a diff, ready to be built on.
pub(super) struct Base {
    pub(super) id: BundleId,
    pub(super) manifest: Arc<Manifest>,
    image: File,
}

impl Staging {
    pub(super) fn base(&self, id: BundleId, draft: &ManifestDraft) -> Result<Base, CommitError> {
        let failed = |source| CommitError::Parent { token: self.token.clone(), source };
        let manifest = self.store.manifest(&id).map_err(|error| failed(error.into()))?;
        let (found, wanted) = (draft.machine.memory_bytes, manifest.machine.memory_bytes);
        if found != wanted {
            return Err(CommitError::ParentMemory { token: self.token.clone(), parent: id, found, wanted });
        }
        let image = self.store.flat_memory(&id, &manifest).map_err(failed)?;
        Ok(Base { id, manifest, image })
    }

    /// Measures the memory file, and gives back the space of what need not be in it.
    pub(super) fn memory(
        &self,
        manifest: &Manifest,
        base: Option<&Base>,
        on_progress: OnProgress<'_>,
    ) -> Result<MemoryMap, CommitError> {
        let failed = |source| self.failed(MEMORY, source);
        let wanted = manifest.machine.memory_bytes;
        let file = self.open(MEMORY).map_err(failed)?;
        let before = Stamp::of(&file).map_err(failed)?;
        if before.bytes() != wanted {
            let (token, file) = (self.token.clone(), MEMORY);
            return Err(CommitError::Length { token, file, found: before.bytes(), wanted });
        }
        let pages = manifest.memory.pages.clone();
        // A parent may have been cut into chunks of another size; a diff of it is cut as it was.
        let chunk_bytes = base.map_or(manifest.memory.chunk_bytes, |base| base.manifest.memory.chunk_bytes);
        let image = Image::new(&file, wanted, chunk_bytes).map_err(failed)?;
        let (view, unwanted) = match (base, &pages) {
            (Some(base), Some(pages)) => {
                let held: Vec<_> = pages.iter().map(|run| run.bytes(PAGE_BYTES)).collect();
                let unwanted = run::subtract(image.data(), &held);
                let below = Image::new(&base.image, wanted, chunk_bytes).map_err(failed)?;
                (View::over(below, image, pages), unwanted)
            }
            (None, _) | (_, None) => (View::flat(image), Vec::new()),
        };
        let parent_map = base.map(|base| &base.manifest.memory);
        let Measured { map, allocated_zeros } = image::measure(view, parent_map, on_progress).map_err(failed)?;
        if !Stamp::of(&file).map_err(failed)?.same_content(&before) {
            return Err(CommitError::Changed { token: self.token.clone() });
        }
        let zeros = if base.is_none() { allocated_zeros } else { Vec::new() };
        for range in unwanted.into_iter().chain(zeros) {
            extent::punch_hole(&file, range.start, range.end - range.start).map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
        file::make_read_only(&file).map_err(failed)?;
        Ok(MemoryMap { pages, ..map })
    }

    pub(super) fn state(&self) -> Result<StateFile, CommitError> {
        let failed = |source| self.failed(STATE, source);
        let file = self.open(STATE).map_err(failed)?;
        let mut bytes = Vec::new();
        (&file).take(STATE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        let found = bytes.len() as u64;
        if found > STATE_BYTES_MAX {
            let (token, file) = (self.token.clone(), STATE);
            return Err(CommitError::Length { token, file, found, wanted: STATE_BYTES_MAX });
        }
        let sections =
            codec::from_bytes(&bytes).map_err(|source| CommitError::State { token: self.token.clone(), source })?;
        let sections = sections.iter().map(|section| SectionEntry {
            kind: section.name.kind as u16,
            instance: section.name.instance,
            version: section.version,
        });
        file.sync_all().map_err(failed)?;
        file::make_read_only(&file).map_err(failed)?;
        Ok(StateFile { bytes: found, digest: Digest::of(&bytes), sections: sections.collect() })
    }
}
