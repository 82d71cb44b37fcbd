//! The bundles of this host: the store on its disk, and what the host adds to a manifest.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::spawn_blocking;

use super::bundles::{BundleError, BundleListed, BundleView, CommitOrder};
use super::command_line::command_line;
use super::host_disk::VmDirs;
use super::host_open::interface_mac;
use super::host_probe::{HostProbe, build_host, processor};
use super::host_vmm::names;
use super::images::ImageStore;
use super::record::VmRecord;
use super::transfer::{Imported, Piece, PieceWriter, Pieces};
use super::world::VmBundles;
use crate::bundle::admit::{GuestNeeds, HostFacts, admit, admit_guest};
use crate::bundle::manifest::{
    Backing, DeviceKind, DeviceSlot, FrozenIdentity, GuestSystem, MachineShape, Provenance, Recipe, SourceImage,
};
use crate::bundle::working_set::{WorkingSet, WorkingSetError};
use crate::bundle::{
    BundlePart, BundleSignature, Committed, Compaction, Contents, Digest, FindError, Listed, Manifest, ManifestDraft,
    ReadDirectoryError, Run, Signed, Store, Verified, part_path, read_from_directory,
};
use crate::clock::UnixNanos;
use crate::ids::{BundleId, VmId};
use crate::units::{MIB, PAGE_BYTES};
use crate::wire::control::PAGE_RUN_BYTES;

/// Slots of the guest-physical map, which is part of the format: vsock, rng, then disks, then interfaces.
const VSOCK_SLOT: u8 = 0;
const RNG_SLOT: u8 = 1;
const BALLOON_SLOT: u8 = 2;
const FIRST_BLOCK_SLOT: u8 = 3;
const FIRST_NET_SLOT: u8 = 9;

/// The bundles of this host.
#[derive(Debug, Clone)]
pub struct HostBundles {
    root: PathBuf,
    store: Store,
    dirs: VmDirs,
    images: ImageStore,
    host_name: Option<String>,
    mtu: u16,
    probe: HostProbe,
    /// One for each bundle that may be on its way at once.
    transfers: Arc<Semaphore>,
}

/// Most bundles that are exported or imported at once: each keeps a disk busy, and holds up to 50 MiB.
const TRANSFERS_MAX: usize = 4;

impl HostBundles {
    /// The bundles below `root`.
    pub(super) fn open(
        root: PathBuf,
        dirs: VmDirs,
        images: ImageStore,
        (host_name, mtu): (Option<String>, u16),
        probe: HostProbe,
    ) -> Result<Self, BundleError> {
        let store = Store::open(&root)?;
        let transfers = Arc::new(Semaphore::new(TRANSFERS_MAX));
        Ok(Self { root, store, dirs, images, host_name, mtu, probe, transfers })
    }

    /// The store, for who hands its files to a VMM.
    pub(super) const fn store(&self) -> &Store {
        &self.store
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Self) -> Result<T, BundleError> + Send + 'static,
    ) -> Result<T, BundleError> {
        let this = self.clone();
        let done = spawn_blocking(move || job(&this)).await;
        done.unwrap_or_else(|_| {
            let source = io::Error::other("the agent is ending");
            Err(BundleError::Host { what: "wait for the disk", source })
        })
    }

    fn transfer(&self) -> Result<OwnedSemaphorePermit, BundleError> {
        let permit = Arc::clone(&self.transfers).try_acquire_owned();
        permit.map_err(|_| BundleError::TooManyTransfers { most: TRANSFERS_MAX })
    }

    pub(super) async fn facts(&self) -> Result<HostFacts, BundleError> {
        self.probe.facts().await.ok_or(BundleError::NoFacts)
    }

    fn view(&self, id: BundleId, manifest: Arc<Manifest>) -> BundleView {
        let directory = self.root.join(id.as_str());
        let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
        // 512: what the system counts blocks in, whatever the file system's are.
        let disk_bytes = files.filter_map(|file| Some(file.metadata().ok()?.blocks() * 512)).sum();
        let signed = self.store.signed(&id).unwrap_or_else(|error| {
            tracing::warn!(bundle = %id, error = %crate::report::chain(&error), "no signature of it counts");
            // Nobody signed this.
            Signed { manifest_digest: Digest::default(), made_here: false, signatures: Vec::new() }
        });
        BundleView { fetched: self.fetched_note(&id), id, manifest, disk_bytes, signed, fetch: None }
    }

    /// The bundle that was already made of what this order saved: the agent ended between the commit and its record.
    fn made_before(&self, order: &CommitOrder) -> Result<Option<BundleView>, BundleError> {
        let listed = self.store.list()?.into_iter();
        let mut found = listed.filter_map(|Listed { id, manifest }| Some((id, manifest.ok()?)));
        Ok(found.find(|(_, manifest)| order.made(manifest)).map(|(id, manifest)| self.view(id, manifest)))
    }

    fn commit_blocking(&self, order: &CommitOrder, facts: &HostFacts) -> Result<BundleView, BundleError> {
        let staging = self.store.reopen(order.vm.id.as_str()).map_err(|error| nothing(order, &error))?;
        let Some(staging) = staging else {
            let made = self.made_before(order)?;
            return made.ok_or_else(|| BundleError::NothingSaved { vm: order.vm.id.clone() });
        };
        let contents = match &order.order.parent {
            None => Contents::Full,
            Some(parent) => Contents::Diff { parent: parent.clone(), pages: self.pages(&order.vm.id)? },
        };
        let committed = staging.commit(self.draft(order, facts), contents, &mut |_| {})?;
        Ok(self.view(committed.id, committed.manifest))
    }

    /// The pages that a VMM says it saved. Whether they can be is the store's to check.
    fn pages(&self, vm: &VmId) -> Result<Vec<Run>, BundleError> {
        let failed = |source| BundleError::Host { what: "read the list of saved pages", source };
        let directory = self.dirs.open(vm).map_err(failed)?;
        let path = format!("/proc/self/fd/{}/{}", std::os::fd::AsRawFd::as_raw_fd(&directory), names::PAGES);
        // A run for every other page is the worst there can be.
        let longest = (1_u64 << 40) / PAGE_BYTES / 2 * PAGE_RUN_BYTES as u64;
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(longest).read_to_end(&mut bytes)).map_err(failed)?;
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let runs = bytes.chunks_exact(PAGE_RUN_BYTES);
        Ok(runs.map(|run| Run { first: number(&run[..8]), count: number(&run[8..]) }).collect())
    }

    fn draft(&self, order: &CommitOrder, facts: &HostFacts) -> ManifestDraft {
        let CommitOrder { vm, operation, order: bundle, agent_protocol } = order;
        let build = vm.spec.build.as_ref();
        ManifestDraft {
            hearth_version: env!("CARGO_PKG_VERSION").to_owned(),
            arch: facts.arch,
            name: bundle.name.clone(),
            host: build_host(facts),
            cpu: processor().clone(),
            machine: MachineShape {
                layout_version: facts.layout_version,
                vcpus: vm.spec.vcpus.into(),
                memory_bytes: u64::from(vm.spec.memory_mib).saturating_mul(MIB),
                page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX),
                backing: Backing::PrivateFile,
                devices: self.devices(vm),
            },
            identity: FrozenIdentity {
                hostname: vm.hostname().to_owned(),
                macs: (0..vm.spec.interfaces).map(|index| mac_text(interface_mac(&vm.id, index))).collect(),
                addresses: vm.addresses().iter().map(ToString::to_string).collect(),
            },
            guest: self.guest(vm, *agent_protocol),
            provenance: Provenance {
                built_at: operation.created_at,
                host_name: self.host_name.clone().unwrap_or_default(),
                recipe: if build.is_some() { Recipe::Image } else { Recipe::Snapshot },
                warmup: build.and_then(|build| build.warmup.clone()).into_iter().collect(),
                ready_marker: build.and_then(|build| build.ready_marker.clone()),
                source_vm: Some(vm.id.clone()),
                compacted_from: None,
            },
            runtime: None,
        }
    }

    fn devices(&self, vm: &VmRecord) -> Vec<DeviceSlot> {
        let plain = |slot, kind| DeviceSlot { slot, kind, read_only: None, mac: None, mtu: None };
        let disks = (FIRST_BLOCK_SLOT..).zip(&vm.spec.disks);
        let disks =
            disks.map(|(slot, disk)| DeviceSlot { read_only: Some(disk.read_only), ..plain(slot, DeviceKind::Block) });
        let slots = vm.spec.volumes.iter().enumerate().map(|(index, slot)| DeviceSlot {
            read_only: Some(slot.told_read_only),
            ..plain(FIRST_BLOCK_SLOT + vm.spec.volume_index(index), DeviceKind::Volume)
        });
        let nets = (FIRST_NET_SLOT..).zip(0..vm.spec.interfaces).map(|(slot, index)| DeviceSlot {
            mac: Some(mac_text(interface_mac(&vm.id, index))),
            mtu: Some(self.mtu),
            ..plain(slot, DeviceKind::Net)
        });
        let always = [plain(VSOCK_SLOT, DeviceKind::Vsock), plain(RNG_SLOT, DeviceKind::Rng)];
        let balloon = vm.spec.balloon.then(|| plain(BALLOON_SLOT, DeviceKind::Balloon));
        always.into_iter().chain(balloon).chain(disks).chain(slots).chain(nets).collect()
    }

    /// What runs in it: as its bundle says, or as its image is now.
    fn guest(&self, vm: &VmRecord, agent_protocol: u16) -> GuestSystem {
        let original = vm.spec.bundle.as_ref().and_then(|bundle| self.store.manifest(bundle).ok());
        if let Some(original) = original {
            return GuestSystem { agent_protocol, ..original.guest.clone() };
        }
        let image = self.images.image(&vm.spec.image).ok();
        let digest = image.as_ref().and_then(|image| serde_json::from_value(image.digest.clone().into()).ok());
        GuestSystem {
            command_line: command_line("", image.as_ref().map_or("", |image| &image.command_line), false),
            image: SourceImage {
                name: vm.spec.image.clone(),
                digest: digest.unwrap_or_else(|| Digest::of(&[])),
                kernel: None,
                initrd: None,
            },
            agent_protocol,
        }
    }
}

fn nothing(order: &CommitOrder, error: &crate::bundle::StageError) -> BundleError {
    tracing::warn!(vm = %order.vm.id, error = %crate::report::chain(error), "what was saved cannot be opened");
    BundleError::NothingSaved { vm: order.vm.id.clone() }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl VmBundles for HostBundles {
    async fn list(&self) -> Result<Vec<BundleListed>, BundleError> {
        self.blocking(|this| {
            let listed = this.store.list()?.into_iter();
            let one = |Listed { id, manifest }| match manifest {
                Ok(manifest) => BundleListed::Readable(this.view(id, manifest)),
                Err(error) => BundleListed::Unreadable { id, reason: crate::report::chain(&error) },
            };
            Ok(listed.map(one).collect())
        })
        .await
    }

    async fn find(&self, word: &str) -> Result<BundleView, BundleError> {
        let word = word.to_owned();
        self.blocking(move |this| {
            let id = match this.store.find(&word) {
                Ok(id) => id,
                Err(error @ FindError::Unknown { .. }) => match this.store.find_partial(&word)? {
                    Some(bundle) => return Err(BundleError::Coming { bundle }),
                    None => return Err(error.into()),
                },
                Err(error) => return Err(error.into()),
            };
            let manifest = this.store.manifest(&id)?;
            Ok(this.view(id, manifest))
        })
        .await
    }

    async fn check(&self, bundle: &BundleId) -> Result<Arc<Manifest>, BundleError> {
        let (bundle, facts) = (bundle.clone(), self.facts().await?);
        self.blocking(move |this| {
            let manifest = this.store.manifest(&bundle)?;
            admit(&manifest, &facts).map_err(|source| BundleError::Incompatible { bundle: bundle.clone(), source })?;
            // Verified now, before anything of a VM is there; kept in mind, so that the launch only looks whether the
            // files are the same.
            this.store.open_for_launch(&bundle)?;
            Ok(manifest)
        })
        .await
    }

    async fn needs(&self) -> Result<GuestNeeds, BundleError> {
        Ok(GuestNeeds::of(&self.facts().await?))
    }

    async fn admit_guest(&self, needs: &GuestNeeds, agent_protocol: Option<u16>) -> Result<(), BundleError> {
        Ok(admit_guest(needs, agent_protocol, &self.facts().await?)?)
    }

    async fn working_set(&self, bundle: &BundleId, bytes_max: u64) -> Result<Option<WorkingSet>, WorkingSetError> {
        let (store, id) = (self.store.clone(), bundle.clone());
        let read = spawn_blocking(move || {
            let set = store.working_set(&id)?.map(|set| set.capped(bytes_max));
            if let Some(set) = &set {
                store.read_ahead(&id, set);
            }
            Ok(set)
        });
        read.await.unwrap_or(Ok(None))
    }

    async fn keep_working_set(&self, bundle: &BundleId, set: WorkingSet) -> Result<(), WorkingSetError> {
        let (store, id) = (self.store.clone(), bundle.clone());
        spawn_blocking(move || store.keep_working_set(&id, &set)).await.unwrap_or(Ok(()))
    }

    async fn forget_working_set(&self, bundle: &BundleId) -> Result<(), WorkingSetError> {
        let (store, id) = (self.store.clone(), bundle.clone());
        spawn_blocking(move || store.forget_working_set(&id)).await.unwrap_or(Ok(()))
    }

    async fn commit(&self, order: CommitOrder) -> Result<BundleView, BundleError> {
        let facts = self.facts().await?;
        self.blocking(move |this| this.commit_blocking(&order, &facts)).await
    }

    async fn discard(&self, vm: &VmId) -> Result<(), BundleError> {
        let vm = vm.clone();
        self.blocking(move |this| {
            let failed = |error: crate::bundle::StageError| BundleError::Host {
                what: "discard what was saved",
                source: io::Error::other(error),
            };
            match this.store.reopen(vm.as_str()).map_err(failed)? {
                Some(staging) => staging.discard().map_err(failed),
                None => Ok(()),
            }
        })
        .await
    }

    async fn sweep(&self, kept: Vec<VmId>) -> Result<(), BundleError> {
        self.blocking(move |this| {
            let kept: Vec<&str> = kept.iter().map(VmId::as_str).collect();
            let swept = this.store.sweep(&kept)?;
            for path in swept.removed {
                tracing::info!(path = %path.display(), "removed what an earlier agent had begun");
            }
            for (path, error) in swept.failed {
                tracing::warn!(path = %path.display(), %error, "cannot remove what an earlier agent had begun");
            }
            Ok(())
        })
        .await
    }

    async fn verify(&self, bundle: &BundleId) -> Result<Verified, BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| Ok(this.store.verify(&bundle, &mut |_| {})?)).await
    }

    async fn remove(&self, bundle: &BundleId) -> Result<(), BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| Ok(this.store.remove(&bundle)?)).await
    }

    async fn compact(
        &self,
        bundle: &BundleId,
        name: Option<String>,
        token: String,
        built_at: UnixNanos,
    ) -> Result<BundleView, BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| {
            let made = this.store.compact(&bundle, Compaction { token, name, built_at }, &mut |_| {})?;
            Ok(this.view(made.id, made.manifest))
        })
        .await
    }

    async fn sign(&self, bundle: &BundleId, signature: BundleSignature) -> Result<(), BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| Ok(this.store.sign(&bundle, signature)?)).await
    }

    async fn export(&self, bundle: &BundleId, to: mpsc::Sender<Piece>) -> Result<(), BundleError> {
        let (permit, bundle) = (self.transfer()?, bundle.clone());
        let export = self.blocking(move |this| Ok(this.store.open_export(&bundle)?)).await?;
        spawn_blocking(move || {
            if let Err(error) = export.write(PieceWriter::new(to.clone())) {
                let text = crate::report::chain(&error);
                tracing::warn!(error = text, "an export broke off");
                // Nobody may be there to be told.
                let _ = to.blocking_send(Err(io::Error::other(text)));
            }
            drop(permit);
        });
        Ok(())
    }

    async fn read_part(&self, bundle: &BundleId, part: BundlePart) -> Result<Vec<u8>, BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| Ok(this.store.read_part(&bundle, part)?)).await
    }

    async fn read_directory(
        &self,
        directory: &Path,
        bundle: &BundleId,
        part: BundlePart,
    ) -> Result<Vec<u8>, ReadDirectoryError> {
        let path = directory.join(part_path(bundle, part).path);
        let (directory, bundle) = (directory.to_owned(), bundle.clone());
        spawn_blocking(move || read_from_directory(&directory, &bundle, part)).await.unwrap_or_else(|_| {
            let source = io::Error::other("the agent is ending");
            Err(ReadDirectoryError::Io { path, source })
        })
    }

    async fn import(&self, from: mpsc::Receiver<Piece>, token: String) -> Result<Vec<Imported>, BundleError> {
        let permit = self.transfer()?;
        self.blocking(move |this| {
            let committed = this.store.import(Pieces::new(from), &token, &mut |_| {})?.into_iter();
            drop(permit);
            let one = |one: Committed| Imported { view: this.view(one.id, one.manifest), existed: one.existed };
            Ok(committed.map(one).collect())
        })
        .await
    }
}
