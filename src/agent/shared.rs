//! What all parts of one agent share: its world, its configuration, its place in the line of agents.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc, watch};

use super::adoption::Adoption;
use super::arrivals::Arrivals;
use super::bundle_names::BundleNames;
use super::bundles::BundleError;
use super::calculations::Calculations;
use super::cluster_record::ClusterRecord;
use super::config::Config;
use super::connections::Connections;
use super::drain::Draining;
use super::filling::Fillings;
use super::ledger::{LedgerError, NewEvent, Write};
use super::metrics::Metrics;
use super::peers::{ArrivingSession, Peers};
use super::pool::Pools;
use super::record::{OperationRecord, Subject, VmRecord};
use super::register::Desk;
use super::self_door::Asking;
use super::session_record::SessionRecord;
use super::sources::Sources;
use super::streams::Streams;
use super::traffic::Traffic;
use super::vm_actor::Request;
use super::world::{DiskIdentity, Records, VmBundles, VmDisk, World};
use crate::bundle::admit::GuestNeeds;
use crate::clock::{Clock, Monotonic, Steady, UnixNanos};
use crate::ids::{BundleId, SessionId, VmId};

/// One agent's shared parts.
pub(crate) struct Shared<W: World> {
    pub(crate) world: W,
    pub(crate) config: Config,
    /// This agent's number among those that had the ledger.
    pub(crate) epoch: u64,
    /// The time of what rests when it began, and when that was.
    steady: (Steady, Monotonic),
    /// Number of the last event; readers of events wait on it.
    pub(crate) last_event: watch::Sender<u64>,
    /// Set once the ledger cannot be written: the agent then ends, its VMs go on, the next agent recovers.
    pub(crate) broken: watch::Sender<Option<String>>,
    pub(crate) metrics: Metrics,
    /// How far the agent is with stopping all VMs before it ends.
    pub(crate) draining: watch::Sender<Draining>,
    /// Connections of clients.
    pub(crate) connections: Arc<Connections>,
    /// What speaks against session networks at the moment, by who found it. While there is anything, no session is
    /// made and no VM joins one.
    conflicts: watch::Sender<BTreeMap<String, String>>,
    /// A session has come that may have to end.
    pub(crate) sessions_changed: Notify,
    /// Counts the changes of VMs' records that can be seen: those who wait for some VM to be somehow look again.
    pub(crate) vms_changed: watch::Sender<u64>,
    /// Registrations that come by the metadata service.
    pub(super) desk: Desk,
    /// What members of clusters do.
    pub(super) calculations: Calculations,
    /// The other hosts of the fabric.
    pub(super) peers: Peers,
    /// The way to stores of bundles.
    pub(super) sources: Sources,
    /// Guests that ask about themselves.
    pub(super) asking: Asking,
    pub(crate) traffic: Traffic,
    /// Guests from bundles that may be on their way from their first instruction to their identity at once. All of them
    /// want a processor then: more than a few for each would all be late.
    pub(crate) turns: Arc<Semaphore>,
    /// Bundles of which is noted, or being noted, what their guests reach first.
    pub(crate) noted: Mutex<BTreeSet<BundleId>>,
    /// VMs of the agent before that are to be looked at.
    pub(super) adoption: Adoption,
    /// Streams into guests.
    pub(crate) streams: Streams,
    /// Machines on their way here.
    pub(super) arrivals: Arrivals,
    /// Bundles on their way here, and VMs whose memory is.
    pub(super) fillings: Fillings,
    /// Somebody made a volume, perhaps the first.
    pub(super) volumes_used: Notify,
    /// Whether the volume daemon may end: the agent does.
    pub(super) is_leaving_volumes: AtomicBool,
    /// Machines that are kept ready.
    pub(super) pools: Pools<W>,
    /// Names of bundles that are being committed.
    pub(super) bundle_names: BundleNames,
    /// Held while something is admitted that is counted among others, or what such a thing needs is taken away.
    pub(super) admission: tokio::sync::Mutex<()>,
    vms: Mutex<BTreeMap<VmId, VmHandle>>,
}

/// See [`Shared::turns`]. Two: while one guest waits for its host, the other works.
const TURNS_PER_CPU: usize = 2;

/// So many guests for each processor leave one that starts among them about the processor time it would have had alone,
/// when they are just being started themselves; one that has come to rest takes half a percent on hosts that emulate its
/// kernel. More than that all slow down.
const GUESTS_PER_CPU: usize = 8;

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// How many times longer a guest may take on a host with so many guests and processors.
fn crowding(guests: usize, cpus: usize) -> u32 {
    u32::try_from(guests.div_ceil(GUESTS_PER_CPU * cpus).max(1)).unwrap_or(u32::MAX)
}

/// The way to a VM's actor.
#[derive(Debug, Clone)]
pub(crate) struct VmHandle {
    pub(crate) id: VmId,
    pub(crate) name: Option<String>,
    pub(crate) inbox: mpsc::Sender<Request>,
    /// The record as it is in the ledger.
    pub(crate) record: watch::Receiver<Arc<VmRecord>>,
}

/// What an agent learnt when it began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    /// Its number among the agents of this ledger.
    pub(crate) epoch: u64,
    /// The last event there was.
    pub(crate) last_event: u64,
    /// The time of what rests.
    pub(crate) steady: Steady,
}

impl<W: World> Shared<W> {
    pub(crate) fn new(world: W, config: Config, begun: Begun) -> Self {
        let Begun { epoch, last_event, steady } = begun;
        let steady = (steady, world.clock().monotonic());
        Self {
            world,
            config,
            epoch,
            steady,
            last_event: watch::Sender::new(last_event),
            broken: watch::Sender::new(None),
            metrics: Metrics::new(),
            draining: watch::Sender::default(),
            connections: Arc::default(),
            conflicts: watch::Sender::default(),
            sessions_changed: Notify::new(),
            vms_changed: watch::Sender::new(0),
            desk: Desk::default(),
            calculations: Calculations::default(),
            peers: Peers::default(),
            sources: Sources::default(),
            asking: Asking::new(),
            traffic: Traffic::default(),
            noted: Mutex::default(),
            turns: Arc::new(Semaphore::new(TURNS_PER_CPU * cpus())),
            adoption: Adoption::default(),
            streams: Streams::default(),
            arrivals: Arrivals::default(),
            fillings: Fillings::default(),
            volumes_used: Notify::new(),
            is_leaving_volumes: AtomicBool::new(false),
            pools: Pools::default(),
            bundle_names: BundleNames::default(),
            admission: tokio::sync::Mutex::default(),
            vms: Mutex::new(BTreeMap::new()),
        }
    }

    /// When this agent started, by the wall clock as it is now: one that was wrong at the start, and has been set since,
    /// would put the start into another day.
    pub(crate) fn started_at(&self) -> UnixNanos {
        let clock = self.world.clock();
        let ago = clock.monotonic().since(self.steady.1);
        UnixNanos(clock.wall().0.saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time of what rests and runs out.
    pub(crate) fn steady(&self) -> Steady {
        let (at_start, start) = self.steady;
        at_start.after(self.world.clock().monotonic().since(start))
    }

    /// The VMs there are. Held for look-ups only, never across a wait.
    pub(crate) fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, VmHandle>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a guest may take to answer: what is configured, times how much more than full this host is.
    pub(crate) fn guest_patience(&self) -> Duration {
        let living = self.vms().values().filter(|vm| vm.record.borrow().state.holds_resources()).count();
        Duration::from_secs(self.config.waits.guest_ready_s.into()).saturating_mul(crowding(living, cpus()))
    }

    /// A VM's record is another than before, or gone.
    pub(crate) fn note_vm_change(&self) {
        self.vms_changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// A session of this host.
    pub(super) async fn session_of(&self, id: SessionId) -> Result<Option<SessionRecord>, LedgerError> {
        self.world.records().with(move |store| store.session(id.as_str())).await
    }

    /// A session as another host has to know it.
    pub(super) async fn arriving_session(&self, session: &SessionRecord) -> Result<ArrivingSession, LedgerError> {
        let id = session.id.clone();
        let user_data = self.world.records().with(move |store| store.user_data(&id)).await?;
        Ok(ArrivingSession::of(session, user_data, self.steady()))
    }

    /// What names the files of a VM's disks, on every host that sees them.
    pub(super) async fn identify_disks(&self, vm: &VmRecord) -> std::io::Result<Vec<DiskIdentity>> {
        let mut all = Vec::new();
        for disk in &vm.spec.disks {
            all.push(self.world.disk().identify_disk(disk).await?);
        }
        Ok(all)
    }

    /// What a VM's guest needs of a host: what there was where it was booted.
    pub(super) async fn needs_of(&self, vm: &VmRecord) -> Result<GuestNeeds, BundleError> {
        match &vm.needs {
            Some(needs) => Ok(needs.clone()),
            None => self.world.bundles().needs().await,
        }
    }

    /// Writes all or nothing and wakes the readers of events.
    pub(crate) async fn commit(&self, writes: Vec<Write>) -> Result<(), LedgerError> {
        let last = self.world.records().with(move |store| store.commit(&writes)).await?;
        self.wake_readers(last);
        Ok(())
    }

    /// Wakes the readers of events up to the one with this number.
    pub(crate) fn wake_readers(&self, last: u64) {
        self.last_event.send_if_modified(|event| {
            let newer = last > *event;
            *event = last.max(*event);
            newer
        });
    }

    /// Whether no new work is taken because the agent will end.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.borrow().has_begun
    }

    /// What speaks against session networks at the moment.
    pub(crate) fn conflicts(&self) -> Vec<String> {
        self.conflicts.borrow().values().cloned().collect()
    }

    /// Says what `source` finds wrong with session networks (`None`: nothing any more), with an event when that is new.
    pub(crate) async fn set_conflict(&self, source: &str, reason: Option<String>) -> Result<(), LedgerError> {
        let changed = self.conflicts.send_if_modified(|conflicts| match &reason {
            Some(reason) => conflicts.insert(source.to_owned(), reason.clone()).as_ref() != Some(reason),
            None => conflicts.remove(source).is_some(),
        });
        if !changed {
            return Ok(());
        }
        match &reason {
            Some(reason) => tracing::error!(source, reason, "fabric conflict: sessions are refused"),
            None => tracing::info!(source, "fabric conflict is over"),
        }
        let event = NewEvent {
            at: self.world.clock().wall(),
            kind: if reason.is_some() { "fabric_conflict" } else { "fabric_conflict_over" },
            subject: Subject::Host,
            operation: None,
            body: serde_json::json!({ "source": source, "reason": reason }),
        };
        self.commit(vec![Write::Event(event)]).await
    }

    /// Records that the ledger cannot be written any more.
    pub(crate) fn declare_broken(&self, error: &LedgerError) {
        let why = crate::report::chain(error);
        tracing::error!(error = %why, "the ledger failed; this agent ends, its VMs go on");
        self.broken.send_if_modified(|broken| {
            let first = broken.is_none();
            broken.get_or_insert(why);
            first
        });
    }

    /// The event of a VM's new state.
    pub(crate) fn vm_event(&self, vm: &VmRecord) -> Write {
        vm_event(self.world.clock().wall(), vm)
    }

    /// The event that a VM is forgotten.
    pub(crate) fn removed_event(&self, vm: &VmRecord) -> Write {
        Write::Event(NewEvent {
            at: self.world.clock().wall(),
            kind: "vm_removed",
            subject: Subject::Vm(vm.id.clone()),
            operation: vm.operation.clone(),
            body: serde_json::json!({ "name": vm.name }),
        })
    }

    /// The event of an operation's new state.
    pub(crate) fn operation_event(&self, operation: &OperationRecord) -> Write {
        operation_event(self.world.clock().wall(), operation)
    }
}

/// The event of a VM's new state.
pub(super) fn vm_event(at: UnixNanos, vm: &VmRecord) -> Write {
    let mut body = serde_json::json!({ "state": vm.state.name(), "revision": vm.revision, "name": vm.name });
    if let super::vm_state::VmState::Failed { cause } = &vm.state {
        body["cause"] = cause.name().into();
    }
    let (subject, operation) = (Subject::Vm(vm.id.clone()), vm.operation.clone());
    Write::Event(NewEvent { at, kind: "vm_state", subject, operation, body })
}

/// The event of an operation's new state.
pub(super) fn operation_event(at: UnixNanos, operation: &OperationRecord) -> Write {
    let error = operation.error.as_ref().map(|error| error.code.clone());
    Write::Event(NewEvent {
        at,
        kind: "operation_state",
        subject: Subject::Vm(operation.vm.clone()),
        operation: Some(operation.id.clone()),
        body: serde_json::json!({ "state": operation.state.name(), "goal": operation.goal, "error": error }),
    })
}

/// The event of something that happened to a cluster.
pub(super) fn cluster_event(at: UnixNanos, kind: &'static str, cluster: &ClusterRecord) -> Write {
    let body = serde_json::json!({ "state": cluster.state.name(), "name": cluster.name });
    Write::Event(NewEvent { at, kind, subject: Subject::Cluster(cluster.id.clone()), operation: None, body })
}

/// The event of something that happened to a session.
pub(super) fn session_event(at: UnixNanos, kind: &'static str, session: &SessionRecord) -> Write {
    let body = serde_json::json!({
        "state": session.state.name(),
        "name": session.name,
        "session_network_id": session.session_network_id,
    });
    Write::Event(NewEvent { at, kind, subject: Subject::Session(session.id.clone()), operation: None, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_get_more_time_the_fuller_their_host_is() {
        for (guests, cpus, wanted) in [(0, 2, 1), (1, 2, 1), (16, 2, 1), (17, 2, 2), (100, 2, 7), (100, 64, 1)] {
            assert_eq!(crowding(guests, cpus), wanted, "{guests} guests on {cpus}");
        }
    }
}
