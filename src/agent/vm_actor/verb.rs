//! What can be asked of a VM, and why it is not done.

use std::time::Duration;

use super::INBOX_MAX;
use crate::agent::migration_record::MigrationRecord;
use crate::agent::record::{BundleOrder, SwapPolicy, VmSpec, WakeCause};
use crate::agent::vm_state::{Denied, SwapMode};
use crate::agent::volume_change::{VolumeChange, VolumeChangeError};
use crate::ids::MigrationId;
use crate::report::Retry;

/// How a VM's memory is to be moved out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwapOrder {
    /// Where to.
    pub mode: SwapMode,
    /// When it wakes by itself, from then on.
    pub wake_after: Option<Duration>,
    /// Who wants it, for people.
    pub because: String,
}

/// What another host says of a VM that it hands over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// From where, by which migration.
    pub way: MigrationRecord,
    /// What it is.
    pub spec: VmSpec,
    /// The protocol its guest's agent speaks.
    pub guest_protocol: Option<u16>,
}

/// What can be asked of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verb {
    /// Make a bundle of it.
    Snapshot(Box<BundleOrder>),
    /// Have another VMM process, of this agent's version, take it over.
    HandOver,
    /// Have other volumes.
    ChangeVolumes(Box<VolumeChange>),
    /// Move it to another host.
    Migrate(MigrationRecord),
    /// Have it stay, if it is on its way to another host by this migration.
    CancelMigration(MigrationId),
    /// Take it from another host, to which it was moved.
    Arrive(Box<Arrival>),
    /// Move its memory out.
    SwapOut(SwapOrder),
    /// Bring it back.
    Wake(WakeCause),
    /// From now on, when its memory is moved out.
    SetSwapPolicy(SwapPolicy),
    /// Forget what is here of one that went another host's way by this migration, as it is gone there.
    ForgetAway(MigrationId),
    /// Hold its vCPUs.
    Pause,
    /// Let its vCPUs run again and set its clock.
    Resume,
    /// Shut its guest down, then end it. Zero grace ends it at once.
    Stop {
        /// How long the guest may take to power off.
        grace: Duration,
    },
    /// Stop it and forget it.
    Remove {
        /// How long the guest may take to power off.
        grace: Duration,
    },
}

/// Why a verb was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum VerbError {
    /// Not in this state.
    #[error("{verb} {vm}")]
    Denied {
        /// What was asked.
        verb: &'static str,
        /// Of which VM.
        vm: String,
        /// In which state it is.
        #[source]
        source: Denied,
    },
    /// Too many requests wait for this VM.
    #[error("{vm} has {INBOX_MAX} requests waiting")]
    Busy {
        /// The VM.
        vm: String,
    },
    /// Some of its memory is still on its way to this host.
    #[error("{verb} {vm}: {mapped} of the {chunks} chunks of its memory are here by now")]
    Filling {
        /// What was asked.
        verb: &'static str,
        /// Of which VM.
        vm: String,
        /// Chunks that are here.
        mapped: u32,
        /// Chunks of all of it.
        chunks: u32,
    },
    /// What was found of it contradicts itself.
    #[error("{verb} {vm}: it is in quarantine: {report}")]
    Quarantined {
        /// What was asked.
        verb: &'static str,
        /// Of which VM.
        vm: String,
        /// What was found.
        report: String,
    },
    /// A bundle has no volumes.
    #[error("snapshot {vm}: it has {volumes} volumes, and a bundle has none")]
    HasVolumes {
        /// The VM.
        vm: String,
        /// How many it has.
        volumes: usize,
    },
    /// Its volumes cannot be so.
    #[error("change the volumes of {vm}: {refused}")]
    Volume {
        /// Of which VM.
        vm: String,
        /// Why not.
        refused: VolumeChangeError,
    },
    /// It was forgotten, or the agent is ending.
    #[error("{vm} is gone")]
    Gone {
        /// The VM.
        vm: String,
    },
    /// It was tried and failed.
    #[error("{verb} {vm}: {message}")]
    Failed {
        /// What was asked.
        verb: &'static str,
        /// Of which VM.
        vm: String,
        /// The cause's name.
        code: String,
        /// What happened.
        message: String,
    },
}

impl VerbError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Denied { .. } | Self::Quarantined { .. } | Self::Volume { .. } | Self::HasVolumes { .. } => {
                Retry::WithChange
            }
            Self::Busy { .. } | Self::Filling { .. } | Self::Failed { .. } => Retry::Later,
            Self::Gone { .. } => Retry::Never,
        }
    }
}

impl Verb {
    /// The verb's name.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Snapshot(_) => "snapshot",
            Self::HandOver => "hand-over",
            Self::ChangeVolumes(_) => "change the volumes of",
            Self::Migrate(_) => "migrate",
            Self::CancelMigration(_) => "cancel the migration of",
            Self::Arrive(_) => "take back",
            Self::ForgetAway(_) => "forget",
            Self::SwapOut(_) => "swap-out",
            Self::Wake(_) => "wake",
            Self::SetSwapPolicy(_) => "set the swap policy of",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop { .. } => "stop",
            Self::Remove { .. } => "remove",
        }
    }
}
