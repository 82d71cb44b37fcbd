//! Volumes, their snapshots and their leases.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ids::{LeaseId, VmId, VolumeId, VolumeSnapshotId};

/// `POST /v1/volumes`: a block device that outlives guests. At most one of `from_file`, `from_volume` and `from_snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreateRequest {
    /// Its name, unique on this host.
    #[serde(default)]
    #[schema(example = "data")]
    pub name: Option<String>,
    /// Its size in MiB. It takes space on the disk as it is written. May be left out when it begins with something.
    #[serde(default)]
    #[schema(minimum = 1, example = 1024)]
    pub size_mib: Option<u64>,
    /// Absolute path of a raw image on this host that it begins with.
    #[serde(default)]
    pub from_file: Option<String>,
    /// Id or name of a volume that it begins with, as that is now.
    #[serde(default)]
    pub from_volume: Option<String>,
    /// Id or name of a snapshot that it begins with.
    #[serde(default)]
    pub from_snapshot: Option<String>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its id.
    #[schema(value_type = String, example = "vol-mzxw6ytbmzxw6ytb")]
    pub id: VolumeId,
    /// Its name.
    pub name: Option<String>,
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes of the disk that are its own, without what it shares with snapshots and clones.
    pub allocated_bytes: u64,
    /// Layers that it is made of.
    pub layers: u32,
    /// Grows with each snapshot: what changed since one, `GET /v1/volumes/{id}/changes` tells.
    pub generation: u32,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// What it was made of.
    pub origin: Option<String>,
    /// Why it refuses writes, if it is damaged.
    pub damage: Option<String>,
    /// The lease that may write.
    pub active: Option<Lease>,
    /// The lease that stands by.
    pub standby: Option<Lease>,
    /// Leases that only read.
    pub shared: u32,
    /// Connections that use it now.
    pub connections: u32,
}

/// `GET /v1/volumes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeList {
    /// The volumes, by id.
    pub volumes: Vec<Volume>,
}

/// `POST /v1/volumes/{id}/resize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeResizeRequest {
    /// Its new size in MiB, not less than it has.
    #[schema(minimum = 1)]
    pub size_mib: u64,
}

/// `POST /v1/volumes/{id}/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSnapshotRequest {
    /// The snapshot's name, unique among snapshots.
    #[serde(default)]
    pub name: Option<String>,
}

/// A volume's content at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSnapshot {
    /// Its id.
    #[schema(value_type = String, example = "vs-mzxw6ytbmzxw6ytb")]
    pub id: VolumeSnapshotId,
    /// Its name.
    pub name: Option<String>,
    /// The volume it was made of, which may be gone.
    #[schema(value_type = String)]
    pub volume_id: VolumeId,
    /// Its size in bytes.
    pub bytes: u64,
    /// The volume's generation that it holds.
    pub generation: u32,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
}

/// `GET /v1/volume-snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSnapshotList {
    /// The snapshots, by id.
    pub snapshots: Vec<VolumeSnapshot>,
}

/// `POST /v1/volumes/{id}/digest`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeDigest {
    /// The volume.
    #[schema(value_type = String)]
    pub volume_id: VolumeId,
    /// BLAKE3 of all its bytes, in hexadecimal digits: what `b3sum` makes of the same content in a file.
    pub blake3: String,
    /// Their number.
    pub bytes: u64,
}

/// A stretch of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeRun {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// The query of `GET /v1/volumes/{id}/changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct VolumeChangesQuery {
    /// A generation: that of a snapshot, or of an earlier answer.
    pub since: u32,
}

/// `GET /v1/volumes/{id}/changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeChanges {
    /// The volume.
    #[schema(value_type = String)]
    pub volume_id: VolumeId,
    /// Its present generation: ask with it next time.
    pub generation: u32,
    /// Whether nothing else changed. False after the host lost power meanwhile: then all of it has to be compared.
    pub complete: bool,
    /// The stretches that changed, in whole chunks.
    pub runs: Vec<VolumeRun>,
}

/// What a lease allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LeaseMode {
    /// To read and write, alone.
    Active,
    /// Nothing yet: it becomes active by a conversion.
    Standby,
    /// To read, beside others that only read.
    Shared,
}

/// The right to use a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// Its id.
    #[schema(value_type = String, example = "l-mzxw6ytbmzxw6ytb")]
    pub id: LeaseId,
    /// What it allows.
    pub mode: LeaseMode,
    /// The epoch it is active in, or would be. An NBD client names it: export `VOLUME:LEASE:EPOCH`.
    pub epoch: u64,
    /// Who has it.
    pub holder: String,
    /// The VM it is for.
    #[schema(value_type = Option<String>)]
    pub vm_id: Option<VmId>,
    /// The number of the host that VM is on.
    pub host: Option<u16>,
    /// Seconds after which it ends, unless it is validated or somebody is connected with it.
    pub ttl_s: Option<u32>,
}

/// `POST /v1/volumes/{id}/leases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// What it shall allow.
    pub mode: LeaseMode,
    /// Who wants it, for people: at most 64 bytes.
    #[schema(example = "backup")]
    pub holder: String,
    /// Seconds after which it ends, unless it is validated or somebody is connected with it.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 86400)]
    pub ttl_s: Option<u32>,
    /// With `active`: end the leases that are in the way, as their holders are dead. What they still write is refused.
    #[serde(default)]
    pub break_others: bool,
}

/// `POST /v1/volumes/{id}/leases/{lease}/validate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseValidateRequest {
    /// The lease's epoch.
    pub epoch: u64,
}

/// `POST /v1/volumes/{id}/leases/convert`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseConvertRequest {
    /// The active lease, which ends.
    #[schema(value_type = String)]
    pub from: LeaseId,
    /// The standby lease, which becomes the active one.
    #[schema(value_type = String)]
    pub to: LeaseId,
    /// The epoch of the active lease.
    pub epoch: u64,
}

/// Something that happened to a volume's leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseHistoryEntry {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// `acquired`, `converted`, `released`, `expired` or `broken`.
    pub what: String,
    /// The lease it is about; of a conversion, the one that is active since.
    #[schema(value_type = String)]
    pub lease_id: LeaseId,
    /// Of a conversion, the lease that ended.
    #[schema(value_type = Option<String>)]
    pub from: Option<LeaseId>,
    /// The lease's epoch, where it got one.
    pub epoch: Option<u64>,
    /// Who has it, where it was acquired.
    pub holder: Option<String>,
}

/// `GET /v1/volumes/{id}/leases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseList {
    /// The volume.
    #[schema(value_type = String)]
    pub volume_id: VolumeId,
    /// The last epoch somebody was active in.
    pub epoch: u64,
    /// Leases in force.
    pub leases: Vec<Lease>,
    /// What happened of late, the oldest first.
    pub history: Vec<LeaseHistoryEntry>,
}

/// A volume for a VM: in `POST /v1/vms`, and `POST /v1/vms/{id}/volumes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeWish {
    /// Id of the volume, a unique start of it, or its name.
    #[schema(example = "data")]
    pub volume: String,
    /// Refuse the guest's writes. Then other VMs may read it as well, and none may write it.
    #[serde(default)]
    pub read_only: bool,
    /// Where the guest is to mount it; it must hold a file system. At `/` it is the guest's root file system: only for a VM
    /// that is launched from an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "/srv")]
    pub mount: Option<String>,
    /// Most requests per second; what is over it waits. Without a bound when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub iops: Option<u32>,
    /// Most bytes read and written per second; what is over it waits. Without a bound when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub bytes_per_s: Option<u64>,
}

/// How far a VM is with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumePhase {
    /// It has it.
    Attached,
    /// It is getting it.
    Attaching,
    /// It is giving it up.
    Detaching,
}

/// A slot of a VM for a volume: a disk of its guest, for as long as it lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSlot {
    /// Its number among the VM's block devices.
    pub index: u8,
    /// Whether the guest was told that the disk cannot be written when it found it.
    pub told_read_only: bool,
    /// The volume in it; null: it is free, and the disk is empty.
    #[schema(value_type = Option<String>)]
    pub volume_id: Option<VolumeId>,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
    /// The volume's size in bytes; 0 without one.
    pub bytes: u64,
    /// How far the VM is with it.
    pub phase: Option<VolumePhase>,
    /// Where the guest was asked to mount it.
    pub mount: Option<String>,
    /// Most requests per second.
    pub iops: Option<u32>,
    /// Most bytes read and written per second.
    pub bytes_per_s: Option<u64>,
    /// The lease it is used with.
    #[schema(value_type = Option<String>)]
    pub lease_id: Option<LeaseId>,
    /// The lease's epoch.
    pub epoch: Option<u64>,
}

/// Requests of one kind that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeFlow {
    /// How many.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long they took, all together, in microseconds.
    #[serde(default)]
    pub took_us: u64,
    /// How many took how long, waiting included: the first counts those below 1 µs, number n those from 2^(n-1) µs to below
    /// 2^n µs, the last one all that took longer.
    pub latency_us: Vec<u64>,
}

/// What passed a volume slot since its volume was attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeStats {
    /// Its number among the VM's block devices.
    pub index: u8,
    /// Connections to the volume's server.
    pub connections: u8,
    /// Requests of the guest that are not finished.
    pub waiting: u32,
    /// Connections that broke and were made again.
    pub reconnects: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Whether the server refuses this VM, as its lease is not the active one any more.
    pub fenced: bool,
    /// Reads.
    pub read: VolumeFlow,
    /// Writes.
    pub write: VolumeFlow,
    /// Flushes.
    pub flush: VolumeFlow,
    /// Why there is no connection, if there is none.
    pub trouble: Option<String>,
}

/// `GET /v1/vms/{id}/volumes`: the volumes of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmVolumes {
    /// The VM.
    #[schema(value_type = String)]
    pub vm_id: VmId,
    /// Its slots.
    pub slots: Vec<VolumeSlot>,
    /// What passed them; empty without a machine.
    pub stats: Vec<VolumeStats>,
}

/// The query of `DELETE /v1/vms/{id}/volumes/{volume}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct VolumeDetachQuery {
    /// Also while requests of the guest are under way, which fail.
    #[serde(default)]
    pub force: bool,
}
