//! The volume daemon of a simulated host: the real leases, and of a volume what its leases and names are about. It has no
//! bytes: who may write them is what a simulation is for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use hearth_guest_wire::FromGuest;

use super::SimHost;
use crate::agent::volumes::{AskVolumesError, VolumeHost, VolumeProgress};
use crate::clock::Clock;
use crate::ids::{VmId, VolumeId, VolumeSnapshotId};
use crate::lease::{Acquire, LeaseEntry, LeaseEvent, Leases};
use crate::wire::volumed::{
    Answer, Ask, Attachment, AttachmentReport, Listening, Origin, Refusal, SnapshotReport, VolumeReport,
};

/// Largest volume there is room for.
const BYTES_MAX: u64 = 1 << 40;

#[derive(Debug, Clone)]
struct SimVolume {
    report: VolumeReport,
    /// Whether it began as a file, which is taken to be a root file system.
    has_root: bool,
    leases: Leases,
}

/// What the daemon keeps.
#[derive(Debug, Clone, Default)]
pub(super) struct Volumes {
    volumes: BTreeMap<VolumeId, SimVolume>,
    snapshots: BTreeMap<VolumeSnapshotId, SnapshotReport>,
    attachments: BTreeMap<PathBuf, Attachment>,
    /// While it is so, nothing is answered.
    frozen: bool,
}

fn no_volume(id: &VolumeId) -> Refusal {
    Refusal::NotFound { what: format!("volume {id}") }
}

impl SimVolume {
    fn report(&self, connections: usize) -> VolumeReport {
        let (active, standby) = (self.leases.active().cloned(), self.leases.standby().cloned());
        let shared = self.leases.all().filter(|lease| lease.mode == crate::lease::LeaseMode::Shared).count();
        let shared = u32::try_from(shared).unwrap_or(u32::MAX);
        let connections = u32::try_from(connections).unwrap_or(u32::MAX);
        VolumeReport { active, standby, shared, connections, ..self.report.clone() }
    }

    fn write(&mut self, events: Vec<LeaseEvent>, at_ms: u64) {
        for event in events {
            self.leases.apply(LeaseEntry { at_ms, event }, at_ms);
        }
    }
}

impl Volumes {
    fn volume(&mut self, id: &VolumeId) -> Result<&mut SimVolume, Refusal> {
        self.volumes.get_mut(id).ok_or_else(|| no_volume(id))
    }

    fn report(&self, id: &VolumeId) -> Result<VolumeReport, Refusal> {
        let volume = self.volumes.get(id).ok_or_else(|| no_volume(id))?;
        let mut attachments = self.attachments.values();
        let users = attachments.by_ref().filter(|one| one.upstream.is_none() && one.volume == *id).count();
        Ok(volume.report(users))
    }

    fn create(&mut self, ask: Ask) -> Result<Answer, Refusal> {
        let Ask::Create { id, name, bytes, origin, now_ms } = ask else { return Err(Refusal::Unknown) };
        if self.volumes.contains_key(&id) {
            return Ok(Answer::Volume { volume: Box::new(self.report(&id)?) });
        }
        let taken = |other: &SimVolume| name.is_some() && other.report.name == name;
        if let (Some(name), true) = (&name, self.volumes.values().any(taken)) {
            return Err(Refusal::NameTaken { name: name.clone() });
        }
        let has_root = match &origin {
            Origin::Empty => false,
            Origin::File { .. } => true,
            Origin::Volume { id } => self.volume(id)?.has_root,
            Origin::Snapshot { id } => {
                let of = self.snapshots.get(id).and_then(|snapshot| self.volumes.get(&snapshot.volume));
                of.is_some_and(|volume| volume.has_root)
            }
        };
        let before = match &origin {
            Origin::Empty | Origin::File { .. } => None,
            Origin::Volume { id } => Some(self.volume(id)?.report.bytes),
            Origin::Snapshot { id } => {
                let missing = || Refusal::NotFound { what: format!("snapshot {id}") };
                Some(self.snapshots.get(id).ok_or_else(missing)?.bytes)
            }
        };
        let Some(bytes) = bytes.or(before).filter(|bytes| *bytes > 0) else {
            return Err(Refusal::Invalid { text: "a volume has at least 4096 bytes".to_owned() });
        };
        if bytes > BYTES_MAX {
            return Err(Refusal::NoSpace { text: format!("{bytes} bytes are more than the disk has") });
        }
        let report = VolumeReport {
            id: id.clone(),
            name,
            bytes,
            allocated_bytes: 0,
            layers: 1,
            generation: 1,
            created_ms: now_ms,
            origin: None,
            damage: None,
            active: None,
            standby: None,
            shared: 0,
            connections: 0,
        };
        self.volumes.insert(id.clone(), SimVolume { report, has_root, leases: Leases::default() });
        Ok(Answer::Volume { volume: Box::new(self.report(&id)?) })
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the other questions are the next function's")]
    fn lease(&mut self, ask: Ask, now_ms: u64) -> Result<Answer, Refusal> {
        let refused = |lease| Refusal::Lease { lease };
        match ask {
            Ask::Acquire { volume, id, mode, holder, vm, host, ttl_s, secret, break_others } => {
                let volume = self.volume(&volume)?;
                let acquire = Acquire { id, mode, holder, vm, host, ttl_s, secret, break_others };
                let step = volume.leases.acquire(&acquire).map_err(refused)?;
                volume.write(step.events, now_ms);
                Ok(Answer::Lease { lease: step.lease })
            }
            Ask::Validate { volume, id, epoch } => {
                let lease = self.volume(&volume)?.leases.validate(&id, epoch).map_err(refused)?;
                Ok(Answer::Lease { lease: lease.clone() })
            }
            Ask::Convert { volume, from, to, epoch } => {
                let volume = self.volume(&volume)?;
                let step = volume.leases.convert(&from, &to, epoch).map_err(refused)?;
                volume.write(step.events, now_ms);
                Ok(Answer::Lease { lease: step.lease })
            }
            Ask::Release { volume, id, only } => {
                // Of a volume that is gone nobody has a lease.
                let Ok(volume) = self.volume(&volume) else { return Ok(Answer::Done) };
                let events = volume.leases.release(&id, only).map_err(refused)?;
                volume.write(events, now_ms);
                Ok(Answer::Done)
            }
            Ask::Leases { volume } => {
                let leases = &self.volume(&volume)?.leases;
                let history = leases.history().cloned().collect();
                Ok(Answer::Leases { leases: leases.all().cloned().collect(), epoch: leases.epoch(), history })
            }
            _ => Err(Refusal::Unknown),
        }
    }

    fn answer(&mut self, ask: Ask, now_ms: u64) -> Result<Answer, Refusal> {
        match ask {
            Ask::Create { .. } => self.create(ask),
            Ask::List => {
                let ids: Vec<_> = self.volumes.keys().cloned().collect();
                let volumes = ids.iter().map(|id| self.report(id)).collect::<Result<_, _>>()?;
                Ok(Answer::Volumes { volumes })
            }
            Ask::Show { id } => Ok(Answer::Volume { volume: Box::new(self.report(&id)?) }),
            Ask::Resize { id, bytes } => {
                let report = &mut self.volume(&id)?.report;
                if bytes < report.bytes {
                    return Err(Refusal::Invalid { text: "a volume does not shrink".to_owned() });
                }
                report.bytes = bytes;
                Ok(Answer::Volume { volume: Box::new(self.report(&id)?) })
            }
            Ask::Remove { id } => {
                if self.volumes.get(&id).is_some_and(|volume| volume.leases.all().next().is_some()) {
                    return Err(Refusal::InUse { text: format!("somebody has a lease of volume {id}") });
                }
                self.volumes.remove(&id);
                Ok(Answer::Done)
            }
            Ask::Snapshot { volume, id, name, now_ms } => {
                let report = &mut self.volume(&volume)?.report;
                let (bytes, generation) = (report.bytes, report.generation);
                report.generation += 1;
                let snapshot = SnapshotReport { id: id.clone(), name, volume, bytes, generation, created_ms: now_ms };
                let snapshot = self.snapshots.entry(id).or_insert(snapshot).clone();
                Ok(Answer::Snapshot { snapshot })
            }
            Ask::Snapshots => Ok(Answer::Snapshots { snapshots: self.snapshots.values().cloned().collect() }),
            Ask::RemoveSnapshot { id } => {
                self.snapshots.remove(&id);
                Ok(Answer::Done)
            }
            Ask::Digest { id } => {
                let bytes = self.volume(&id)?.report.bytes;
                Ok(Answer::Digest { blake3: "0".repeat(64), bytes })
            }
            Ask::Changes { id, .. } => {
                let generation = self.volume(&id)?.report.generation;
                Ok(Answer::Changes { generation, complete: true, runs: Vec::new() })
            }
            Ask::Acquire { .. }
            | Ask::Validate { .. }
            | Ask::Convert { .. }
            | Ask::Release { .. }
            | Ask::Leases { .. } => self.lease(ask, now_ms),
            Ask::Attach { attachment } => {
                self.attachments.insert(attachment.socket.clone(), attachment);
                Ok(Answer::Done)
            }
            Ask::Detach { socket } => {
                self.attachments.remove(&socket);
                Ok(Answer::Done)
            }
            Ask::Attachments => {
                let report = |attachment: &Attachment| AttachmentReport {
                    attachment: attachment.clone(),
                    connected: attachment.lines,
                    trouble: None,
                };
                Ok(Answer::Attachments { attachments: self.attachments.values().map(report).collect() })
            }
            Ask::Listen { .. } | Ask::End | Ask::EndIfIdle => Ok(Answer::Done),
        }
    }
}

impl SimHost {
    /// From now on, or no longer, the volume daemon answers nothing.
    pub fn freeze_volumes(&self, frozen: bool) {
        self.state().volumes.frozen = frozen;
        self.changed.notify_waiters();
    }

    /// What a guest answers that is to have its root on this disk.
    pub(super) fn enter_root(&self, vm: &VmId, disk: &str) -> FromGuest {
        let slot = disk.bytes().last().unwrap_or_default().saturating_sub(b'a');
        let state = self.state();
        let volumes = &state.volumes;
        let attached = volumes.attachments.get(&self.socket(vm, slot));
        match attached.and_then(|attached| volumes.volumes.get(&attached.volume)) {
            Some(volume) if volume.has_root => FromGuest::Done,
            Some(_) => {
                FromGuest::Failed { errno: 22, what: format!("{disk} has no file system that this kernel knows") }
            }
            None => FromGuest::Failed { errno: 2, what: format!("there is no {disk}") },
        }
    }

    /// The leases of a volume, as the daemon has them.
    pub fn volume_leases(&self, volume: &VolumeId) -> Option<Leases> {
        Some(self.state().volumes.volumes.get(volume)?.leases.clone())
    }

    /// What the daemon serves: the sockets' VMs and the leases they are served with.
    pub fn attachments(&self) -> Vec<Attachment> {
        self.state().volumes.attachments.values().cloned().collect()
    }
}

impl VolumeHost for SimHost {
    async fn ask(&self, ask: Ask, _: Option<VolumeProgress>) -> Result<Answer, AskVolumesError> {
        self.point(true).await.map_err(AskVolumesError::Start)?;
        loop {
            let changed = self.changed.notified();
            if !self.state().volumes.frozen {
                break;
            }
            changed.await;
        }
        let now_ms = self.wall().0 / 1_000_000;
        let answer = self.state().volumes.answer(ask, now_ms);
        // It is done; whether the agent hears of it is another matter.
        self.point(true).await.map_err(AskVolumesError::Socket)?;
        Ok(answer?)
    }

    fn is_used(&self) -> bool {
        !self.state().volumes.volumes.is_empty()
    }

    async fn watch(&self) -> Result<(), AskVolumesError> {
        std::future::pending().await
    }

    fn socket(&self, vm: &VmId, slot: u8) -> PathBuf {
        PathBuf::from(format!("/vms/{vm}/volume-{slot}.sock"))
    }

    async fn listen(&self) -> Result<Option<Listening>, AskVolumesError> {
        let (address, certificate_sha256) = (SocketAddr::from(([127, 0, 0, 1], 7788)), "0".repeat(64));
        Ok(Some(Listening { address, certificate_sha256 }))
    }
}
