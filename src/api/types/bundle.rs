//! Bundles: guests frozen once, to be launched any number of times.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{BundleFetch, BundleFetched, IMAGE_DEFAULT};
use crate::ids::{BundleId, VmId};
use crate::signing::{PublicKey, Signature};

/// `POST /v1/bundles`: boots a VM of an image, warms it up, freezes it and removes it. Answered 202 with an operation,
/// whose `bundle_id` is the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BundleBuildRequest {
    /// Image to boot.
    #[serde(default = "image_default")]
    #[schema(example = "demo")]
    pub image: String,
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Number of vCPUs; 1 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Guest memory in MiB; 128 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// How many network interfaces its VMs have, 1 to 8; 1 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interfaces: Option<u8>,
    /// Disks of its VMs that are empty until they get a volume, at launch or later: none when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 6)]
    pub spare_disks: Option<u8>,
    /// Make it also if the guest says that it holds secrets (marks in /run/hearth/secrets.d): every clone has them then.
    #[serde(default)]
    pub with_secrets: bool,
    /// A line for the guest's shell that warms it up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<String>,
    /// What the warm-up program prints when the guest is warm; it runs on then, also in every VM launched from the
    /// bundle. Without it the program has to end with code 0. Without a program, the marker is looked for on the guest's
    /// console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_marker: Option<String>,
    /// How long warming up may take, in seconds.
    #[serde(default = "timeout_default")]
    pub timeout_s: u32,
}

fn image_default() -> String {
    IMAGE_DEFAULT.to_owned()
}

const fn timeout_default() -> u32 {
    300
}

impl Default for BundleBuildRequest {
    fn default() -> Self {
        Self {
            image: image_default(),
            name: None,
            vcpus: None,
            memory_mib: None,
            interfaces: None,
            spare_disks: None,
            with_secrets: false,
            warmup: None,
            ready_marker: None,
            timeout_s: timeout_default(),
        }
    }
}

/// `POST /v1/vms/{id}/snapshot`: answered with the operation that made the bundle, once it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Name of the bundle, unique on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle_name: Option<String>,
    /// Hold only what differs from the bundle the VM was launched from.
    #[serde(default)]
    pub diff: bool,
    /// Copy most of memory while the VM runs, and hold it for the rest only: a shorter pause, a longer snapshot.
    #[serde(default)]
    pub live: bool,
    /// Make it also if the guest says that it holds secrets (marks in /run/hearth/secrets.d): every clone has them then.
    #[serde(default)]
    pub with_secrets: bool,
}

/// `POST /v1/bundles/{id}/compact`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompactRequest {
    /// Name of the new bundle, unique on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle_name: Option<String>,
}

/// A bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Bundle {
    /// Its id: the start of a digest over all of it.
    #[schema(value_type = String, example = "b-mzxw6ytbmzxw6ytbmzxw6ytbme")]
    pub id: BundleId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The image its guest was booted from.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Disks a VM launched from it gets, and network interfaces.
    pub disks: u32,
    /// Network interfaces.
    pub interfaces: u32,
    /// Disks that are empty until a VM launched from it gets a volume.
    #[serde(default)]
    pub spare_disks: u32,
    /// The bundle it holds the difference to; null when it holds all of its memory.
    #[schema(value_type = Option<String>)]
    pub parent: Option<BundleId>,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
    /// VMs that run from it.
    pub vms: u32,
    /// How it was made.
    pub recipe: BundleRecipe,
    /// The line that warmed it up.
    pub warmup: Option<String>,
    /// What the guest said when it was warm.
    pub ready_marker: Option<String>,
    /// The VM it was.
    #[schema(value_type = Option<String>)]
    pub source_vm: Option<VmId>,
    /// The host it was made on, and what of it matters to the guest.
    pub built_on: BundleHost,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Digest of its manifest, 64 hexadecimal digits: what is signed. The id is the start of it.
    pub manifest_digest: String,
    /// Keys of those who signed it.
    #[schema(value_type = Vec<String>, example = json!(["ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]))]
    pub signed_by: Vec<PublicKey>,
    /// Whether it may be launched here, as far as signatures go.
    pub trust: BundleTrust,
    /// Where it came from, if it was fetched; null when it was made or imported here.
    #[serde(default)]
    pub fetched: Option<BundleFetched>,
    /// How far it is, if some of its memory is still on its way; null when all of it is here.
    pub fetch: Option<BundleFetch>,
}

/// Whether a bundle may be launched on this host, as far as signatures go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BundleTrust {
    /// This host asks for no signatures.
    Unchecked,
    /// It has a signature of a key that this host trusts.
    Signed,
    /// It was made on this host, which trusts that.
    MadeHere,
    /// It has none, and is not launched.
    Untrusted,
}

/// `POST /v1/bundles/{id}/signatures`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BundleSignRequest {
    /// The public key.
    #[schema(value_type = String, example = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")]
    pub key: PublicKey,
    /// Its signature, base64 of 64 bytes: Ed25519 over `hearth bundle manifest v1`, a zero byte and the 32 bytes of
    /// `manifest_digest`.
    #[schema(value_type = String)]
    pub signature: Signature,
}

/// `POST /v1/bundle-imports`: what came of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BundleImported {
    /// The bundle that was exported.
    pub bundle: Bundle,
    /// Whether it was here before; then nothing but signatures is new.
    pub existed: bool,
    /// The bundles it builds on, which came with it.
    #[schema(value_type = Vec<String>)]
    pub parents: Vec<BundleId>,
}

/// How a bundle was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BundleRecipe {
    /// Booted for the purpose.
    Build,
    /// Taken of a VM.
    Snapshot,
    /// Made of another bundle.
    Compaction,
}

/// What of a host matters to a frozen guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BundleHost {
    /// Its name.
    pub name: String,
    /// The hypervisor's signature.
    pub provider: String,
    /// Whether the guest's kernel mode is emulated.
    pub kernel_mode_emulated: bool,
    /// Frequency of the time-stamp counter.
    pub tsc_khz: u32,
    /// The host's kernel.
    pub kernel_release: String,
}

/// `GET /v1/bundles`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BundleList {
    /// The bundles of this host.
    pub bundles: Vec<Bundle>,
    /// Those that are there and cannot be read.
    pub unreadable: Vec<UnreadableBundle>,
}

/// A bundle that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnreadableBundle {
    /// Its id.
    #[schema(value_type = String)]
    pub id: BundleId,
    /// Why.
    pub reason: String,
}

/// `POST /v1/bundles/{id}/verify`: all of it was read, and is what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BundleVerified {
    /// Its id.
    #[schema(value_type = String)]
    pub id: BundleId,
    /// Chunks of memory that were compared.
    pub chunks: u64,
    /// Sections of state.
    pub sections: u64,
}
