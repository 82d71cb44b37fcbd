//! The parts of a manifest that its maker knows: host, processor, machine, guest and provenance.

use serde::{Deserialize, Serialize};

use crate::bundle::digest::Digest;
use crate::clock::UnixNanos;
use crate::ids::{BundleId, VmId};

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
    /// virtio-blk, to hold a volume: empty in a bundle, whose clones each get their own, or none.
    Volume,
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
    /// The version of the guest's protocol that a host has to know to launch it (`hearth_guest_wire::version_to_go_on`).
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
