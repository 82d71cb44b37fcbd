//! Bundles from elsewhere, and memory that is on its way.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{BundleId, VmId};

/// `POST /v1/bundle-fetches`: begins to have a bundle that is elsewhere. Its memory comes behind the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BundleFetchRequest {
    /// Id of the bundle, all of it: what comes is compared with it, whoever sends it.
    #[schema(value_type = String, example = "b-mzxw6ytbmzxw6ytbmzxw6ytbme")]
    pub bundle_id: BundleId,
    /// Where it is: `peer:NAME` (another host of the fabric), the absolute path of a directory of this host with bundles in
    /// it, or `http://HOST[:PORT]/BASE` of a server that has such a directory below `BASE` and answers ranges.
    #[schema(example = "http://[fd00::1]:8080/bundles")]
    pub from: String,
}

/// Where a bundle came from that was not made here, and whether it may go again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BundleFetched {
    /// Where it came from; null when that is not known any more.
    pub from: Option<String>,
    /// When it began to come.
    #[schema(value_type = String, format = DateTime)]
    pub fetched_at: Timestamp,
    /// When something was last launched from it: the longest unused goes first.
    #[schema(value_type = String, format = DateTime)]
    pub last_used_at: Timestamp,
    /// Whether it stays however little it is used.
    pub pinned: bool,
}

/// How far a bundle is that is on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BundleFetch {
    /// Where it comes from.
    pub from: String,
    /// Bytes of memory that are here by now.
    pub fetched_bytes: u64,
    /// Bytes of memory with content.
    pub total_bytes: u64,
    /// Why the rest does not come at the moment, if it does not. It is tried again and again.
    pub trouble: Option<String>,
}

/// `GET /v1/vms/{id}/memory`: what a VM has of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmMemory {
    /// The VM.
    #[schema(value_type = String)]
    pub vm_id: VmId,
    /// The bundle it was launched from; null when it booted.
    #[schema(value_type = Option<String>)]
    pub bundle_id: Option<BundleId>,
    /// How it was launched; null when it booted.
    pub mode: Option<LaunchMode>,
    /// What is missing of it; null when nothing is.
    pub filling: Option<VmFilling>,
}

/// How a VM is launched from a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LaunchMode {
    /// All of the bundle has to be here.
    #[default]
    Mmap,
    /// The VM may run while some of the bundle's memory is still on its way: a guest waits for what it reaches.
    Lazy,
}

/// A VM whose memory is not all here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmFilling {
    /// Parts of its memory that it has by now.
    pub chunks_mapped: u32,
    /// Parts of all of its memory.
    pub chunks_total: u32,
    /// Parts that its guest waits for.
    pub chunks_wanted: u32,
    /// For how long it has waited for the first of them, in milliseconds; null when it waits for none.
    pub waits_ms: Option<u64>,
    /// How far its bundle is; null when all of that is here.
    pub fetch: Option<BundleFetch>,
}
