//! From a partial bundle of which nothing is missing to a bundle.

use std::os::unix::fs::MetadataExt;

use super::PartialError;
use super::install::Partial;
use crate::bundle::commit::{CommitError, Committed};
use crate::bundle::damage::Damage;
use crate::bundle::image::{Image, View, compare};
use crate::bundle::manifest::Manifest;
use crate::bundle::places::MEMORY;
use crate::bundle::signatures::Beside;
use crate::bundle::stage::Staging;
use crate::sys::file;

impl Partial {
    /// Makes a bundle of it, once nothing is missing: makes it durable, compares all of it once more, gives it its name.
    /// It is the same file then, so VMMs that map it go on. A chunk that turns out to be damaged is missing again.
    pub fn publish(&self) -> Result<Committed, PartialError> {
        // Nothing is written from here on.
        let _writing = self.writing();
        self.check_missing()?;
        let failed = |source| PartialError::file(&self.id, self.store.places().partial(&self.id).join(MEMORY), source);
        let Manifest { machine, memory, .. } = &*self.manifest;
        self.memory.sync_all().map_err(failed)?;
        let image = Image::new(&self.memory, machine.memory_bytes, memory.chunk_bytes).map_err(failed)?;
        let damages = compare(View::flat(image), &self.manifest, None, usize::MAX, &mut |_| ()).map_err(failed)?;
        for damage in &damages {
            if let Damage::Chunk { index, .. } = damage {
                self.forget(u32::try_from(*index).unwrap_or(u32::MAX));
            }
        }
        if let Some(damage) = damages.into_iter().next() {
            return Err(PartialError::Damaged { bundle: self.id.clone(), damage });
        }
        self.read_state()?;
        let (id, directory) = (self.id.clone(), self.store.places().partial(&self.id));
        let staging = Staging { store: self.store.clone(), token: id.to_string(), directory };
        let not_committed = |source: CommitError| PartialError::Commit { bundle: id.clone(), source: Box::new(source) };

        let _changes = self.store.lock_changes();
        // It may have been removed, and begun again, since it was opened: what was compared is this file.
        if !self.is_in_place() {
            return Err(PartialError::Unknown { bundle: id });
        }
        file::make_read_only(&self.memory).map_err(failed)?;
        let digest = self.manifest_digest;
        let committed = staging
            .publish_held((id.clone(), digest), Manifest::clone(&self.manifest), Beside::default())
            .map_err(not_committed)?;
        if committed.existed {
            // What stays of it is swept, or removed with its bundle's next part.
            let removing = self.store.places().partial_removing(&id);
            let _ = file::remove_tree(&removing).and_then(|()| std::fs::rename(&staging.directory, &removing));
            let _ = file::remove_tree(&removing);
        }
        // The name below the root is durable; that the other one is gone is as good as said by it.
        let _ = file::sync_parent(&staging.directory);
        Ok(committed)
    }

    fn check_missing(&self) -> Result<(), PartialError> {
        match self.missing() {
            0 => Ok(()),
            chunks => Err(PartialError::Missing { bundle: self.id.clone(), chunks }),
        }
    }

    /// Whether the file that is open here is the one that a bundle would be made of.
    fn is_in_place(&self) -> bool {
        let place = self.store.places().partial(&self.id).join(MEMORY);
        match (std::fs::symlink_metadata(place), self.memory.metadata()) {
            (Ok(found), Ok(open)) => (found.dev(), found.ino()) == (open.dev(), open.ino()),
            (Err(_), _) | (_, Err(_)) => false,
        }
    }
}
