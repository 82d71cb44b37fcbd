//! Agent to VMM: requests, answered one by one in order. Descriptors travel beside a frame (SCM_RIGHTS), in the order
//! the message names them.

use serde::{Deserialize, Serialize};

use super::frame::{Kind, Message};
use super::refusal::Refusal;
use crate::units::NetLimits;

mod copying;
mod filling;
mod moving;
mod prefault;
mod volumes;

pub use copying::{CopyPhases, CopySpec};
pub use filling::{FILLED_CHUNKS_MAX, RestoreFillingSpec};
pub use moving::{
    PackedPhases, Packing, ReceiveSpec, ReceivedMemory, SendPhase, SendPhases, SendProgress, SendSpec, SentPages,
    StreamForm, StreamKey, StreamTls, StreamToken,
};
pub use prefault::{PREFAULT_RUNS_MAX, PrefaultSpec};
pub use volumes::{AttachVolumeSpec, LATENCY_BUCKETS, VOLUME_BLOCK_BYTES, VOLUME_SLOTS_MAX, VolumeFlow, VolumeStatus};

/// Most descriptors beside one frame: kvm, kernel, initrd, console file and socket, and 19 slots. Linux allows 253.
pub const DESCRIPTORS_MAX: usize = 32;

/// Longest kernel command line in bytes, x86's COMMAND_LINE_SIZE less its terminator.
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// The first version of the protocol that has volumes.
const VOLUMES_SINCE: u16 = 6;

/// Most network interfaces of one machine.
pub const INTERFACES_MAX: usize = 8;

/// A secret that ties a VMM to the ledger entry it was started for.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 16]);

impl std::fmt::Debug for Nonce {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Nonce(..)")
    }
}

/// What a VMM reads from standard input when it starts, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartMessage {
    /// The VM it is for, for its log.
    pub vm_id: crate::ids::VmId,
    /// What an agent has to know to be served.
    pub nonce: Nonce,
    /// User and group id it becomes.
    pub uid: u32,
    /// Most bytes it may make of any one file: its largest disk or its guest's memory, and some to spare.
    pub file_bytes_max: u64,
}

impl StartMessage {
    /// The message as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// What the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First on every connection. A VMM serves the highest epoch it has seen and drops connections of older ones.
    Hello {
        /// The nonce of this VMM's ledger entry.
        nonce: Nonce,
        /// Counts the agents that owned this VMM; each start of an agent uses a higher one.
        epoch: u64,
    },
    /// Build the machine, paused. Descriptors: /dev/kvm, kernel, initrd if `initrd`, console file, console listener,
    /// then one for each device that wants one, in the order of `devices`.
    Launch(LaunchSpec),
    /// Stop the vCPUs and devices.
    Pause,
    /// Let the vCPUs and devices run.
    Resume,
    /// Ask for [`Status`].
    Status,
    /// End the machine at once and exit.
    Stop,
    /// Ask what passed each network interface.
    Network,
    /// Give a network interface another tap in the place of one that was deleted; descriptor: the tap's queue. The
    /// guest goes on with what it negotiated, and sees its link come up.
    ReplaceTap {
        /// Which interface, 0 to 7.
        index: u8,
    },
    /// Build the machine from saved state, paused. Descriptors: /dev/kvm, saved state, memory image, console file,
    /// console listener, then one for each device that wants one, in the order of `devices`.
    Restore(RestoreSpec),
    /// Write the paused machine to files; it stays paused. Descriptors: the VMM's own `/proc/PID/pagemap`, a file for
    /// the state, one for the memory image, and with [`SavedPages::Changed`] one for the list of pages.
    Save {
        /// Which pages of guest memory.
        pages: SavedPages,
    },
    /// Write the paused machine, encrypted, to one file; it stays paused. Descriptors: the VMM's own
    /// `/proc/PID/pagemap` and the file.
    Seal {
        /// Which pages of guest memory.
        pages: SavedPages,
        /// The file's key, which serves for this file only.
        key: SealingKey,
    },
    /// Build the machine from a sealed file, paused. Descriptors: /dev/kvm, the sealed file, the memory image if
    /// `image`, console file, console listener, then one for each device that wants one, in the order of `devices`.
    Unseal(UnsealSpec),
    /// Ask what the balloon holds, and have the guest asked for fresh statistics.
    Balloon {
        /// How many bytes of its memory the guest is to give from now on; `None` leaves that as it is.
        target_bytes: Option<u64>,
    },
    /// Send the machine to another VMM, as `PROTOCOL.md` says, while it runs. Answered when it stands ready there; here
    /// it is then paused, for the agent to decide which of the two goes on. Refused when that did not come about: then
    /// it runs on (or stays paused) as before. Who hangs up before the answer gives the send up. Descriptors: the VMM's
    /// own `/proc/PID/pagemap`, then one connected stream socket for each connection.
    Send(SendSpec),
    /// Ask how far a send is.
    SendProgress,
    /// Give up a send; its own request is refused, if it was not answered yet.
    CancelSend,
    /// After [`Answer::Sent`] or [`Answer::SentIn`], when the machine will go on at the other end: send the packets that waited for it or that
    /// came since. With `last`, none will follow.
    ForwardPackets {
        /// Whether these are the last.
        last: bool,
    },
    /// Build the machine from what another VMM sends, paused. Descriptors: /dev/kvm, memory unless it
    /// is new, console file, console listener, one for each device that wants one, in the order of `devices`, then one connected stream socket for each connection.
    Receive(ReceiveSpec),
    /// As [`Request::Send`], with frames of this form; answered by [`Answer::SentIn`].
    SendIn {
        /// How.
        spec: SendSpec,
        /// The form.
        form: StreamForm,
    },
    /// Write the machine's memory to a file while it runs, again and again what it wrote meanwhile, until little is left;
    /// answered then. What it writes from there on is written by [`Request::SaveRest`]. Who hangs up before the answer
    /// gives it up, as does [`Request::CancelSend`]. Descriptors: the VMM's own `/proc/PID/pagemap` and a memory image,
    /// as long as guest memory and without data.
    CopyMemory(CopySpec),
    /// After [`Answer::Copied`]: write what is left of the machine, which is paused now and stays so. Answered by
    /// [`Answer::Saved`], whose memory is what was written by this request only. Descriptors: a file for the state, and
    /// with [`SavedPages::Changed`] one for the list of all pages.
    SaveRest,
    /// Map pages of the memory image that the machine was restored from ahead of their use. Answered when that is begun;
    /// how it ends makes no difference but to speed.
    Prefault(PrefaultSpec),
    /// As [`Request::Restore`], while parts of the memory image are not here yet: what reaches one of them waits until the
    /// agent says that it is. Descriptors: those of a restore, then `/dev/userfaultfd`, then a listening unix socket, to
    /// which agents connect that fill it ([`super::filling`]).
    RestoreFilling(RestoreFillingSpec),
    /// Attach a volume to a volume slot that has none; its server connects to the slot's socket. The guest sees the size
    /// change.
    AttachVolume(AttachVolumeSpec),
    /// Leave a volume slot without a volume: its size is 0 then, and its connections are closed.
    DetachVolume {
        /// Which slot, 0 to 5.
        index: u8,
        /// Also with requests under way, which fail.
        force: bool,
    },
    /// A volume has become larger. Connections are made again, as the size is agreed upon on each.
    ResizeVolume {
        /// Which slot, 0 to 5.
        index: u8,
        /// The new size in bytes, a multiple of [`VOLUME_BLOCK_BYTES`].
        bytes: u64,
    },
    /// Ask how the volume slots are.
    Volumes,
    /// Bound what a volume slot's guest may do, until its volume is detached: requests wait, none fails. `None` is without
    /// a bound.
    LimitVolume {
        /// Which slot, 0 to 5.
        index: u8,
        /// Requests per second.
        iops: Option<u32>,
        /// Bytes read and written per second.
        bytes_per_s: Option<u64>,
    },
}

impl Message for Request {
    const KIND: Kind = Kind::Request;
}

impl Request {
    /// The first version of the protocol that has it.
    pub const fn since_version(&self) -> u16 {
        match self {
            Self::Launch(spec) => with_devices(1, spec.devices.as_slice()),
            Self::Restore(spec) => with_devices(1, spec.devices.as_slice()),
            Self::Unseal(spec) => with_devices(2, spec.devices.as_slice()),
            Self::Receive(spec) => with_devices(2, spec.devices.as_slice()),
            Self::RestoreFilling(spec) => with_devices(5, spec.restore.devices.as_slice()),
            Self::Hello { .. }
            | Self::Pause
            | Self::Resume
            | Self::Status
            | Self::Stop
            | Self::Network
            | Self::ReplaceTap { .. }
            | Self::Save { .. } => 1,
            Self::Seal { .. }
            | Self::Balloon { .. }
            | Self::Send(_)
            | Self::SendProgress
            | Self::CancelSend
            | Self::ForwardPackets { .. } => 2,
            Self::SendIn { .. } => 3,
            Self::CopyMemory(_) | Self::SaveRest | Self::Prefault(_) => 4,
            Self::AttachVolume(_)
            | Self::DetachVolume { .. }
            | Self::ResizeVolume { .. }
            | Self::Volumes
            | Self::LimitVolume { .. } => VOLUMES_SINCE,
        }
    }
}

/// The first version that has a request of `version` with these devices.
const fn with_devices(version: u16, devices: &[DeviceSpec]) -> u16 {
    let mut rest = devices;
    while let [first, later @ ..] = rest {
        if matches!(first, DeviceSpec::Volume { .. }) {
            return VOLUMES_SINCE;
        }
        rest = later;
    }
    version
}

/// The key of a sealed machine.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealingKey(pub [u8; 32]);

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("SealingKey(..)")
    }
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Request::Hello`].
    Welcome(Status),
    /// To [`Request::Launch`], [`Request::Restore`], [`Request::RestoreFilling`], [`Request::Unseal`] and
    /// [`Request::Receive`]: the machine is built and paused.
    Launched(LaunchPhases),
    /// To [`Request::Pause`], [`Request::Resume`], [`Request::Stop`], [`Request::ReplaceTap`], [`Request::Prefault`],
    /// [`Request::CancelSend`], and to what changes a volume slot.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// Instead of any of these: not done, and nothing changed.
    Refused(Refusal),
    /// To [`Request::Network`]: the interfaces, by index.
    Network(Vec<InterfaceStatus>),
    /// To [`Request::Save`], [`Request::SaveRest`] and [`Request::Seal`]: the files are written, not yet durable.
    Saved(SavePhases),
    /// To [`Request::Balloon`].
    Balloon(BalloonStatus),
    /// To [`Request::Send`]: the machine stands ready at the other end, and is paused here.
    Sent(SendPhases),
    /// To [`Request::SendProgress`].
    Sending(SendProgress),
    /// To [`Request::ForwardPackets`]: how many packets went over.
    Forwarded {
        /// Their number.
        packets: u64,
    },
    /// To [`Request::SendIn`], as [`Answer::Sent`].
    SentIn {
        /// What it did.
        phases: SendPhases,
        /// What packing made of it.
        packed: PackedPhases,
    },
    /// To [`Request::CopyMemory`]: little is left, and the machine still runs.
    Copied(CopyPhases),
    /// To [`Request::Volumes`]: the volume slots, by index.
    Volumes(Vec<VolumeStatus>),
}

impl Message for Answer {
    const KIND: Kind = Kind::Answer;
}

/// A machine to build from a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// Number of vCPUs, from 1.
    pub vcpus: u8,
    /// Guest memory in bytes, whole MiB.
    pub memory_bytes: u64,
    /// Kernel command line; the VMM adds the words that announce devices.
    pub command_line: String,
    /// Whether an initrd is among the descriptors.
    pub initrd: bool,
    /// Devices to announce.
    pub devices: Vec<DeviceSpec>,
}

/// A device to announce. The slot follows from kind and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceSpec {
    /// vsock; descriptor: a listening unix socket.
    Vsock,
    /// Entropy; no descriptor.
    Rng,
    /// Block device; descriptor: the raw file.
    Block {
        /// Which of its kind, 0 to 5.
        index: u8,
        /// Refuse writes.
        read_only: bool,
    },
    /// Network interface; descriptor: the tap's queue.
    Net {
        /// Which of its kind, 0 to 7.
        index: u8,
        /// Hardware address.
        mac: [u8; 6],
        /// Longest packet in bytes that the guest is told to send; `None` tells it nothing.
        mtu: Option<u16>,
        /// What may pass.
        limits: NetLimits,
    },
    /// Memory balloon; no descriptor.
    Balloon,
    /// Block device on a volume; descriptor: a listening unix socket, to which the volume's server connects. Since
    /// version 6.
    Volume {
        /// Which of the block devices, 0 to 5.
        index: u8,
        /// The volume's size in bytes, a multiple of [`VOLUME_BLOCK_BYTES`]; 0: a slot to attach one to later.
        bytes: u64,
        /// Refuse writes, and tell the guest so.
        read_only: bool,
        /// How long requests wait for a connection, in milliseconds, before they fail.
        reconnect_ms: u32,
    },
}

impl DeviceSpec {
    /// Whether a descriptor comes with it.
    pub const fn wants_descriptor(self) -> bool {
        match self {
            Self::Vsock | Self::Block { .. } | Self::Net { .. } | Self::Volume { .. } => true,
            Self::Rng | Self::Balloon => false,
        }
    }
}

/// A machine to build from saved state: vCPUs and memory are what was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// Guest memory in bytes; saved state of another size is refused.
    pub memory_bytes: u64,
    /// Devices: exactly the slots that were saved.
    pub devices: Vec<DeviceSpec>,
}

/// A machine to build from a sealed file: vCPUs and memory are what was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnsealSpec {
    /// Guest memory in bytes; a sealed machine of another size is refused.
    pub memory_bytes: u64,
    /// Devices: exactly the slots that were sealed.
    pub devices: Vec<DeviceSpec>,
    /// The file's key.
    pub key: SealingKey,
    /// Whether the memory image it was sealed as a difference to is among the descriptors.
    pub image: bool,
}

/// Which pages of guest memory to save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedPages {
    /// All that are not zero.
    All,
    /// Those that differ from the memory image the machine was restored from. They are listed in a file of their own:
    /// runs of first page and count, both u64 little-endian, ascending, by their place in the image.
    Changed,
}

/// Bytes of one run in the list of [`SavedPages::Changed`].
pub const PAGE_RUN_BYTES: usize = 16;

/// What a save wrote and where its time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SavePhases {
    /// Bytes of state.
    pub state_bytes: u64,
    /// Bytes of guest memory that were written.
    pub memory_bytes: u64,
    /// Collecting and writing the state, in nanoseconds.
    pub state_ns: u64,
    /// Writing guest memory, in nanoseconds.
    pub memory_ns: u64,
}

/// Where the time of a launch went, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LaunchPhases {
    /// Making the VM, its memory and interrupt controllers.
    pub vm_ns: u64,
    /// Loading kernel and initrd, or reading saved state.
    pub load_ns: u64,
    /// Making devices and vCPUs.
    pub devices_ns: u64,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineState {
    /// No machine yet.
    Empty,
    /// Built or paused: no vCPU runs.
    Paused,
    /// The vCPUs run.
    Running,
}

/// What the VMM says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What the machine does.
    pub state: MachineState,
    /// Nanoseconds from the first resume to the first vCPU's entry into the guest; 0 before.
    pub first_entry_ns: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Accesses of the guest to ports and addresses where nothing is.
    pub stray_accesses: u64,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
    /// Start address of the guest's memory in this process, 0 when there is none: with `/proc/PID/smaps` it tells the
    /// VMM's own memory from the guest's.
    pub guest_memory_host_address: u64,
}

/// What passed a network interface since the machine was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Which interface, 0 to 7.
    pub index: u8,
    /// Whether its tap is there.
    pub link_up: bool,
    /// To the guest.
    pub rx: FlowStatus,
    /// From the guest.
    pub tx: FlowStatus,
}

/// What passed a network interface in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FlowStatus {
    /// Frames that passed; a segment that the host cuts is one.
    pub frames: u64,
    /// Their bytes, from the destination address on.
    pub bytes: u64,
    /// Frames that were thrown away.
    pub dropped: u64,
    /// Times a frame had to wait for a limit.
    pub throttled: u64,
}

/// What a balloon holds, and what the guest says of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Bytes the guest is asked to give.
    pub target_bytes: u64,
    /// Bytes it says it has given.
    pub actual_bytes: u64,
    /// Bytes that were given back as the guest reported them free, in all: it may use them again at any time.
    pub reported_bytes: u64,
    /// What the guest said of its memory last; `None` before it did.
    pub guest: Option<GuestMemoryStatus>,
}

/// What a guest says of its memory (virtio 1.2 section 5.5.6.4); `None` for what it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestMemoryStatus {
    /// How long ago it said so, in nanoseconds.
    pub age_ns: u64,
    /// Bytes it read from its swap.
    pub swap_in_bytes: Option<u64>,
    /// Bytes it wrote to its swap.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes it uses for nothing.
    pub free_bytes: Option<u64>,
    /// Bytes it has.
    pub total_bytes: Option<u64>,
    /// Bytes programs could get without swapping.
    pub available_bytes: Option<u64>,
    /// Bytes of files it could drop.
    pub disk_caches_bytes: Option<u64>,
}
