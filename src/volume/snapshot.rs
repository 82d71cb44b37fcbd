//! Snapshots: what a volume held at some moment. Read only, for ever.

use super::about::SnapshotAbout;
use super::chunk::range_in;
use super::error::{Damage, VolumeError};
use super::live::{Changed, Frozen};
use super::view::{StatusRun, View};
use crate::ids::{VolumeId, VolumeSnapshotId};

/// A snapshot, open for as long as its store is.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) about: SnapshotAbout,
    pub(super) view: View,
    pub(super) generation: u32,
    pub(super) incomplete_to: u32,
    pub(super) damage: Vec<Damage>,
}

/// What can be said of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: VolumeSnapshotId,
    /// Its name.
    pub name: String,
    /// The volume it is of, if that is known.
    pub volume: Option<VolumeId>,
    /// Its size.
    pub size_bytes: u64,
    /// How many layers its chunks lie in.
    pub layers: usize,
    /// The volume's generation up to which changes are in it.
    pub generation: u32,
    /// What is wrong with it.
    pub damage: Vec<Damage>,
    /// When it was made, in ms since the Unix epoch.
    pub created_ms: u64,
}

impl Snapshot {
    /// Its id.
    pub const fn id(&self) -> &VolumeSnapshotId {
        &self.about.id
    }

    /// Its size in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.view.size_bytes
    }

    /// Reads as many bytes as the buffer has.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        range_in(&self.view.subject, offset, buffer.len() as u64, self.view.size_bytes)?;
        self.view.read(buffer, offset)
    }

    /// Which parts of a range are data, at most `runs_max` from its start on.
    pub fn status(&self, offset: u64, length: u64, runs_max: usize) -> Result<Vec<StatusRun>, VolumeError> {
        let range = range_in(&self.view.subject, offset, length, self.view.size_bytes)?;
        self.view.status(&range, runs_max)
    }

    /// Digest (blake3) of all its bytes.
    pub fn digest(&self, on_progress: super::OnProgress<'_>) -> Result<[u8; 32], VolumeError> {
        let status = |offset, length| self.status(offset, length, 1);
        super::digest::digest(self.size_bytes(), status, |buffer, offset| self.read_at(buffer, offset), on_progress)
    }

    /// What was written after a generation of the volume, up to this snapshot.
    pub fn changed_since(&self, generation: u32) -> Changed {
        Changed {
            chunks: self.view.map.touched_after(generation),
            complete: generation >= self.incomplete_to && self.damage.is_empty(),
            generation: self.generation,
        }
    }

    /// What can be said of it.
    pub fn info(&self) -> SnapshotInfo {
        let SnapshotAbout { id, name, created_ms, volume, .. } = self.about.clone();
        SnapshotInfo {
            id,
            name,
            volume,
            size_bytes: self.view.size_bytes,
            layers: self.view.slots.iter().filter(|slot| slot.layer.is_some()).count(),
            generation: self.generation,
            damage: self.damage.clone(),
            created_ms,
        }
    }

    /// What a clone begins with.
    pub(super) fn frozen(&self) -> Result<Frozen, VolumeError> {
        if let Some(damage) = self.damage.first() {
            return Err(VolumeError::Damaged { subject: self.view.subject.clone(), damage: damage.clone() });
        }
        Ok(Frozen {
            size_bytes: self.view.size_bytes,
            generation: self.generation,
            incomplete_to: self.incomplete_to,
            slots: self.view.slots.clone(),
            runs: self.view.map.runs(),
        })
    }
}
