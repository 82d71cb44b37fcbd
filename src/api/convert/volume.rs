//! Volumes, their snapshots and their leases.

use crate::agent::{self, ChangesView, DigestView, LeasesView, SnapshotReport, VolumeReport};
use crate::api::error::ApiError;
use crate::api::types::{
    Lease, LeaseHistoryEntry, LeaseList, LeaseMode, VmVolumes, Volume, VolumeChanges, VolumeDigest, VolumeFlow,
    VolumePhase, VolumeRun, VolumeSlot, VolumeSnapshot, VolumeStats, VolumeWish,
};
use crate::lease;

pub(in crate::api) fn volume(report: VolumeReport) -> Volume {
    let VolumeReport { id, name, bytes, allocated_bytes, layers, generation, created_ms, origin, damage, .. } = report;
    Volume {
        id,
        name,
        bytes,
        allocated_bytes,
        layers,
        generation,
        created_ms,
        origin,
        damage,
        active: report.active.map(lease),
        standby: report.standby.map(lease),
        shared: report.shared,
        connections: report.connections,
    }
}

pub(in crate::api) fn volume_snapshot(report: SnapshotReport) -> VolumeSnapshot {
    let SnapshotReport { id, name, volume, bytes, generation, created_ms } = report;
    VolumeSnapshot { id, name, volume_id: volume, bytes, generation, created_ms }
}

/// What its holder knows is left out: it goes from agent to daemon only.
pub(in crate::api) fn lease(lease: lease::Lease) -> Lease {
    let lease::Lease { id, mode, epoch, holder, vm, host, ttl_s, secret: _ } = lease;
    let mode = match mode {
        lease::LeaseMode::Active => LeaseMode::Active,
        lease::LeaseMode::Standby => LeaseMode::Standby,
        lease::LeaseMode::Shared => LeaseMode::Shared,
    };
    Lease { id, mode, epoch, holder, vm_id: vm, host, ttl_s }
}

pub(in crate::api) fn lease_mode(mode: LeaseMode) -> lease::LeaseMode {
    match mode {
        LeaseMode::Active => lease::LeaseMode::Active,
        LeaseMode::Standby => lease::LeaseMode::Standby,
        LeaseMode::Shared => lease::LeaseMode::Shared,
    }
}

pub(in crate::api) fn leases(view: LeasesView) -> LeaseList {
    let LeasesView { volume, leases, epoch, history } = view;
    let (leases, history) = (leases.into_iter().map(lease).collect(), history.into_iter().map(entry).collect());
    LeaseList { volume_id: volume, epoch, leases, history }
}

fn entry(entry: lease::LeaseEntry) -> LeaseHistoryEntry {
    let at_ms = entry.at_ms;
    match entry.event {
        lease::LeaseEvent::Acquired { lease } => LeaseHistoryEntry {
            at_ms,
            what: "acquired".to_owned(),
            lease_id: lease.id,
            from: None,
            epoch: Some(lease.epoch),
            holder: Some(lease.holder),
        },
        lease::LeaseEvent::Converted { from, to, epoch } => LeaseHistoryEntry {
            at_ms,
            what: "converted".to_owned(),
            lease_id: to,
            from: Some(from),
            epoch: Some(epoch.saturating_add(1)),
            holder: None,
        },
        lease::LeaseEvent::Ended { id, why } => {
            let what = match why {
                lease::LeaseEnd::Released => "released",
                lease::LeaseEnd::Expired => "expired",
                lease::LeaseEnd::Broken => "broken",
            };
            LeaseHistoryEntry { at_ms, what: what.to_owned(), lease_id: id, from: None, epoch: None, holder: None }
        }
    }
}

pub(in crate::api) fn digest(view: DigestView) -> VolumeDigest {
    let DigestView { volume, blake3, bytes } = view;
    VolumeDigest { volume_id: volume, blake3, bytes }
}

pub(in crate::api) fn changes(view: ChangesView) -> VolumeChanges {
    let ChangesView { volume, generation, complete, runs } = view;
    let runs = runs.into_iter().map(|agent::VolumeRun { offset, bytes }| VolumeRun { offset, bytes }).collect();
    VolumeChanges { volume_id: volume, generation, complete, runs }
}

pub(in crate::api) fn wish(wish: VolumeWish) -> Result<agent::VolumeWish, ApiError> {
    let VolumeWish { volume, read_only, mount, iops, bytes_per_s } = wish;
    if iops == Some(0) || bytes_per_s == Some(0) {
        return Err(ApiError::bad_request("invalid_volume", "iops and bytes_per_s: a limit is at least 1"));
    }
    Ok(agent::VolumeWish { volume, read_only, mount, limits: agent::VolumeLimits { iops, bytes_per_s } })
}

/// The slots of a VM.
pub(in crate::api) fn slots(vm: &agent::VmRecord) -> Vec<VolumeSlot> {
    let slot = |(index, slot): (usize, &agent::VolumeSlot)| {
        let used = slot.used.as_ref();
        VolumeSlot {
            index: vm.spec.volume_index(index),
            told_read_only: slot.told_read_only,
            volume_id: used.map(|used| used.volume.clone()),
            read_only: slot.told_read_only || used.is_some_and(|used| used.read_only),
            bytes: used.map_or(0, |used| used.bytes),
            phase: used.map(|used| match used.phase {
                agent::UsePhase::Attached => VolumePhase::Attached,
                agent::UsePhase::Attaching => VolumePhase::Attaching,
                agent::UsePhase::Detaching { .. } => VolumePhase::Detaching,
            }),
            mount: used.and_then(|used| used.mount.clone()),
            iops: used.and_then(|used| used.limits.iops),
            bytes_per_s: used.and_then(|used| used.limits.bytes_per_s),
            lease_id: used.map(|used| used.lease.clone()),
            epoch: used.map(|used| used.epoch),
        }
    };
    vm.spec.volumes.iter().enumerate().map(slot).collect()
}

pub(in crate::api) fn vm_volumes(view: agent::VmVolumesView) -> VmVolumes {
    let flow = |flow: agent::VolumeFlow| VolumeFlow {
        requests: flow.requests,
        bytes: flow.bytes,
        took_us: flow.took_us,
        latency_us: flow.latency_us.to_vec(),
    };
    let stats = |status: agent::VolumeStatus| VolumeStats {
        index: status.index,
        connections: status.connections,
        waiting: status.waiting,
        reconnects: status.reconnects,
        errors: status.errors,
        fenced: status.fenced,
        read: flow(status.read),
        write: flow(status.write),
        flush: flow(status.flush),
        trouble: status.trouble,
    };
    let slots = slots(&view.vm);
    VmVolumes { vm_id: view.vm.id.clone(), slots, stats: view.slots.into_iter().map(stats).collect() }
}
