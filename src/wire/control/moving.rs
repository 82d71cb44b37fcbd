//! What is said of a machine that moves from one VMM to another.

use serde::{Deserialize, Serialize};

use super::DeviceSpec;

/// What ties the two ends of a migration's stream to each other.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamToken(pub [u8; 32]);

impl std::fmt::Debug for StreamToken {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("StreamToken(..)")
    }
}

/// What one end of a migration's stream needs for TLS; made for this migration alone, all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTls {
    /// Its own certificate, DER.
    pub certificate: Vec<u8>,
    /// The certificate's key, PKCS #8 in DER.
    pub key: StreamKey,
    /// The one certificate that the other end may have, DER.
    pub peer: Vec<u8>,
}

/// The key of a certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamKey(pub Vec<u8>);

impl std::fmt::Debug for StreamKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("StreamKey(..)")
    }
}

/// How to send a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSpec {
    /// The token that the other end was given.
    pub token: StreamToken,
    /// Number of connections, 1 to 8.
    pub connections: u8,
    /// Which pages the other end does not have.
    pub pages: SentPages,
    /// Longest pause that is aimed at, in milliseconds.
    pub pause_ms_max: u32,
    /// Rounds after which no other begins.
    pub rounds_max: u32,
    /// Time after which no other round begins, in milliseconds.
    pub deadline_ms: u64,
    /// What is done with a guest that writes faster than its pages are sent: moved all the same, with a pause as long as
    /// it takes, or left where it is.
    pub force: bool,
    /// Whether the guest may be slowed down before that.
    pub throttle: bool,
    /// Most bytes a second while the guest runs; `None` is no limit.
    pub rate_bytes_max: Option<u64>,
    /// How to encrypt; `None` within one host, or over a link that is trusted by name.
    pub tls: Option<StreamTls>,
}

/// What the frames of a stream are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamForm {
    /// The version they are written in: one that the other end speaks. [`super::Request::Send`] has version 1.
    pub version: u16,
    /// Whether pages are packed.
    pub packing: Packing,
}

impl StreamForm {
    /// What every end speaks.
    pub const PLAIN: Self = Self { version: 1, packing: Packing::None };
}

/// Whether pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Packing {
    /// They are sent as they are.
    #[default]
    None,
    /// As lz4 blocks where that is shorter; from version 2 of the stream on.
    Lz4,
}

/// Which pages of guest memory are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SentPages {
    /// All that are not zero.
    All,
    /// Those that differ from the memory image the machine was restored from, which the other end has.
    Changed,
    /// None: the other end has the same memory ([`ReceivedMemory::Shared`]).
    None,
}

/// What the memory of a machine on its way here is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReceivedMemory {
    /// New memory, all zero.
    New,
    /// The memory image that the machine was restored from; descriptor: the image. What is sent differs from it.
    Image,
    /// The memory of the machine as it is, by another VMM of this host; descriptor: the memory file. The other end must
    /// send no pages, and its guest stands still before this one runs.
    Shared,
}

/// A machine to build from a migration's stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveSpec {
    /// The token that the other end was given.
    pub token: StreamToken,
    /// Number of connections, 1 to 8.
    pub connections: u8,
    /// What its memory is made of.
    pub memory: ReceivedMemory,
    /// Guest memory in bytes; a machine of another size is refused.
    pub memory_bytes: u64,
    /// Devices: exactly the slots that are sent.
    pub devices: Vec<DeviceSpec>,
    /// How to decrypt, as the other end encrypts.
    pub tls: Option<StreamTls>,
}

/// What a send did and where its time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SendPhases {
    /// Rounds while the guest ran.
    pub rounds: u32,
    /// Pages that were sent with their bytes, the last ones among them.
    pub pages: u64,
    /// Pages that were sent as zeroes.
    pub zero_pages: u64,
    /// Pages sent while the guest stood still.
    pub last_pages: u64,
    /// Bytes of saved state.
    pub state_bytes: u64,
    /// Bytes on the connections, of everything.
    pub wire_bytes: u64,
    /// From the request to the guest's pause, in nanoseconds.
    pub running_ns: u64,
    /// Taking the vCPUs out and the devices to rest, in nanoseconds.
    pub pause_ns: u64,
    /// Collecting the state, in nanoseconds; the last pages are sent meanwhile.
    pub collect_ns: u64,
    /// From the guest's pause until the last page was acknowledged, in nanoseconds.
    pub last_pages_ns: u64,
    /// From there until the other end stood ready, in nanoseconds.
    pub ready_ns: u64,
    /// From the beginning of the pause until the other end stood ready, in nanoseconds.
    pub held_ns: u64,
}

/// What packing made of the pages of a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PackedPhases {
    /// Pages that were packed; the others that were sent with their bytes would not have become shorter.
    pub pages: u64,
    /// Bytes they were packed to.
    pub bytes: u64,
}

/// What a send is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SendPhase {
    /// There is none, or it failed.
    #[default]
    None,
    /// The guest runs and its memory is being copied.
    Copying,
    /// The guest stands still for the rest.
    Critical,
    /// The machine stands ready at the other end.
    Ready,
}

/// How far a send is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SendProgress {
    /// What it is doing.
    pub phase: SendPhase,
    /// Rounds that are over.
    pub rounds: u32,
    /// Bytes of guest memory that were to be sent when this round began.
    pub round_bytes: u64,
    /// Those of them that were sent.
    pub round_sent_bytes: u64,
    /// Bytes of guest memory that were sent in all.
    pub sent_bytes: u64,
    /// Bytes a second over the rounds so far; 0 before the first is over.
    pub rate_bytes: u64,
    /// Bytes a second that the guest wrote in the last round.
    pub dirty_rate_bytes: u64,
    /// How long the guest would stand still if it did now, in nanoseconds; 0 before the first round is over.
    pub pause_expected_ns: u64,
    /// Share of the time in which the vCPUs may run, in percent.
    pub vcpu_share: u8,
}
