//! Changing the volumes of a VM that is there: what its record is to say, and why not. Pure.

use super::record::VmSpec;
use super::volumes::{UsePhase, VolumeUse};
use crate::ids::VolumeId;

/// A change of a VM's volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeChange {
    /// It gets one.
    Attach(VolumeUse),
    /// It gives one up.
    Detach {
        /// Which.
        volume: VolumeId,
        /// Also while requests are under way.
        force: bool,
    },
    /// One has become larger.
    Resized {
        /// Which.
        volume: VolumeId,
        /// Its size in bytes.
        bytes: u64,
    },
}

/// Why a VM's volumes cannot be changed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeChangeError {
    /// It has it.
    #[error("it has {volume} already")]
    Attached {
        /// The volume.
        volume: VolumeId,
    },
    /// All its programs have it as their root, from its launch to its end.
    #[error("{volume} is the root of its guest")]
    Root {
        /// The volume.
        volume: VolumeId,
    },
    /// It does not have it.
    #[error("it does not have {volume}")]
    NotAttached {
        /// The volume.
        volume: VolumeId,
    },
    /// All its slots are used, or it was launched with none.
    #[error("none of its {slots} slots for volumes is free{}", if *.read_only_slots > 0 { ": what is free can only be read" } else { "" })]
    NoSlot {
        /// How many it has.
        slots: usize,
        /// How many are free, but can only be read.
        read_only_slots: usize,
    },
}

impl VolumeChange {
    /// Has the record say what is to be.
    pub(super) fn apply(&self, spec: &mut VmSpec) -> Result<(), VolumeChangeError> {
        match self {
            Self::Attach(wanted) => {
                if uses(spec).any(|used| used.volume == wanted.volume) {
                    return Err(VolumeChangeError::Attached { volume: wanted.volume.clone() });
                }
                let slots = spec.volumes.len();
                let free = || spec.volumes.iter().filter(|slot| slot.used.is_none());
                let read_only_slots = free().filter(|slot| slot.told_read_only).count();
                let fits = |told_read_only: bool| wanted.read_only || !told_read_only;
                let slot = spec.volumes.iter_mut().find(|slot| slot.used.is_none() && fits(slot.told_read_only));
                let slot = slot.ok_or(VolumeChangeError::NoSlot { slots, read_only_slots })?;
                slot.used = Some(VolumeUse { phase: UsePhase::Attaching, ..wanted.clone() });
                Ok(())
            }
            Self::Detach { volume, force } => {
                let used = used(spec, volume)?;
                if used.is_root() {
                    return Err(VolumeChangeError::Root { volume: volume.clone() });
                }
                used.phase = UsePhase::Detaching { force: *force };
                Ok(())
            }
            Self::Resized { volume, bytes } => {
                let used = used(spec, volume)?;
                used.bytes = used.bytes.max(*bytes);
                Ok(())
            }
        }
    }
}

fn uses(spec: &VmSpec) -> impl Iterator<Item = &VolumeUse> {
    spec.volumes.iter().filter_map(|slot| slot.used.as_ref())
}

fn used<'a>(spec: &'a mut VmSpec, volume: &VolumeId) -> Result<&'a mut VolumeUse, VolumeChangeError> {
    let mut uses = spec.volumes.iter_mut().filter_map(|slot| slot.used.as_mut());
    uses.find(|used| used.volume == *volume).ok_or_else(|| VolumeChangeError::NotAttached { volume: volume.clone() })
}
