//! The JSON bodies of `/v1`: serde only, separate from the types inside, stable once shipped.
//!
//! * Requests and queries refuse unknown fields. Answers may gain fields: a reader ignores what it does not know.
//! * An answer's field without a value is `null`, not absent, so that a script can rely on the key.
//! * Times are RFC 3339 in UTC; durations are milliseconds with fraction and end in `_ms`; sizes are bytes and end in
//!   `_bytes`, except where people give them (`memory_mib`).

mod balloon;
mod bundle;
mod calculation;
mod cluster;
mod error;
mod exec;
mod fetch;
mod host;
mod image;
mod isolation;
mod migration;
mod network;
mod operation;
mod pool;
mod session;
mod swap;
mod usage;
mod vm;
mod volume;

pub(crate) use crate::base64::{decode as decode_base64, encode as encode_base64};
pub use balloon::{BalloonGuestStats, BalloonRequest, BalloonStats};
pub use bundle::{
    Bundle, BundleBuildRequest, BundleHost, BundleImported, BundleList, BundleRecipe, BundleSignRequest, BundleTrust,
    BundleVerified, CompactRequest, SnapshotRequest, UnreadableBundle,
};
pub use calculation::{Calculation, CalculationCreateRequest, CalculationList, CalculationQuery, CalculationState};
pub use cluster::{
    Cluster, ClusterCreateRequest, ClusterList, ClusterMember, ClusterMemberList, ClusterRemoveQuery, ClusterState,
};
pub use error::{ErrorBody, ErrorDetail, RetryHint};
pub use exec::{Captured, ExecRequest, ExecResult, TerminalSize};
pub use fetch::{BundleFetch, BundleFetchRequest, BundleFetched, LaunchMode, VmFilling, VmMemory};
pub use host::{
    Drain, DrainRequest, Host, HostFailure, HostLedger, HostPressure, HostRoom, HostVms, HostWarning, LedgerBackup,
    LedgerBackupRequest,
};
pub use image::{CONTAINER_MIB_MAX_DEFAULT, ContainerProgram, Image, ImageContainer, ImageImportRequest, ImageList};
pub use isolation::{CgroupController, HostIsolation, VmJail, VmJailLimit, VmJailThread};
pub use migration::{
    Compress, MigrateRequest, Migration, MigrationDirection, MigrationEstimate, MigrationList, MigrationProgress,
    MigrationState, Moved, OnNonconverge, PauseSteps, Uncompressed,
};
pub use network::{FlowLimits, FlowStats, InterfaceStats, NetworkLimits};
pub use operation::{Event, EventsQuery, Operation, OperationList, OperationState, Step, StepState};
pub use pool::{Pool, PoolList, PoolRequest};
pub use session::{
    Addressing, Drops, Egress, EgressProtocol, EgressRule, Fabric, FabricIpv4, FabricPeer, Session,
    SessionCreateRequest, SessionList, SessionMember, SessionRemoveQuery, SessionState,
};
pub use swap::{
    SwapChoice, SwapDecision, SwapDecisionList, SwapMode, SwapNeed, SwapOutRequest, SwapPolicy, SwapVerdict,
    SwapWeighed, Swapped, WakeCause,
};
pub use usage::{NetworkUsage, ProcessUsage, UsageList, VmUsage};
pub use vm::{
    Cause, ConsoleQuery, Disk, GuestStats, PortProtocol, PublishedPort, Quarantine, RemoveQuery, Stats, StopRequest,
    Timings, Vm, VmLaunchRequest, VmList, VmState, VmmStats, Wait,
};
pub use volume::{
    Lease, LeaseConvertRequest, LeaseHistoryEntry, LeaseList, LeaseMode, LeaseRequest, LeaseValidateRequest, VmVolumes,
    Volume, VolumeChanges, VolumeChangesQuery, VolumeCreateRequest, VolumeDetachQuery, VolumeDigest, VolumeFlow,
    VolumeList, VolumePhase, VolumeResizeRequest, VolumeRun, VolumeSlot, VolumeSnapshot, VolumeSnapshotList,
    VolumeSnapshotRequest, VolumeStats, VolumeWish,
};

/// The protocol name in `Upgrade:` for exec and console.
pub const UPGRADE_PROTOCOL: &str = "hearth-stream/1";

/// The header that makes a repeated create answer what the first one answered.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";

/// The image a launch uses when it names none.
pub const IMAGE_DEFAULT: &str = "demo";

/// Most disks of one VM: the block slots of the guest-physical map.
pub const DISKS_MAX: usize = 6;

/// Longest name of a VM or image in bytes: a DNS label, as the VM's name is also its guest's host name.
pub const NAME_BYTES_MAX: usize = 63;
