//! What may be asked of the agent about volumes, their snapshots and their leases.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::Agent;
use super::admit::is_mount;
use super::door::VmError;
use super::images::is_name;
use super::launch::VolumeWish;
use super::record::VmRecord;
use super::shared::{Shared, VmHandle};
use super::vm_actor::Verb;
use super::volume_change::VolumeChange;
use super::volume_names::pick;
use super::volumes::{AskVolumesError, ROOT, UsePhase, VolumeHost, VolumeUse};
use super::world::{self as vmm, AskError, VmmHost, World, random_array};
use crate::clock::Clock;
use crate::ids::{LeaseId, VolumeId, VolumeSnapshotId};
use crate::lease::{Epoch, Lease, LeaseEntry, LeaseMode, LeaseRefusal, LeaseSecret};
use crate::wire::control::{self, VolumeStatus};
use crate::wire::volumed::{Answer, Ask, Origin, Refusal, Run, SnapshotReport, VolumeReport};

/// What a new volume is to begin with, in a user's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeOrigin {
    /// Nothing.
    Empty,
    /// A raw image: its absolute path on this host.
    File(String),
    /// Another volume, as it is now.
    Volume(String),
    /// A snapshot.
    Snapshot(String),
}

/// A volume to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRequest {
    /// Its name.
    pub name: Option<String>,
    /// Its size in bytes; `None`: that of what it begins with.
    pub bytes: Option<u64>,
    /// What it begins with.
    pub origin: VolumeOrigin,
}

/// A lease to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// What it shall allow.
    pub mode: LeaseMode,
    /// Who wants it, for people.
    pub holder: String,
    /// Its time to live in seconds.
    pub ttl_s: Option<u32>,
    /// End whatever lease is in the way.
    pub break_others: bool,
}

/// The leases of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeasesView {
    /// The volume.
    pub volume: VolumeId,
    /// In force.
    pub leases: Vec<Lease>,
    /// The last epoch somebody was active in.
    pub epoch: Epoch,
    /// What happened of late, the oldest first.
    pub history: Vec<LeaseEntry>,
}

/// What changed of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangesView {
    /// The volume.
    pub volume: VolumeId,
    /// Its present generation.
    pub generation: u32,
    /// Whether nothing else changed.
    pub complete: bool,
    /// The stretches.
    pub runs: Vec<Run>,
}

/// The digest of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestView {
    /// The volume.
    pub volume: VolumeId,
    /// BLAKE3 of its bytes, in hexadecimal digits.
    pub blake3: String,
    /// Their number.
    pub bytes: u64,
}

/// The volumes of a VM.
#[derive(Debug, Clone)]
pub struct VmVolumesView {
    /// The VM.
    pub vm: Arc<VmRecord>,
    /// What its machine says of each slot; none if it has no machine.
    pub slots: Vec<VolumeStatus>,
}

/// Why something asked of a volume was not done.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// None has this id or name.
    #[error("there is no {what} {word:?}")]
    Unknown {
        /// A volume, or a snapshot of one.
        what: &'static str,
        /// What was given.
        word: String,
    },
    /// Several ids start like this.
    #[error("{word:?} is the start of {count} ids; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
        /// How many it could be.
        count: usize,
    },
    /// The name cannot be one.
    #[error("{name:?} is not a name: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// Where a volume is to be mounted.
    #[error("{mount:?} is not an absolute path of a directory")]
    Mount {
        /// The word.
        mount: String,
    },
    /// A guest that runs has a root.
    #[error("a VM that runs has its root already: no volume can become that any more")]
    RootOfRunning,
    /// The VM does not do it.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its VMM does not answer.
    #[error("ask the VMM")]
    Vmm(#[source] AskError),
    /// Randomness for an id.
    #[error("read random bytes for an id")]
    Random(#[source] std::io::Error),
    /// The daemon did not do it.
    #[error(transparent)]
    Ask(#[from] AskVolumesError),
}

/// Volumes, as seen from above.
pub trait VolumeDoor: Send + Sync + 'static {
    /// Makes a volume.
    fn create_volume(&self, request: VolumeRequest) -> BoxFuture<'_, Result<VolumeReport, VolumeError>>;
    /// All of them.
    fn volumes(&self) -> BoxFuture<'_, Result<Vec<VolumeReport>, VolumeError>>;
    /// The one a word means: its id, the start of it, or its name.
    fn volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<VolumeReport, VolumeError>>;
    /// Makes one larger.
    fn resize_volume<'a>(&'a self, word: &'a str, bytes: u64) -> BoxFuture<'a, Result<VolumeReport, VolumeError>>;
    /// Removes one that nobody has a lease of.
    fn remove_volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), VolumeError>>;
    /// Keeps its content as of now.
    fn snapshot_volume<'a>(
        &'a self,
        word: &'a str,
        name: Option<String>,
    ) -> BoxFuture<'a, Result<SnapshotReport, VolumeError>>;
    /// All snapshots.
    fn volume_snapshots(&self) -> BoxFuture<'_, Result<Vec<SnapshotReport>, VolumeError>>;
    /// Removes a snapshot.
    fn remove_volume_snapshot<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), VolumeError>>;
    /// The digest of all its bytes.
    fn digest_volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<DigestView, VolumeError>>;
    /// What changed after a generation.
    fn volume_changes<'a>(&'a self, word: &'a str, since: u32) -> BoxFuture<'a, Result<ChangesView, VolumeError>>;
    /// Its leases.
    fn volume_leases<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<LeasesView, VolumeError>>;
    /// Takes a lease.
    fn acquire_lease<'a>(&'a self, word: &'a str, request: LeaseRequest) -> BoxFuture<'a, Result<Lease, VolumeError>>;
    /// Whether a lease is in force in this epoch; it lives on.
    fn validate_lease<'a>(
        &'a self,
        word: &'a str,
        id: &'a LeaseId,
        epoch: Epoch,
    ) -> BoxFuture<'a, Result<Lease, VolumeError>>;
    /// Makes a standby lease the active one.
    fn convert_lease<'a>(
        &'a self,
        word: &'a str,
        from: &'a LeaseId,
        to: &'a LeaseId,
        epoch: Epoch,
    ) -> BoxFuture<'a, Result<Lease, VolumeError>>;
    /// Ends a lease.
    fn release_lease<'a>(&'a self, word: &'a str, id: &'a LeaseId) -> BoxFuture<'a, Result<(), VolumeError>>;
    /// Gives a volume to a VM.
    fn attach_volume<'a>(&'a self, vm: &'a str, wish: VolumeWish) -> BoxFuture<'a, Result<Arc<VmRecord>, VolumeError>>;
    /// Takes a volume from a VM.
    fn detach_volume<'a>(
        &'a self,
        vm: &'a str,
        volume: &'a str,
        force: bool,
    ) -> BoxFuture<'a, Result<Arc<VmRecord>, VolumeError>>;
    /// The volume slots of a VM, and what passed them.
    fn vm_volumes<'a>(&'a self, vm: &'a str) -> BoxFuture<'a, Result<VmVolumesView, VolumeError>>;
}

fn unexpected() -> VolumeError {
    VolumeError::Ask(AskVolumesError::Unexpected)
}

impl<W: World> Shared<W> {
    pub(super) async fn ask_volumes(&self, ask: Ask) -> Result<Answer, AskVolumesError> {
        self.world.volumes().ask(ask, None).await
    }

    /// All volumes of this host; none without a daemon, as there was never one.
    pub(super) async fn all_volumes(&self) -> Result<Vec<VolumeReport>, VolumeError> {
        if !self.world.volumes().is_used() {
            return Ok(Vec::new());
        }
        if let Answer::Volumes { volumes } = self.ask_volumes(Ask::List).await? {
            Ok(volumes)
        } else {
            Err(unexpected())
        }
    }

    /// The volume of this host that a word means.
    pub(super) async fn find_volume(&self, word: &str) -> Result<VolumeReport, VolumeError> {
        let all = self.all_volumes().await?;
        pick("volume", word, all, (VolumeId::PREFIX, |one| (one.id.to_string(), one.name.clone())))
    }

    async fn all_volume_snapshots(&self) -> Result<Vec<SnapshotReport>, VolumeError> {
        if !self.world.volumes().is_used() {
            return Ok(Vec::new());
        }
        if let Answer::Snapshots { snapshots } = self.ask_volumes(Ask::Snapshots).await? {
            Ok(snapshots)
        } else {
            Err(unexpected())
        }
    }

    async fn find_volume_snapshot(&self, word: &str) -> Result<SnapshotReport, VolumeError> {
        let all = self.all_volume_snapshots().await?;
        let names = |one: &SnapshotReport| (one.id.to_string(), one.name.clone());
        pick("snapshot", word, all, (VolumeSnapshotId::PREFIX, names))
    }

    fn now_ms(&self) -> u64 {
        self.world.clock().wall().0 / 1_000_000
    }

    async fn make_volume(&self, request: VolumeRequest) -> Result<VolumeReport, VolumeError> {
        named(request.name.as_deref())?;
        let origin = match request.origin {
            VolumeOrigin::Empty => Origin::Empty,
            VolumeOrigin::File(path) => Origin::File { path: path.into() },
            VolumeOrigin::Volume(word) => Origin::Volume { id: self.find_volume(&word).await?.id },
            VolumeOrigin::Snapshot(word) => Origin::Snapshot { id: self.find_volume_snapshot(&word).await?.id },
        };
        let id = VolumeId::from_random(random_array(&self.world).map_err(VolumeError::Random)?);
        let (name, bytes, now_ms) = (request.name, request.bytes, self.now_ms());
        let volume = volume_of(self.ask_volumes(Ask::Create { id, name, bytes, origin, now_ms }).await?)?;
        self.volumes_used.notify_one();
        self.volume_event("volume_created", &volume.id).await;
        Ok(volume)
    }

    /// A volume of this host for a VM, with a lease that is only named yet.
    pub(super) async fn volume_for(&self, wish: &VolumeWish) -> Result<VolumeUse, VolumeError> {
        let VolumeReport { id, bytes, damage, active, .. } = self.find_volume(&wish.volume).await?;
        if let Some(damage) = damage.filter(|_| !wish.read_only) {
            return Err(AskVolumesError::Refused(Refusal::Damaged { text: format!("volume {id}: {damage}") }).into());
        }
        if let Some(Lease { id, holder, epoch, .. }) = active {
            let lease = LeaseRefusal::Held { id, holder, epoch };
            return Err(AskVolumesError::Refused(Refusal::Lease { lease }).into());
        }
        let random = |error| VolumeError::Random(error);
        Ok(VolumeUse {
            volume: id,
            home: self.config.fabric.as_ref().map(|fabric| fabric.host.into()),
            bytes,
            read_only: wish.read_only,
            lease: LeaseId::from_random(random_array(&self.world).map_err(random)?),
            epoch: 0,
            secret: LeaseSecret::from_random(random_array(&self.world).map_err(random)?),
            mount: wish.mount.clone(),
            limits: wish.limits,
            standby: None,
            phase: UsePhase::Attached,
        })
    }

    async fn volume_event(&self, kind: &'static str, volume: &VolumeId) {
        self.bundle_event(kind, serde_json::json!({ "volume_id": volume })).await;
    }

    async fn take_lease(&self, word: &str, request: LeaseRequest) -> Result<Lease, VolumeError> {
        let volume = self.find_volume(word).await?.id;
        let LeaseRequest { mode, holder, ttl_s, break_others } = request;
        let id = LeaseId::from_random(random_array(&self.world).map_err(VolumeError::Random)?);
        let secret = LeaseSecret::from_random(random_array(&self.world).map_err(VolumeError::Random)?);
        lease_of(
            self.ask_volumes(Ask::Acquire {
                volume,
                id,
                mode,
                holder,
                vm: None,
                host: None,
                ttl_s,
                secret,
                break_others,
            })
            .await?,
        )
    }
}

fn named(name: Option<&str>) -> Result<(), VolumeError> {
    match name {
        Some(name) if !is_name(name) => Err(VolumeError::Name { name: name.to_owned() }),
        Some(_) | None => Ok(()),
    }
}

fn volume_of(answer: Answer) -> Result<VolumeReport, VolumeError> {
    if let Answer::Volume { volume } = answer { Ok(*volume) } else { Err(unexpected()) }
}

fn lease_of(answer: Answer) -> Result<Lease, VolumeError> {
    if let Answer::Lease { lease } = answer { Ok(lease) } else { Err(unexpected()) }
}

impl<W: World> VolumeDoor for Agent<W> {
    fn create_volume(&self, request: VolumeRequest) -> BoxFuture<'_, Result<VolumeReport, VolumeError>> {
        self.shared.make_volume(request).boxed()
    }

    fn volumes(&self) -> BoxFuture<'_, Result<Vec<VolumeReport>, VolumeError>> {
        self.shared.all_volumes().boxed()
    }

    fn volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<VolumeReport, VolumeError>> {
        self.shared.find_volume(word).boxed()
    }

    fn resize_volume<'a>(&'a self, word: &'a str, bytes: u64) -> BoxFuture<'a, Result<VolumeReport, VolumeError>> {
        async move {
            let id = self.shared.find_volume(word).await?.id;
            let volume = volume_of(self.shared.ask_volumes(Ask::Resize { id, bytes }).await?)?;
            self.tell_larger(&volume).await;
            Ok(volume)
        }
        .boxed()
    }

    fn remove_volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), VolumeError>> {
        async move {
            let id = self.shared.find_volume(word).await?.id;
            self.shared.ask_volumes(Ask::Remove { id: id.clone() }).await?;
            self.shared.volume_event("volume_removed", &id).await;
            Ok(())
        }
        .boxed()
    }

    fn snapshot_volume<'a>(
        &'a self,
        word: &'a str,
        name: Option<String>,
    ) -> BoxFuture<'a, Result<SnapshotReport, VolumeError>> {
        async move {
            named(name.as_deref())?;
            let volume = self.shared.find_volume(word).await?.id;
            let random = random_array(&self.shared.world).map_err(VolumeError::Random)?;
            let (id, now_ms) = (VolumeSnapshotId::from_random(random), self.shared.now_ms());
            if let Answer::Snapshot { snapshot } =
                self.shared.ask_volumes(Ask::Snapshot { volume, id, name, now_ms }).await?
            {
                Ok(snapshot)
            } else {
                Err(unexpected())
            }
        }
        .boxed()
    }

    fn volume_snapshots(&self) -> BoxFuture<'_, Result<Vec<SnapshotReport>, VolumeError>> {
        self.shared.all_volume_snapshots().boxed()
    }

    fn remove_volume_snapshot<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), VolumeError>> {
        async move {
            let id = self.shared.find_volume_snapshot(word).await?.id;
            self.shared.ask_volumes(Ask::RemoveSnapshot { id }).await?;
            Ok(())
        }
        .boxed()
    }

    fn digest_volume<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<DigestView, VolumeError>> {
        async move {
            let volume = self.shared.find_volume(word).await?.id;
            if let Answer::Digest { blake3, bytes } =
                self.shared.ask_volumes(Ask::Digest { id: volume.clone() }).await?
            {
                Ok(DigestView { volume, blake3, bytes })
            } else {
                Err(unexpected())
            }
        }
        .boxed()
    }

    fn volume_changes<'a>(&'a self, word: &'a str, since: u32) -> BoxFuture<'a, Result<ChangesView, VolumeError>> {
        async move {
            let volume = self.shared.find_volume(word).await?.id;
            let answer = self.shared.ask_volumes(Ask::Changes { id: volume.clone(), since }).await?;
            let Answer::Changes { generation, complete, runs } = answer else { return Err(unexpected()) };
            Ok(ChangesView { volume, generation, complete, runs })
        }
        .boxed()
    }

    fn volume_leases<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<LeasesView, VolumeError>> {
        async move {
            let volume = self.shared.find_volume(word).await?.id;
            if let Answer::Leases { leases, epoch, history } =
                self.shared.ask_volumes(Ask::Leases { volume: volume.clone() }).await?
            {
                Ok(LeasesView { volume, leases, epoch, history })
            } else {
                Err(unexpected())
            }
        }
        .boxed()
    }

    fn acquire_lease<'a>(&'a self, word: &'a str, request: LeaseRequest) -> BoxFuture<'a, Result<Lease, VolumeError>> {
        self.shared.take_lease(word, request).boxed()
    }

    fn validate_lease<'a>(
        &'a self,
        word: &'a str,
        id: &'a LeaseId,
        epoch: Epoch,
    ) -> BoxFuture<'a, Result<Lease, VolumeError>> {
        async move {
            let (volume, id) = (self.shared.find_volume(word).await?.id, id.clone());
            lease_of(self.shared.ask_volumes(Ask::Validate { volume, id, epoch }).await?)
        }
        .boxed()
    }

    fn convert_lease<'a>(
        &'a self,
        word: &'a str,
        from: &'a LeaseId,
        to: &'a LeaseId,
        epoch: Epoch,
    ) -> BoxFuture<'a, Result<Lease, VolumeError>> {
        async move {
            let (volume, from, to) = (self.shared.find_volume(word).await?.id, from.clone(), to.clone());
            lease_of(self.shared.ask_volumes(Ask::Convert { volume, from, to, epoch }).await?)
        }
        .boxed()
    }

    fn release_lease<'a>(&'a self, word: &'a str, id: &'a LeaseId) -> BoxFuture<'a, Result<(), VolumeError>> {
        async move {
            let (volume, id) = (self.shared.find_volume(word).await?.id, id.clone());
            self.shared.ask_volumes(Ask::Release { volume, id, only: None }).await?;
            Ok(())
        }
        .boxed()
    }

    fn attach_volume<'a>(&'a self, vm: &'a str, wish: VolumeWish) -> BoxFuture<'a, Result<Arc<VmRecord>, VolumeError>> {
        self.attach(vm, wish).boxed()
    }

    fn detach_volume<'a>(
        &'a self,
        vm: &'a str,
        volume: &'a str,
        force: bool,
    ) -> BoxFuture<'a, Result<Arc<VmRecord>, VolumeError>> {
        self.detach(vm, volume, force).boxed()
    }

    fn vm_volumes<'a>(&'a self, vm: &'a str) -> BoxFuture<'a, Result<VmVolumesView, VolumeError>> {
        self.slots(vm).boxed()
    }
}

impl<W: World> Agent<W> {
    async fn attach(&self, vm: &str, wish: VolumeWish) -> Result<Arc<VmRecord>, VolumeError> {
        match wish.mount.as_deref() {
            Some(ROOT) => return Err(VolumeError::RootOfRunning),
            Some(mount) if !is_mount(mount) => return Err(VolumeError::Mount { mount: mount.to_owned() }),
            Some(_) | None => {}
        }
        let handle = self.find(vm).map_err(VmError::from)?;
        let change = VolumeChange::Attach(self.shared.volume_for(&wish).await?);
        Ok(self.ask_actor(&handle, Verb::ChangeVolumes(Box::new(change))).await?)
    }

    async fn detach(&self, vm: &str, word: &str, force: bool) -> Result<Arc<VmRecord>, VolumeError> {
        let handle = self.find(vm).map_err(VmError::from)?;
        let uses: Vec<_> = handle.record.borrow().spec.volume_uses().map(|(_, used)| used.volume.clone()).collect();
        // A volume of another host is known here by its id alone.
        let of_vm = pick("volume", word, uses, (VolumeId::PREFIX, |id: &VolumeId| (id.to_string(), None)));
        let volume = match of_vm {
            Ok(volume) => volume,
            Err(_) => self.shared.find_volume(word).await?.id,
        };
        let change = Verb::ChangeVolumes(Box::new(VolumeChange::Detach { volume, force }));
        Ok(self.ask_actor(&handle, change).await?)
    }

    async fn slots(&self, vm: &str) -> Result<VmVolumesView, VolumeError> {
        let vm = self.find(vm).map_err(VmError::from)?.record.borrow().clone();
        if vm.spec.volumes.is_empty() || vm.process.is_none() {
            return Ok(VmVolumesView { vm, slots: Vec::new() });
        }
        match self.shared.world.vmm().ask(&vm, self.shared.epoch, vmm::Ask::Volumes).await {
            Ok(control::Answer::Volumes(slots)) => Ok(VmVolumesView { vm, slots }),
            Ok(_) => Err(VolumeError::Vmm(AskError::Unexpected)),
            Err(error) => Err(VolumeError::Vmm(error)),
        }
    }

    /// Tells the VM that has a volume, if one here does, that it is larger.
    async fn tell_larger(&self, volume: &VolumeReport) {
        let vms: Vec<_> = self.shared.vms().values().cloned().collect();
        let has = |vm: &&VmHandle| vm.record.borrow().spec.volume_uses().any(|(_, used)| used.volume == volume.id);
        for vm in vms.iter().filter(has) {
            let change = VolumeChange::Resized { volume: volume.id.clone(), bytes: volume.bytes };
            if let Err(error) = self.ask_actor(vm, Verb::ChangeVolumes(Box::new(change))).await {
                tracing::warn!(vm = %vm.id, volume = %volume.id, error = %crate::report::chain(&error), "it does not know that its volume is larger");
            }
        }
    }
}
