//! What a bundle says of itself: `manifest.json`, version 1. It is read before anything else and can be read without
//! anything else. Whoever reads a version that is not the first still learns which version it is ([`read`]).
//!
//! A bundle's id is the digest of the manifest's bytes, and the manifest holds the digests of the other files: the id
//! stands for all of the content.

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::run::Run;
use crate::ids::BundleId;
use crate::units::PAGE_BYTES;

mod check;
mod parts;
mod read;

pub use check::InvalidManifest;
pub(super) use check::{STATE_BYTES_MAX, is_label};
pub use parts::{
    Arch, Backing, BuildHost, DeviceKind, DeviceSlot, FrozenIdentity, GuestCpu, GuestSystem, MachineShape, Provenance,
    Recipe, Runtime, SourceImage, UnknownArch,
};
pub use read::{ReadManifestError, id_of, read};

/// Version of the manifest that is written. All from 1 on are read.
pub const FORMAT: u32 = 1;

/// Largest manifest in bytes. A chunk's entry takes about 95, so this is room for 40 GiB of memory in 256 KiB chunks of
/// which none is zero. A guest with more content than that cannot be made a bundle of.
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

#[cfg(test)]
mod tests;
