//! The volume daemon as the agent sees it: a process that serves volumes, keeps their leases, and outlives agents.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::record::VolumeSlot;
use crate::ids::{LeaseId, VmId, VolumeId};
use crate::lease::{Epoch, LeaseMode, LeaseSecret};
use crate::wire::volumed::{Answer, Ask, FrameError, Listening, Refusal};

/// Connections that are kept to a VMM for each of its volumes: enough for both processors of a small host, and for a flush
/// beside other requests.
pub(super) const LINES: u8 = 2;

/// Where a volume is to be mounted that the guest has its root file system on.
pub(super) const ROOT: &str = "/";

/// A volume of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeUse {
    /// Which volume.
    pub volume: VolumeId,
    /// The host of the fabric that has it; `None`: this one, which is in no fabric.
    #[serde(default)]
    pub home: Option<u16>,
    /// Its size in bytes, which the guest was told.
    pub bytes: u64,
    /// Refuse the guest's writes.
    pub read_only: bool,
    /// The lease it is used with.
    pub lease: LeaseId,
    /// The epoch the lease is active in, or will be; 0 until the lease is there.
    pub epoch: Epoch,
    /// What the lease's holder knows.
    pub secret: LeaseSecret,
    /// Where the guest has it mounted, if it was asked to.
    #[serde(default)]
    pub mount: Option<String>,
    /// What the guest may do with it.
    #[serde(default)]
    pub limits: VolumeLimits,
    /// The lease that another host's VM takes it over with, and what its holder knows, while its VM is on its way there.
    #[serde(default)]
    pub standby: Option<(LeaseId, LeaseSecret)>,
    /// Whether it is there, coming or going.
    #[serde(default)]
    pub phase: UsePhase,
}

/// What a guest may do with a volume: more waits, and nothing fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeLimits {
    /// Requests per second; `None` is without a bound.
    pub iops: Option<u32>,
    /// Bytes read and written per second; `None` is without a bound.
    pub bytes_per_s: Option<u64>,
}

/// How far a VM is with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum UsePhase {
    /// It has it.
    #[default]
    Attached,
    /// It is getting it.
    Attaching,
    /// It is giving it up.
    Detaching {
        /// Also while requests are under way.
        force: bool,
    },
}

impl VolumeUse {
    /// Whether its VM is to have it.
    pub const fn is_wanted(&self) -> bool {
        !matches!(self.phase, UsePhase::Detaching { .. })
    }

    /// Whether the guest's root file system is on it.
    pub fn is_root(&self) -> bool {
        self.mount.as_deref() == Some(ROOT)
    }

    /// The kind of lease it is used with.
    pub const fn mode(&self) -> LeaseMode {
        if self.read_only { LeaseMode::Shared } else { LeaseMode::Active }
    }
}

/// The volumes of a VM when a change of them came about: who came is there, who went is not.
pub(super) fn settled(slots: &mut [VolumeSlot]) {
    for slot in slots {
        slot.used = slot.used.take().filter(VolumeUse::is_wanted);
        if let Some(used) = &mut slot.used {
            used.phase = UsePhase::Attached;
        }
    }
}

/// What they are to be again when it did not: who came goes, who was to go stays.
pub(super) fn taken_back(slots: &mut [VolumeSlot]) {
    for used in slots.iter_mut().filter_map(|slot| slot.used.as_mut()) {
        used.phase = match used.phase {
            UsePhase::Attached | UsePhase::Detaching { .. } => UsePhase::Attached,
            UsePhase::Attaching => UsePhase::Detaching { force: true },
        };
    }
}

/// How far something is that takes long: bytes done, of all.
pub type VolumeProgress = watch::Sender<(u64, u64)>;

/// Why the volume daemon did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskVolumesError {
    /// It cannot be started.
    #[error("start the volume daemon")]
    Start(#[source] io::Error),
    /// The socket failed: usually the daemon ended.
    #[error("talk to the volume daemon")]
    Socket(#[source] io::Error),
    /// It said something else than an answer.
    #[error("understand the volume daemon")]
    Frame(#[source] FrameError),
    /// It is of a version that this agent cannot speak with.
    #[error("the volume daemon speaks version {speaks} of its protocol: stop the VMs with volumes, then end it")]
    OtherVersion {
        /// The version it speaks.
        speaks: u16,
    },
    /// It did not answer in time.
    #[error("the volume daemon did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
    /// The volume is another host's, and that one does not answer for it.
    #[error("ask host number {home}, which has the volume: {text}")]
    Home {
        /// The host's number.
        home: u16,
        /// What failed.
        text: String,
    },
    /// It answered something that is not an answer to this.
    #[error("the volume daemon answered something else than was asked")]
    Unexpected,
    /// It said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// The volume daemon of this host.
pub trait VolumeHost: Send + Sync + 'static {
    /// Asks it, and starts it first if it does not run. Refusals are errors; `progress` hears how far it is.
    fn ask(
        &self,
        ask: Ask,
        progress: Option<VolumeProgress>,
    ) -> impl Future<Output = Result<Answer, AskVolumesError>> + Send;

    /// Whether there is, or was, any volume here: a host without one needs no daemon.
    fn is_used(&self) -> bool;

    /// Has it run, and resolves when it ended or hangs up. An error: it cannot be started, or not be spoken to.
    fn watch(&self) -> impl Future<Output = Result<(), AskVolumesError>> + Send;

    /// The socket of a VM's slot, which the daemon connects to.
    fn socket(&self, vm: &VmId, slot: u8) -> PathBuf;

    /// Has it serve other hosts of the fabric; where. `None`: this host is in no fabric.
    fn listen(&self) -> impl Future<Output = Result<Option<Listening>, AskVolumesError>> + Send;
}
