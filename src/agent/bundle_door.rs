//! What may be asked of the agent about bundles: make them, look at them, remove them.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::Agent;
use super::bundles::{BundleError, BundleListed, BundleView};
use super::door::{Door, VmError};
use super::fetched::FetchedBundles;
use super::launch::{Key, LaunchRequest, Launched};
use super::launch_error::LaunchError;
use super::ledger::{LedgerError, Store};
use super::record::{BuildSpec, BundleOrder, OperationRecord, VmRecord};
use super::room::NewWork;
use super::vm_actor::Verb;
use super::vm_state::Goal;
use super::world::{Records, VmBundles, World, random_array};
use crate::bundle::Verified;
use crate::clock::Clock;
use crate::ids::{BundleId, VmId};

/// A bundle to build of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildRequest {
    /// Its label.
    pub name: Option<String>,
    /// Image to boot.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: Option<u32>,
    /// Guest memory in MiB.
    pub memory_mib: Option<u64>,
    /// How many network interfaces its VMs have.
    pub interfaces: Option<u8>,
    /// How many of its VMs' disks are empty until they get a volume.
    pub spare_disks: u8,
    /// Also if the guest says that it holds secrets.
    pub with_secrets: bool,
    /// How it is warmed up.
    pub build: BuildSpec,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// A bundle to take of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotRequest {
    /// Its label.
    pub name: Option<String>,
    /// Only what differs from the bundle the VM was launched from.
    pub diff: bool,
    /// Most of memory while the guest runs.
    pub live: bool,
    /// Also if the guest says that it holds secrets.
    pub with_secrets: bool,
}

/// What became of a request for a bundle.
#[derive(Debug, Clone)]
pub enum BundleWork {
    /// This operation makes it.
    Operation(Box<OperationRecord>),
    /// The same request was answered like this.
    Answered(super::ledger::StoredAnswer),
}

/// Bundles, as seen from above.
pub trait BundleDoor: Send + Sync + 'static {
    /// All bundles, by id.
    fn bundles(&self) -> BoxFuture<'_, Result<Vec<BundleListed>, BundleError>>;
    /// The bundle a word means: its id, the start of it, or its name.
    fn bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<BundleView, BundleError>>;
    /// The VMs that run from a bundle.
    fn users(&self, bundle: &BundleId) -> usize;
    /// Boots a VM of an image that becomes a bundle.
    fn build_bundle(&self, request: BuildRequest) -> BoxFuture<'_, Result<BundleWork, LaunchError>>;
    /// Makes a bundle of a VM, which goes on as before. Gives the operation when it is done.
    fn snapshot<'a>(
        &'a self,
        word: &'a str,
        request: SnapshotRequest,
    ) -> BoxFuture<'a, Result<OperationRecord, VmError>>;
    /// Reads all of a bundle and compares it with its digests.
    fn verify_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(BundleView, Verified), BundleError>>;
    /// Removes a bundle that no VM and no other bundle needs.
    fn remove_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), BundleError>>;
    /// A bundle with the content of one that builds on others, which builds on none.
    fn compact_bundle<'a>(
        &'a self,
        word: &'a str,
        name: Option<String>,
    ) -> BoxFuture<'a, Result<BundleView, BundleError>>;
}

impl<W: World> Agent<W> {
    async fn operation_of(&self, vm: &VmRecord) -> Result<Option<OperationRecord>, LedgerError> {
        match &vm.operation {
            Some(id) => self.operation(id.as_str()).await,
            None => Ok(None),
        }
    }

    /// The operation that an earlier request with this key began and nobody was told of: the VM may be gone since.
    async fn built_before(&self, key: Option<&Key>) -> Result<Option<OperationRecord>, LedgerError> {
        let Some(key) = key else { return Ok(None) };
        let row = self.key_row(key).await?;
        match row.filter(|row| row.body_hash == key.body_hash && row.answer.is_none()) {
            Some(row) => self.build_of(&row.object).await,
            None => Ok(None),
        }
    }

    /// The operation that makes, or made, a bundle of a VM that was booted for that.
    async fn build_of(&self, vm: &str) -> Result<Option<OperationRecord>, LedgerError> {
        let operations = self.shared.world.records().with(|store: &mut Store| store.operations()).await?;
        let is_build = |operation: &OperationRecord| operation.goal == Goal::Build && operation.vm.as_str() == vm;
        Ok(operations.into_iter().find(is_build))
    }

    async fn build(&self, request: BuildRequest) -> Result<BundleWork, LaunchError> {
        if let Some(operation) = self.built_before(request.key.as_ref()).await.map_err(LaunchError::Ledger)? {
            return Ok(BundleWork::Operation(Box::new(operation)));
        }
        let BuildRequest { name, image, vcpus, memory_mib, interfaces, spare_disks, with_secrets, build, key } =
            request;
        let order = BundleOrder { name, with_secrets, ..BundleOrder::default() };
        let launch = LaunchRequest {
            image,
            vcpus,
            memory_mib,
            interfaces,
            spare_disks,
            build: Some((build, order)),
            key,
            role: Some("bundle-build".to_owned()),
            ..LaunchRequest::default()
        };
        match self.launch_vm(launch).await? {
            Launched::Answered(answer) => Ok(BundleWork::Answered(answer)),
            Launched::Vm(vm) => {
                let operation = self.build_of(vm.id.as_str()).await.map_err(LaunchError::Ledger)?;
                Ok(BundleWork::Operation(Box::new(operation.ok_or(LaunchError::Ending)?)))
            }
        }
    }

    async fn take_snapshot(&self, word: &str, request: SnapshotRequest) -> Result<OperationRecord, VmError> {
        let handle = self.find(word)?;
        self.room(NewWork::Files).await.map_err(BundleError::NoRoom)?;
        self.shared.bundle_name_is_free(request.name.as_deref()).await?;
        let parent = if request.diff {
            let parent = handle.record.borrow().spec.bundle.clone();
            Some(parent.ok_or_else(|| VmError::NoParent { vm: handle.id.to_string() })?)
        } else {
            None
        };
        let SnapshotRequest { name, live, with_secrets, .. } = request;
        let order = BundleOrder { name, parent, live, with_secrets, ..BundleOrder::default() };
        let vm = self.ask_actor(&handle, Verb::Snapshot(Box::new(order))).await?;
        let operation = self.operation_of(&vm).await.map_err(VmError::Ledger)?;
        operation.ok_or_else(|| VmError::NoParent { vm: handle.id.to_string() })
    }

    async fn remove_unused_bundle(&self, word: &str) -> Result<(), BundleError> {
        // No launch is admitted meanwhile that would use it.
        let _admission = self.shared.admission.lock().await;
        let bundles = self.shared.world.bundles();
        let coming = bundles.find_partial(word).await?;
        let bundle = match &coming {
            Some(bundle) => bundle.clone(),
            None => bundles.find(word).await?.id,
        };
        let vms = self.users(&bundle);
        if vms > 0 {
            return Err(BundleError::InUse { bundle, vms });
        }
        if let Some(size) = self.shared.pools.size(&bundle) {
            return Err(BundleError::Pooled { bundle, size });
        }
        if coming.is_some() { self.shared.stop_filling(&bundle).await } else { bundles.remove(&bundle).await }
    }
}

impl<W: World> BundleDoor for Agent<W> {
    fn bundles(&self) -> BoxFuture<'_, Result<Vec<BundleListed>, BundleError>> {
        self.shared.world.bundles().list().boxed()
    }

    fn bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<BundleView, BundleError>> {
        self.shared.world.bundles().find(word).boxed()
    }

    fn users(&self, bundle: &BundleId) -> usize {
        let uses = |vm: &&Arc<VmRecord>| vm.state.holds_resources() && vm.spec.bundle.as_ref() == Some(bundle);
        self.records().iter().filter(uses).count()
    }

    fn build_bundle(&self, request: BuildRequest) -> BoxFuture<'_, Result<BundleWork, LaunchError>> {
        // On a task of its own, as a launch.
        let agent = self.clone();
        async move {
            let building = tokio::spawn(async move { agent.build(request).await });
            building.await.unwrap_or(Err(LaunchError::Ending))
        }
        .boxed()
    }

    fn snapshot<'a>(
        &'a self,
        word: &'a str,
        request: SnapshotRequest,
    ) -> BoxFuture<'a, Result<OperationRecord, VmError>> {
        self.take_snapshot(word, request).boxed()
    }

    fn verify_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(BundleView, Verified), BundleError>> {
        async move {
            let view = self.shared.world.bundles().find(word).await?;
            let verified = self.shared.world.bundles().verify(&view.id).await?;
            Ok((view, verified))
        }
        .boxed()
    }

    fn remove_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), BundleError>> {
        self.remove_unused_bundle(word).boxed()
    }

    fn compact_bundle<'a>(
        &'a self,
        word: &'a str,
        name: Option<String>,
    ) -> BoxFuture<'a, Result<BundleView, BundleError>> {
        async move {
            let bundle = self.shared.world.bundles().find(word).await?.id;
            self.room(NewWork::Files).await?;
            self.shared.bundle_name_is_free(name.as_deref()).await?;
            let _held = self.shared.hold_bundle_name(name.as_deref(), |_| false).await?;
            let random = random_array(&self.shared.world);
            let random = random.map_err(|source| BundleError::Host { what: "read randomness", source })?;
            let token = format!("compact-{}", VmId::from_random(random));
            let now = self.shared.world.clock().wall();
            self.shared.world.bundles().compact(&bundle, name, token, now).await
        }
        .boxed()
    }
}
