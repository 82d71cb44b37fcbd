//! What the ledger keeps: VMs, operations, events. These types are the schema: each change of one that older
//! records do not fit raises [`SCHEMA_VERSION`] and adds a migration.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::cluster_record::{Membership, Registered};
use super::effect::Effect;
use super::migration_record::{MigrationRecord, MoveRecord};
use super::session_record::NetworkRecord;
use super::vm_state::{Goal, SwapMode, VmState};
use super::volumes::VolumeUse;
use crate::bundle::admit::GuestNeeds;
use crate::clock::UnixNanos;
use crate::ids::{BundleId, ClusterId, MigrationId, OperationId, ParseIdError, SessionId, VmId};
use crate::report::Retry;
use crate::units::NetLimits;
use crate::wire::control::Nonce;

/// Version of the JSON in records.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Its id.
    pub id: VmId,
    /// Its name, unique on this host, if it has one.
    pub name: Option<String>,
    /// What it is doing.
    pub state: VmState,
    /// Counts the changes of this record, from 1.
    pub revision: u64,
    /// What was asked for.
    pub spec: VmSpec,
    /// 32 hexadecimal digits that differ for every launch.
    pub generation: String,
    /// The user id of its VMM.
    pub uid: u32,
    /// The number of its jail, the network namespace it lives in: no two records on a host have the same.
    pub jail: u16,
    /// Its place in its session; `None` for a VM without one.
    #[serde(default)]
    pub network: Option<NetworkRecord>,
    /// Its registration with its cluster, once there is one.
    #[serde(default)]
    pub registration: Option<Registered>,
    /// The secret its VMM was started with.
    pub nonce: Nonce,
    /// Its VMM process, once started.
    pub process: Option<ProcessRecord>,
    /// The operation that works on it, or the last one that did.
    pub operation: Option<OperationId>,
    /// The version of the control protocol its VMM was started with.
    #[serde(default = "first_wire_version")]
    pub wire_version: u16,
    /// Why nothing is done with it, when an agent could not make out what it found.
    #[serde(default)]
    pub quarantine: Option<QuarantineRecord>,
    /// Why and until when its memory is out, while it is.
    #[serde(default)]
    pub swap: Option<SwapRecord>,
    /// Its last way to or from another host; the one it is on, while it is on one.
    #[serde(default)]
    pub migration: Option<MigrationRecord>,
    /// The migration it came here by, if it did.
    #[serde(default)]
    pub came_by: Option<MigrationId>,
    /// What its guest needs of a host, if it was booted on another one.
    #[serde(default)]
    pub needs: Option<GuestNeeds>,
    /// The version of the protocol its guest agent speaks, once it answered.
    #[serde(default)]
    pub guest_protocol: Option<u16>,
    /// Names of secrets that its guest said it holds when it was paused; `None`: it did not say.
    #[serde(default)]
    pub secrets: Option<Vec<String>>,
    /// When it was asked for.
    pub created_at: UnixNanos,
    /// Where the time of its launch went.
    pub timings: Timings,
    /// What was left when it ended.
    pub remains: Option<Remains>,
}

impl VmRecord {
    /// The guest's host name: the VM's name or, without one, its id.
    pub fn hostname(&self) -> &str {
        self.name.as_deref().unwrap_or(self.id.as_str())
    }

    /// Where its memory is or is being moved to or from, if it is not all here.
    pub const fn swap_mode(&self) -> Option<SwapMode> {
        match self.state {
            VmState::SwappingOut { mode } | VmState::SwappedOut { mode } | VmState::Waking { mode } => Some(mode),
            VmState::Reserved
            | VmState::Launching
            | VmState::Registering
            | VmState::Running
            | VmState::Paused
            | VmState::Saving { .. }
            | VmState::HandingOver { .. }
            | VmState::ChangingVolumes { .. }
            | VmState::Sending
            | VmState::HandedOver
            | VmState::Arriving { .. }
            | VmState::Stopping
            | VmState::Stopped
            | VmState::Failed { .. }
            | VmState::Gone => None,
        }
    }

    /// Whether its memory is in the host's swap, and its process there.
    pub const fn is_paged(&self) -> bool {
        matches!(self.state, VmState::SwappedOut { mode: SwapMode::Page })
    }

    /// Whether its addresses are of this host's subnet: it has some, and did not bring them from elsewhere.
    pub fn is_at_home(&self) -> bool {
        self.network.as_ref().is_some_and(|network| network.home.is_none())
    }

    /// Whether it is on its way, or ended while it was, and the lease service has not said yet whose it is.
    pub fn is_undecided(&self) -> bool {
        let mut written = self.spec.volume_uses().map(|(_, used)| used).filter(|used| !used.read_only);
        written.next().is_some_and(|first| first.standby.is_some())
    }

    /// Its addresses, IPv6 first. One that ended has none: they rest, and are somebody else's then.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let Some(network) = self.network.as_ref().filter(|_| self.state.holds_resources()) else { return Vec::new() };
        std::iter::once(IpAddr::V6(network.ipv6)).chain(network.ipv4.map(IpAddr::V4)).collect()
    }
}

/// VMMs of agents that did not write this down.
const fn first_wire_version() -> u16 {
    1
}

/// A VM that is left alone, as what was found of it contradicts itself. It can be stopped and removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineRecord {
    /// Since when.
    pub at: UnixNanos,
    /// What was found, for people.
    pub report: String,
}

/// A VM whose memory is out, or on its way there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapRecord {
    /// When it stood still.
    pub at: UnixNanos,
    /// Who wanted it, for people.
    pub because: String,
    /// When it wakes by itself, if nothing wakes it before.
    pub wake_at: Option<UnixNanos>,
}

/// When a VM's memory is moved out, and what brings it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapPolicy {
    /// Where to; `None`: only when somebody asks for it.
    pub mode: Option<SwapMode>,
    /// Seconds it has to be idle before it is moved out without need of memory; 0: only with need.
    pub idle_s: u32,
    /// Seconds it runs at least between two times.
    pub min_resident_s: u32,
    /// Those with less are moved out first.
    pub priority: u8,
    /// What wakes it.
    pub wake: BTreeSet<WakeCause>,
}

impl Default for SwapPolicy {
    fn default() -> Self {
        let wake = [WakeCause::Api, WakeCause::Packet, WakeCause::Timer, WakeCause::Vsock].into();
        // A minute: a wake costs tens of milliseconds, so that even one a minute is less than a thousandth of the time.
        Self { mode: None, idle_s: 0, min_resident_s: 60, priority: 100, wake }
    }
}

/// What brings a VM's memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WakeCause {
    /// Somebody asks for it.
    Api,
    /// A packet for it.
    Packet,
    /// The time it was to wake by itself.
    Timer,
    /// Somebody connects to its guest: a program to run, a console to see.
    Vsock,
}

impl WakeCause {
    /// The cause's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Packet => "packet",
            Self::Timer => "timer",
            Self::Vsock => "vsock",
        }
    }
}

/// What was asked for when a VM was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Name of the image.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Raw files to attach as block devices, in order.
    pub disks: Vec<DiskSpec>,
    /// What it is in its session, for those who look: at most [`super::ROLE_BYTES_MAX`] bytes.
    #[serde(default)]
    pub role: Option<String>,
    /// What may pass its network interface.
    #[serde(default)]
    pub network_limits: NetLimits,
    /// How many network interfaces it has. The first is in its session; the others lead nowhere yet.
    #[serde(default = "one")]
    pub interfaces: u8,
    /// The bundle it is launched from, with the image that was booted for that; `None`: it boots the image.
    #[serde(default)]
    pub bundle: Option<BundleId>,
    /// Whether it may be launched while some of its bundle's memory is still on its way here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lazy: bool,
    /// How it becomes a bundle, if it is there for that.
    #[serde(default)]
    pub build: Option<BuildSpec>,
    /// What it is to its cluster; `None`: it is in none.
    #[serde(default)]
    pub cluster: Option<Membership>,
    /// When its memory is moved out.
    #[serde(default)]
    pub swap: SwapPolicy,
    /// Whether it has a memory balloon: those of earlier agents, and of bundles made without one, have none.
    #[serde(default)]
    pub balloon: bool,
    /// Its slots for volumes, behind its disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeSlot>,
}

impl VmSpec {
    /// The number of a volume slot among its block devices.
    pub fn volume_index(&self, slot: usize) -> u8 {
        u8::try_from(self.disks.len().saturating_add(slot)).unwrap_or(u8::MAX)
    }

    /// The volumes it has, or is getting, or giving up, each with its number among the block devices.
    pub fn volume_uses(&self) -> impl Iterator<Item = (u8, &VolumeUse)> {
        let slots = self.volumes.iter().enumerate();
        slots.filter_map(|(slot, of)| Some((self.volume_index(slot), of.used.as_ref()?)))
    }

    /// The volume that its guest has its root on, if it has it on one.
    pub fn root(&self) -> Option<(u8, &VolumeUse)> {
        self.volume_uses().find(|(_, used)| used.is_root())
    }
}

/// A slot for a volume, which the guest has as a disk for as long as it lives.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeSlot {
    /// Whether the guest was told that it cannot be written when it found it.
    #[serde(default)]
    pub told_read_only: bool,
    /// The volume in it; `None`: it is free, and the guest's disk is empty.
    #[serde(default)]
    pub used: Option<VolumeUse>,
}

/// How a guest is made ready to become a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSpec {
    /// A line for the guest's shell that warms it up.
    pub warmup: Option<String>,
    /// What the program, or without one the guest's console, says when it is warm. A program that says so runs on.
    pub ready_marker: Option<String>,
    /// How long that may take, in seconds.
    pub timeout_s: u32,
}

/// The bundle an operation makes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BundleOrder {
    /// Its label.
    pub name: Option<String>,
    /// The bundle it holds the difference to; `None`: it is whole.
    pub parent: Option<BundleId>,
    /// Whether most of memory is copied while the guest runs.
    #[serde(default)]
    pub live: bool,
    /// Whether it is made although the guest says that it holds secrets.
    #[serde(default)]
    pub with_secrets: bool,
    /// In how many rounds it was, once it was.
    #[serde(default)]
    pub rounds: Option<u32>,
    /// Its id, once it is there.
    pub bundle: Option<BundleId>,
    /// How long no vCPU ran, in microseconds.
    pub pause_us: Option<u64>,
    /// Bytes of guest memory that were written.
    pub memory_bytes: Option<u64>,
    /// Whether the guest's file systems came to rest in time.
    pub quiesced: Option<bool>,
}

const fn one() -> u8 {
    1
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Absolute path of a raw file or block device.
    pub path: String,
    /// Refuse the guest's writes.
    pub read_only: bool,
    /// Other hosts see the same file at this path: its VM can go there.
    #[serde(default)]
    pub shared: bool,
}

/// Names a process even after its pid is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Process id on the host.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_ticks: u64,
}

/// Microseconds each part of a launch took. Absent: not reached, or an agent restart lies between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timings {
    /// From the request until the VMM process was there.
    pub spawn_us: Option<u64>,
    /// Making the jail and opening it for the VM.
    #[serde(default)]
    pub network_us: Option<u64>,
    /// From sending the launch until the machine was built.
    pub build_us: Option<u64>,
    /// From the request until the vCPUs ran.
    #[serde(default)]
    pub resumed_us: Option<u64>,
    /// From the request until the guest's agent first answered.
    #[serde(default)]
    pub answered_us: Option<u64>,
    /// From the request until the guest had registered with its cluster.
    #[serde(default)]
    pub registered_us: Option<u64>,
    /// Making the VM, its memory and interrupt controllers (told by the VMM).
    pub vm_us: Option<u64>,
    /// Loading kernel and initrd (told by the VMM).
    pub load_us: Option<u64>,
    /// Making devices and vCPUs (told by the VMM).
    pub devices_us: Option<u64>,
    /// From the first resume to the first vCPU's entry into the guest (told by the VMM).
    pub first_entry_us: Option<u64>,
    /// From the guest kernel's start to the guest agent's start (told by the guest).
    pub kernel_us: Option<u64>,
    /// From the guest agent's start until it answered.
    pub init_us: Option<u64>,
    /// From the request until the VM was running.
    pub total_us: Option<u64>,
}

/// What was left when a VM ended, bounded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Remains {
    /// When it was looked at.
    pub at: Option<UnixNanos>,
    /// Why the guest or the VMM ended, by the VMM's last words: `guest_powered_off`, `stopped` ...
    #[serde(default)]
    pub cause: Option<String>,
    /// How the VMM's process ended, if known: `exit code 1`, `signal 9`.
    pub exit: Option<String>,
    /// Its last words.
    pub last_words: Option<String>,
    /// The last lines on the guest's console.
    pub console: Vec<String>,
    /// The last lines of the VMM's log.
    pub log: Vec<String>,
}

/// How far an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Being worked on.
    Running,
    /// Done.
    Succeeded,
    /// Not done; see its error.
    Failed,
    /// Given up for another operation (a stop during a launch).
    Cancelled,
}

impl OperationState {
    /// The state's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A piece of work on a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// Its id.
    pub id: OperationId,
    /// The VM it is for.
    pub vm: VmId,
    /// What it leads to.
    pub goal: Goal,
    /// Whether the VM is forgotten once this is done (`rm` of a VM that runs).
    pub then_remove: bool,
    /// How far it is.
    pub state: OperationState,
    /// Its steps, in order.
    pub steps: Vec<StepRecord>,
    /// The bundle it makes, if it does.
    #[serde(default)]
    pub makes: Option<BundleOrder>,
    /// What moving the machine to another process took, if it does.
    #[serde(default)]
    pub moved: Option<MoveRecord>,
    /// The migration it is a part of, if it is.
    #[serde(default)]
    pub migration: Option<MigrationRecord>,
    /// Why it failed.
    pub error: Option<OperationError>,
    /// When it began.
    pub created_at: UnixNanos,
    /// When it ended.
    pub ended_at: Option<UnixNanos>,
}

impl OperationRecord {
    /// Whether there is a bundle of it: that is recorded together with the step that makes it, for good.
    pub(crate) fn has_made_its_bundle(&self) -> bool {
        self.makes.as_ref().is_some_and(|order| order.bundle.is_some())
    }
}

/// One step of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// What is done.
    pub effect: Effect,
    /// How far it is.
    pub state: StepState,
    /// How long it took, in microseconds.
    pub took_us: Option<u64>,
    /// What is worth knowing about it: why it failed.
    pub note: Option<String>,
}

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Recorded, not done yet as far as is known.
    Pending,
    /// Done.
    Done,
    /// Failed.
    Failed,
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationError {
    /// The cause's name.
    pub code: String,
    /// What happened, as a chain.
    pub message: String,
    /// Whether to try again.
    pub retry: Retry,
}

/// Something that happened, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Its place in the order, from 1.
    pub seq: u64,
    /// When.
    pub at: UnixNanos,
    /// What, as `noun_verb`.
    pub kind: String,
    /// What it is about.
    pub subject: Subject,
    /// The operation it belongs to.
    pub operation: Option<OperationId>,
    /// What is worth knowing about it.
    pub body: serde_json::Value,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Subject {
    /// A VM.
    Vm(VmId),
    /// A session.
    Session(SessionId),
    /// A cluster.
    Cluster(ClusterId),
    /// This host: what is of no VM, session or cluster in particular.
    Host,
}

/// The word for [`Subject::Host`].
const HOST_WORD: &str = "host";

impl std::fmt::Display for Subject {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Vm(id) => id.as_str(),
            Self::Session(id) => id.as_str(),
            Self::Cluster(id) => id.as_str(),
            Self::Host => HOST_WORD,
        })
    }
}

impl TryFrom<String> for Subject {
    type Error = ParseIdError;
    fn try_from(text: String) -> Result<Self, ParseIdError> {
        if text == HOST_WORD {
            Ok(Self::Host)
        } else if text.starts_with(SessionId::PREFIX) {
            text.try_into().map(Self::Session)
        } else if text.starts_with(ClusterId::PREFIX) {
            text.try_into().map(Self::Cluster)
        } else {
            text.try_into().map(Self::Vm)
        }
    }
}

impl From<Subject> for String {
    fn from(subject: Subject) -> Self {
        subject.to_string()
    }
}
