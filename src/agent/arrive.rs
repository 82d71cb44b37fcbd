//! Migrations as they are asked for: of this host's VMs to another one, and of another one's to here. What is checked
//! here can be checked without making anything; the rest is the VMs' actors'.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::admit::{Facts, admit};
use super::arrivals::{Decision, Waiting};
use super::config::FabricConfig;
use super::door::VmError;
use super::images::Image;
use super::launch::LaunchRequest;
use super::launch_error::LaunchError;
use super::ledger::{Claim, Grant, LedgerError, SessionRefusal, Write};
use super::peers::{ArrivalOrder, ArrivalReady, DecisionBody};
use super::record::{MigrationRecord, OperationRecord, SCHEMA_VERSION, Timings, VmRecord, VmSpec};
use super::room::{NewWork, check};
use super::session::SessionRequest;
use super::session_error::{SessionError, join_refused};
use super::session_record::{NetworkRecord, SessionRecord, SessionState};
use super::shared::{VmHandle, operation_event, vm_event};
use super::vm_actor::{Arrival, Begin, Verb, operation_for, start};
use super::vm_state::{Event, Goal, VmState, step};
use super::world::{Records, VmDisk, VmNetworks, World, random_array, random_nonce};
use super::{Agent, Store};
use crate::clock::{Clock, UnixNanos};
use crate::ids::{Generation, MigrationId, OperationId, VmId};
use crate::net::address::{HostNumber, Parts};
use crate::report::Retry;
use crate::wire::control::StreamToken;
use crate::wire::frame;

/// Longest wait for the place where a machine is received: its VMM is started for it.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Longest wait for a machine that is this host's to run.
const RUN_LIMIT: Duration = Duration::from_secs(20);

/// Why a VM is not moved to another host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// There is no other host.
    #[error("this host has no [fabric] in its configuration, so it knows no other host")]
    NoFabric,
    /// The word is no peer's name.
    #[error("there is no peer {word:?} in the configuration; there are: {known}")]
    UnknownPeer {
        /// The word.
        word: String,
        /// The peers there are.
        known: String,
    },
    /// It is this host.
    #[error("{word:?} is this host")]
    SameHost {
        /// The word.
        word: String,
    },
    /// The VM has something that only this host has.
    #[error("{vm} cannot leave this host: {what}")]
    Tied {
        /// The VM.
        vm: String,
        /// What it has.
        what: &'static str,
    },
    /// Its addresses are another host's, which alone can lead there.
    #[error("{vm} has addresses of host number {home}: from here it can only go back there")]
    NotHome {
        /// The VM.
        vm: String,
        /// Whose addresses it has.
        home: u16,
    },
}

impl MigrateError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        Retry::WithChange
    }
}

/// Why another host's machine is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ArriveError {
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
    /// What is said of it is not possible.
    #[error("take a machine of another host: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// It was not admitted.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Its session cannot be here.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A VM of its id is here, and does something else.
    #[error("{vm} is here already, and is {state}")]
    Here {
        /// The VM.
        vm: String,
        /// What it is doing.
        state: &'static str,
    },
    /// There was no place in time, or none at all.
    #[error("there is no place to receive {vm} in: see the operations of this host")]
    NotReady {
        /// The VM.
        vm: String,
    },
    /// No machine came by this migration, or it is not here any more.
    #[error("no machine came by {id}, or it is not here any more")]
    Unknown {
        /// The migration.
        id: MigrationId,
    },
    /// It does not run yet.
    #[error("the machine of {id} does not run yet")]
    NotYet {
        /// The migration.
        id: MigrationId,
    },
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Whether a VM can go to another host, and how.
pub(super) fn check_to_migrate(
    vm: &VmRecord,
    word: &str,
    fabric: Option<&FabricConfig>,
    own_name: Option<&str>,
) -> Result<(String, HostNumber), MigrateError> {
    let fabric = fabric.ok_or(MigrateError::NoFabric)?;
    let Some(peer) = fabric.peers.iter().find(|peer| peer.name == word) else {
        if own_name == Some(word) {
            return Err(MigrateError::SameHost { word: word.to_owned() });
        }
        let known: Vec<&str> = fabric.peers.iter().map(|peer| peer.name.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(MigrateError::UnknownPeer { word: word.to_owned(), known });
    };
    let name = || vm.name.clone().unwrap_or_else(|| vm.id.to_string());
    let tie = if !vm.spec.disks.is_empty() {
        Some("it has disks, which are files of this host")
    } else if vm.spec.cluster.is_some() {
        Some("it is a member of a cluster, whose registrar is here")
    } else if vm.network.as_ref().is_some_and(|network| !network.published.is_empty()) {
        Some("ports of this host lead to it")
    } else if vm.spec.build.is_some() {
        Some("it is there to become a bundle here")
    } else {
        None
    };
    if let Some(what) = tie {
        return Err(MigrateError::Tied { vm: name(), what });
    }
    match vm.network.as_ref().and_then(|network| network.home) {
        Some(home) if home != u16::from(peer.host) => Err(MigrateError::NotHome { vm: name(), home }),
        Some(_) | None => Ok((peer.name.clone(), peer.host)),
    }
}

impl<W: World> Agent<W> {
    /// Moves a VM to the peer of this name; answers when it runs there.
    pub(super) async fn migrate_vm(&self, word: &str, to: &str) -> Result<Arc<VmRecord>, VmError> {
        let handle = self.find(word)?;
        let vm = handle.record.borrow().clone();
        let fabric = self.shared.config.fabric.as_ref();
        let (peer, host) = check_to_migrate(&vm, to, fabric, self.shared.config.host_name.as_deref())?;
        let random = random_array(&self.shared.world).unwrap_or_default();
        let way = MigrationRecord { id: MigrationId::from_random(random), peer, host: host.into() };
        self.ask_actor(&handle, Verb::Migrate(way)).await
    }

    /// Admits a machine of another host, and waits until it can be sent.
    pub(super) async fn take_machine(&self, from: IpAddr, order: ArrivalOrder) -> Result<ArrivalReady, ArriveError> {
        let fabric = self.shared.config.fabric.as_ref().ok_or(ArriveError::Malformed { what: "there is no fabric" })?;
        let (certificate, token) = order.keys().ok_or(ArriveError::Malformed { what: "its keys are none" })?;
        let is_known = self.shared.vms().contains_key(&order.vm);
        check_order(&order, fabric, is_known)?;
        let peer = fabric.peers.iter().find(|peer| u16::from(peer.host) == order.host);
        let peer = peer.ok_or(ArriveError::Malformed { what: "its host is no peer" })?;
        let way = MigrationRecord { id: order.migration.clone(), peer: peer.name.clone(), host: order.host };
        let (tell, ready) = oneshot::channel();
        let waiting = Waiting { from, token: StreamToken(token), peer: certificate, ready: tell };
        let vm = order.vm.to_string();
        if !self.shared.arrivals.expect(order.migration.clone(), waiting) {
            // It was asked for before, and is being made ready.
            return Err(ArriveError::NotReady { vm });
        }
        let id = order.migration.clone();
        let begun = self.begin_arrival(way, order).await;
        let ready = match begun {
            Ok(()) => timeout(READY_LIMIT, ready).await,
            Err(error) => {
                self.shared.arrivals.take(&id);
                return Err(error);
            }
        };
        match ready {
            Ok(Ok(ready)) => Ok(ready),
            Ok(Err(_)) | Err(_) => {
                self.shared.arrivals.take(&id);
                Err(ArriveError::NotReady { vm })
            }
        }
    }

    async fn begin_arrival(&self, way: MigrationRecord, order: ArrivalOrder) -> Result<(), ArriveError> {
        let known = self.shared.vms().get(&order.vm).cloned();
        if let Some(handle) = known {
            return self.begin_return(&handle, way, order);
        }
        let session = match (&order.network, &order.session) {
            (Some(network), Some(session)) => {
                let request = SessionRequest {
                    ipv4: Some(session.ipv4),
                    egress: session.egress.clone(),
                    ..SessionRequest::default()
                };
                Some(self.session_for_peer(network.session_network_id.into(), request).await?)
            }
            (_, _) => None,
        };
        // Held through the record, as a launch holds it.
        let _admission = self.admission.lock().await;
        if let Some(handle) = self.shared.vms().get(&order.vm) {
            let state = handle.record.borrow().state.name();
            return Err(ArriveError::Here { vm: order.vm.to_string(), state });
        }
        if let Some(session) = &session {
            let now = self.shared.session_of(session.id.clone()).await?;
            if now.is_none_or(|session| session.state != SessionState::Active) {
                return Err(join_refused(session, u32::MAX, SessionRefusal::Draining).into());
            }
        }
        let disk = self.shared.world.disk();
        let host = disk.host().await.map_err(|source| LaunchError::Host { what: "ask the host", source })?;
        check(NewWork::Vm, &host, &self.shared.config, self.shared.is_draining()).map_err(LaunchError::from)?;
        let (vms, image) = (self.records(), image_of(&order));
        let limits = &self.shared.config.limits;
        let facts = Facts { limits, host: &host, image: &image, bundle: None, additions: "", vms: &vms };
        let request = LaunchRequest {
            name: order.name.clone(),
            image: order.spec.image.clone(),
            vcpus: Some(order.spec.vcpus.into()),
            memory_mib: Some(order.spec.memory_mib.into()),
            interfaces: Some(order.spec.interfaces),
            ..LaunchRequest::default()
        };
        admit(&request, &facts)?;
        self.record_arrival(way, order, session, &vms).await
    }

    /// One that is known here was handed over from here.
    fn begin_return(&self, handle: &VmHandle, way: MigrationRecord, order: ArrivalOrder) -> Result<(), ArriveError> {
        let known = handle.record.borrow().clone();
        let gone_to = known.migration.as_ref().map(|gone| gone.host);
        if known.state != VmState::HandedOver || gone_to != Some(way.host) {
            return Err(ArriveError::Here { vm: order.vm.to_string(), state: known.state.name() });
        }
        if self.shared.is_draining() {
            return Err(ArriveError::Ending);
        }
        let (was, is) = (&known.spec, &order.spec);
        if (was.vcpus, was.memory_mib, was.interfaces) != (is.vcpus, is.memory_mib, is.interfaces) {
            return Err(ArriveError::Malformed { what: "it is not what it was" });
        }
        // All of its memory comes over the wire: it shares nothing with an image any more.
        let spec = VmSpec { bundle: None, swap: is.swap.clone(), ..was.clone() };
        let arrival = Arrival { way, spec, guest_protocol: order.guest_protocol };
        let (agent, handle) = (self.clone(), handle.clone());
        // Its end is told by the decision.
        tokio::spawn(async move { drop(agent.ask_actor(&handle, Verb::Arrive(Box::new(arrival))).await) });
        Ok(())
    }

    async fn record_arrival(
        &self,
        way: MigrationRecord,
        order: ArrivalOrder,
        session: Option<SessionRecord>,
        vms: &[Arc<VmRecord>],
    ) -> Result<(), ArriveError> {
        let world = &self.shared.world;
        let random = |source| LaunchError::Host { what: "read randomness", source };
        let now = self.shared.steady();
        let (first, count) = (self.shared.config.uids.first(), super::config::UIDS_PER_HOST);
        let uid = world.records().with(move |store| store.free_uid(first, count, now)).await?;
        let uid = uid.ok_or(LaunchError::NoUid)?;
        let used = vms.iter().map(|vm| vm.jail).collect();
        let jail = world.networks().take(&used);
        let network = order.network.clone().zip(session);
        let network = network.map(|(network, session)| NetworkRecord { session: session.id, ..network });
        let mut record = VmRecord {
            schema_version: SCHEMA_VERSION,
            id: order.vm,
            name: order.name,
            state: VmState::Reserved,
            revision: 1,
            spec: order.spec,
            generation: order.generation,
            uid,
            jail: 0,
            network,
            registration: None,
            nonce: random_nonce(world).map_err(random)?,
            process: None,
            operation: None,
            wire_version: frame::VERSION,
            quarantine: None,
            swap: None,
            came_by: Some(way.id.clone()),
            migration: Some(way),
            guest_protocol: order.guest_protocol,
            created_at: order.created_at,
            timings: Timings::default(),
            remains: None,
        };
        // All of its memory came over the wire: it shares nothing with an image any more.
        record.spec.bundle = None;
        let id = OperationId::from_random(random_array(world).map_err(random)?);
        let claim = Claim { vm: record.id.clone(), session: None, jail, now };
        let wall = world.clock().wall();
        let admitted = world
            .records()
            .with(move |store: &mut Store| store.admit_vm(&claim, |grant| arriving(record, grant, id, wall)));
        let ((record, operation), last) = match admitted.await {
            Ok(admitted) => admitted,
            Err(error) => {
                if let Some(jail) = jail {
                    world.networks().give_back(jail);
                }
                return Err(error.into());
            }
        };
        self.shared.wake_readers(last);
        tracing::info!(vm = %record.id, name = record.name, from = ?record.migration, "arriving");
        let asked_at = world.clock().monotonic();
        start(&self.shared, record, Begin::Launch(Box::new(operation), asked_at));
        Ok(())
    }

    /// The VM that came by a migration.
    fn came_by(&self, id: &MigrationId) -> Option<VmHandle> {
        self.shared.vms().values().find(|vm| vm.record.borrow().came_by.as_ref() == Some(id)).cloned()
    }

    /// The VM that went by a migration, or is about to.
    fn went_by(&self, id: &MigrationId) -> Option<VmHandle> {
        let by = |vm: &&VmHandle| vm.record.borrow().migration.as_ref().is_some_and(|way| way.id == *id);
        self.shared.vms().values().find(by).cloned()
    }

    /// Whether what this agent knows of its VMs may be less than what the ledger does: it ends then.
    fn knows_nothing_for_sure(&self) -> bool {
        self.shared.broken.borrow().is_some()
    }

    /// What a VM does here, if there is one of this id.
    pub(super) fn presence_of(&self, vm: &VmId) -> Option<String> {
        let here = self.shared.vms().get(vm).map(|vm| vm.record.borrow().state.name().to_owned());
        here.or_else(|| self.knows_nothing_for_sure().then(|| "unknown".to_owned()))
    }

    pub(super) async fn note_decision(
        &self,
        from: u16,
        id: MigrationId,
        decision: Decision,
    ) -> Result<DecisionBody, ArriveError> {
        let done = DecisionBody { decision: Some(decision) };
        let Some(mut vm) = self.came_by(&id) else {
            // Before there was a place for it: who waits for the machine hears of it.
            self.shared.arrivals.take(&id);
            let is_over = decision == Decision::Kept;
            return match is_over {
                true => Ok(done),
                false if self.knows_nothing_for_sure() => Err(ArriveError::NotYet { id }),
                false => Err(ArriveError::Unknown { id }),
            };
        };
        // Whose it is, is its source's word and nobody else's.
        let is_source = |vm: &VmRecord| vm.migration.as_ref().is_some_and(|way| way.id != id || way.host == from);
        if !is_source(&vm.record.borrow()) {
            return Err(ArriveError::Malformed { what: "another host sends it" });
        }
        self.shared.arrivals.decide(&id, decision);
        if decision == Decision::Kept {
            self.shared.arrivals.take(&id);
            return Ok(done);
        }
        let settled = vm.record.wait_for(|vm| !matches!(vm.state, VmState::Arriving { .. }));
        let settled = timeout(RUN_LIMIT, settled).await.map(|settled| settled.map(|vm| vm.state.clone()));
        let state = match settled {
            Ok(Ok(state)) => state,
            // Its actor is gone, with the VM or with the agent.
            Ok(Err(_)) if vm.record.borrow().state == VmState::Gone => return Err(ArriveError::Unknown { id }),
            Ok(Err(_)) | Err(_) => return Err(ArriveError::NotYet { id }),
        };
        // One that was to come back, and did not, is again where it was handed to, or nowhere.
        let is_lost = matches!(state, VmState::Gone | VmState::Failed { .. } | VmState::HandedOver);
        if is_lost { Err(ArriveError::Unknown { id }) } else { Ok(done) }
    }

    /// Whose a machine is that went from here: this ledger's word.
    pub(super) fn decision_on(&self, id: &MigrationId) -> Option<Decision> {
        match self.went_by(id).map(|vm| vm.record.borrow().state.clone()) {
            // Not yet, or this agent cannot say any more.
            Some(VmState::Sending) => None,
            _ if self.knows_nothing_for_sure() => None,
            Some(VmState::HandedOver) => Some(Decision::HandedOver),
            // One that left for good is forgotten here only after the other host has said that it runs.
            Some(_) | None => Some(Decision::Kept),
        }
    }
}

/// The VM that is to come, its operation, and all that is written of them.
fn arriving(
    mut record: VmRecord,
    grant: Grant,
    operation: OperationId,
    now: UnixNanos,
) -> ((VmRecord, OperationRecord), Vec<Write>) {
    record.jail = grant.jail;
    // From `reserved` it is always possible.
    let next = step(&record.state, &Event::ArriveAsked);
    let next = next.unwrap_or_else(|denied| super::vm_state::Step { state: denied.state, effects: Vec::new() });
    let operation = operation_for(&record, operation, Goal::Arrive, false, &next, now);
    record.state = next.state;
    record.operation = Some(operation.id.clone());
    let writes = vec![
        Write::Vm(Box::new(record.clone())),
        Write::Lease { uid: record.uid, vm: record.id.clone() },
        Write::Operation(Box::new(operation.clone())),
        vm_event(now, &record),
        operation_event(now, &operation),
    ];
    ((record, operation), writes)
}

/// An image as far as admission cares: none is read.
fn image_of(order: &ArrivalOrder) -> Image {
    Image {
        name: order.spec.image.clone(),
        digest: String::new(),
        kernel_bytes: 0,
        initrd_bytes: None,
        command_line: String::new(),
        memory_mib_min: 0,
        created_at: order.created_at,
    }
}

/// What can be said of an order without looking at this host.
fn check_order(order: &ArrivalOrder, fabric: &FabricConfig, is_known: bool) -> Result<(), ArriveError> {
    let wrong = |what| Err(ArriveError::Malformed { what });
    if !order.spec.disks.is_empty() || order.spec.cluster.is_some() || order.spec.build.is_some() {
        return wrong("it has what stays on its host");
    }
    if order.generation.parse::<Generation>().is_err() {
        return wrong("its generation is none");
    }
    let Some(network) = &order.network else { return Ok(()) };
    if order.session.is_none() || !network.published.is_empty() {
        return wrong("its place in its session is none");
    }
    let Some(Ok(home)) = network.home.map(HostNumber::try_from) else { return wrong("its addresses are of no host") };
    if home == fabric.host && !is_known {
        return wrong("its addresses are of this host, which does not know it");
    }
    let parts = Parts { host: home, session: network.session_network_id, local: network.local_id };
    let v4 = fabric.fabric.v4(parts).ok().flatten();
    if fabric.fabric.v6(parts) != network.ipv6 || network.ipv4.is_some() && network.ipv4 != v4 {
        return wrong("its addresses are not those of its host, session and number");
    }
    Ok(())
}
