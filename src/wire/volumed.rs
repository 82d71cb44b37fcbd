//! Agent to volume daemon: what is asked of `hearth volumed` on its control socket.
//!
//! ```text
//! length u32 (little-endian) | length bytes of JSON
//! ```
//! First [`Hello`] from the agent, answered by [`Welcome`]; then one [`Ask`] after another, each answered by any number of
//! [`Answer::Progress`] and then one other [`Answer`]. Several connections may be open: what takes long keeps only its own
//! waiting, and who hangs up gives it up. JSON, and unknown fields are passed over, since a daemon outlives agents: it goes
//! on serving while the agent is replaced by another version.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::ids::{LeaseId, VmId, VolumeId, VolumeSnapshotId};
use crate::lease::{Epoch, Lease, LeaseEntry, LeaseMode, LeaseRefusal, LeaseSecret};

/// Version of this protocol.
pub const VERSION: u16 = 1;

/// Longest frame in bytes: a list of a thousand volumes.
pub const FRAME_BYTES_MAX: u32 = 4 << 20;

/// Most connections that are kept to one VMM for one volume.
pub const LINES_MAX: u8 = 8;

/// What the daemon reads from standard input when it starts, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartMessage {
    /// The directory of the store, absolute.
    pub store: std::path::PathBuf,
    /// The directory of its sockets (`control.sock`, `nbd.sock`) and of its own state (whom it serves, where it listens,
    /// its certificate), absolute.
    pub runtime: std::path::PathBuf,
    /// Most bytes that all volumes may take on the disk; `None` for no bound.
    pub quota_bytes: Option<u64>,
    /// Bytes of the file system that stay free.
    pub reserve_bytes: u64,
    /// A file that every change of the store's files is written to, for finding out what a power failure would leave.
    #[serde(default)]
    pub record: Option<std::path::PathBuf>,
}

/// The agent's first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version the agent speaks.
    pub version: u16,
}

/// The daemon's first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version it speaks.
    pub version: u16,
    /// Its process id.
    pub pid: u32,
    /// The build it is of.
    pub build: String,
    /// Where it serves other hosts, if it does.
    pub listening: Option<Listening>,
}

/// Where a daemon serves other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// Address and port.
    pub address: SocketAddr,
    /// SHA-256 of its certificate (DER), in hexadecimal digits.
    pub certificate_sha256: String,
}

/// What a new volume begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Origin {
    /// Nothing: it reads as zeroes.
    Empty,
    /// A raw image on this host.
    File {
        /// Its absolute path.
        path: std::path::PathBuf,
    },
    /// The present content of another volume.
    Volume {
        /// Which.
        id: VolumeId,
    },
    /// A snapshot.
    Snapshot {
        /// Which.
        id: VolumeSnapshotId,
    },
}

/// A VMM that is served, by connections that the daemon makes to it.
///
/// The connections of an attachment live and die together. What was asked on one and not answered is asked again on
/// another, and the guest then goes on to write the same place: were the first still being carried out, or waiting in some
/// buffer, it would undo that. So when one ends, the daemon ends the others, waits until nothing that came by any of them is
/// being carried out, and only then connects anew; and a VMM asks again only on connections made after that. Between hosts,
/// where buffers lie on the way, each set of connections has a number, and the serving daemon lets no request of an earlier
/// set of the same lease be carried out once it has shaken hands with a later one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The listening unix socket of the VMM's slot, absolute: it is what names an attachment.
    pub socket: std::path::PathBuf,
    /// The volume.
    pub volume: VolumeId,
    /// The lease it is used with.
    pub lease: LeaseId,
    /// The epoch that lease is, or will be, active in.
    pub epoch: Epoch,
    /// Whether writes are refused, whatever the lease allows.
    pub read_only: bool,
    /// How many connections to keep, from 1 to [`LINES_MAX`].
    pub lines: u8,
    /// Another host's daemon that has the volume; `None` if it is this one.
    pub upstream: Option<Upstream>,
}

/// A volume of another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// Where its daemon listens.
    pub address: SocketAddr,
    /// The certificate it has to show.
    pub certificate_sha256: String,
    /// The lease's secret.
    pub secret: LeaseSecret,
}

/// What the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// Make a volume; answered by [`Answer::Volume`]. Asked again with the same id, it is the one that is there.
    Create {
        /// Its id.
        id: VolumeId,
        /// Its name, if it has one.
        name: Option<String>,
        /// Its size in bytes, a multiple of 4096; `None`: that of what it begins with, rounded up.
        bytes: Option<u64>,
        /// What it begins with.
        origin: Origin,
        /// Wall clock, milliseconds since 1970.
        now_ms: u64,
    },
    /// All volumes; answered by [`Answer::Volumes`].
    List,
    /// One volume; answered by [`Answer::Volume`].
    Show {
        /// Which.
        id: VolumeId,
    },
    /// Make it larger; answered by [`Answer::Volume`].
    Resize {
        /// Which.
        id: VolumeId,
        /// Its new size in bytes.
        bytes: u64,
    },
    /// Remove a volume that nobody has a lease of; answered by [`Answer::Done`], also when it is not there.
    Remove {
        /// Which.
        id: VolumeId,
    },
    /// Keep its content as of now; answered by [`Answer::Snapshot`].
    Snapshot {
        /// Of which.
        volume: VolumeId,
        /// The snapshot's id.
        id: VolumeSnapshotId,
        /// Its name, if it has one.
        name: Option<String>,
        /// Wall clock, milliseconds since 1970.
        now_ms: u64,
    },
    /// All snapshots; answered by [`Answer::Snapshots`].
    Snapshots,
    /// Remove a snapshot; answered by [`Answer::Done`], also when it is not there.
    RemoveSnapshot {
        /// Which.
        id: VolumeSnapshotId,
    },
    /// BLAKE3 of all its bytes; answered by [`Answer::Digest`].
    Digest {
        /// Of which.
        id: VolumeId,
    },
    /// What changed after a generation; answered by [`Answer::Changes`].
    Changes {
        /// Of which.
        id: VolumeId,
        /// The generation.
        since: u32,
    },
    /// Take a lease; answered by [`Answer::Lease`].
    Acquire {
        /// Of which volume.
        volume: VolumeId,
        /// The lease's id. Asked again with the same one, it is the lease that is there.
        id: LeaseId,
        /// What it shall allow.
        mode: LeaseMode,
        /// Who wants it.
        holder: String,
        /// For which VM.
        vm: Option<VmId>,
        /// The number of the host that VM is on.
        #[serde(default)]
        host: Option<u16>,
        /// Its time to live.
        ttl_s: Option<u32>,
        /// What its holder will know.
        secret: LeaseSecret,
        /// End whatever lease is in the way.
        break_others: bool,
    },
    /// Whether a lease is in force in this epoch, and let it live on; answered by [`Answer::Lease`].
    Validate {
        /// Of which volume.
        volume: VolumeId,
        /// Which lease.
        id: LeaseId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Make a standby lease the active one; answered by [`Answer::Lease`] when no request of the earlier one is being
    /// carried out any more, and none will.
    Convert {
        /// Of which volume.
        volume: VolumeId,
        /// The active lease.
        from: LeaseId,
        /// The standby lease.
        to: LeaseId,
        /// The epoch of the active lease.
        epoch: Epoch,
    },
    /// End a lease; answered by [`Answer::Done`], also when it ended before.
    Release {
        /// Of which volume.
        volume: VolumeId,
        /// Which.
        id: LeaseId,
        /// Only if this is what it allows; refused otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        only: Option<LeaseMode>,
    },
    /// The leases of a volume and what happened to them; answered by [`Answer::Leases`].
    Leases {
        /// Of which volume.
        volume: VolumeId,
    },
    /// Serve a VMM, from now on and whenever the daemon starts; answered by [`Answer::Done`] at once. In the place of
    /// an attachment of the same socket: one that differs is ended first, as by [`Ask::Detach`]; one that is the same goes
    /// on.
    Attach {
        /// What and whom.
        attachment: Attachment,
    },
    /// Serve a VMM no longer; answered by [`Answer::Done`] when no request of it is being carried out any more.
    Detach {
        /// The VMM's socket.
        socket: std::path::PathBuf,
    },
    /// All attachments; answered by [`Answer::Attachments`].
    Attachments,
    /// Serve other hosts at this address, from now on and whenever the daemon starts; port 0 is one that is free, the same
    /// as before if it can be. Answered by [`Answer::Listening`]. Asked again for the same address, it is so already.
    Listen {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
    },
    /// Flush everything and end; answered by [`Answer::Done`] before it does.
    End,
    /// The same if nobody uses it: there is no attachment and no connection of a client; refused otherwise.
    EndIfIdle,
}

/// A volume, as it is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: Option<String>,
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes on the disk that are its own, without what it shares.
    pub allocated_bytes: u64,
    /// Layers it is made of.
    pub layers: u32,
    /// Its generation.
    pub generation: u32,
    /// Wall clock, milliseconds since 1970.
    pub created_ms: u64,
    /// What it was made of.
    pub origin: Option<String>,
    /// Why it refuses writes, if it is damaged.
    pub damage: Option<String>,
    /// The lease that may write.
    pub active: Option<Lease>,
    /// The lease that stands by.
    pub standby: Option<Lease>,
    /// Leases that read.
    pub shared: u32,
    /// Connections that use it now.
    pub connections: u32,
}

/// A snapshot, as it is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its id.
    pub id: VolumeSnapshotId,
    /// Its name.
    pub name: Option<String>,
    /// The volume it was made of, which may be gone.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub bytes: u64,
    /// The volume's generation that it holds: what changed since, [`Ask::Changes`] tells.
    pub generation: u32,
    /// Wall clock, milliseconds since 1970.
    pub created_ms: u64,
}

/// An attachment, as it is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentReport {
    /// What is kept up.
    pub attachment: Attachment,
    /// Connections that are there now.
    pub connected: u8,
    /// Why the last attempt failed, if none is there.
    pub trouble: Option<String>,
}

/// A stretch of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// Why something is not done. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "refused", rename_all = "snake_case")]
pub enum Refusal {
    /// No such volume, snapshot or attachment.
    #[error("there is no {what}")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// What is asked for cannot be.
    #[error("{text}")]
    Invalid {
        /// Why.
        text: String,
    },
    /// Another one has the name.
    #[error("the name {name:?} is another volume's")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Somebody uses it.
    #[error("{text}")]
    InUse {
        /// Who.
        text: String,
    },
    /// The leases speak against it.
    #[error(transparent)]
    Lease {
        /// How.
        lease: LeaseRefusal,
    },
    /// No room for it.
    #[error("{text}")]
    NoSpace {
        /// How much is missing of what.
        text: String,
    },
    /// It is damaged.
    #[error("{text}")]
    Damaged {
        /// What is.
        text: String,
    },
    /// The host did not let it be done.
    #[error("{text}")]
    Failed {
        /// What failed.
        text: String,
    },
    /// This daemon does not know the question: it is of another version.
    #[error("the volume daemon does not know this question: it is of another version; restart it")]
    Unknown,
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// It is done, or was before.
    Done,
    /// A volume.
    Volume {
        /// It.
        volume: Box<VolumeReport>,
    },
    /// All volumes, by id.
    Volumes {
        /// They.
        volumes: Vec<VolumeReport>,
    },
    /// A snapshot.
    Snapshot {
        /// It.
        snapshot: SnapshotReport,
    },
    /// All snapshots, by id.
    Snapshots {
        /// They.
        snapshots: Vec<SnapshotReport>,
    },
    /// BLAKE3, in hexadecimal digits.
    Digest {
        /// It.
        blake3: String,
        /// The bytes it is of.
        bytes: u64,
    },
    /// What changed.
    Changes {
        /// The present generation.
        generation: u32,
        /// Whether nothing else changed; not known after the host lost power meanwhile.
        complete: bool,
        /// The stretches.
        runs: Vec<Run>,
    },
    /// A lease.
    Lease {
        /// It.
        lease: Lease,
    },
    /// The leases of a volume.
    Leases {
        /// In force.
        leases: Vec<Lease>,
        /// The last epoch somebody was active in.
        epoch: Epoch,
        /// What happened of late, the oldest first.
        history: Vec<LeaseEntry>,
    },
    /// All attachments, by socket.
    Attachments {
        /// They.
        attachments: Vec<AttachmentReport>,
    },
    /// Where other hosts are served.
    Listening {
        /// There.
        listening: Listening,
    },
    /// Not yet an answer: how far it is.
    Progress {
        /// Bytes done.
        done: u64,
        /// Of all.
        total: u64,
    },
    /// Not done.
    Refused {
        /// Why.
        refusal: Refusal,
    },
}

/// Why bytes are not a frame. The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is zero or above the limit.
    #[error("a frame of {found} bytes, 1 to {FRAME_BYTES_MAX} are allowed")]
    Length {
        /// The length found.
        found: u64,
    },
    /// The body is not what belongs here.
    #[error("a frame that is not a message of this protocol")]
    Malformed(#[source] serde_json::Error),
}

/// The bytes of one frame.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let body = serde_json::to_vec(message).map_err(FrameError::Malformed)?;
    let length = u32::try_from(body.len()).ok().filter(|length| (1..=FRAME_BYTES_MAX).contains(length));
    let length = length.ok_or(FrameError::Length { found: body.len() as u64 })?;
    Ok([&length.to_le_bytes()[..], &body].concat())
}

/// The length of the body behind these first four bytes.
pub fn body_bytes(head: [u8; 4]) -> Result<usize, FrameError> {
    let found = u32::from_le_bytes(head);
    if (1..=FRAME_BYTES_MAX).contains(&found) {
        Ok(found as usize)
    } else {
        Err(FrameError::Length { found: found.into() })
    }
}

/// Reads a body.
pub fn decode<M: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<M, FrameError> {
    serde_json::from_slice(body).map_err(FrameError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_its_length_and_json() {
        let ask =
            Ask::Release { volume: VolumeId::from_random([1; 10]), id: LeaseId::from_random([2; 10]), only: None };
        let frame = encode(&ask).expect("encode");
        let (head, body) = frame.split_first_chunk().expect("a head");
        assert_eq!(body_bytes(*head).expect("length"), body.len());
        assert_eq!(decode::<Ask>(body).expect("decode"), ask);
        let text = r#"{"ask":"release","volume":"vol-aeaqcaibaeaqcaib","id":"l-aibaeaqcaibaeaqc"}"#;
        assert_eq!(str::from_utf8(body), Ok(text));
    }

    #[test]
    fn what_a_newer_agent_adds_is_passed_over() {
        let text = br#"{"version":2,"dialect":"north"}"#;
        assert_eq!(decode::<Hello>(text).expect("decode"), Hello { version: 2 });
        assert!(decode::<Ask>(br#"{"ask":"sing"}"#).is_err());
    }

    #[test]
    fn a_length_is_bounded() {
        assert!(body_bytes(0_u32.to_le_bytes()).is_err());
        assert!(body_bytes(FRAME_BYTES_MAX.to_le_bytes()).is_ok());
        assert!(body_bytes((FRAME_BYTES_MAX + 1).to_le_bytes()).is_err());
    }
}
