//! For tests of this floor: a store in a directory of its own, drafts, saved state, and memory from a list of writes.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::manifest::{
    Arch, Backing, BuildHost, DeviceKind, DeviceSlot, FrozenIdentity, GuestCpu, GuestSystem, MachineShape,
    ManifestDraft, Provenance, Recipe, Runtime, SourceImage,
};
use super::{Committed, Contents, Run, Staging, Store};
use crate::clock::UnixNanos;
use crate::ids::{BundleId, VmId};
use crate::saved::{Saved, Section, SectionKind, Sections, codec};

/// A saved type of the tests' own.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SampleV1 {
    pub(super) requests: u64,
}

impl Saved for SampleV1 {
    const KIND: SectionKind = SectionKind::Rng;
    const VERSION: u16 = 1;
}

pub(super) fn state() -> Vec<u8> {
    let mut sections = Sections::new();
    for instance in 0..2 {
        sections.push(Section::new(instance, &SampleV1 { requests: 7 }).unwrap()).unwrap();
    }
    codec::to_bytes(&sections).unwrap()
}

pub(super) fn draft(memory_bytes: u64) -> ManifestDraft {
    let device = |slot, kind| DeviceSlot { slot, kind, read_only: None, mac: None, mtu: None };
    ManifestDraft {
        hearth_version: "0.1.0".to_owned(),
        arch: Arch::X86_64,
        name: Some("warm".to_owned()),
        host: BuildHost {
            provider: "KVMKVMKVM".to_owned(),
            kernel_mode_emulated: false,
            cpuid_honoured: true,
            tsc_khz: 2_400_000,
            kernel_release: "6.18.44".to_owned(),
        },
        cpu: GuestCpu {
            vendor: "GenuineIntel".to_owned(),
            family: 6,
            model: 106,
            stepping: 6,
            features: ["aes", "avx2", "sse4_2"].map(str::to_owned).to_vec(),
            leaves_digest: Digest::of(b"leaves"),
        },
        machine: MachineShape {
            layout_version: 1,
            vcpus: 1,
            memory_bytes,
            page_bytes: 4096,
            backing: Backing::PrivateFile,
            devices: vec![
                device(0, DeviceKind::Vsock),
                device(1, DeviceKind::Rng),
                DeviceSlot { read_only: Some(true), ..device(3, DeviceKind::Block) },
                DeviceSlot { mac: Some("02:00:00:00:00:01".to_owned()), mtu: Some(1450), ..device(9, DeviceKind::Net) },
            ],
        },
        identity: FrozenIdentity {
            hostname: "frozen".to_owned(),
            macs: vec!["02:00:00:00:00:01".to_owned()],
            addresses: vec!["169.254.7.2/30".to_owned()],
        },
        guest: GuestSystem {
            command_line: "console=ttyS0 quiet".to_owned(),
            image: SourceImage {
                name: "demo".to_owned(),
                digest: Digest::of(b"image"),
                kernel: Some(Digest::of(b"kernel")),
                initrd: None,
            },
            agent_protocol: 2,
        },
        provenance: Provenance {
            built_at: UnixNanos(1_700_000_000_000_000_000),
            host_name: "host".to_owned(),
            recipe: Recipe::Image,
            warmup: vec!["/bin/warm".to_owned(), "--all".to_owned()],
            ready_marker: Some("ready".to_owned()),
            source_vm: Some(VmId::from_random([7; 10])),
            compacted_from: None,
        },
        runtime: Some(Runtime { name: "python".to_owned(), version: "3.13".to_owned() }),
    }
}

/// Bytes and where they go.
pub(super) type Writes<'a> = &'a [(u64, &'a [u8])];

/// The id of the bundle in `tests/golden/bundle_v1`.
pub(super) const GOLDEN_ID: &str = "b-3af4uijvozy4xsval2ult3i7u4";

/// What is written into the memory of the bundle in `tests/golden/bundle_v1`; the rest of its MiB is zero.
pub(super) const GOLDEN_MEMORY: Writes<'static> =
    &[(0, b"zero page"), (300 << 10, &[0xa5; 9000]), ((1 << 20) - 1, b"!")];

/// The directories that a store keeps beside its bundles.
pub(super) const DIRECTORIES: [&str; 5] = [".fetched", ".flat", ".partial", ".signatures", ".working-sets"];

/// A store below a temporary directory.
pub(super) struct Rig {
    pub(super) root: PathBuf,
    pub(super) store: Store,
    pub(super) memory_bytes: u64,
    _directory: tempfile::TempDir,
}

impl Rig {
    pub(super) fn new(memory_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("bundles");
        Self { store: Store::open(&root).unwrap(), root, memory_bytes, _directory: directory }
    }

    /// The same store, as the next process sees it.
    pub(super) fn restarted(&self) -> Store {
        Store::open(&self.root).unwrap()
    }

    /// Staged as a VMM leaves it.
    pub(super) fn staged(&self, token: &str, writes: Writes<'_>) -> Staging {
        let staging = self.store.stage(token, self.memory_bytes).unwrap();
        staging.state_file().unwrap().write_all(&state()).unwrap();
        let memory = staging.memory_file().unwrap();
        writes.iter().for_each(|(offset, bytes)| memory.write_all_at(bytes, *offset).unwrap());
        staging
    }

    pub(super) fn full(&self, token: &str, writes: Writes<'_>) -> Committed {
        let staging = self.staged(token, writes);
        staging.commit(self.named(token), Contents::Full, &mut |_| ()).unwrap()
    }

    pub(super) fn diff(&self, token: &str, parent: &BundleId, pages: &[(u64, u64)], writes: Writes<'_>) -> Committed {
        let pages = pages.iter().copied().map(Run::from).collect();
        let contents = Contents::Diff { parent: parent.clone(), pages };
        self.staged(token, writes).commit(self.named(token), contents, &mut |_| ()).unwrap()
    }

    pub(super) fn named(&self, name: &str) -> ManifestDraft {
        ManifestDraft { name: Some(name.to_owned()), ..draft(self.memory_bytes) }
    }

    /// Changes a file of a committed bundle, which takes some doing.
    pub(super) fn tamper(&self, id: &BundleId, name: &str, change: impl FnOnce(&File)) {
        let path = self.root.join(id.as_str()).join(name);
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        change(&File::options().read(true).write(true).open(path).unwrap());
    }

    /// Flips one bit of a byte.
    pub(super) fn flip(&self, id: &BundleId, name: &str, offset: u64, bit: u8) {
        self.tamper(id, name, |file| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << bit)], offset).unwrap();
        });
    }
}

/// A file's bytes.
pub(super) fn content(mut file: &File) -> Vec<u8> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Names in a directory.
pub(super) fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
