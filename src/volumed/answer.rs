//! Questions of an agent, answered.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::attachments::{AttachError, Attached};
use super::control::Teller;
use super::dial;
use super::leases::ChangeError;
use super::registry::LeaseError;
use crate::ids::{LeaseId, VolumeId, VolumeSnapshotId};
use crate::lease::{Acquire, Epoch, LeaseRefusal, Step};
use crate::report;
use crate::volume::{self, CHUNK_BYTES, CreateSpec, ErrorKind, Info, Progress, SnapshotInfo, VolumeError, image_bytes};
use crate::wire::volumed::{Answer, Ask, Attachment, Origin, Refusal, Run, SnapshotReport, VolumeReport};

/// How long a detachment waits for requests: it is answered before its agent's patience ends.
const DETACH_PATIENCE: Duration = Duration::from_secs(4);

/// Most stretches of changes that one answer tells; those beyond are joined with what lies between.
const RUNS_MAX: usize = 50_000;

type Answered = Result<Answer, Refusal>;

impl From<VolumeError> for Refusal {
    fn from(error: VolumeError) -> Self {
        let text = report::chain(&error);
        match (error.kind(), error) {
            (_, VolumeError::NameTaken { name }) => Self::NameTaken { name },
            (ErrorKind::NotFound, VolumeError::NotFound { subject }) => Self::NotFound { what: subject },
            (ErrorKind::BadRequest | ErrorKind::Taken, _) => Self::Invalid { text },
            (ErrorKind::InUse, _) => Self::InUse { text },
            (ErrorKind::NoSpace, _) => Self::NoSpace { text },
            (ErrorKind::Damaged | ErrorKind::ReadOnly, _) => Self::Damaged { text },
            (ErrorKind::NotFound | ErrorKind::Cancelled | ErrorKind::Io, _) => Self::Failed { text },
        }
    }
}

impl From<LeaseError> for Refusal {
    fn from(error: LeaseError) -> Self {
        let text = report::chain(&error);
        match error {
            LeaseError::NotFound(id) => Self::NotFound { what: format!("volume {id}") },
            LeaseError::Change(ChangeError::Refused(lease)) => Self::Lease { lease },
            LeaseError::Change(ChangeError::Unknown(_)) => Self::Damaged { text },
            LeaseError::Busy(_) | LeaseError::Change(ChangeError::NotWritten(_)) => Self::Failed { text },
        }
    }
}

impl From<AttachError> for Refusal {
    fn from(error: AttachError) -> Self {
        let text = report::chain(&error);
        match error {
            AttachError::Words(_) | AttachError::Full => Self::Invalid { text },
            AttachError::NotWritten { .. } | AttachError::Busy(_) => Self::Failed { text },
        }
    }
}

/// Answers a question.
pub(super) fn answer(daemon: &Arc<Daemon>, ask: Ask, teller: &mut Teller<'_>) -> Answer {
    about_volumes(daemon, ask, teller).unwrap_or_else(|refusal| Answer::Refused { refusal })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the other questions are the next function's")]
fn about_volumes(daemon: &Arc<Daemon>, ask: Ask, teller: &mut Teller<'_>) -> Answered {
    let store = &daemon.registry.store;
    match ask {
        Ask::Create { id, name, bytes, origin, now_ms } => {
            let new = New { id, name, bytes, origin, now_ms };
            create(daemon, &new, teller).map(|()| volume_answer(daemon, &new.id))?
        }
        Ask::List => {
            let volumes = store.list()?.into_iter().map(|info| volume_report(daemon, info)).collect();
            Ok(Answer::Volumes { volumes })
        }
        Ask::Show { id } => volume_answer(daemon, &id),
        Ask::Resize { id, bytes } => {
            store.resize(&id, bytes)?;
            volume_answer(daemon, &id)
        }
        Ask::Remove { id } => match daemon.registry.remove(&id) {
            Ok(Ok(())) | Ok(Err(VolumeError::NotFound { .. })) | Err(LeaseError::NotFound(_)) => Ok(Answer::Done),
            Ok(Err(error)) => Err(error.into()),
            Err(error) => Err(error.into()),
        },
        Ask::Snapshot { volume, id, name, now_ms } => snapshot(daemon, &volume, &id, name, now_ms),
        Ask::Snapshots => {
            let snapshots = store.list_snapshots().into_iter().filter_map(snapshot_report).collect();
            Ok(Answer::Snapshots { snapshots })
        }
        Ask::RemoveSnapshot { id } => match store.remove_snapshot(&id) {
            Ok(()) | Err(VolumeError::NotFound { .. }) => Ok(Answer::Done),
            Err(error) => Err(error.into()),
        },
        Ask::Digest { id } => {
            let (volume, _) = daemon.registry.volume(&id).ok_or_else(|| no_volume(&id))?;
            let bytes = volume.size_bytes();
            let digest = volume.digest(&mut |progress| tell(teller, progress))?;
            let blake3 = blake3::Hash::from_bytes(digest).to_hex().to_string();
            Ok(Answer::Digest { blake3, bytes })
        }
        Ask::Changes { id, since } => changes(daemon, &id, since),
        other => about_leases(daemon, other),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the other questions are the next function's")]
fn about_leases(daemon: &Arc<Daemon>, ask: Ask) -> Answered {
    let registry = &daemon.registry;
    match ask {
        Ask::Acquire { volume, id, mode, holder, vm, host, ttl_s, secret, break_others } => {
            let wanted = Acquire { id, mode, holder, vm, host, ttl_s, secret, break_others };
            let lease = registry.change(&volume, |leases| {
                let Step { events, lease } = leases.acquire(&wanted)?;
                Ok((events, lease))
            })?;
            Ok(Answer::Lease { lease })
        }
        Ask::Validate { volume, id, epoch } => validate(daemon, &volume, &id, epoch),
        Ask::Convert { volume, from, to, epoch } => {
            let lease = registry.change(&volume, |leases| {
                let Step { events, lease } = leases.convert(&from, &to, epoch)?;
                Ok((events, lease))
            })?;
            Ok(Answer::Lease { lease })
        }
        Ask::Release { volume, id, only } => {
            registry.change(&volume, |leases| Ok((leases.release(&id, only)?, ())))?;
            Ok(Answer::Done)
        }
        Ask::Leases { volume } => {
            let gate = registry.gate_of(&volume)?;
            gate.look(|book| {
                let leases = book.known().map_err(|damage| Refusal::Damaged { text: damage.to_owned() })?;
                Ok(Answer::Leases {
                    leases: leases.all().cloned().collect(),
                    epoch: leases.epoch(),
                    history: leases.history().cloned().collect(),
                })
            })
        }
        other => about_connections(daemon, other),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the other questions were the functions' before")]
fn about_connections(daemon: &Arc<Daemon>, ask: Ask) -> Answered {
    match ask {
        Ask::Attach { attachment } => attach(daemon, attachment),
        Ask::Detach { socket } => {
            daemon.attachments.detach(&socket)?;
            end_connections(daemon, &socket)?;
            Ok(Answer::Done)
        }
        Ask::Attachments => Ok(Answer::Attachments { attachments: daemon.attachments.reports() }),
        Ask::Listen { address, port } => {
            let listening = daemon.listen((address, port).into());
            listening
                .map(|listening| Answer::Listening { listening })
                .map_err(|error| Refusal::Failed { text: format!("listen at {address}: {}", report::chain(&error)) })
        }
        Ask::End => {
            daemon.stop.ask();
            Ok(Answer::Done)
        }
        Ask::EndIfIdle => {
            let connections = daemon.registry.connections.count_all();
            if daemon.attachments.is_empty() && connections == 0 {
                daemon.stop.ask();
                return Ok(Answer::Done);
            }
            Err(Refusal::InUse { text: format!("{connections} connections, or VMMs to be served") })
        }
        // The others were asked before.
        _ => Err(Refusal::Unknown),
    }
}

/// A volume to be made.
struct New {
    id: VolumeId,
    name: Option<String>,
    bytes: Option<u64>,
    origin: Origin,
    now_ms: u64,
}

fn no_volume(id: &VolumeId) -> Refusal {
    Refusal::NotFound { what: format!("volume {id}") }
}

fn create(daemon: &Daemon, new: &New, teller: &mut Teller<'_>) -> Result<(), Refusal> {
    let store = &daemon.registry.store;
    if store.volume(&new.id).is_some() {
        return Ok(());
    }
    let spec = |size_bytes| CreateSpec {
        name: new.name.clone().unwrap_or_else(|| new.id.to_string()),
        size_bytes,
        created_ms: new.now_ms,
    };
    match &new.origin {
        Origin::Empty => {
            let bytes = new.bytes.ok_or_else(|| Refusal::Invalid { text: "an empty volume has a size".to_owned() })?;
            store.create(&spec(bytes), &new.id)?;
        }
        Origin::File { path } => {
            let failed = |error: io::Error| Refusal::Invalid { text: format!("read {}: {error}", path.display()) };
            let image = open_image(path).map_err(failed)?;
            let bytes = match new.bytes {
                Some(bytes) => bytes,
                None => image_bytes(&image).map_err(failed)?,
            };
            store.create_from_image(&spec(bytes), &new.id, &image, &mut |progress| tell(teller, progress))?;
        }
        Origin::Volume { id } => {
            let of = store.volume(id).ok_or_else(|| no_volume(id))?;
            let bytes = new.bytes.unwrap_or_else(|| of.size_bytes());
            store.clone_of(&volume::Origin::Volume(id.clone()), &spec(bytes), &new.id)?;
        }
        Origin::Snapshot { id } => {
            let of = store.snapshot(id).ok_or_else(|| Refusal::NotFound { what: format!("snapshot {id}") })?;
            let bytes = new.bytes.unwrap_or_else(|| of.size_bytes());
            store.clone_of(&volume::Origin::Snapshot(id.clone()), &spec(bytes), &new.id)?;
        }
    }
    Ok(())
}

/// A file or a block device. Anything else, a pipe say, would keep its reader waiting.
fn open_image(path: &Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path)?.file_type();
    if !(path.is_absolute() && (kind.is_file() || kind.is_block_device())) {
        return Err(io::Error::other("an image is a file or a block device, at an absolute path"));
    }
    std::fs::File::open(path)
}

fn tell(teller: &mut Teller<'_>, progress: Progress) -> ControlFlow<()> {
    let Progress { done_bytes, total_bytes } = progress;
    if teller.progress(done_bytes, total_bytes) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

fn volume_answer(daemon: &Daemon, id: &VolumeId) -> Answered {
    let volume = daemon.registry.store.volume(id).ok_or_else(|| no_volume(id))?;
    Ok(Answer::Volume { volume: Box::new(volume_report(daemon, volume.info()?)) })
}

fn volume_report(daemon: &Daemon, info: Info) -> VolumeReport {
    let Info { id, name, size_bytes, allocated_bytes, layers, generation, damage, created_ms, parent } = info;
    let connections = daemon.registry.connections.of_volume(&id);
    let mut damage = damage.first().map(ToString::to_string);
    let (mut active, mut standby, mut shared) = (None, None, 0);
    if let Ok(gate) = daemon.registry.gate_of(&id) {
        gate.look(|book| match book.known() {
            Ok(leases) => {
                (active, standby) = (leases.active().cloned(), leases.standby().cloned());
                let others = usize::from(active.is_some()) + usize::from(standby.is_some());
                shared = leases.all().count() - others;
            }
            Err(lost) => damage = Some(lost.to_owned()),
        });
    }
    VolumeReport {
        name: Some(name).filter(|name| *name != id.as_str()),
        id,
        bytes: size_bytes,
        allocated_bytes,
        layers: u32::try_from(layers).unwrap_or(u32::MAX),
        generation,
        created_ms,
        origin: parent.map(|parent| match parent {
            volume::Origin::Volume(id) => id.to_string(),
            volume::Origin::Snapshot(id) => id.to_string(),
        }),
        damage,
        active,
        standby,
        shared: u32::try_from(shared).unwrap_or(u32::MAX),
        connections: u32::try_from(connections).unwrap_or(u32::MAX),
    }
}

/// `None` for one that is damaged so that nobody knows what it is of.
fn snapshot_report(info: SnapshotInfo) -> Option<SnapshotReport> {
    let SnapshotInfo { id, name, volume, size_bytes, generation, created_ms, .. } = info;
    let name = Some(name).filter(|name| *name != id.as_str());
    Some(SnapshotReport { id, name, volume: volume?, bytes: size_bytes, generation, created_ms })
}

fn snapshot(daemon: &Daemon, of: &VolumeId, id: &VolumeSnapshotId, name: Option<String>, now_ms: u64) -> Answered {
    let store = &daemon.registry.store;
    let info = match store.snapshot(id) {
        Some(snapshot) => snapshot.info(),
        None => store.take_snapshot(of, &name.unwrap_or_else(|| id.to_string()), now_ms, id)?,
    };
    let damaged = || Refusal::Damaged { text: format!("snapshot {id} does not say what it is of") };
    Ok(Answer::Snapshot { snapshot: snapshot_report(info).ok_or_else(damaged)? })
}

fn changes(daemon: &Daemon, id: &VolumeId, since: u32) -> Answered {
    let volume = daemon.registry.store.volume(id).ok_or_else(|| no_volume(id))?;
    let changed = volume.changed_since(since);
    let size_bytes = volume.size_bytes();
    let mut runs: Vec<Run> = Vec::new();
    for chunks in changed.chunks {
        let offset = u64::from(chunks.start) * CHUNK_BYTES;
        let end = (u64::from(chunks.end) * CHUNK_BYTES).min(size_bytes);
        let is_full = runs.len() >= RUNS_MAX;
        match runs.last_mut() {
            // Too much is told rather than too little.
            Some(last) if is_full => last.bytes = end - last.offset,
            Some(_) | None => runs.push(Run { offset, bytes: end - offset }),
        }
    }
    Ok(Answer::Changes { generation: changed.generation, complete: changed.complete, runs })
}

fn validate(daemon: &Daemon, volume: &VolumeId, id: &LeaseId, epoch: Epoch) -> Answered {
    let gate = daemon.registry.gate_of(volume)?;
    let now_ms = daemon.registry.now_ms();
    let lease = gate.note(|book| {
        let leases = book.known().map_err(|damage| Refusal::Damaged { text: damage.to_owned() })?;
        let lease = leases.validate(id, epoch).cloned();
        let lease = lease.map_err(|lease: LeaseRefusal| Refusal::Lease { lease })?;
        book.saw(id, now_ms);
        Ok::<_, Refusal>(lease)
    })?;
    Ok(Answer::Lease { lease })
}

fn attach(daemon: &Arc<Daemon>, attachment: Attachment) -> Answered {
    if attachment.upstream.is_none() && daemon.registry.store.volume(&attachment.volume).is_none() {
        return Err(no_volume(&attachment.volume));
    }
    let socket = attachment.socket.clone();
    let Attached { new, before } = daemon.attachments.attach(attachment)?;
    if before.is_some()
        && let Err(refusal) = end_connections(daemon, &socket)
    {
        // Asked again, it is tried anew.
        new.iter().for_each(|new| new.give_up());
        return Err(refusal);
    }
    if let Some(new) = new {
        dial::start(daemon, &new);
    }
    Ok(Answer::Done)
}

fn end_connections(daemon: &Daemon, socket: &Path) -> Result<(), Refusal> {
    if daemon.registry.connections.end_attachment(socket, DETACH_PATIENCE) {
        return Ok(());
    }
    Err(AttachError::Busy(socket.to_owned()).into())
}
