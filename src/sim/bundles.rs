//! The bundles of a simulated host. They outlive the agent, as files do, and so does what is saved and is no bundle yet.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{SimHost, State, manifest};
use crate::agent::world::VmBundles;
use crate::agent::{BundleError, BundleListed, BundleView, CommitOrder, Imported, Piece};
use crate::bundle::admit::{GuestNeeds, admit_guest};
use crate::bundle::manifest::{id_of, read};
use crate::bundle::working_set::{WorkingSet, WorkingSetError};
use crate::bundle::{
    BundlePart, BundleSignature, Digest, FindError, ImportError, Manifest, ReadBundleError, ReadDirectoryError,
    ReadPartError, RemoveError, SignError, Signed, Verified, read_from_directory,
};
use crate::clock::UnixNanos;
use crate::ids::{BundleId, VmId};
use crate::wire::control::SavedPages;

/// What a simulated bundle takes on disk.
const DISK_BYTES: u64 = 1 << 20;

/// The bundles, and what is to become one.
#[derive(Default)]
pub(super) struct Bundles {
    committed: BTreeMap<BundleId, Arc<Manifest>>,
    staged: BTreeMap<VmId, Staged>,
    /// Who stands for them: whether they were made here, and their signatures.
    stood_for: BTreeMap<BundleId, (bool, Vec<BundleSignature>)>,
    /// The bundles that were removed because somebody asked for it.
    removed: Vec<BundleId>,
}

/// What a VMM wrote, or is writing.
#[derive(Debug, Clone, Copy)]
struct Staged {
    /// The VMM.
    pid: i32,
    pages: SavedPages,
    /// What the guest had in memory: a number that is another one each time its vCPUs begin to run.
    memory: u64,
    /// When all of it is written; `None`: it never will be, as the VMM ended before.
    whole_at_ns: Option<u64>,
}

/// Most bytes of what is imported: a simulated bundle is its manifest.
const IMPORT_BYTES_MAX: usize = 1 << 20;

fn digest(manifest: &Manifest) -> Result<Digest, BundleError> {
    let bytes = manifest.to_bytes().map_err(|error| host_error(io::Error::other(error)))?;
    Ok(Digest::of(&bytes))
}

fn host_error(source: io::Error) -> BundleError {
    BundleError::Host { what: "simulate the disk", source }
}

impl State {
    /// A VMM begins to write its machine, and is done at this time.
    pub(super) fn begin_save(&mut self, vm: &VmId, (pid, pages, memory): (i32, SavedPages, u64), whole_at_ns: u64) {
        let staged = Staged { pid, pages, memory, whole_at_ns: Some(whole_at_ns) };
        // What an earlier try left is not whole, and gives way.
        self.bundles.staged.insert(vm.clone(), staged);
    }

    /// A VMM has copied most of its machine's memory, which is no machine as long as that is all.
    pub(super) fn begin_copy(&mut self, vm: &VmId, pid: i32, pages: SavedPages) {
        self.bundles.staged.insert(vm.clone(), Staged { pid, pages, memory: 0, whole_at_ns: None });
    }

    /// A VMM writes what such a copy left.
    pub(super) fn complete_copy(&mut self, vm: &VmId, saved: (i32, SavedPages, u64), whole_at_ns: u64) {
        let begun = self.bundles.staged.get(vm);
        if begun.is_none_or(|begun| (begun.pid, begun.pages) != (saved.0, saved.1)) {
            self.violations.push(format!("the rest of {vm} was saved to where its memory was not copied"));
        }
        self.begin_save(vm, saved, whole_at_ns);
    }

    /// A VMM ended: what it had not written by then stays as it is.
    pub(super) fn end_save(&mut self, pid: i32) {
        let now = self.now_ns();
        let writing = self.bundles.staged.values_mut().filter(|staged| staged.pid == pid);
        for staged in writing.filter(|staged| staged.whole_at_ns.is_some_and(|at| at > now)) {
            staged.whole_at_ns = None;
        }
    }

    /// A machine is made from a bundle; whether it is there.
    pub(super) fn open_bundle(&mut self, vm: &VmId, bundle: &BundleId) -> Result<(), ReadBundleError> {
        if self.bundles.committed.contains_key(bundle) {
            return Ok(());
        }
        self.violations.push(format!("{vm} is to be made from {bundle}, which is not there"));
        Err(ReadBundleError::Unknown { bundle: bundle.clone() })
    }

    fn view(&self, id: &BundleId) -> Result<BundleView, BundleError> {
        let manifest = self.bundles.committed.get(id).cloned();
        let manifest = manifest.ok_or_else(|| ReadBundleError::Unknown { bundle: id.clone() })?;
        let manifest_digest = digest(&manifest)?;
        let (made_here, signatures) = self.bundles.stood_for.get(id).cloned().unwrap_or_default();
        let signed = Signed { manifest_digest, made_here, signatures };
        Ok(BundleView { id: id.clone(), manifest, disk_bytes: DISK_BYTES, signed, fetched: None, fetch: None })
    }

    fn find_bundle(&self, word: &str) -> Result<BundleView, BundleError> {
        let committed = &self.bundles.committed;
        if let Some(id) = committed.keys().find(|id| id.as_str() == word) {
            return self.view(&id.clone());
        }
        let means = |(id, manifest): &(&BundleId, &Arc<Manifest>)| {
            let starts = word.len() > BundleId::PREFIX.len() && id.as_str().starts_with(word);
            starts || manifest.name.as_deref() == Some(word)
        };
        let candidates: Vec<BundleId> = committed.iter().filter(means).map(|(id, _)| id.clone()).collect();
        match candidates.as_slice() {
            [] => Err(FindError::Unknown { word: word.to_owned() }.into()),
            [one] => self.view(one),
            [_, ..] => Err(FindError::Ambiguous { word: word.to_owned(), candidates }.into()),
        }
    }

    fn commit_bundle(&mut self, order: &CommitOrder) -> Result<BundleView, BundleError> {
        let vm = &order.vm.id;
        let Some(staged) = self.bundles.staged.remove(vm) else {
            let mut committed = self.bundles.committed.iter();
            let made = committed.find(|(_, manifest)| order.made(manifest)).map(|(id, _)| id.clone());
            return self.view(&made.ok_or_else(|| BundleError::NothingSaved { vm: vm.clone() })?);
        };
        if staged.whole_at_ns.is_none_or(|at| at > self.now_ns()) {
            self.violations.push(format!("what was saved of {vm} is not whole, and was to become a bundle"));
        }
        if (staged.pages == SavedPages::Changed) != order.order.parent.is_some() {
            self.violations.push(format!("the pages saved of {vm} do not fit the bundle it was to become"));
        }
        let parent = order.order.parent.as_ref().map(|parent| self.view(parent)).transpose()?;
        let manifest = manifest::of(order, parent.as_ref(), staged.memory);
        let id = self.keep(manifest)?;
        self.bundles.stood_for.entry(id.clone()).or_default().0 = true;
        self.view(&id)
    }

    fn keep(&mut self, manifest: Manifest) -> Result<BundleId, BundleError> {
        if let Err(error) = manifest.check() {
            self.violations.push(format!("a manifest that contradicts itself: {error}"));
        }
        let bytes = manifest.to_bytes().map_err(|error| host_error(io::Error::other(error)))?;
        let id = id_of(&bytes);
        self.bundles.committed.insert(id.clone(), Arc::new(manifest));
        Ok(id)
    }

    fn children(&self, id: &BundleId) -> Vec<BundleId> {
        let builds_on = |manifest: &Manifest| manifest.parent.as_ref().is_some_and(|parent| parent.bundle == *id);
        let children = self.bundles.committed.iter().filter(|(_, manifest)| builds_on(manifest));
        children.map(|(id, _)| id.clone()).collect()
    }

    fn remove_bundle(&mut self, id: &BundleId) -> Result<(), BundleError> {
        let children = self.children(id);
        if !children.is_empty() {
            return Err(RemoveError::HasChildren { bundle: id.clone(), children }.into());
        }
        let records = self.store.vms().unwrap_or_default();
        let uses = |vm: &&crate::agent::VmRecord| vm.state.holds_resources() && vm.spec.bundle.as_ref() == Some(id);
        if let Some(user) = records.iter().find(uses) {
            self.violations.push(format!("{id} was removed while {} runs from it", user.id));
        }
        match self.bundles.committed.remove(id) {
            Some(_) => {
                self.bundles.stood_for.remove(id);
                self.bundles.removed.push(id.clone());
                Ok(())
            }
            None => Err(RemoveError::Unknown { bundle: id.clone() }.into()),
        }
    }
}

impl SimHost {
    /// The bundles there are.
    pub fn bundles(&self) -> Vec<BundleId> {
        self.state().bundles.committed.keys().cloned().collect()
    }

    /// The bundles that somebody had removed.
    pub fn removed_bundles(&self) -> Vec<BundleId> {
        self.state().bundles.removed.clone()
    }

    /// The VMs of which something is saved that is no bundle yet.
    pub fn staged(&self) -> Vec<VmId> {
        self.state().bundles.staged.keys().cloned().collect()
    }

    /// Notes a violation when a bundle's content is not what its id was made of, or what it builds on is not there.
    pub fn look_at_bundles(&self) {
        let mut state = self.state();
        let committed = &state.bundles.committed;
        let is_whole = |id: &BundleId, manifest: &Manifest| {
            let same = manifest.to_bytes().is_ok_and(|bytes| id_of(&bytes) == *id);
            same && manifest.parent.as_ref().is_none_or(|parent| committed.contains_key(&parent.bundle))
        };
        let broken = committed.iter().filter(|(id, manifest)| !is_whole(id, manifest));
        let broken: Vec<String> = broken.map(|(id, _)| format!("{id} is not as it was committed")).collect();
        state.violations.extend(broken);
    }
}

impl VmBundles for SimHost {
    async fn list(&self) -> Result<Vec<BundleListed>, BundleError> {
        self.point(true).await.map_err(host_error)?;
        let state = self.state();
        state.bundles.committed.keys().map(|id| state.view(id).map(BundleListed::Readable)).collect()
    }

    async fn find(&self, word: &str) -> Result<BundleView, BundleError> {
        self.point(true).await.map_err(host_error)?;
        self.state().find_bundle(word)
    }

    async fn check(&self, bundle: &BundleId) -> Result<Arc<Manifest>, BundleError> {
        self.point(true).await.map_err(host_error)?;
        Ok(self.state().view(bundle)?.manifest)
    }

    async fn needs(&self) -> Result<GuestNeeds, BundleError> {
        self.point(true).await.map_err(host_error)?;
        Ok(GuestNeeds::of(&self.state().facts))
    }

    async fn admit_guest(&self, needs: &GuestNeeds, agent_protocol: Option<u16>) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        Ok(admit_guest(needs, agent_protocol, &self.state().facts)?)
    }

    async fn working_set(&self, _: &BundleId, _: u64) -> Result<Option<WorkingSet>, WorkingSetError> {
        Ok(None)
    }

    async fn keep_working_set(&self, _: &BundleId, _: WorkingSet) -> Result<(), WorkingSetError> {
        Ok(())
    }

    async fn forget_working_set(&self, _: &BundleId) -> Result<(), WorkingSetError> {
        Ok(())
    }

    async fn commit(&self, order: CommitOrder) -> Result<BundleView, BundleError> {
        if let Err(error) = self.point(true).await {
            // A commit that fails leaves nothing.
            self.state().bundles.staged.remove(&order.vm.id);
            return Err(host_error(error));
        }
        let made = self.state().commit_bundle(&order);
        self.point(false).await.map_err(host_error)?;
        made
    }

    async fn discard(&self, vm: &VmId) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        self.state().bundles.staged.remove(vm);
        self.point(false).await.map_err(host_error)
    }

    async fn sweep(&self, kept: Vec<VmId>) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        self.state().bundles.staged.retain(|vm, _| kept.contains(vm));
        self.point(false).await.map_err(host_error)
    }

    async fn verify(&self, bundle: &BundleId) -> Result<Verified, BundleError> {
        self.check(bundle).await?;
        Ok(Verified { chunks: 0, sections: 0 })
    }

    async fn remove(&self, bundle: &BundleId) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        let removed = self.state().remove_bundle(bundle);
        self.point(false).await.map_err(host_error)?;
        removed
    }

    async fn compact(
        &self,
        bundle: &BundleId,
        name: Option<String>,
        _token: String,
        built_at: UnixNanos,
    ) -> Result<BundleView, BundleError> {
        self.point(true).await.map_err(host_error)?;
        let made = {
            let mut state = self.state();
            let original = state.view(bundle)?;
            let id = state.keep(manifest::compacted(&original, name, built_at))?;
            state.bundles.stood_for.entry(id.clone()).or_default().0 = original.signed.made_here;
            state.view(&id)
        };
        self.point(false).await.map_err(host_error)?;
        made
    }

    async fn sign(&self, bundle: &BundleId, signature: BundleSignature) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        {
            let mut state = self.state();
            let view = state.view(bundle)?;
            if !signature.is_of(&view.signed.manifest_digest) {
                return Err(SignError::Invalid { bundle: bundle.clone(), key: signature.key }.into());
            }
            let (_, signatures) = state.bundles.stood_for.entry(bundle.clone()).or_default();
            signatures.retain(|one| one.key != signature.key);
            signatures.push(signature);
        }
        self.point(false).await.map_err(host_error)
    }

    async fn export(&self, bundle: &BundleId, to: mpsc::Sender<Piece>) -> Result<(), BundleError> {
        self.point(true).await.map_err(host_error)?;
        let manifest = self.state().view(bundle)?.manifest;
        let bytes = manifest.to_bytes().map_err(|error| host_error(io::Error::other(error)))?;
        // Nobody may be there to take it.
        let _ = to.send(Ok(bytes.into())).await;
        Ok(())
    }

    async fn read_part(&self, bundle: &BundleId, part: BundlePart) -> Result<Vec<u8>, BundleError> {
        self.point(true).await.map_err(host_error)?;
        let manifest = self.state().view(bundle)?.manifest;
        let memory_bytes = manifest.machine.memory_bytes;
        match part {
            BundlePart::Manifest => manifest.to_bytes().map_err(|error| host_error(io::Error::other(error))),
            // As its manifest says: it has no state but what names it, and nobody's signatures are files here.
            BundlePart::State | BundlePart::Signatures => Ok(Vec::new()),
            // As its manifest says: all of it is zero.
            BundlePart::Memory { offset, bytes } => match offset.checked_add(bytes) {
                Some(end) if end <= memory_bytes => Ok(vec![0; usize::try_from(bytes).unwrap_or(0)]),
                Some(_) | None => {
                    let bundle = bundle.clone();
                    Err(ReadPartError::Beyond { bundle, offset, bytes, memory_bytes }.into())
                }
            },
        }
    }

    async fn read_directory(
        &self,
        directory: &Path,
        bundle: &BundleId,
        part: BundlePart,
    ) -> Result<Vec<u8>, ReadDirectoryError> {
        // Whoever names a directory of the real host means it.
        read_from_directory(directory, bundle, part)
    }

    async fn import(&self, mut from: mpsc::Receiver<Piece>, _token: String) -> Result<Vec<Imported>, BundleError> {
        self.point(true).await.map_err(host_error)?;
        let mut bytes = Vec::new();
        while let Some(piece) = from.recv().await {
            bytes.extend_from_slice(&piece.map_err(host_error)?);
            if bytes.len() > IMPORT_BYTES_MAX {
                return Err(host_error(io::ErrorKind::FileTooLarge.into()));
            }
        }
        let manifest = read(&bytes).map_err(|error| BundleError::Import(ImportError::Manifest(error)))?;
        let imported = {
            let mut state = self.state();
            let existed = state.bundles.committed.contains_key(&id_of(&bytes));
            let id = state.keep(manifest)?;
            Imported { view: state.view(&id)?, existed }
        };
        self.point(false).await.map_err(host_error)?;
        Ok(vec![imported])
    }
}
