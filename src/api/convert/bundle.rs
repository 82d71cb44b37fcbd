//! Bundles.

use super::timestamp;
use crate::agent::{self, BundleListed, BundleView, DeviceKind, Manifest, Recipe, Trust};
use crate::api::types::{Bundle, BundleFetched, BundleHost, BundleList, BundleRecipe, BundleTrust, UnreadableBundle};
use crate::units::MIB;

/// A bundle, and what the agent knows of it.
pub(in crate::api) fn bundle(view: &BundleView, door: &dyn agent::Door) -> Bundle {
    let BundleView { id, manifest, disk_bytes, signed, fetched, fetch } = view;
    let Manifest { machine, host, provenance, .. } = &**manifest;
    let count = |kind| {
        let devices = machine.devices.iter().filter(|device| device.kind == kind);
        u32::try_from(devices.count()).unwrap_or(u32::MAX)
    };
    Bundle {
        id: id.clone(),
        name: manifest.name.clone(),
        image: manifest.guest.image.name.clone(),
        vcpus: machine.vcpus.into(),
        memory_mib: machine.memory_bytes / MIB,
        disks: count(DeviceKind::Block),
        interfaces: count(DeviceKind::Net),
        spare_disks: count(DeviceKind::Volume),
        parent: manifest.parent.as_ref().map(|parent| parent.bundle.clone()),
        disk_bytes: *disk_bytes,
        vms: u32::try_from(door.users(id)).unwrap_or(u32::MAX),
        recipe: match (&provenance.compacted_from, provenance.recipe) {
            (Some(_), _) => BundleRecipe::Compaction,
            (None, Recipe::Image) => BundleRecipe::Build,
            (None, Recipe::Snapshot) => BundleRecipe::Snapshot,
        },
        warmup: provenance.warmup.first().cloned(),
        ready_marker: provenance.ready_marker.clone(),
        source_vm: provenance.source_vm.clone(),
        built_on: BundleHost {
            name: provenance.host_name.clone(),
            provider: host.provider.clone(),
            kernel_mode_emulated: host.kernel_mode_emulated,
            tsc_khz: host.tsc_khz,
            kernel_release: host.kernel_release.clone(),
        },
        created_at: timestamp(provenance.built_at),
        manifest_digest: signed.manifest_digest.to_string(),
        signed_by: signed.signatures.iter().map(|one| one.key).collect(),
        trust: match door.trust(view) {
            Trust::Unchecked => BundleTrust::Unchecked,
            Trust::Signed { .. } => BundleTrust::Signed,
            Trust::MadeHere => BundleTrust::MadeHere,
            Trust::Untrusted => BundleTrust::Untrusted,
        },
        fetched: fetched.clone().map(|fetched| BundleFetched {
            from: Some(fetched.from).filter(|from| !from.is_empty()),
            fetched_at: timestamp(fetched.fetched_at),
            last_used_at: timestamp(fetched.last_used),
            pinned: fetched.pinned,
        }),
        fetch: fetch.clone().map(super::fetch),
    }
}

/// All bundles.
pub(in crate::api) fn bundles(listed: &[BundleListed], door: &dyn agent::Door) -> BundleList {
    let (mut bundles, mut unreadable) = (Vec::new(), Vec::new());
    for one in listed {
        match one {
            BundleListed::Readable(view) => bundles.push(bundle(view, door)),
            BundleListed::Unreadable { id, reason } => {
                unreadable.push(UnreadableBundle { id: id.clone(), reason: reason.clone() });
            }
        }
    }
    let coming = door.coming_bundles();
    // One that has just come as a whole may be among both.
    let coming = coming.iter().filter(|view| bundles.iter().all(|here| here.id != view.id));
    let coming: Vec<Bundle> = coming.map(|view| bundle(view, door)).collect();
    bundles.extend(coming);
    bundles.sort_by(|a, b| a.id.cmp(&b.id));
    BundleList { bundles, unreadable }
}
