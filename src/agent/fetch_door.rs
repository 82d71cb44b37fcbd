//! What may be asked of the agent about bundles that come from elsewhere: have them, keep them, see how far they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::Agent;
use super::bundles::{BundleError, BundleView};
use super::door::VmError;
use super::fetched::{Coming, FetchView, FetchedBundles};
use super::filling::{Filling, VmFilling};
use super::record::VmRecord;
use super::room::NewWork;
use super::shared::Shared;
use super::sources::read_part;
use super::world::{VmBundles, World};
use crate::bundle::eviction::to_remove;
use crate::bundle::{BundlePart, SourceSpec, read_signatures};
use crate::clock::Clock;
use crate::ids::BundleId;
use crate::report::chain;
use crate::units::MIB;

/// What a VM has of its memory.
#[derive(Debug, Clone)]
pub struct MemoryView {
    /// The VM.
    pub vm: Arc<VmRecord>,
    /// What is missing, if anything is.
    pub filling: Option<(VmFilling, Option<FetchView>)>,
    /// How long its guest has waited for what it waits for longest, in milliseconds.
    pub waits_ms: Option<u64>,
}

/// Bundles from elsewhere, as seen from above.
pub trait FetchDoor: Send + Sync + 'static {
    /// Begins to have a bundle that is elsewhere. Gives it as it is then, and whether that was news.
    fn fetch_bundle<'a>(
        &'a self,
        bundle: &'a BundleId,
        from: SourceSpec,
    ) -> BoxFuture<'a, Result<(BundleView, bool), BundleError>>;
    /// The bundle a word means, also one that is not whole yet.
    fn any_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<BundleView, BundleError>>;
    /// Those that are not whole yet.
    fn coming_bundles(&self) -> Vec<BundleView>;
    /// Whether a bundle from elsewhere is kept when there is little room.
    fn pin_bundle<'a>(&'a self, word: &'a str, pinned: bool) -> BoxFuture<'a, Result<BundleView, BundleError>>;
    /// What a VM has of its memory.
    fn memory(&self, word: &str) -> Result<MemoryView, VmError>;
}

impl<W: World> Shared<W> {
    /// A bundle that is on its way, as it looks now.
    pub(super) fn coming_view(&self, filling: &Filling) -> Result<BundleView, BundleError> {
        let view = self.world.bundles().partial_view(&filling.partial)?;
        Ok(BundleView { fetch: Some(fetch_view(filling)), ..view })
    }

    /// Removes bundles that came from elsewhere, the longest unused first and not this one, until what is left of them fits
    /// its bound.
    pub(super) async fn evict_fetched(&self, but: &BundleId) {
        let bytes_max = self.config.fetched_mib.saturating_mul(MIB);
        if bytes_max == 0 {
            return;
        }
        // No launch is admitted meanwhile that would use one of them.
        let _admission = self.admission.lock().await;
        // Again as long as something went: what that built on may go next.
        while self.evict_once(but, bytes_max).await {}
    }

    /// Whether one was removed at least.
    async fn evict_once(&self, but: &BundleId, bytes_max: u64) -> bool {
        let fetched = match self.world.bundles().fetched().await {
            Ok(fetched) => fetched,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "bundles that came from elsewhere cannot be listed");
                return false;
            }
        };
        let used = self.bundles_in_use();
        // What comes as it should is waited for by whoever asked for it.
        let comes = |bundle: &BundleId| self.fillings.of(bundle).is_some_and(|filling| filling.trouble().is_none());
        let is_used = |bundle: &BundleId| {
            bundle == but || used.contains(bundle) || self.pools.size(bundle).is_some() || comes(bundle)
        };
        let candidates: Vec<_> = fetched.iter().map(|one| one.candidate(is_used(&one.id))).collect();
        let mut has_removed = false;
        for bundle in to_remove(&candidates, bytes_max) {
            let is_whole = fetched.iter().any(|one| one.id == bundle && one.is_whole);
            let removed =
                if is_whole { self.world.bundles().remove(&bundle).await } else { self.stop_filling(&bundle).await };
            match removed {
                Ok(()) => {
                    has_removed = true;
                    tracing::info!(%bundle, "a bundle from elsewhere was removed, to make room for others");
                    self.bundle_event("bundle_evicted", serde_json::json!({ "bundle_id": bundle })).await;
                }
                Err(error) => tracing::warn!(%bundle, error = %chain(&error), "a bundle cannot be removed for others"),
            }
        }
        has_removed
    }

    /// Bundles that VMs run from.
    fn bundles_in_use(&self) -> BTreeSet<BundleId> {
        let vms = self.vms();
        let records = vms.values().map(|vm| vm.record.borrow().clone());
        records.filter(|vm| vm.state.holds_resources()).filter_map(|vm| vm.spec.bundle.clone()).collect()
    }
}

fn fetch_view(filling: &Filling) -> FetchView {
    let partial = &filling.partial;
    FetchView { from: filling.from(), progress: partial.progress(), trouble: filling.trouble() }
}

impl<W: World> Agent<W> {
    async fn fetch(&self, bundle: &BundleId, from: SourceSpec) -> Result<(BundleView, bool), BundleError> {
        let shared = &self.shared;
        let coming = shared.filling(bundle).await?;
        if let Some(filling) = coming.filter(|filling| filling.from() == from.to_string()) {
            return Ok((shared.coming_view(&filling)?, false));
        }
        if let Ok(view) = shared.world.bundles().find(bundle.as_str()).await {
            return Ok((view, false));
        }
        self.room(NewWork::Files).await?;
        let read = async |part| read_part(shared, &from, bundle, part).await;
        let manifest = read(BundlePart::Manifest).await?;
        let state = read(BundlePart::State).await?;
        let signatures = read_signatures(&read(BundlePart::Signatures).await?).unwrap_or_default();
        let (manifest, state, from) = (manifest.to_vec(), state.to_vec(), from.to_string());
        let at = shared.world.clock().wall();
        let filling =
            shared.begin_filling(Coming { bundle: bundle.clone(), manifest, state, signatures, from, at }).await?;
        shared.evict_fetched(bundle).await;
        Ok((shared.coming_view(&filling)?, true))
    }

    async fn any(&self, word: &str) -> Result<BundleView, BundleError> {
        let bundles = self.shared.world.bundles();
        if let Some(bundle) = bundles.find_partial(word).await?
            && let Some(filling) = self.shared.filling(&bundle).await?
        {
            return self.shared.coming_view(&filling);
        }
        bundles.find(word).await
    }
}

impl<W: World> FetchDoor for Agent<W> {
    fn fetch_bundle<'a>(
        &'a self,
        bundle: &'a BundleId,
        from: SourceSpec,
    ) -> BoxFuture<'a, Result<(BundleView, bool), BundleError>> {
        self.fetch(bundle, from).boxed()
    }

    fn any_bundle<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<BundleView, BundleError>> {
        self.any(word).boxed()
    }

    fn coming_bundles(&self) -> Vec<BundleView> {
        // Who signed one cannot be told: it is not shown, and its trouble comes up when it is used.
        self.shared.fillings.all().iter().filter_map(|filling| self.shared.coming_view(filling).ok()).collect()
    }

    fn pin_bundle<'a>(&'a self, word: &'a str, pinned: bool) -> BoxFuture<'a, Result<BundleView, BundleError>> {
        async move {
            let bundle = self.any(word).await?.id;
            self.shared.world.bundles().pin(&bundle, pinned).await?;
            if !pinned {
                self.shared.evict_fetched(&bundle).await;
            }
            self.any(bundle.as_str()).await
        }
        .boxed()
    }

    fn memory(&self, word: &str) -> Result<MemoryView, VmError> {
        let vm = self.find(word)?.record.borrow().clone();
        let now = self.shared.world.clock().monotonic();
        let filling = self.shared.fillings.of_vm(&vm.id);
        let oldest = filling.as_ref().and_then(|filling| filling.wanted.values().min().copied());
        let waits_ms = oldest.map(|since| u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX));
        let filling = filling.map(|filling| {
            let fetch = self.shared.fillings.of(&filling.bundle).map(|coming| fetch_view(&coming));
            (filling, fetch)
        });
        Ok(MemoryView { vm, filling, waits_ms })
    }
}
