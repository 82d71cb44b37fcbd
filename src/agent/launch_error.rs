//! Why a VM is not made, and whether asking again helps.

use super::bundles::BundleError;
use super::cluster_error::ClusterError;
use super::cluster_record::EXECUTOR_BYTES_MAX;
use super::images::ImageError;
use super::ledger::LedgerError;
use super::room::NoRoom;
use super::self_door::{MEMBERS_AT_ONCE_MAX, ROLE_BYTES_MAX};
use super::session_error::SessionError;
use super::volume_door::VolumeError;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::units::NetLimitError;

/// Why no VM was made. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Not a name.
    #[error("{name:?} is not a name: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// A VM has this name.
    #[error("there is a VM named {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The image is not usable.
    #[error("use the image")]
    Image(#[source] ImageError),
    /// The bundle is not usable.
    #[error("use the bundle")]
    Bundle(#[source] BundleError),
    /// A bundle is launched as it is.
    #[error("{what} {found}: bundle {bundle} was frozen with {frozen}, and is launched with that")]
    BundleShape {
        /// The bundle.
        bundle: BundleId,
        /// What.
        what: &'static str,
        /// What was asked for.
        found: u64,
        /// What the bundle has.
        frozen: u64,
    },
    /// The bundle to build cannot have its name.
    #[error(transparent)]
    BundleToBuild(BundleError),
    /// Nobody can mean this.
    #[error("{reason}")]
    Build {
        /// What is wrong.
        reason: String,
    },
    /// Too few or too many vCPUs.
    #[error("vcpus {found}: 1 to {max} are possible")]
    Vcpus {
        /// What was asked for.
        found: u32,
        /// The most there can be.
        max: u32,
    },
    /// Less memory than the image needs.
    #[error("memory {found_mib} MiB: image {image:?} needs at least {min_mib} MiB")]
    MemoryTooSmall {
        /// The image.
        image: String,
        /// What was asked for.
        found_mib: u64,
        /// What is needed.
        min_mib: u64,
    },
    /// More memory than is free.
    #[error("memory {found_mib} MiB: {free_mib} MiB of this host's {total_mib} MiB are free for VMs")]
    MemoryTooLarge {
        /// What was asked for.
        found_mib: u64,
        /// What is free.
        free_mib: u64,
        /// What the host has.
        total_mib: u64,
    },
    /// The kernel would cut the command line off.
    #[error("the command line of image {image:?} is {found} bytes long with this host's additions: at most {max} fit")]
    CommandLine {
        /// The image.
        image: String,
        /// How long it is.
        found: usize,
        /// How long it may be.
        max: usize,
    },
    /// A volume cannot be had.
    #[error(transparent)]
    Volume(VolumeError),
    /// A volume is named twice.
    #[error("volume {volume:?} is named twice")]
    VolumeTwice {
        /// The word.
        volume: String,
    },
    /// A guest that becomes a bundle takes no volume along: its clones could not all have it.
    #[error("a bundle has no volumes: build it with spare disks, and give volumes to what is launched from it")]
    VolumesInBuild,
    /// Where a volume is to be mounted.
    #[error("{mount:?} is not an absolute path of a directory")]
    Mount {
        /// The word.
        mount: String,
    },
    /// A guest has one root.
    #[error("volumes {first:?} and {second:?} are both to be the root of the guest")]
    TwoRoots {
        /// The first.
        first: String,
        /// Another.
        second: String,
    },
    /// A guest from a bundle goes on where it was frozen.
    #[error(
        "volume {volume:?} cannot be the root of a guest from a bundle, which has the root that it was frozen with"
    )]
    RootInBundle {
        /// The volume.
        volume: String,
    },
    /// More disks than slots.
    #[error("{found} disks: at most 6 are possible")]
    TooManyDisks {
        /// How many.
        found: usize,
    },
    /// Not a path of a disk.
    #[error("{path:?} is not an absolute path")]
    DiskPath {
        /// What was given.
        path: String,
    },
    /// Somebody writes this disk.
    #[error("disk {path:?} is used by another VM, and one of them would write it")]
    DiskInUse {
        /// Its path.
        path: String,
    },
    /// The disk cannot be opened.
    #[error("open disk {path:?}")]
    Disk {
        /// Its path.
        path: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Nobody can mean such a limit.
    #[error(transparent)]
    NetworkLimits(#[from] NetLimitError),
    /// This host has its most VMs.
    #[error("this host has {max} VMs, which is its limit; remove some")]
    TooManyVms {
        /// The limit.
        max: u32,
    },
    /// All user ids rest.
    #[error("no user id is free for the VM")]
    NoUid,
    /// The session does not take it.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// An addressing without addresses.
    #[error("addressing without a session: a VM without one has no addresses")]
    AddressingWithoutSession,
    /// Only a bundle comes piece by piece.
    #[error("lazy without a bundle: an image is read as a whole before its guest boots")]
    LazyWithoutBundle,
    /// Not a role.
    #[error("{role:?} is not a role: 1 to {ROLE_BYTES_MAX} bytes without control characters")]
    Role {
        /// What was given.
        role: String,
    },
    /// None, or more at once than is possible.
    #[error("count {found}: 1 to {MEMBERS_AT_ONCE_MAX} are possible")]
    Count {
        /// What was asked for.
        found: u32,
    },
    /// No, or too many, interfaces.
    #[error("{found} network interfaces: 1 to {max} are possible")]
    Interfaces {
        /// What was asked for.
        found: u8,
        /// The most there can be.
        max: u8,
    },
    /// Too many published ports.
    #[error("{found} published ports: at most {max} are possible")]
    TooManyPorts {
        /// How many.
        found: usize,
        /// The most there can be.
        max: usize,
    },
    /// Not ports.
    #[error("publish {host_port}:{guest_port}: two ports of TCP or UDP, 1 to 65535, are possible")]
    Port {
        /// The host's.
        host_port: u16,
        /// The VM's.
        guest_port: u16,
    },
    /// Another VM has the port.
    #[error("port {port} of this host leads to another VM")]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// Published ports need a session.
    #[error("published ports without a session lead nowhere: name a session")]
    PublishedWithoutSession,
    /// The cluster does not take it.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Not an executor id.
    #[error("{found:?} is not an executor id: 1 to {EXECUTOR_BYTES_MAX} of a-z, A-Z, 0-9, `.`, `_` and `-`")]
    ExecutorId {
        /// What was given.
        found: String,
    },
    /// A living member has it.
    #[error("cluster {cluster} has a living member {executor_id:?}")]
    ExecutorTaken {
        /// The executor id.
        executor_id: String,
        /// The cluster.
        cluster: String,
    },
    /// The key was used for something else.
    #[error("the idempotency key was used with another body")]
    KeyMismatch,
    /// No new work is taken now.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It could not be recorded.
    #[error("record the VM")]
    Ledger(#[source] LedgerError),
}

impl LaunchError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Name { .. }
            | Self::NameTaken { .. }
            | Self::Vcpus { .. }
            | Self::MemoryTooSmall { .. }
            | Self::CommandLine { .. }
            | Self::TooManyDisks { .. }
            | Self::DiskPath { .. }
            | Self::DiskInUse { .. }
            | Self::Disk { .. }
            | Self::Role { .. }
            | Self::Count { .. }
            | Self::NetworkLimits(_)
            | Self::AddressingWithoutSession
            | Self::LazyWithoutBundle
            | Self::PublishedWithoutSession
            | Self::Interfaces { .. }
            | Self::TooManyPorts { .. }
            | Self::Port { .. }
            | Self::PortTaken { .. }
            | Self::BundleShape { .. }
            | Self::Build { .. }
            | Self::ExecutorId { .. }
            | Self::ExecutorTaken { .. }
            | Self::VolumeTwice { .. }
            | Self::VolumesInBuild
            | Self::Mount { .. }
            | Self::TwoRoots { .. }
            | Self::RootInBundle { .. }
            | Self::Volume(_)
            | Self::KeyMismatch => Retry::WithChange,
            Self::Image(error) => error.retry(),
            Self::Bundle(error) | Self::BundleToBuild(error) => error.retry(),
            Self::Session(error) => error.retry(),
            Self::Cluster(error) => error.retry(),
            Self::MemoryTooLarge { found_mib, total_mib, .. } if found_mib > total_mib => Retry::WithChange,
            Self::NoRoom(error) => error.retry(),
            Self::MemoryTooLarge { .. } | Self::TooManyVms { .. } | Self::NoUid | Self::Ending | Self::Host { .. } => {
                Retry::Later
            }
            Self::Ledger(error) => error.retry(),
        }
    }
}
