//! Machines of other hosts as they come: what is checked here can be checked without making anything; the rest is the
//! VMs' actors'.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::admit::{Facts, admit};
use super::arrivals::{Decision, Waiting};
use super::bundles::BundleError;
use super::config::FabricConfig;
use super::images::Image;
use super::launch::LaunchRequest;
use super::launch_error::LaunchError;
use super::ledger::{Claim, Grant, LedgerError, SessionRefusal, Write};
use super::migration_record::{MigrationRecord, MovePolicy};
use super::peers::{ArrivalOrder, ArrivalReady, ArrivalVerdict, DecisionBody};
use super::record::{OperationRecord, SCHEMA_VERSION, Timings, VmRecord, VmSpec};
use super::room::{NewWork, check};
use super::session::SessionRequest;
use super::session_error::{SessionError, join_refused};
use super::session_record::{NetworkRecord, SessionRecord, SessionState};
use super::shared::{VmHandle, operation_event, vm_event};
use super::vm_actor::{Arrival, Begin, Verb, operation_for, start};
use super::vm_state::{Event, Goal, VmState, step};
use super::world::{Records, VmBundles, VmDisk, VmNetworks, World, random_array, random_nonce};
use super::{Agent, Store};
use crate::clock::{Clock, UnixNanos};
use crate::ids::{BundleId, Generation, MigrationId, OperationId, VmId};
use crate::net::address::{HostNumber, Parts};
use crate::units::MIB;
use crate::wire::control::StreamToken;
use crate::wire::frame;
use crate::wire::stream::{self, CONNECTIONS_MAX};

/// Longest wait for the place where a machine is received: its VMM is started for it.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Longest wait for a machine that is this host's to run.
const RUN_LIMIT: Duration = Duration::from_secs(20);

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
    /// Its guest cannot go on here, or its bundle cannot be looked at.
    #[error("take the VM of another host")]
    Guest(#[from] BundleError),
    /// What is here at the path of a disk is another file.
    #[error("{path} is not the file that the other host has there: is it on storage that both see?")]
    OtherDisk {
        /// The path.
        path: String,
    },
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

impl<W: World> Agent<W> {
    /// Admits a machine of another host, and waits until it can be sent.
    pub(super) async fn take_machine(&self, from: IpAddr, order: ArrivalOrder) -> Result<ArrivalReady, ArriveError> {
        let fabric = self.shared.config.fabric.as_ref().ok_or(ArriveError::Malformed { what: "there is no fabric" })?;
        let (certificate, token) = order.keys().ok_or(ArriveError::Malformed { what: "its keys are none" })?;
        let is_known = self.shared.vms().contains_key(&order.vm);
        check_order(&order, fabric, is_known)?;
        let way = way_of(&order, fabric)?;
        self.check_disks(&order).await?;
        let base = self.base_of(&order).await?;
        let (tell, ready) = oneshot::channel();
        let token = StreamToken(token);
        let (connections, on_base) = (order.connections, base.is_some());
        let waiting = Waiting { from, token, peer: certificate, connections, on_base, ready: tell };
        let vm = order.vm.to_string();
        if !self.shared.arrivals.expect(order.migration.clone(), waiting) {
            // It was asked for before, and is being made ready.
            return Err(ArriveError::NotReady { vm });
        }
        let id = order.migration.clone();
        let begun = self.begin_arrival(way, order, base).await;
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

    /// Whether a machine could come, if it came now: what would be checked then, and nothing is made.
    pub(super) async fn check_machine(&self, order: ArrivalOrder) -> Result<ArrivalVerdict, ArriveError> {
        let fabric = self.shared.config.fabric.as_ref().ok_or(ArriveError::Malformed { what: "there is no fabric" })?;
        let is_known = self.shared.vms().contains_key(&order.vm);
        check_order(&order, fabric, is_known)?;
        let way = way_of(&order, fabric)?;
        let known = self.shared.vms().get(&order.vm).cloned();
        self.check_disks(&order).await?;
        let has_base = self.base_of(&order).await?.is_some();
        match known {
            Some(handle) => self.check_return(&handle, &way, &order)?,
            None => self.admit_machine(&order, &self.records()).await?,
        }
        let host = self.shared.world.disk().host().await;
        let host = host.map_err(|source| LaunchError::Host { what: "ask the host", source })?;
        let memory_available_bytes = host.memory_available_bytes;
        Ok(ArrivalVerdict { has_base, memory_available_bytes, stream_version: stream::VERSION })
    }

    /// The bundle that a machine was launched from, if it is here and whole: then only what differs has to come. The first
    /// look at a bundle reads all of it.
    async fn base_of(&self, order: &ArrivalOrder) -> Result<Option<BundleId>, ArriveError> {
        let bundles = self.shared.world.bundles();
        if let Some(needs) = &order.needs {
            bundles.admit_guest(needs, order.guest_protocol).await?;
        }
        let Some(base) = &order.base else { return Ok(None) };
        match bundles.check(base).await {
            Ok(manifest) if manifest.machine.memory_bytes == u64::from(order.spec.memory_mib) * MIB => {
                Ok(Some(base.clone()))
            }
            Ok(_) => Err(ArriveError::Malformed { what: "its bundle has another size" }),
            Err(error) => {
                tracing::debug!(%base, error = %crate::report::chain(&error), "not here: all of the memory has to come");
                Ok(None)
            }
        }
    }

    /// Whether its disks are seen here, and are the same files.
    async fn check_disks(&self, order: &ArrivalOrder) -> Result<(), ArriveError> {
        if order.disks.len() != order.spec.disks.len() {
            return Err(ArriveError::Malformed { what: "its disks are not named" });
        }
        for (disk, theirs) in order.spec.disks.iter().zip(&order.disks) {
            let path = || disk.path.clone();
            let found = self.shared.world.disk().identify_disk(disk).await;
            let ours = found.map_err(|source| LaunchError::Disk { path: path(), source })?;
            if ours != *theirs {
                return Err(ArriveError::OtherDisk { path: path() });
            }
        }
        Ok(())
    }

    /// Whether there is a place for a machine that is not known here.
    async fn admit_machine(&self, order: &ArrivalOrder, vms: &[Arc<VmRecord>]) -> Result<(), ArriveError> {
        let disk = self.shared.world.disk();
        let host = disk.host().await.map_err(|source| LaunchError::Host { what: "ask the host", source })?;
        check(NewWork::Vm, &host, &self.shared.config, self.shared.is_draining()).map_err(LaunchError::from)?;
        let image = image_of(order);
        let limits = &self.shared.config.limits;
        let facts = Facts { limits, host: &host, image: &image, bundle: None, additions: "", vms };
        let request = LaunchRequest {
            name: order.name.clone(),
            image: order.spec.image.clone(),
            vcpus: Some(order.spec.vcpus.into()),
            memory_mib: Some(order.spec.memory_mib.into()),
            interfaces: Some(order.spec.interfaces),
            disks: order.spec.disks.clone(),
            ..LaunchRequest::default()
        };
        admit(&request, &facts)?;
        Ok(())
    }

    async fn begin_arrival(
        &self,
        way: MigrationRecord,
        order: ArrivalOrder,
        base: Option<BundleId>,
    ) -> Result<(), ArriveError> {
        let known = self.shared.vms().get(&order.vm).cloned();
        if let Some(handle) = known {
            return self.begin_return(&handle, way, order, base).await;
        }
        let session = match (&order.network, &order.session) {
            (Some(network), Some(session)) => {
                let request = SessionRequest {
                    ipv4: Some(session.ipv4),
                    egress: session.egress.clone(),
                    ttl_s: session.ttl_s,
                    user_data: session.user_data.clone(),
                    ..SessionRequest::default()
                };
                Some(self.session_for_peer(network.session_network_id.into(), request).await?)
            }
            (_, _) => None,
        };
        // Held through the record, as a launch holds it.
        let _admission = self.shared.admission.lock().await;
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
        let vms = self.records();
        self.admit_machine(&order, &vms).await?;
        self.hold_base(base.as_ref()).await?;
        self.record_arrival(way, order, base, session, &vms).await
    }

    /// Whether a machine's bundle is still here. While the admission is held nobody removes it.
    async fn hold_base(&self, base: Option<&BundleId>) -> Result<(), ArriveError> {
        if let Some(base) = base {
            self.shared.world.bundles().find(base.as_str()).await?;
        }
        Ok(())
    }

    /// One that is known here was handed over from here.
    fn check_return(&self, handle: &VmHandle, way: &MigrationRecord, order: &ArrivalOrder) -> Result<(), ArriveError> {
        let known = handle.record.borrow();
        let gone_to = known.migration.as_ref().map(|gone| gone.host);
        if known.state != VmState::HandedOver || gone_to != Some(way.host) {
            return Err(ArriveError::Here { vm: order.vm.to_string(), state: known.state.name() });
        }
        if self.shared.is_draining() {
            return Err(ArriveError::Ending);
        }
        let (was, is) = (&known.spec, &order.spec);
        let is_same = (was.vcpus, was.memory_mib, was.interfaces) == (is.vcpus, is.memory_mib, is.interfaces);
        if !is_same || was.disks != is.disks {
            return Err(ArriveError::Malformed { what: "it is not what it was" });
        }
        Ok(())
    }

    async fn begin_return(
        &self,
        handle: &VmHandle,
        way: MigrationRecord,
        order: ArrivalOrder,
        base: Option<BundleId>,
    ) -> Result<(), ArriveError> {
        // Held until its record says that it uses its bundle, or nearly: the one it has may say so already.
        let _admission = self.shared.admission.lock().await;
        self.hold_base(base.as_ref()).await?;
        self.check_return(handle, &way, &order)?;
        let was = handle.record.borrow().spec.clone();
        // Without it all of its memory comes over the wire, and it shares nothing with an image any more.
        let volumes = order.spec.volumes.clone();
        let spec = VmSpec { bundle: base, swap: order.spec.swap.clone(), volumes, ..was };
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
        base: Option<BundleId>,
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
            needs: order.needs,
            migration: Some(way),
            guest_protocol: order.guest_protocol,
            secrets: None,
            created_at: order.created_at,
            timings: Timings::default(),
            remains: None,
        };
        // Without it all of its memory comes over the wire, and it shares nothing with an image any more.
        record.spec.bundle = base;
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
        start(&self.shared, record, Begin::Launch(Box::new(operation), asked_at), None);
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
        let done = DecisionBody::of(Some(decision));
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
        // One that was to come back, and did not, is again where it was handed to. One that failed has run here.
        let is_lost = matches!(state, VmState::Gone | VmState::HandedOver);
        if is_lost {
            return Err(ArriveError::Unknown { id });
        }
        let ran = self.shared.arrivals.ran_for(&id, self.shared.world.clock().monotonic());
        Ok(DecisionBody { ran_us: u64::try_from(ran.as_micros()).unwrap_or(u64::MAX), ..done })
    }

    /// Whose a machine is that went from here: this ledger's word.
    pub(super) fn decision_on(&self, id: &MigrationId) -> Option<Decision> {
        let record = self.went_by(id).map(|vm| vm.record.borrow().clone());
        match record.as_ref().map(|record| &record.state) {
            // Not yet, or this agent cannot say any more.
            Some(VmState::Sending) => None,
            _ if self.knows_nothing_for_sure() => None,
            Some(VmState::HandedOver) => Some(Decision::HandedOver),
            Some(VmState::Stopping | VmState::Stopped | VmState::Failed { .. })
                if record.as_ref().is_some_and(|record| record.is_undecided()) =>
            {
                None
            }
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
        container: None,
        created_at: order.created_at,
    }
}

/// The way a machine comes.
fn way_of(order: &ArrivalOrder, fabric: &FabricConfig) -> Result<MigrationRecord, ArriveError> {
    let peer = fabric.peers.iter().find(|peer| u16::from(peer.host) == order.host);
    let peer = peer.ok_or(ArriveError::Malformed { what: "its host is no peer" })?;
    let policy = MovePolicy { connections: order.connections, ..MovePolicy::default() };
    Ok(MigrationRecord { id: order.migration.clone(), peer: peer.name.clone(), host: order.host, policy })
}

/// What can be said of an order without looking at this host.
fn check_order(order: &ArrivalOrder, fabric: &FabricConfig, is_known: bool) -> Result<(), ArriveError> {
    let wrong = |what| Err(ArriveError::Malformed { what });
    if order.spec.disks.iter().any(|disk| !disk.shared) || order.spec.cluster.is_some() || order.spec.build.is_some() {
        return wrong("it has what stays on its host");
    }
    if !(1..=CONNECTIONS_MAX).contains(&order.connections) {
        return wrong("its number of connections is not possible");
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
