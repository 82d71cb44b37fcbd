//! Agent to VMM: requests, answered one by one in order. Descriptors travel beside a frame (SCM_RIGHTS), in the order
//! the message names them.

use serde::{Deserialize, Serialize};

use super::frame::{Kind, Message};
use super::refusal::Refusal;
use crate::units::NetLimits;

/// Most descriptors beside one frame: kvm, kernel, initrd, console file and socket, and 19 slots. Linux allows 253.
pub const DESCRIPTORS_MAX: usize = 32;

/// Longest kernel command line in bytes, x86's COMMAND_LINE_SIZE less its terminator.
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;

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
}

impl Message for Request {
    const KIND: Kind = Kind::Request;
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Request::Hello`].
    Welcome(Status),
    /// To [`Request::Launch`] and [`Request::Restore`]: the machine is built and paused.
    Launched(LaunchPhases),
    /// To [`Request::Pause`], [`Request::Resume`], [`Request::Stop`] and [`Request::ReplaceTap`].
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// Instead of any of these: not done, and nothing changed.
    Refused(Refusal),
    /// To [`Request::Network`]: the interfaces, by index.
    Network(Vec<InterfaceStatus>),
    /// To [`Request::Save`]: the files are written, not yet durable.
    Saved(SavePhases),
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
}

impl DeviceSpec {
    /// Whether a descriptor comes with it.
    pub const fn wants_descriptor(self) -> bool {
        match self {
            Self::Vsock | Self::Block { .. } | Self::Net { .. } => true,
            Self::Rng => false,
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
