//! `hearth volume`.

use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::call::{Agent, PROMPT};
use super::output::Output;
use super::progress::shown;
use super::table::{bytes, columns, or_dash, pairs};
use crate::api::types::{
    Lease, LeaseConvertRequest, LeaseHistoryEntry, LeaseList, LeaseMode, LeaseRequest, Vm, Volume, VolumeChanges,
    VolumeCreateRequest, VolumeDigest, VolumeList, VolumeResizeRequest, VolumeSnapshot, VolumeSnapshotList,
    VolumeSnapshotRequest, VolumeWish,
};
use crate::cli::{
    LeaseArgs, LeaseConvertArgs, LeaseModeWord, VolumeAttachArgs, VolumeCommand, VolumeCreateArgs, VolumeDetachArgs,
    VolumeSnapshotArgs,
};
use crate::ids::VolumeSnapshotId;

/// How long reading or copying all of a volume may take.
const WHOLE_LIMIT: Duration = Duration::from_secs(24 * 3600);

#[derive(Serialize)]
struct Removed<'a> {
    removed: Vec<&'a str>,
}

pub(super) async fn run(agent: &Agent, out: Output, command: VolumeCommand) -> Result<(), Error> {
    match command {
        VolumeCommand::Create(args) => create(agent, out, args).await?,
        VolumeCommand::Ls => {
            let list: VolumeList = agent.get("/v1/volumes").await?;
            out.value(&list, |list| match list.volumes.as_slice() {
                [] => "no volumes; `hearth volume create --name data --size 1024` makes one".to_owned(),
                volumes => columns(&["VOLUME", "NAME", "SIZE", "ON DISK", "USED BY", "STATE"], volumes.iter().map(row)),
            })?;
        }
        VolumeCommand::Show { volume } => {
            let volume: Volume = agent.get(&path(volume.as_str(), "")).await?;
            out.value(&volume, shown_volume)?;
        }
        VolumeCommand::Attach(VolumeAttachArgs { volume, vm, read_only, mount, iops, rate }) => {
            let wish = VolumeWish {
                volume: volume.as_str().to_owned(),
                read_only,
                mount,
                iops,
                bytes_per_s: rate.map(|rate| rate.per_s),
            };
            let vm: Vm = agent.post(&format!("/v1/vms/{}/volumes", vm.as_str()), &wish, PROMPT).await?;
            out.value(&vm, |vm| format!("{} has {}", vm_called(vm), volume.as_str()))?;
        }
        VolumeCommand::Detach(VolumeDetachArgs { volume, vm, force }) => {
            let path = format!("/v1/vms/{}/volumes/{}?force={force}", vm.as_str(), volume.as_str());
            let vm: Vm = agent.delete_for(&path, PROMPT).await?;
            out.value(&vm, |vm| format!("{} does not have {} any more", vm_called(vm), volume.as_str()))?;
        }
        VolumeCommand::Snapshot(VolumeSnapshotArgs { volume, name }) => {
            let request = VolumeSnapshotRequest { name };
            let made: VolumeSnapshot = agent.post(&path(volume.as_str(), "/snapshots"), &request, WHOLE_LIMIT).await?;
            out.value(&made, |made| made.id.to_string())?;
        }
        VolumeCommand::Snapshots => {
            let list: VolumeSnapshotList = agent.get("/v1/volume-snapshots").await?;
            out.value(&list, |list| match list.snapshots.as_slice() {
                [] => "no snapshots; `hearth volume snapshot VOLUME` makes one".to_owned(),
                all => columns(&["SNAPSHOT", "NAME", "VOLUME", "SIZE", "GENERATION"], all.iter().map(snapshot_row)),
            })?;
        }
        VolumeCommand::Resize { volume, size } => {
            let request = VolumeResizeRequest { size_mib: size };
            let volume: Volume = agent.post(&path(volume.as_str(), "/resize"), &request, PROMPT).await?;
            out.value(&volume, |volume| format!("{} has {} now", called(volume), bytes(volume.bytes)))?;
        }
        VolumeCommand::Digest { volume } => {
            let path = path(volume.as_str(), "/digest");
            let reading = async { agent.post::<VolumeDigest>(&path, &super::bundle::Nothing {}, WHOLE_LIMIT).await };
            let digest = shown(&format!("read {}", volume.as_str()), reading).await?;
            out.value(&digest, |digest| format!("{}  {}", digest.blake3, digest.volume_id))?;
        }
        VolumeCommand::Changes { volume, since } => {
            let changes: VolumeChanges = agent.get(&path(volume.as_str(), &format!("/changes?since={since}"))).await?;
            out.value(&changes, shown_changes)?;
        }
        VolumeCommand::Leases { volume } => {
            let list: LeaseList = agent.get(&path(volume.as_str(), "/leases")).await?;
            out.value(&list, shown_leases)?;
        }
        VolumeCommand::Lease(args) => lease(agent, out, args).await?,
        VolumeCommand::Release { volume, lease } => {
            agent.delete(&path(volume.as_str(), &format!("/leases/{lease}")), PROMPT).await?;
            let removed = lease.as_str();
            out.value(&Removed { removed: vec![removed] }, |_| format!("{removed} is not in force"))?;
        }
        VolumeCommand::Convert(LeaseConvertArgs { volume, from, to, epoch }) => {
            let request = LeaseConvertRequest { from, to, epoch };
            let lease: Lease = agent.post(&path(volume.as_str(), "/leases/convert"), &request, PROMPT).await?;
            out.value(&lease, |lease| format!("{} is active, in epoch {}", lease.id, lease.epoch))?;
        }
        VolumeCommand::Rm { volumes } => {
            for word in &volumes {
                let word = word.as_str();
                let is_snapshot = word.starts_with(VolumeSnapshotId::PREFIX);
                let path = if is_snapshot { format!("/v1/volume-snapshots/{word}") } else { path(word, "") };
                agent.delete(&path, PROMPT).await?;
            }
            let removed: Vec<_> = volumes.iter().map(|word| word.as_str()).collect();
            out.value(&Removed { removed }, |it| format!("removed {}", it.removed.join(", ")))?;
        }
    }
    Ok(())
}

fn path(word: &str, rest: &str) -> String {
    format!("/v1/volumes/{word}{rest}")
}

async fn create(agent: &Agent, out: Output, args: VolumeCreateArgs) -> Result<(), Error> {
    let VolumeCreateArgs { name, size, from_file, from_volume, from_snapshot } = args;
    let from_file = from_file.map(std::path::absolute).transpose();
    let from_file = from_file.map_err(Error::Directory)?;
    let request = VolumeCreateRequest {
        name,
        size_mib: size,
        from_file: from_file.map(|path| path.display().to_string()),
        from_volume: from_volume.map(|word| word.as_str().to_owned()),
        from_snapshot: from_snapshot.map(|word| word.as_str().to_owned()),
    };
    let making = async { agent.post::<Volume>("/v1/volumes", &request, WHOLE_LIMIT).await };
    let volume = shown("make the volume", making).await?;
    out.value(&volume, |volume| volume.id.to_string())?;
    Ok(())
}

async fn lease(agent: &Agent, out: Output, args: LeaseArgs) -> Result<(), Error> {
    let LeaseArgs { volume, mode, holder, ttl, break_others } = args;
    let mode = match mode {
        LeaseModeWord::Active => LeaseMode::Active,
        LeaseModeWord::Standby => LeaseMode::Standby,
        LeaseModeWord::Shared => LeaseMode::Shared,
    };
    let shown: Volume = agent.get(&path(volume.as_str(), "")).await?;
    let request = LeaseRequest { mode, holder, ttl_s: ttl, break_others };
    let lease: Lease = agent.post(&path(shown.id.as_str(), "/leases"), &request, PROMPT).await?;
    out.value(&lease, |lease| format!("{}:{}:{}", shown.id, lease.id, lease.epoch))?;
    Ok(())
}

fn vm_called(vm: &Vm) -> &str {
    vm.name.as_deref().unwrap_or(vm.id.as_str())
}

fn called(volume: &Volume) -> &str {
    volume.name.as_deref().unwrap_or(volume.id.as_str())
}

/// Who has it, for people.
fn users(volume: &Volume) -> Option<String> {
    match (&volume.active, &volume.standby, volume.shared) {
        (None, _, 0) => None,
        (None, _, readers) => Some(format!("{readers} who read")),
        (Some(active), None, _) => Some(holder(active)),
        (Some(active), Some(standby), _) => Some(format!("{}, then {}", holder(active), holder(standby))),
    }
}

fn holder(lease: &Lease) -> String {
    lease.vm_id.as_ref().map_or_else(|| lease.holder.clone(), ToString::to_string)
}

fn row(volume: &Volume) -> Vec<String> {
    vec![
        volume.id.to_string(),
        or_dash(volume.name.as_deref()),
        bytes(volume.bytes),
        bytes(volume.allocated_bytes),
        or_dash(users(volume).as_deref()),
        if volume.damage.is_some() { "damaged: read only".to_owned() } else { "ok".to_owned() },
    ]
}

fn snapshot_row(snapshot: &VolumeSnapshot) -> Vec<String> {
    vec![
        snapshot.id.to_string(),
        or_dash(snapshot.name.as_deref()),
        snapshot.volume_id.to_string(),
        bytes(snapshot.bytes),
        snapshot.generation.to_string(),
    ]
}

fn shown_volume(volume: &Volume) -> String {
    let lease = |lease: &Option<Lease>| {
        lease.as_ref().map(|lease| format!("{} ({}, epoch {})", lease.id, holder(lease), lease.epoch))
    };
    pairs([
        ("volume", Some(volume.id.to_string())),
        ("name", volume.name.clone()),
        ("size", Some(bytes(volume.bytes))),
        ("on disk", Some(bytes(volume.allocated_bytes))),
        ("layers", Some(volume.layers.to_string())),
        ("generation", Some(volume.generation.to_string())),
        ("began with", volume.origin.clone()),
        ("damage", volume.damage.clone()),
        ("active", lease(&volume.active)),
        ("standby", lease(&volume.standby)),
        ("readers", (volume.shared > 0).then(|| volume.shared.to_string())),
        ("connections", Some(volume.connections.to_string())),
    ])
}

fn shown_changes(changes: &VolumeChanges) -> String {
    let total = changes.runs.iter().map(|run| run.bytes).sum::<u64>();
    let doubt = if changes.complete { "" } else { "; the host lost power meanwhile: compare all of it" };
    let first = format!("generation {}: {} changed{doubt}", changes.generation, bytes(total));
    let runs = changes.runs.iter().map(|run| format!("{:>16} {:>12}", run.offset, run.bytes));
    std::iter::once(first).chain(runs).collect::<Vec<_>>().join("\n")
}

fn shown_leases(list: &LeaseList) -> String {
    let row = |lease: &Lease| {
        let ttl = lease.ttl_s.map(|ttl| format!("{ttl} s"));
        vec![
            lease.id.to_string(),
            super::table::word(&lease.mode),
            lease.epoch.to_string(),
            holder(lease),
            or_dash(ttl.as_deref()),
        ]
    };
    let now = match list.leases.as_slice() {
        [] => format!("nobody has a lease of {}", list.volume_id),
        leases => columns(&["LEASE", "MODE", "EPOCH", "HOLDER", "TTL"], leases.iter().map(row)),
    };
    let history: Vec<_> = list.history.iter().map(told).collect();
    if history.is_empty() { now } else { format!("{now}\n\nwhat happened:\n{}", history.join("\n")) }
}

fn told(entry: &LeaseHistoryEntry) -> String {
    let at = i64::try_from(entry.at_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    let at = at.map_or_else(|| entry.at_ms.to_string(), |at| at.to_string());
    let what = match (&entry.from, &entry.holder) {
        (Some(from), _) => format!("{} active in the place of {from}", entry.lease_id),
        (None, Some(holder)) => format!("{} {} by {holder}", entry.lease_id, entry.what),
        (None, None) => format!("{} {}", entry.lease_id, entry.what),
    };
    let epoch = entry.epoch.map(|epoch| format!(", epoch {epoch}")).unwrap_or_default();
    format!("  {at}  {what}{epoch}")
}
