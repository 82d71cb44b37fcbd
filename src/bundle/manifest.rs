//! What a bundle says of itself: `manifest.json`, version 1. It is read before anything else and can be read without
//! anything else. Whoever reads a version that is not the first still learns which version it is ([`read`]).
//!
//! A bundle's id is the digest of the manifest's bytes, and the manifest holds the digests of the other files: the id
//! stands for all of the content.

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::run::Run;
use crate::clock::UnixNanos;
use crate::ids::{BundleId, VmId};
use crate::units::PAGE_BYTES;

mod check;

pub use check::InvalidManifest;
pub(super) use check::{STATE_BYTES_MAX, is_label};

/// Version of the manifest that is written. All from 1 on are read.
pub const FORMAT: u32 = 1;

/// Largest manifest in bytes. A chunk's entry takes about 90: this is room for 40 GiB of memory without a zero in
/// 256 KiB chunks, and for most of what a TiB holds.
pub const MANIFEST_BYTES_MAX: usize = 16 << 20;

/// Bytes of a chunk when a bundle is made: small enough that one changed page costs little, large enough that a digest
/// each is cheap.
pub const CHUNK_BYTES: u32 = 256 << 10;

/// All that is known of a bundle. Fields are written in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub hearth_version: String,
    /// Architecture of the guest.
    pub arch: Arch,
    /// A label given by people; several bundles may have the same.
    pub name: Option<String>,
    /// The host it was made on.
    pub host: BuildHost,
    /// The processor its guest has seen.
    pub cpu: GuestCpu,
    /// The machine.
    pub machine: MachineShape,
    /// Guest memory, as a restored guest sees it.
    pub memory: MemoryMap,
    /// The saved state of everything else.
    pub state: StateFile,
    /// The bundle this one holds the difference to.
    pub parent: Option<Parent>,
    /// Who the frozen guest takes itself for.
    pub identity: FrozenIdentity,
    /// What runs in it.
    pub guest: GuestSystem,
    /// Where it comes from.
    pub provenance: Provenance,
    /// The language runtime or application that was warmed up, for people and schedulers.
    pub runtime: Option<Runtime>,
    /// Leases on anything outside: there may be none, since a clone would share them.
    pub leases: Vec<String>,
}

/// What the maker of a bundle knows; the rest of the manifest is measured when it is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestDraft {
    /// Version of the program.
    pub hearth_version: String,
    /// Architecture of the guest.
    pub arch: Arch,
    /// A label: 1 to 63 of a-z, 0-9 and -.
    pub name: Option<String>,
    /// The host.
    pub host: BuildHost,
    /// The processor its guest has seen.
    pub cpu: GuestCpu,
    /// The machine.
    pub machine: MachineShape,
    /// Who the frozen guest takes itself for.
    pub identity: FrozenIdentity,
    /// What runs in it.
    pub guest: GuestSystem,
    /// Where it comes from.
    pub provenance: Provenance,
    /// The runtime that was warmed up.
    pub runtime: Option<Runtime>,
}

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm. No host runs it yet; a bundle of it is told apart instead of being garbage.
    Aarch64,
}

/// The host a bundle was made on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildHost {
    /// The hypervisor's signature as a guest sees it.
    pub provider: String,
    /// Whether the guest's kernel mode is emulated: such guests have other kernel words and other code in memory.
    pub kernel_mode_emulated: bool,
    /// Whether guests see the CPUID they are given.
    pub cpuid_honoured: bool,
    /// Frequency of the guest's time-stamp counter.
    pub tsc_khz: u32,
    /// Release of the host's kernel, for people.
    pub kernel_release: String,
}

/// The processor a guest has seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCpu {
    /// Vendor, as CPUID spells it.
    pub vendor: String,
    /// Family.
    pub family: u32,
    /// Model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Names of the features the guest may be using, as in /proc/cpuinfo: sorted, each once.
    pub features: Vec<String>,
    /// Digest of the CPUID leaves.
    pub leaves_digest: Digest,
}

/// The machine a guest runs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineShape {
    /// Version of the map of guest-physical addresses.
    pub layout_version: u16,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Guest memory; also the length of `memory.img`.
    pub memory_bytes: u64,
    /// Bytes of a page.
    pub page_bytes: u32,
    /// How memory is backed when it is launched.
    pub backing: Backing,
    /// Devices, by ascending slot.
    pub devices: Vec<DeviceSlot>,
}

/// How guest memory is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// The image mapped privately: clones share what they do not write.
    PrivateFile,
    /// Shared memory filled from the image.
    SharedMemfd,
    /// Anonymous memory filled from the image.
    Anonymous,
}

/// A device in its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSlot {
    /// The slot.
    pub slot: u8,
    /// What is there.
    pub kind: DeviceKind,
    /// Whether a disk is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Hardware address of an interface, `02:00:00:00:00:01`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// MTU of an interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// virtio-vsock.
    Vsock,
    /// virtio-rng.
    Rng,
    /// virtio-balloon.
    Balloon,
    /// virtio-blk.
    Block,
    /// virtio-net.
    Net,
}

/// Guest memory in chunks. `chunks` and `zero_runs` cover each chunk exactly once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMap {
    /// Bytes of a chunk; the last one may be shorter.
    pub chunk_bytes: u32,
    /// Chunks with content, ascending.
    pub chunks: Vec<Chunk>,
    /// Runs of chunks that are zero, ascending.
    pub zero_runs: Vec<Run>,
    /// In a diff: runs of pages held in this bundle's own `memory.img`; the others are the parent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Vec<Run>>,
}

/// A chunk with content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chunk {
    /// Its number: offset in `memory.img` divided by the size of a chunk.
    pub index: u64,
    /// Digest of its bytes.
    pub digest: Digest,
}

/// `state.bin`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Its length.
    pub bytes: u64,
    /// Its digest.
    pub digest: Digest,
    /// The sections in it, in order.
    pub sections: Vec<SectionEntry>,
}

/// A section of saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionEntry {
    /// Number of its kind ([`crate::saved::SectionKind`]).
    pub kind: u16,
    /// Which of its kind.
    pub instance: u16,
    /// Version of its content.
    pub version: u16,
}

/// The bundle a diff builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Which.
    pub bundle: BundleId,
    /// How many bundles this one needs below it: 1 when the parent is flat.
    pub depth: u8,
}

/// Who a guest took itself for when it was frozen. A clone gets another identity before its network opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenIdentity {
    /// Host name.
    pub hostname: String,
    /// Hardware addresses.
    pub macs: Vec<String>,
    /// IP addresses, with their prefix length or without.
    pub addresses: Vec<String>,
}

/// What runs in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSystem {
    /// The kernel's command line.
    pub command_line: String,
    /// The image it was booted from.
    pub image: SourceImage,
    /// Version of the protocol its agent speaks.
    pub agent_protocol: u16,
}

/// The image a guest was booted from, as it was then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceImage {
    /// Its name.
    pub name: String,
    /// Its digest, over files and command line.
    pub digest: Digest,
    /// The kernel's digest, if known.
    pub kernel: Option<Digest>,
    /// The initrd's digest, if there is one and it is known.
    pub initrd: Option<Digest>,
}

/// Where a bundle comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// When it was made.
    pub built_at: UnixNanos,
    /// Name of the host.
    pub host_name: String,
    /// How it was made.
    pub recipe: Recipe,
    /// Words of the command that warmed it up.
    pub warmup: Vec<String>,
    /// What the guest printed when it was warm.
    pub ready_marker: Option<String>,
    /// The VM it was.
    pub source_vm: Option<VmId>,
    /// The diff it has the content of.
    pub compacted_from: Option<BundleId>,
}

/// How a bundle was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// Booted from an image and warmed up for the purpose.
    Image,
    /// Taken of a VM that was running.
    Snapshot,
}

/// A runtime that was warmed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Why bytes are not a manifest this program reads.
#[derive(Debug, thiserror::Error)]
pub enum ReadManifestError {
    /// Too long.
    #[error("{bytes} bytes are over the limit of {MANIFEST_BYTES_MAX}")]
    Size {
        /// How many there are.
        bytes: usize,
    },
    /// It has no version: it is no manifest of any version.
    #[error("no manifest: there is no format number in it")]
    NoFormat(#[source] serde_json::Error),
    /// Of a version this program does not read.
    #[error("format {found}, this program reads 1 to {FORMAT}")]
    Format {
        /// The version.
        found: u32,
    },
    /// Not of the shape its version has.
    #[error("malformed")]
    Syntax(#[source] serde_json::Error),
    /// Of the right shape, but it cannot be true.
    #[error("it contradicts itself or a limit")]
    Invalid(#[source] InvalidManifest),
}

/// All that is asked of a manifest of any version.
#[derive(Deserialize)]
struct AnyVersion {
    format: u32,
}

/// Reads and checks a manifest of any version this program knows.
pub fn read(bytes: &[u8]) -> Result<Manifest, ReadManifestError> {
    if bytes.len() > MANIFEST_BYTES_MAX {
        return Err(ReadManifestError::Size { bytes: bytes.len() });
    }
    let AnyVersion { format } = serde_json::from_slice(bytes).map_err(ReadManifestError::NoFormat)?;
    if format != FORMAT {
        return Err(ReadManifestError::Format { found: format });
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(ReadManifestError::Syntax)?;
    manifest.check().map_err(ReadManifestError::Invalid)?;
    Ok(manifest)
}

/// The id of the bundle whose `manifest.json` has these bytes.
pub fn id_of(bytes: &[u8]) -> BundleId {
    let digest = Digest::of(bytes);
    let mut first = [0; crate::ids::ID_DIGEST_BYTES];
    first.copy_from_slice(&digest.as_bytes()[..crate::ids::ID_DIGEST_BYTES]);
    BundleId::from_digest(first)
}

impl Manifest {
    /// The bytes of `manifest.json`: compact JSON, fields in the order of the types.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ReadManifestError> {
        let bytes = serde_json::to_vec(self).map_err(ReadManifestError::Syntax)?;
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ReadManifestError::Size { bytes: bytes.len() });
        }
        Ok(bytes)
    }

    /// Whether all of it can be true: everything is bounded, and nothing contradicts another part.
    pub fn check(&self) -> Result<(), InvalidManifest> {
        check::check(self)
    }

    /// Whether memory needs another bundle.
    pub fn is_diff(&self) -> bool {
        self.parent.is_some()
    }

    /// Number of chunks of guest memory.
    pub fn chunk_count(&self) -> u64 {
        self.machine.memory_bytes.div_ceil(u64::from(self.memory.chunk_bytes.max(1)))
    }

    /// Number of pages of guest memory.
    pub fn page_count(&self) -> u64 {
        self.machine.memory_bytes / PAGE_BYTES
    }
}

impl ManifestDraft {
    /// The finished manifest.
    pub(super) fn complete(self, memory: MemoryMap, state: StateFile, parent: Option<Parent>) -> Manifest {
        let Self { hearth_version, arch, name, host, cpu, machine, identity, guest, provenance, runtime } = self;
        Manifest {
            format: FORMAT,
            hearth_version,
            arch,
            name,
            host,
            cpu,
            machine,
            memory,
            state,
            parent,
            identity,
            guest,
            provenance,
            runtime,
            leases: Vec::new(),
        }
    }

    /// The draft that would become this manifest.
    pub(super) fn of(manifest: &Manifest) -> Self {
        let Manifest { hearth_version, arch, name, host, cpu, machine, identity, guest, provenance, runtime, .. } =
            manifest.clone();
        Self { hearth_version, arch, name, host, cpu, machine, identity, guest, provenance, runtime }
    }
}

impl Arch {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }
}

impl From<Arch> for String {
    fn from(arch: Arch) -> Self {
        arch.as_str().to_owned()
    }
}

impl TryFrom<String> for Arch {
    type Error = UnknownArch;
    fn try_from(text: String) -> Result<Self, UnknownArch> {
        [Self::X86_64, Self::Aarch64].into_iter().find(|arch| arch.as_str() == text).ok_or(UnknownArch { text })
    }
}

/// An architecture nobody here has heard of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("arch: {text:?} is none of x86_64 and aarch64")]
pub struct UnknownArch {
    /// What was given.
    pub text: String,
}
