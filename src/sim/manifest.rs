//! What the bundles of a simulated host say of themselves.

use std::collections::BTreeSet;

use crate::agent::{BundleView, CommitOrder};
use crate::bundle::admit::HostFacts;
use crate::bundle::manifest::{
    Arch, Backing, BuildHost, CHUNK_BYTES, DeviceKind, DeviceSlot, FORMAT, FrozenIdentity, GuestCpu, GuestSystem,
    MachineShape, MemoryMap, Parent, Provenance, Recipe, SourceImage, StateFile,
};
use crate::bundle::{Digest, Manifest, Run};
use crate::clock::UnixNanos;
use crate::units::{MIB, PAGE_BYTES};

/// Slot of the first disk, and of the first network interface.
const FIRST_BLOCK_SLOT: u8 = 3;
const FIRST_NET_SLOT: u8 = 9;

/// What a simulated host is.
pub(super) fn facts() -> HostFacts {
    HostFacts {
        arch: Arch::X86_64,
        provider: "simulated".to_owned(),
        kernel_mode_emulated: false,
        cpuid_honoured: true,
        tsc_khz: 1_000_000,
        tsc_scaling: false,
        cpu_vendor: "simulated".to_owned(),
        cpu_features: BTreeSet::new(),
        layout_version: 1,
        agent_protocols: 1..=u16::MAX,
        backings: vec![Backing::PrivateFile],
    }
}

/// The manifest of a bundle of a VM that had `memory` in its memory.
pub(super) fn of(order: &CommitOrder, parent: Option<&BundleView>, memory: u64) -> Manifest {
    let CommitOrder { vm, operation, order, agent_protocol } = order;
    let build = vm.spec.build.as_ref();
    let machine = machine(vm);
    let parent = parent.map(|view| Parent {
        bundle: view.id.clone(),
        depth: view.manifest.parent.as_ref().map_or(0, |parent| parent.depth).saturating_add(1),
    });
    let chunks = machine.memory_bytes.div_ceil(CHUNK_BYTES.into());
    let text = |word: &str| word.to_owned();
    Manifest {
        format: FORMAT,
        hearth_version: env!("CARGO_PKG_VERSION").to_owned(),
        arch: Arch::X86_64,
        name: order.name.clone(),
        host: BuildHost {
            provider: text("simulated"),
            kernel_mode_emulated: false,
            cpuid_honoured: true,
            tsc_khz: 1_000_000,
            kernel_release: text("simulated"),
        },
        cpu: GuestCpu {
            vendor: text("simulated"),
            family: 6,
            model: 1,
            stepping: 1,
            features: Vec::new(),
            leaves_digest: Digest::of(&[]),
        },
        memory: MemoryMap {
            chunk_bytes: CHUNK_BYTES,
            chunks: Vec::new(),
            zero_runs: vec![Run { first: 0, count: chunks }],
            pages: parent.is_some().then(Vec::new),
        },
        // Stands for all of the content.
        state: StateFile { digest: Digest::of(&memory.to_le_bytes()), ..StateFile::default() },
        parent,
        identity: FrozenIdentity {
            hostname: vm.hostname().to_owned(),
            macs: (0..vm.spec.interfaces).map(mac).collect(),
            addresses: Vec::new(),
        },
        guest: GuestSystem {
            command_line: text("quiet"),
            image: SourceImage { name: vm.spec.image.clone(), digest: Digest::of(&[]), kernel: None, initrd: None },
            agent_protocol: *agent_protocol,
        },
        provenance: Provenance {
            built_at: operation.created_at,
            host_name: text("simulated"),
            recipe: if build.is_some() { Recipe::Image } else { Recipe::Snapshot },
            warmup: build.and_then(|build| build.warmup.clone()).into_iter().collect(),
            ready_marker: build.and_then(|build| build.ready_marker.clone()),
            source_vm: Some(vm.id.clone()),
            compacted_from: None,
        },
        machine,
        runtime: None,
        leases: Vec::new(),
    }
}

/// The manifest of a bundle with the content of another that builds on none.
pub(super) fn compacted(original: &BundleView, name: Option<String>, built_at: UnixNanos) -> Manifest {
    let mut manifest = (*original.manifest).clone();
    manifest.name = name;
    manifest.parent = None;
    manifest.memory.pages = None;
    manifest.provenance.built_at = built_at;
    manifest.provenance.compacted_from = Some(original.id.clone());
    manifest
}

fn machine(vm: &crate::agent::VmRecord) -> MachineShape {
    let plain = |slot, kind| DeviceSlot { slot, kind, read_only: None, mac: None, mtu: None };
    let disks = (FIRST_BLOCK_SLOT..).zip(&vm.spec.disks);
    let disks =
        disks.map(|(slot, disk)| DeviceSlot { read_only: Some(disk.read_only), ..plain(slot, DeviceKind::Block) });
    let nets = (FIRST_NET_SLOT..).zip(0..vm.spec.interfaces);
    let nets = nets.map(|(slot, index)| DeviceSlot { mac: Some(mac(index)), ..plain(slot, DeviceKind::Net) });
    let slots = vm.spec.volumes.iter().enumerate().map(|(index, slot)| DeviceSlot {
        read_only: Some(slot.told_read_only),
        ..plain(FIRST_BLOCK_SLOT + vm.spec.volume_index(index), DeviceKind::Volume)
    });
    let always = [plain(0, DeviceKind::Vsock), plain(1, DeviceKind::Rng)];
    let balloon = vm.spec.balloon.then(|| plain(2, DeviceKind::Balloon));
    MachineShape {
        layout_version: 1,
        vcpus: vm.spec.vcpus.into(),
        memory_bytes: u64::from(vm.spec.memory_mib).saturating_mul(MIB),
        page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX),
        backing: Backing::PrivateFile,
        devices: always.into_iter().chain(balloon).chain(disks).chain(slots).chain(nets).collect(),
    }
}

fn mac(index: u8) -> String {
    format!("02:00:00:00:00:{index:02x}")
}
