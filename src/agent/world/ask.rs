//! What a VMM is asked, and what it is asked about: names of things on this host, opened by whoever sends them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::FillingPort;
use crate::agent::migration_record::MovePolicy;
use crate::agent::record::DiskSpec;
use crate::bundle::Partial;
use crate::bundle::working_set::WorkingSet;
use crate::ids::BundleId;
use crate::units::NetLimits;
use crate::wire::control::{
    AttachVolumeSpec, PackedPhases, SavedPages, SealingKey, SendPhases, StreamForm, StreamKey, StreamTls, StreamToken,
};

/// Who one end of a migration's stream is.
#[derive(Debug, Clone)]
pub struct StreamIdentity {
    /// Its certificate, DER.
    pub certificate: Vec<u8>,
    /// The certificate's key.
    pub key: StreamKey,
}

/// What both ends of a migration's stream know.
#[derive(Debug, Clone)]
pub struct StreamTerms {
    /// What it begins with.
    pub token: StreamToken,
    /// How it is encrypted.
    pub tls: StreamTls,
}

/// Where to send a machine.
#[derive(Debug, Clone)]
pub struct SendOrder {
    /// Where it is waited for.
    pub to: SocketAddr,
    /// What both ends know.
    pub terms: StreamTerms,
    /// How it is sent.
    pub policy: MovePolicy,
    /// In frames of which form: one that the VMM can write and the other end can read.
    pub form: StreamForm,
    /// Whether the other end has the bundle it was launched from: then only what differs is sent.
    pub is_base_there: bool,
}

/// What sending a machine took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SentMachine {
    /// Where its time went.
    pub phases: SendPhases,
    /// What packing made of its pages.
    pub packed: PackedPhases,
}

/// From where to receive a machine.
#[derive(Debug, Clone)]
pub struct ReceiveOrder {
    /// The other host's address.
    pub from: IpAddr,
    /// What both ends know.
    pub terms: StreamTerms,
    /// Number of connections that come.
    pub connections: u8,
    /// Whether the record's bundle is what the machine differs from, and only that is sent.
    pub on_base: bool,
}

/// What to ask a VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// What it is doing.
    Status,
    /// Build the machine.
    Launch(LaunchPlan),
    /// Build the machine as it was saved in a bundle.
    Restore(RestorePlan),
    /// Write the machine, which is held, to files of the bundle store.
    Save {
        /// Which pages of memory.
        pages: SavedPages,
    },
    /// Map these pages of the machine's memory image ahead of their use.
    Prefault(WorkingSet),
    /// Write the machine's memory to files of the bundle store while it runs, until little is left.
    CopyMemory {
        /// Which pages of memory.
        pages: SavedPages,
    },
    /// Write what such a copy left of the machine, which is held now.
    SaveRest {
        /// Which pages of memory: those that were copied.
        pages: SavedPages,
    },
    /// Write the machine, which is held, encrypted to a file of the VM's directory.
    Seal {
        /// Which pages of memory.
        pages: SavedPages,
        /// The file's key.
        key: SealingKey,
    },
    /// Build the machine from such a file.
    Unseal(UnsealPlan),
    /// Give up sending the machine.
    CancelSend,
    /// How far sending it is.
    SendProgress,
    /// Hold the vCPUs.
    Pause,
    /// Let the vCPUs run.
    Resume,
    /// What passed its network interfaces.
    Network,
    /// Take the tap of this interface anew: the one it has was deleted.
    ReplaceTap {
        /// Which interface.
        index: u8,
    },
    /// What its balloon holds.
    Balloon {
        /// What it is to hold from now on.
        target_bytes: Option<u64>,
    },
    /// Attach a volume to a volume slot that has none.
    AttachVolume(AttachVolumeSpec),
    /// Leave a volume slot without a volume.
    DetachVolume {
        /// Which slot.
        index: u8,
        /// Also with requests under way, which fail.
        force: bool,
    },
    /// A volume has become larger.
    ResizeVolume {
        /// Which slot.
        index: u8,
        /// Its size from now on.
        bytes: u64,
    },
    /// Bound what the guest may do with a volume, until it is detached.
    LimitVolume {
        /// Which slot.
        index: u8,
        /// Requests per second; `None` is without a bound.
        iops: Option<u32>,
        /// Bytes read and written per second; `None` is without a bound.
        bytes_per_s: Option<u64>,
    },
    /// How its volume slots are.
    Volumes,
}

/// A machine to build: names of things on this host, opened by whoever sends them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// The image's name.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The whole kernel command line, but for the words that announce devices.
    pub command_line: String,
    /// Raw files to attach.
    pub disks: Vec<DiskSpec>,
    /// What may pass its network interface.
    pub network_limits: NetLimits,
}

/// A machine to build from a bundle: names of things on this host, opened by whoever sends them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePlan {
    /// The bundle.
    pub bundle: BundleId,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Raw files to attach.
    pub disks: Vec<DiskSpec>,
    /// What may pass its network interface.
    pub network_limits: NetLimits,
    /// What there is of the bundle, if it is not whole.
    pub filling: Option<FillingPlan>,
}

/// What there is of a bundle that is not whole, and how what is missing comes.
#[derive(Debug, Clone)]
pub struct FillingPlan {
    /// What there is.
    pub partial: Arc<Partial>,
    /// By the connections that come here.
    pub port: FillingPort,
}

impl PartialEq for FillingPlan {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.partial, &other.partial) && self.port == other.port
    }
}

impl Eq for FillingPlan {}

/// A machine to build from its sealed file: names of things on this host, opened by whoever sends them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsealPlan {
    /// The bundle it was sealed as the difference to.
    pub bundle: Option<BundleId>,
    /// The file's key.
    pub key: SealingKey,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Raw files to attach.
    pub disks: Vec<DiskSpec>,
    /// What may pass its network interface.
    pub network_limits: NetLimits,
}
