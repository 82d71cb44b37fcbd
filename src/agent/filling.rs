//! Bundles on their way here: what of their memory is missing is fetched, verified and put where VMMs map it, while guests
//! of them may already run.
//!
//! ```text
//!  source ── fetch ──▶ a bundle's task ── install ──▶ memory.img ◀── mapped ── VMM
//!            (`run`)     ▲ wanted first    └ Present ──▶ a VM's task (`serve`) ── Wanted, Mapped
//!                        └───────────────────────────────┘
//! ```
//! One task for each bundle, for as long as something of it is missing; one for each VM that was launched of it meanwhile,
//! until all of its memory is mapped. What is there is what has the right digest: an agent that starts looks at the file,
//! and goes on. A guest that waits too long for memory is ended, and its record says why.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::bundles::BundleError;
use super::fetched::{Coming, FetchedBundles};
use super::ledger::{NewEvent, Write};
use super::record::{Subject, VmRecord};
use super::shared::Shared;
use super::world::{VmBundles, VmmHost, VmmProcess, World};
use crate::bundle::{ParseSourceError, Partial, Run, SourceSpec};
use crate::clock::{Clock, Monotonic};
use crate::ids::{BundleId, VmId};
use crate::report::chain;

mod fetch;
mod serve;

pub(super) use serve::Chunks;
pub use serve::FillingPort;

/// A bundle of which something is missing.
#[derive(Debug)]
pub(super) struct Filling {
    /// What is there of it.
    pub(super) partial: Arc<Partial>,
    /// Where the rest is.
    source: Result<SourceSpec, ParseSourceError>,
    state: Mutex<State>,
    /// Counts what is new: chunks that came, and that somebody waits for.
    changed: watch::Sender<u64>,
}

/// What is to be fetched, and what came.
#[derive(Debug, Default)]
struct State {
    /// Chunks that guests wait for, the longest first.
    wanted: VecDeque<u32>,
    /// Those that are being fetched.
    fetching: BTreeSet<u32>,
    /// Where to look for what is missing and nobody waits for.
    next: u32,
    /// What came since this agent opened it, in that order.
    came: Vec<u32>,
    /// Why the last one did not come, if it did not.
    trouble: Option<String>,
    /// It is of no use to anybody any more.
    is_over: bool,
}

impl State {
    /// The chunk to fetch next: what a guest waits for, then what comes next in memory.
    fn take(&mut self, chunks: u32, is_missing: impl Fn(u32) -> bool) -> Option<u32> {
        let (fetching, wanted) = (&self.fetching, &mut self.wanted);
        wanted.retain(|&chunk| is_missing(chunk));
        let first = wanted.iter().copied().find(|chunk| !fetching.contains(chunk));
        let chunk = match first {
            Some(chunk) => chunk,
            None => {
                let chunk = (self.next..chunks).find(|&chunk| is_missing(chunk) && !fetching.contains(&chunk))?;
                self.next = chunk + 1;
                chunk
            }
        };
        self.fetching.insert(chunk);
        Some(chunk)
    }

    /// It is as if it had not been taken.
    fn give_back(&mut self, chunk: u32) {
        self.fetching.remove(&chunk);
        self.next = self.next.min(chunk);
    }
}

impl Filling {
    fn new(partial: Arc<Partial>) -> Self {
        Self { source: partial.from().parse(), partial, state: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// Held for look-ups only.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_change(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Why what is missing does not come, if it does not.
    pub(super) fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    /// Somebody waits for this chunk.
    fn want(&self, chunk: u32) {
        let mut state = self.state();
        if !state.wanted.contains(&chunk) {
            state.wanted.push_back(chunk);
        }
        drop(state);
        self.note_change();
    }

    /// What is there now, and how much of what came that includes.
    fn present(&self) -> (Vec<Run>, usize) {
        // In this order: what comes between the two is told twice, and not never.
        let told = self.state().came.len();
        (self.partial.present_runs(), told)
    }

    /// What came after this many.
    fn came_after(&self, told: usize) -> Vec<u32> {
        self.state().came.get(told..).unwrap_or_default().to_vec()
    }

    /// Nothing more of it is fetched.
    fn end(&self) {
        self.state().is_over = true;
        self.note_change();
    }
}

/// What a VM has of its memory, that was launched while some of it was missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFilling {
    /// Its bundle.
    pub bundle: BundleId,
    /// Chunks of its memory.
    pub chunks: u32,
    /// Those that are mapped.
    pub mapped: u32,
    /// Those that its guest waits for, and since when.
    pub wanted: BTreeMap<u32, Monotonic>,
}

/// All that is on its way.
#[derive(Debug, Default)]
pub(super) struct Fillings {
    bundles: Mutex<BTreeMap<BundleId, Arc<Filling>>>,
    /// Held while one is opened, which takes long: all of what is there is read.
    opening: tokio::sync::Mutex<()>,
    vms: Mutex<BTreeMap<VmId, VmFilling>>,
    /// VMs that are ended because their memory did not come.
    lost: Mutex<BTreeMap<VmId, String>>,
}

impl Fillings {
    fn bundles(&self) -> MutexGuard<'_, BTreeMap<BundleId, Arc<Filling>>> {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, VmFilling>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> MutexGuard<'_, BTreeMap<VmId, String>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundles that are on their way.
    pub(super) fn all(&self) -> Vec<Arc<Filling>> {
        self.bundles().values().cloned().collect()
    }

    /// One of them.
    pub(super) fn of(&self, bundle: &BundleId) -> Option<Arc<Filling>> {
        self.bundles().get(bundle).cloned()
    }

    /// What a VM has of its memory, if something is missing.
    pub(super) fn of_vm(&self, vm: &VmId) -> Option<VmFilling> {
        self.vms().get(vm).cloned()
    }

    /// Why a VM was ended, if that was because its memory did not come. Told once.
    pub(super) fn loss(&self, vm: &VmId) -> Option<String> {
        self.lost().remove(vm)
    }
}

impl<W: World> Shared<W> {
    /// Goes on fetching what an earlier agent began to.
    pub(super) async fn go_on_filling(self: Arc<Self>) {
        let partials = match self.world.bundles().partials().await {
            Ok(partials) => partials,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "what is there of bundles that are not whole cannot be listed");
                return;
            }
        };
        for bundle in partials {
            if let Err(error) = self.filling(&bundle).await {
                tracing::warn!(%bundle, error = %chain(&error), "a bundle that is not whole cannot be opened: remove it, \
                    or fetch it again");
            }
        }
    }

    /// The filling of a bundle that is not whole; `None`: there is nothing of it, or all.
    pub(super) async fn filling(self: &Arc<Self>, bundle: &BundleId) -> Result<Option<Arc<Filling>>, BundleError> {
        let _opening = self.fillings.opening.lock().await;
        if let Some(filling) = self.fillings.of(bundle) {
            return Ok(Some(filling));
        }
        let Some(partial) = self.world.bundles().open_partial(bundle).await? else { return Ok(None) };
        let filling = Arc::new(Filling::new(partial));
        self.fillings.bundles().insert(bundle.clone(), Arc::clone(&filling));
        tokio::spawn(fetch::run(Arc::clone(self), Arc::clone(&filling)));
        Ok(Some(filling))
    }

    /// Begins to have a bundle that is elsewhere; what is there of it already stays.
    pub(super) async fn begin_filling(self: &Arc<Self>, coming: Coming) -> Result<Arc<Filling>, BundleError> {
        let bundle = coming.bundle.clone();
        self.world.bundles().begin_partial(coming).await?;
        match self.filling(&bundle).await? {
            Some(filling) => Ok(filling),
            None => Err(BundleError::NotPartial { bundle }),
        }
    }

    /// Has nothing of a bundle that is not whole.
    pub(super) async fn stop_filling(&self, bundle: &BundleId) -> Result<(), BundleError> {
        let _opening = self.fillings.opening.lock().await;
        if let Some(filling) = self.fillings.bundles().remove(bundle) {
            filling.end();
        }
        self.world.bundles().remove_partial(bundle).await
    }

    /// Ends a VM whose memory does not come. Its actor sees the end, and finds the reason.
    async fn lose(&self, vm: &VmId, why: String) {
        let Some(record) = self.vms().get(vm).map(|vm| vm.record.borrow().clone()) else { return };
        tracing::error!(%vm, why, "a VM is ended, as its memory does not come");
        self.fillings.lost().insert(vm.clone(), why);
        let killed = match self.world.vmm().find(&record).await {
            Ok(Some(process)) => process.kill(),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = killed {
            tracing::error!(%vm, %error, "it cannot be ended");
        }
    }

    pub(super) async fn bundle_event(&self, kind: &'static str, body: serde_json::Value) {
        let at = self.world.clock().wall();
        let event = NewEvent { at, kind, subject: Subject::Host, operation: None, body };
        if let Err(error) = self.commit(vec![Write::Event(event)]).await {
            tracing::warn!(error = %chain(&error), "an event is lost");
        }
    }

    /// Serves the memory of a VM that an earlier agent launched while some was missing.
    pub(super) async fn go_on_serving(self: &Arc<Self>, vm: &VmRecord) {
        let Some(bundle) = vm.spec.bundle.clone().filter(|_| vm.spec.lazy) else { return };
        // One that has all of its memory takes no connection any more.
        let near = match self.world.vmm().connect_to_fill(vm).await {
            Ok(Some(near)) => near,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(vm = %vm.id, %error, "nobody serves what is missing of a VM's memory");
                return;
            }
        };
        let chunks = match self.filling(&bundle).await {
            Ok(Some(filling)) => Ok(Chunks::Coming(filling)),
            Ok(None) => self.world.bundles().check(&bundle).await.map(Chunks::Here),
            Err(error) => Err(error),
        };
        let chunks = match chunks {
            Ok(chunks) => chunks,
            Err(error) => {
                self.lose(&vm.id, chain(&error)).await;
                return;
            }
        };
        self.serve(vm, chunks, near);
    }

    /// How long a guest waits for memory.
    pub(super) fn fill_patience(&self) -> Duration {
        Duration::from_secs(self.config.waits.memory_s.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_guest_waits_for_comes_first() {
        let mut state = State::default();
        state.wanted.extend([7, 3, 7]);
        let missing = |chunk: u32| chunk != 1;
        let taken: Vec<_> = std::iter::from_fn(|| state.take(9, missing)).collect();
        assert_eq!(taken, [7, 3, 0, 2, 4, 5, 6, 8]);
        state.give_back(2);
        assert_eq!((state.take(9, missing), state.take(9, missing)), (Some(2), None));
    }

    proptest! {
        /// Each missing chunk is taken once, whoever waits for what and whatever fails in between.
        #[test]
        fn all_that_is_missing_is_taken(
            missing in proptest::collection::btree_set(0_u32..40, 0..40),
            wanted in proptest::collection::vec(0_u32..40, 0..20),
            failing in proptest::collection::vec(any::<bool>(), 0..20),
        ) {
            let mut state = State { wanted: wanted.into(), ..State::default() };
            let (mut left, mut failing) = (missing, failing.into_iter());
            let mut taken = Vec::new();
            while let Some(chunk) = state.take(40, |chunk| left.contains(&chunk)) {
                prop_assert!(left.contains(&chunk) && !taken.contains(&chunk));
                if failing.next().unwrap_or(false) {
                    state.give_back(chunk);
                } else {
                    taken.push(chunk);
                    left.remove(&chunk);
                    state.fetching.remove(&chunk);
                }
            }
            prop_assert!(left.is_empty());
        }
    }
}
