//! The volumes that are served: the store's, each with its leases behind a gate.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::connections::Connections;
use super::gate::{Busy, Gate};
use super::leases::{ChangeError, FILE, LeaseBook};
use super::log::say;
use crate::clock::{Clock, SystemClock};
use crate::ids::{LeaseId, VolumeId, VolumeSnapshotId};
use crate::lease::{Epoch, LeaseEvent, LeaseMode, LeaseRefusal, Leases};
use crate::report;
use crate::volume::{Snapshot, StatusRun, Store, Volume, VolumeError};

/// How long whoever changes leases waits for requests that are being carried out. It is answered before its agent's
/// patience ends; a conversion may be asked for again.
const ALONE_PATIENCE: Duration = Duration::from_secs(4);

/// How often a removal is tried again that finds a volume in use by nobody who is connected, and after how long.
const REMOVE_AGAIN_MAX: u32 = 20;
const REMOVE_AGAIN: Duration = Duration::from_millis(5);

/// A volume's gate. What lies behind it are its leases.
pub(super) type LeaseGate = Gate<LeaseBook>;

/// All that is served.
#[derive(Debug)]
pub(super) struct Registry {
    pub(super) store: Store,
    pub(super) clock: SystemClock,
    pub(super) connections: Connections,
    gates: Mutex<BTreeMap<VolumeId, Arc<LeaseGate>>>,
}

/// What a connection is bound to.
#[derive(Debug, Clone)]
pub(super) enum Bound {
    /// A volume, with a lease.
    Leased {
        /// It.
        volume: Arc<Volume>,
        /// Its gate.
        gate: Arc<LeaseGate>,
        /// The lease.
        lease: LeaseId,
        /// The lease's epoch.
        epoch: Epoch,
        /// Writes are refused, whatever the lease allows.
        read_only: bool,
        /// The set of connections from another host that it belongs to.
        set: Option<u64>,
    },
    /// A volume, to look at.
    Looked {
        /// It.
        volume: Arc<Volume>,
        /// Its gate.
        gate: Arc<LeaseGate>,
    },
    /// A snapshot.
    Snapshot(Arc<Snapshot>),
}

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stale {
    /// The lease is not the active one, or not of this epoch.
    #[error("lease {lease} of epoch {epoch} may not: {now}")]
    Lease {
        /// The connection's lease.
        lease: LeaseId,
        /// Its epoch.
        epoch: Epoch,
        /// What is.
        now: String,
    },
    /// Who may write is not known.
    #[error("{0}")]
    Unknown(String),
    /// The other host made its connections anew, and asks there for what was not answered here.
    #[error("a later set of connections took the place of this one")]
    Replaced,
    /// The connection is for reading.
    #[error("this connection only reads")]
    ReadOnly,
}

/// Why leases were not changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeaseError {
    /// There is no such volume.
    #[error("there is no volume {0}")]
    NotFound(VolumeId),
    /// Requests did not end.
    #[error("wait for requests")]
    Busy(#[from] Busy),
    /// They were not.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl From<LeaseRefusal> for LeaseError {
    fn from(refusal: LeaseRefusal) -> Self {
        Self::Change(refusal.into())
    }
}

impl Registry {
    /// Serves a store; reads the leases of all its volumes.
    pub(super) fn new(store: Store, clock: SystemClock) -> Result<Self, VolumeError> {
        let registry = Self { store, clock, connections: Connections::new(), gates: Mutex::new(BTreeMap::new()) };
        for info in registry.store.list()? {
            if let Some(damage) = info.damage.first() {
                say(format_args!("volume {} is damaged, so it is only read: {damage}", info.id));
            }
            registry.gate(&info.id);
        }
        Ok(registry)
    }

    /// Milliseconds of the clock that leases live by.
    pub(super) fn now_ms(&self) -> u64 {
        self.clock.monotonic().0 / 1_000_000
    }

    /// Milliseconds of the wall clock.
    pub(super) fn wall_ms(&self) -> u64 {
        self.clock.wall().0 / 1_000_000
    }

    fn gates(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Arc<LeaseGate>>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All gates there are.
    pub(super) fn all_gates(&self) -> Vec<(VolumeId, Arc<LeaseGate>)> {
        self.gates().iter().map(|(id, gate)| (id.clone(), Arc::clone(gate))).collect()
    }

    /// The gate of a volume that there is.
    fn gate(&self, id: &VolumeId) -> Arc<LeaseGate> {
        let mut gates = self.gates();
        if let Some(gate) = gates.get(id) {
            return Arc::clone(gate);
        }
        let path = self.store.root().join(Path::new(id.as_str())).join(FILE);
        let book = LeaseBook::open(&path, self.now_ms());
        if let Err(damage) = book.known() {
            say(format_args!("volume {id} is served to nobody, as who may write it is not known: {damage}"));
        }
        let gate = Arc::new(Gate::new(book));
        gates.insert(id.clone(), Arc::clone(&gate));
        gate
    }

    /// A volume and its gate.
    pub(super) fn volume(&self, id: &VolumeId) -> Option<(Arc<Volume>, Arc<LeaseGate>)> {
        let volume = self.store.volume(id)?;
        Some((volume, self.gate(id)))
    }

    /// The gate of a volume, without holding the volume.
    pub(super) fn gate_of(&self, id: &VolumeId) -> Result<Arc<LeaseGate>, LeaseError> {
        match self.store.volume(id) {
            Some(_) => Ok(self.gate(id)),
            None => Err(LeaseError::NotFound(id.clone())),
        }
    }

    /// A snapshot.
    pub(super) fn snapshot(&self, id: &VolumeSnapshotId) -> Option<Arc<Snapshot>> {
        self.store.snapshot(id)
    }

    /// Forgets the gate of a volume that was removed.
    pub(super) fn forget(&self, id: &VolumeId) {
        self.gates().remove(id);
    }

    /// Changes the leases of a volume: no request is carried out meanwhile, and what changed is durable when this returns.
    pub(super) fn change<R>(
        &self,
        id: &VolumeId,
        decide: impl FnOnce(&Leases) -> Result<(Vec<LeaseEvent>, R), LeaseRefusal>,
    ) -> Result<R, LeaseError> {
        let gate = self.gate_of(id)?;
        let mut alone = gate.alone(ALONE_PATIENCE)?;
        alone.with(|book| {
            let leases = book.known().map_err(|damage| ChangeError::Unknown(damage.to_owned()))?;
            let (events, answer) = decide(leases)?;
            let said = events.clone();
            book.happened(events, self.wall_ms(), self.now_ms())?;
            for event in &said {
                tell(id, event);
            }
            Ok(answer)
        })
    }

    /// Lets a set of connections take the place of earlier ones: when this returns, nothing of those is being carried out.
    /// `false`: a later one is there, or requests did not end.
    pub(super) fn begin_set(gate: &LeaseGate, lease: &LeaseId, set: u64) -> bool {
        match gate.look(|book| book.set_of(lease)) {
            latest if latest == set => true,
            latest if latest > set => false,
            _ => gate.alone(ALONE_PATIENCE).is_ok_and(|mut alone| {
                alone.with(|book| {
                    // Another one may have come first.
                    let begins = book.set_of(lease) <= set;
                    if begins {
                        book.begin_set(lease, set);
                    }
                    begins
                })
            }),
        }
    }

    /// Removes a volume that nobody has a lease of. `false`: somebody has.
    pub(super) fn remove(&self, id: &VolumeId) -> Result<Result<(), VolumeError>, LeaseError> {
        let gate = self.gate_of(id)?;
        let mut alone = gate.alone(ALONE_PATIENCE)?;
        let held = alone.with(|book| book.known().ok().and_then(|leases| leases.all().next().cloned()));
        if let Some(lease) = held {
            let text = format!("{id} ({} has the {} lease {})", lease.holder, lease.mode, lease.id);
            return Ok(Err(VolumeError::InUse { subject: text }));
        }
        let mut removed = self.store.remove(id);
        for _ in 0..REMOVE_AGAIN_MAX {
            let is_looked_at = matches!(removed, Err(VolumeError::InUse { .. })) && self.connections.of_volume(id) == 0;
            if !is_looked_at {
                break;
            }
            // Somebody lists volumes just now, say.
            std::thread::sleep(REMOVE_AGAIN);
            removed = self.store.remove(id);
        }
        if removed.is_ok() {
            self.forget(id);
        }
        Ok(removed)
    }

    /// Ends leases whose time is over; to be called now and then.
    pub(super) fn expire(&self) {
        for (id, gate) in self.all_gates() {
            let now_ms = self.now_ms();
            let is_connected = |lease: &LeaseId| self.connections.of_lease(lease) > 0;
            let is_any_over = gate.note(|book| {
                let Ok(leases) = book.known() else { return false };
                let used: Vec<_> = leases
                    .all()
                    .filter(|lease| lease.mode != LeaseMode::Standby && lease.ttl_s.is_some())
                    .map(|lease| lease.id.clone())
                    .filter(is_connected)
                    .collect();
                let is_any_over = !leases.expired(now_ms, is_connected).is_empty();
                for lease in used {
                    book.saw(&lease, now_ms);
                }
                is_any_over
            });
            if is_any_over && let Err(error) = self.change(&id, |leases| Ok((leases.expired(now_ms, is_connected), ())))
            {
                say(format_args!("volume {id}: leases whose time is over stay: {}", report::chain(&error)));
            }
        }
    }
}

fn tell(volume: &VolumeId, event: &LeaseEvent) {
    match event {
        LeaseEvent::Acquired { lease } => say(format_args!(
            "volume {volume}: {} has the {} lease {} of epoch {}",
            lease.holder, lease.mode, lease.id, lease.epoch
        )),
        LeaseEvent::Converted { from, to, epoch } => say(format_args!(
            "volume {volume}: lease {to} is active in epoch {}, {from} no longer",
            epoch.saturating_add(1)
        )),
        LeaseEvent::Ended { id, why } => say(format_args!("volume {volume}: lease {id} ended: {why:?}")),
    }
}

impl Bound {
    /// The volume, if it is one.
    pub(super) fn volume(&self) -> Option<&Arc<Volume>> {
        match self {
            Self::Leased { volume, .. } | Self::Looked { volume, .. } => Some(volume),
            Self::Snapshot(_) => None,
        }
    }

    /// Carries something out, if it may be now.
    pub(super) fn carry_out<R>(&self, writes: bool, work: impl FnOnce(&Self) -> R) -> Result<R, Stale> {
        let gate = match self {
            Self::Leased { gate, .. } | Self::Looked { gate, .. } => gate,
            Self::Snapshot(_) if writes => return Err(Stale::ReadOnly),
            Self::Snapshot(_) => return Ok(work(self)),
        };
        let pass = gate.enter(|book| self.check(book, writes))?;
        let result = work(self);
        drop(pass);
        Ok(result)
    }

    fn check(&self, book: &LeaseBook, writes: bool) -> Result<(), Stale> {
        let leases = book.known().map_err(|damage| Stale::Unknown(damage.to_owned()))?;
        match self {
            Self::Leased { read_only: true, .. } | Self::Looked { .. } | Self::Snapshot(_) if writes => {
                Err(Stale::ReadOnly)
            }
            Self::Leased { lease, set: Some(set), .. } if book.set_of(lease) != *set => Err(Stale::Replaced),
            Self::Leased { lease, epoch, .. } => {
                let may = if writes { leases.may_write(lease, *epoch) } else { leases.may_read(lease, *epoch) };
                if may { Ok(()) } else { Err(stale(leases, lease, *epoch)) }
            }
            Self::Looked { .. } | Self::Snapshot(_) => Ok(()),
        }
    }

    /// Its size as of now.
    pub(super) fn size_bytes(&self) -> u64 {
        match self {
            Self::Leased { volume, .. } | Self::Looked { volume, .. } => volume.size_bytes(),
            Self::Snapshot(snapshot) => snapshot.size_bytes(),
        }
    }

    /// Reads.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        match self {
            Self::Leased { volume, .. } | Self::Looked { volume, .. } => volume.read_at(buffer, offset),
            Self::Snapshot(snapshot) => snapshot.read_at(buffer, offset),
        }
    }

    /// Which parts are data.
    pub(super) fn status(&self, offset: u64, length: u64, runs_max: usize) -> Result<Vec<StatusRun>, VolumeError> {
        match self {
            Self::Leased { volume, .. } | Self::Looked { volume, .. } => volume.status(offset, length, runs_max),
            Self::Snapshot(snapshot) => snapshot.status(offset, length, runs_max),
        }
    }
}

/// Why a lease may not, in words that say what is.
pub(super) fn stale(leases: &Leases, lease: &LeaseId, epoch: Epoch) -> Stale {
    let now = match (leases.find(lease), leases.active()) {
        (Some(found), _) if found.mode == LeaseMode::Standby => "it stands by".to_owned(),
        (Some(found), _) if found.epoch != epoch => format!("it is of epoch {}", found.epoch),
        (Some(found), _) if found.mode == LeaseMode::Shared => "it only reads".to_owned(),
        (_, Some(active)) => format!("{} is active, of {} in epoch {}", active.id, active.holder, active.epoch),
        (_, None) => "it ended, and nobody is active".to_owned(),
    };
    Stale::Lease { lease: lease.clone(), epoch, now }
}
