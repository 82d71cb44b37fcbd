//! Making a VM: admission, reservation, and the hand-over to its actor. One launch is admitted at a time, so that two
//! cannot both fit where only one does; the launches themselves go on side by side.

use std::sync::Arc;
use std::time::Duration;

use super::admit::{Facts, admit};
use super::bundles::BundleError;
use super::cluster::Place;
use super::cluster_record::called;
use super::config::FabricConfig;
use super::fetched::FetchedBundles;
use super::images::Image;
use super::launch_error::LaunchError;
use super::ledger::{Claim, Grant, KeyRow, LedgerError, SessionRefusal, StoredAnswer, Taken, Write};
use super::record::{
    BuildSpec, BundleOrder, DiskSpec, OperationRecord, SCHEMA_VERSION, SwapPolicy, Timings, VmRecord, VmSpec,
};
use super::register::member_event;
use super::room::{NewWork, check};
use super::session_error::join_refused;
use super::session_record::{Addressing, JAILS_MAX, NetworkRecord, PublishedPort, SessionRecord};
use super::shared::{cluster_event, operation_event, vm_event};
use super::vm_actor::{Begin, operation_for, start};
use super::vm_state::{Event, Goal, Origin, Step, VmState, step};
use super::volumes::VolumeLimits;
use super::world::{Records, VmBundles, VmDisk, VmNetworks, VmmHost, World, random_array, random_nonce};
use super::{Agent, Store};
use crate::bundle::Manifest;
use crate::clock::{Clock, Monotonic, Steady, UnixNanos};
use crate::ids::{BundleId, Generation, OperationId, VmId};
use crate::net::address::{LocalId, Parts};
use crate::units::NetLimits;
use crate::wire::control::FILLED_CHUNKS_MAX as CHUNKS_MAX;
use crate::wire::frame;

/// How long an idempotency key is remembered: a client that repeats a request after a day means a new one.
pub const KEY_LIFETIME_NS: u64 = 24 * 3600 * 1_000_000_000;

/// A VM to make.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LaunchRequest {
    /// Its name, if it gets one.
    pub name: Option<String>,
    /// Image to boot, when it is not launched from a bundle.
    pub image: String,
    /// Bundle to launch from: its id, the start of it, or its name.
    pub bundle: Option<String>,
    /// Whether it may begin while some of the bundle's memory is still on its way here.
    pub lazy: bool,
    /// Number of vCPUs; 1 when nothing is said, or what the bundle has.
    pub vcpus: Option<u32>,
    /// Guest memory in MiB; 128 when nothing is said, or what the bundle has.
    pub memory_mib: Option<u64>,
    /// What it is made into, if it is there to become a bundle: how, and the bundle.
    pub build: Option<(BuildSpec, BundleOrder)>,
    /// Disks to attach.
    pub disks: Vec<DiskSpec>,
    /// Volumes that it gets.
    pub volumes: Vec<VolumeWish>,
    /// Slots for more of them, to be attached later.
    pub spare_disks: u8,
    /// What may pass its network interface.
    pub network_limits: NetLimits,
    /// Session to join: its id, name or network id.
    pub session: Option<String>,
    /// Who puts its session addresses to use; only with a session.
    pub addressing: Option<Addressing>,
    /// What it is in its session.
    pub role: Option<String>,
    /// Ports of the host that lead to it; only with a session.
    pub published: Vec<PublishedPort>,
    /// How many network interfaces it gets; one when nothing is said.
    pub interfaces: Option<u8>,
    /// Cluster to join: its id, the start of it, or its name. With an executor id alone: the one of its session, or
    /// the host's.
    pub cluster: Option<String>,
    /// When its memory is moved out.
    pub swap: SwapPolicy,
    /// Who it is in its cluster; its own id when nothing is said.
    pub executor_id: Option<String>,
    /// The member that did not register, with its attempt, when it is launched instead of one.
    pub replaces: Option<(VmId, u8)>,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// A volume for a VM, in a user's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeWish {
    /// Which: its id, the start of it, or its name.
    pub volume: String,
    /// Refuse the guest's writes; other VMs may read it as well.
    pub read_only: bool,
    /// Where the guest is to mount it.
    pub mount: Option<String>,
    /// What the guest may do with it.
    pub limits: VolumeLimits,
}

/// An idempotency key as a client sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The client's word.
    pub key: String,
    /// Method and path.
    pub route: String,
    /// blake3 of the body.
    pub body_hash: [u8; 32],
}

impl Key {
    /// That it made `object` now; what is answered is not known yet.
    pub(super) fn row(self, object: String, now: Steady) -> KeyRow {
        let Self { key, route, body_hash } = self;
        let expires = now.after(Duration::from_nanos(KEY_LIFETIME_NS));
        KeyRow { key, route, body_hash, object, expires, answer: None }
    }
}

/// What became of a launch request.
#[derive(Debug, Clone)]
pub enum Launched {
    /// A VM was made, or the same request had made it.
    Vm(Arc<VmRecord>),
    /// The same request was answered like this.
    Answered(StoredAnswer),
}

impl<W: World> Agent<W> {
    /// Admits and records a VM, and starts its launch.
    pub(crate) async fn launch_vm(&self, request: LaunchRequest) -> Result<Launched, LaunchError> {
        let asked_at = self.shared.world.clock().monotonic();
        // Before the admission of others waits for it: the first look at a bundle reads all of it.
        let bundle = match &request.bundle {
            Some(word) => Some(self.bundle_to_launch(word, request.lazy).await?),
            None if request.lazy => return Err(LaunchError::LazyWithoutBundle),
            None => None,
        };
        // Held through the record: names, memory and uids are handed out one by one.
        let _admission = self.shared.admission.lock().await;
        if let Some(key) = &request.key
            && let Some(earlier) = self.earlier(key).await?
        {
            return Ok(earlier);
        }
        let disk = self.shared.world.disk();
        let host = disk.host().await.map_err(|source| LaunchError::Host { what: "ask the host", source })?;
        check(NewWork::Vm, &host, &self.shared.config, self.shared.is_draining())?;
        let image = match &bundle {
            Some((id, manifest)) => {
                // It may have been removed since; from here on nobody can, as removals wait for the admission as well.
                if self.shared.fillings.of(id).filter(|_| request.lazy).is_none() {
                    self.shared.world.bundles().find(id.as_str()).await.map_err(LaunchError::Bundle)?;
                }
                image_of(manifest)
            }
            None => disk.image(&request.image).await.map_err(LaunchError::Image)?,
        };
        let additions = disk.command_line_additions().await;
        let vms = self.records();
        let limits = &self.shared.config.limits;
        let bundle = bundle.as_ref().map(|(id, manifest)| (id, &**manifest));
        let facts = Facts { limits, host: &host, image: &image, bundle, additions: &additions, vms: &vms };
        let mut spec = admit(&request, &facts)?;
        for (slot, wish) in spec.volumes.iter_mut().zip(&request.volumes) {
            slot.used = Some(self.shared.volume_for(wish).await.map_err(LaunchError::Volume)?);
        }
        if let Some((_, order)) = &request.build {
            let free = self.shared.bundle_name_is_free(order.name.as_deref()).await;
            free.map_err(LaunchError::BundleToBuild)?;
        }
        for one in &spec.disks {
            let checked = disk.check_disk(one).await;
            checked.map_err(|source| LaunchError::Disk { path: one.path.clone(), source })?;
        }
        let session = match &request.session {
            Some(word) => Some(self.session_to_join(word).await?),
            None if request.addressing.is_some() => return Err(LaunchError::AddressingWithoutSession),
            None if !request.published.is_empty() => return Err(LaunchError::PublishedWithoutSession),
            None => None,
        };
        let place = self.place(&request, session.as_ref().map(|(session, _)| session)).await?;
        let spare = bundle.and_then(|(bundle, _)| self.shared.pools.claim(&request, bundle));
        let admitted = Admitted { request, spec, session, place, asked_at };
        let begun = match &spare {
            Some(spare) => {
                let record = self.take_over(&admitted, &spare.record);
                let held = (Some(spare.record.jail), Some(spare.process.clone()));
                match record {
                    Ok(record) => self.begin_launch(admitted, record, held).await,
                    Err(error) => Err(error),
                }
            }
            None => {
                let record = self.reserve(&admitted.request, admitted.spec.clone()).await?;
                let networks = self.shared.world.networks();
                let jail = networks.take(&self.shared.pools.jails_beside(&vms));
                let begun = self.begin_launch(admitted, record, (jail, None)).await;
                if let (Err(_), Some(jail)) = (&begun, jail) {
                    networks.give_back(jail);
                }
                begun
            }
        };
        match (&begun, spare) {
            (Ok(vm), Some(_)) => self.shared.pools.became_vm(&vm.id),
            (Err(_), Some(spare)) => self.shared.pools.give_back(spare),
            (_, None) => {}
        }
        begun.map(Launched::Vm)
    }

    /// The bundle a word means, if it is trusted and runs here, and is whole unless that may come later.
    async fn bundle_to_launch(&self, word: &str, lazy: bool) -> Result<(BundleId, Arc<Manifest>), LaunchError> {
        let bundles = self.shared.world.bundles();
        let now = self.shared.world.clock().wall();
        if lazy && let Some((id, manifest)) = self.coming_to_launch(word).await.map_err(LaunchError::Bundle)? {
            bundles.touch_fetched(&id, now).await;
            return Ok((id, manifest));
        }
        let view = bundles.find(word).await.map_err(LaunchError::Bundle)?;
        self.shared.require_trust(&view).map_err(LaunchError::Bundle)?;
        let id = view.id;
        let manifest = bundles.check(&id).await.map_err(LaunchError::Bundle)?;
        bundles.touch_fetched(&id, now).await;
        Ok((id, manifest))
    }

    /// The same for one that is on its way; `None`: none of those is meant.
    async fn coming_to_launch(&self, word: &str) -> Result<Option<(BundleId, Arc<Manifest>)>, BundleError> {
        let bundles = self.shared.world.bundles();
        let Some(id) = bundles.find_partial(word).await? else { return Ok(None) };
        let Some(filling) = self.shared.filling(&id).await? else { return Ok(None) };
        self.shared.require_trust(&self.shared.coming_view(&filling)?)?;
        let manifest = Arc::clone(filling.partial.manifest());
        if filling.partial.chunks() > CHUNKS_MAX {
            return Err(BundleError::TooManyChunks { bundle: id, found: filling.partial.chunks(), max: CHUNKS_MAX });
        }
        bundles.fits(&id, &manifest).await?;
        Ok(Some((id, manifest)))
    }

    async fn earlier(&self, key: &Key) -> Result<Option<Launched>, LaunchError> {
        let Some(row) = self.key_row(key).await.map_err(LaunchError::Ledger)? else { return Ok(None) };
        if row.body_hash != key.body_hash {
            return Err(LaunchError::KeyMismatch);
        }
        if let Some(answer) = row.answer {
            return Ok(Some(Launched::Answered(answer)));
        }
        // Recorded but not answered: the client hung up, or an agent ended between.
        Ok(self.find(&row.object).ok().map(|vm| Launched::Vm(vm.record.borrow().clone())))
    }

    pub(crate) async fn key_row(&self, key: &Key) -> Result<Option<KeyRow>, LedgerError> {
        let (word, route, now) = (key.key.clone(), key.route.clone(), self.shared.steady());
        self.shared.world.records().with(move |store| store.key(&word, &route, now)).await
    }

    /// The record of a VM that is made of a machine that was kept ready: what that was lent is the VM's now.
    fn take_over(&self, admitted: &Admitted, spare: &VmRecord) -> Result<VmRecord, LaunchError> {
        let world = &self.shared.world;
        let random = |source| LaunchError::Host { what: "read randomness", source };
        Ok(VmRecord {
            name: admitted.request.name.clone(),
            spec: admitted.spec.clone(),
            generation: Generation(random_array(world).map_err(random)?).to_string(),
            created_at: world.clock().wall(),
            ..spare.clone()
        })
    }

    pub(super) async fn reserve(&self, request: &LaunchRequest, spec: VmSpec) -> Result<VmRecord, LaunchError> {
        let world = &self.shared.world;
        let random = |source| LaunchError::Host { what: "read randomness", source };
        let now = self.shared.steady();
        let (first, count) = (self.shared.config.uids.first(), super::config::UIDS_PER_HOST);
        let uid = world.records().with(move |store| store.free_uid(first, count, now)).await;
        let uid = uid.map_err(LaunchError::Ledger)?.ok_or(LaunchError::NoUid)?;
        Ok(VmRecord {
            schema_version: SCHEMA_VERSION,
            id: VmId::from_random(random_array(world).map_err(random)?),
            name: request.name.clone(),
            state: VmState::Reserved,
            revision: 1,
            spec,
            generation: Generation(random_array(world).map_err(random)?).to_string(),
            uid,
            // Both come with the record's transaction.
            jail: 0,
            network: None,
            registration: None,
            nonce: random_nonce(world).map_err(random)?,
            process: None,
            operation: None,
            wire_version: frame::VERSION,
            quarantine: None,
            swap: None,
            needs: None,
            migration: None,
            came_by: None,
            guest_protocol: None,
            secrets: None,
            created_at: world.clock().wall(),
            timings: Timings::default(),
            remains: None,
        })
    }

    async fn begin_launch(
        &self,
        admitted: Admitted,
        mut record: VmRecord,
        (jail, process): (Option<u16>, Option<<W::Vmm as VmmHost>::Process>),
    ) -> Result<Arc<VmRecord>, LaunchError> {
        let Admitted { request, session, place, asked_at, .. } = admitted;
        record.spec.cluster = place.as_ref().map(|place| place.membership(&record.id));
        let goal = if place.is_some() { Goal::Enlist } else { Goal::Launch };
        let (origin, goal) = match (&record.spec.build, &record.spec.bundle) {
            (Some(_), _) => (Origin::Build, Goal::Build),
            (None, Some(_)) => (if process.is_some() { Origin::Pool } else { Origin::Bundle }, goal),
            (None, None) => (Origin::Image, goal),
        };
        let next = step(&record.state, &Event::LaunchAsked(origin)).map_err(|_| LaunchError::Ending)?;
        let makes = request.build.map(|(_, order)| order);
        let addressing = request.addressing.unwrap_or_default();
        let fabric = self.shared.config.fabric.clone();
        let (now, steady) = (self.shared.world.clock().wall(), self.shared.steady());
        let published = request.published;
        let draft =
            Draft { record, next, goal, makes, fabric, place, addressing, published, now, steady, key: request.key };
        let random = random_array(&self.shared.world);
        let random = random.map_err(|source| LaunchError::Host { what: "read randomness", source })?;
        let id = OperationId::from_random(random);
        let claim = Claim {
            vm: draft.record.id.clone(),
            session: session.as_ref().map(|(session, local_max)| (session.id.clone(), *local_max)),
            jail,
            now: draft.steady,
        };
        let name = draft.record.name.clone();
        let place = draft.place.clone();
        let admit = move |store: &mut Store| store.admit_vm(&claim, |grant| draft.admitted(grant, id));
        let ((record, operation), last) = match self.shared.world.records().with(admit).await {
            Ok(admitted) => admitted,
            Err(LedgerError::Taken { what: Taken::Executor }) => return Err(executor_taken(place)),
            Err(error) => return Err(not_admitted(error, session.as_ref(), name)),
        };
        self.shared.wake_readers(last);
        tracing::info!(vm = %record.id, name = record.name, image = record.spec.image, "launching");
        let handle = start(&self.shared, record, Begin::Launch(Box::new(operation), asked_at), process);
        let record = handle.record.borrow().clone();
        Ok(record)
    }
}

/// The image a bundle's guest was booted from, as far as a launch cares: it need not be there any more.
pub(super) fn image_of(manifest: &Manifest) -> Image {
    let image = &manifest.guest.image;
    Image {
        name: image.name.clone(),
        digest: image.digest.to_string(),
        kernel_bytes: 0,
        initrd_bytes: None,
        command_line: String::new(),
        memory_mib_min: 0,
        container: None,
        created_at: manifest.provenance.built_at,
    }
}

/// A launch that was found possible.
struct Admitted {
    request: LaunchRequest,
    spec: VmSpec,
    session: Option<(SessionRecord, u32)>,
    place: Option<Place>,
    asked_at: Monotonic,
}

/// A VM to be, but for what is handed out one by one. Becomes a VM on the ledger's thread, so it asks nobody anything
/// there.
struct Draft {
    record: VmRecord,
    next: Step,
    goal: Goal,
    makes: Option<BundleOrder>,
    fabric: Option<FabricConfig>,
    place: Option<Place>,
    addressing: Addressing,
    published: Vec<PublishedPort>,
    now: UnixNanos,
    steady: Steady,
    key: Option<Key>,
}

impl Draft {
    /// The VM, its operation, and all that is written of them.
    fn admitted(self, grant: Grant, operation: OperationId) -> ((VmRecord, OperationRecord), Vec<Write>) {
        let Self { mut record, next, goal, makes, fabric, place, addressing, published, now, steady, key } = self;
        record.jail = grant.jail;
        let member = fabric.zip(grant.member);
        record.network =
            member.map(|(fabric, (session, local))| network(&fabric, &session, local, (addressing, published)));
        let mut operation = operation_for(&record, operation, goal, makes.is_some(), &next, now);
        operation.makes = makes;
        record.state = next.state;
        record.operation = Some(operation.id.clone());
        let mut writes = vec![
            Write::Vm(Box::new(record.clone())),
            Write::Lease { uid: record.uid, vm: record.id.clone() },
            Write::Operation(Box::new(operation.clone())),
            vm_event(now, &record),
            operation_event(now, &operation),
        ];
        if let Some(place) = place {
            writes.extend(joined(&record, place, now));
        }
        writes.extend(key.map(|key| Write::Key(key.row(record.id.to_string(), steady))));
        ((record, operation), writes)
    }
}

/// What is written of a VM's place in its cluster.
fn joined(record: &VmRecord, place: Place, now: UnixNanos) -> Vec<Write> {
    let Place { cluster, is_new, replaces, .. } = place;
    let mut writes = Vec::new();
    if is_new {
        writes.push(cluster_event(now, "cluster_created", &cluster));
        writes.push(Write::NewCluster(Box::new(cluster)));
    }
    if let Some((vm, _)) = replaces {
        let body = serde_json::json!({ "replaces": vm });
        writes.push(member_event(now, "member_relaunched", record, body));
        writes.push(Write::Relaunched { vm, successor: Some(record.id.clone()) });
    }
    writes
}

/// A VM's place in its session.
fn network(
    fabric: &FabricConfig,
    session: &SessionRecord,
    local: LocalId,
    (addressing, published): (Addressing, Vec<PublishedPort>),
) -> NetworkRecord {
    let parts = Parts { host: fabric.host, session: session.session_network_id, local };
    // A local id that is too wide was not granted.
    let ipv4 = fabric.fabric.v4(parts).ok().flatten().filter(|_| session.ipv4);
    NetworkRecord {
        session: session.id.clone(),
        session_network_id: session.session_network_id,
        local_id: local,
        home: None,
        ipv6: fabric.fabric.v6(parts),
        ipv4,
        addressing,
        egress: session.egress.clone(),
        published,
    }
}

fn executor_taken(place: Option<Place>) -> LaunchError {
    let cluster = place.as_ref().map(|place| called(&place.cluster)).unwrap_or_default();
    LaunchError::ExecutorTaken { executor_id: place.and_then(|place| place.executor_id).unwrap_or_default(), cluster }
}

fn not_admitted(error: LedgerError, session: Option<&(SessionRecord, u32)>, name: Option<String>) -> LaunchError {
    match (error, session) {
        (LedgerError::Taken { what: Taken::Name }, _) => LaunchError::NameTaken { name: name.unwrap_or_default() },
        (LedgerError::Session(SessionRefusal::NoJail), _) => LaunchError::TooManyVms { max: JAILS_MAX.into() },
        (LedgerError::Session(refusal), Some((session, max))) => join_refused(session, *max, refusal).into(),
        (error, _) => LaunchError::Ledger(error),
    }
}
