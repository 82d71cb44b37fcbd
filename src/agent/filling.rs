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
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::bundles::BundleError;
use super::fetched::{Coming, FetchedBundles};
use super::ledger::{NewEvent, Write};
use super::record::{Subject, VmRecord};
use super::shared::Shared;
use super::vm_state::FailureCause;
use super::world::{VmBundles, VmmHost, VmmProcess, World};
use crate::bundle::working_set::WorkingSet;
use crate::bundle::{ParseSourceError, Partial, Run, SourceSpec};
use crate::clock::{Clock, Monotonic};
use crate::ids::{BundleId, VmId};
use crate::report::chain;
use crate::units::PAGE_BYTES;

mod fetch;
mod serve;

/// Time until what is here of a bundle is looked at again, when that failed.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(super) use serve::Chunks;
pub use serve::FillingPort;

/// A bundle of which something is missing.
#[derive(Debug)]
pub(super) struct Filling {
    /// What is there of it.
    pub(super) partial: Arc<Partial>,
    /// Where the rest is: another place may be told meanwhile.
    source: Mutex<From>,
    state: Mutex<State>,
    /// Counts what is new: chunks that came, and that somebody waits for.
    changed: watch::Sender<u64>,
}

/// Where a bundle comes from.
#[derive(Debug, Clone)]
struct From {
    words: String,
    spec: Result<SourceSpec, ParseSourceError>,
}

impl From {
    fn new(words: &str) -> Self {
        Self { words: words.to_owned(), spec: words.parse() }
    }
}

/// A chunk that did not come: when it may be asked for again, and how long that was.
#[derive(Debug, Clone, Copy)]
struct Failed {
    again: Instant,
    wait: Duration,
}

/// Chunks that are fetched at once: enough to hide a source's answer time, few enough that what a guest waits for shares the
/// way with few that nobody does.
const AT_ONCE_MAX: usize = 4;

/// Chunks that are verified and written at once. While so many are, none is asked for that nobody waits for: a disk that
/// does not keep up is waited for.
const INSTALLS_MAX: usize = 4;

/// Time until a chunk that did not come is asked for again: the first, doubled up to the last.
const CHUNK_AGAIN_FIRST: Duration = Duration::from_millis(200);
const CHUNK_AGAIN_LAST: Duration = Duration::from_secs(5);

/// What is to be fetched, and what came.
#[derive(Debug, Default)]
struct State {
    /// Chunks that guests wait for, the longest first.
    wanted: VecDeque<u32>,
    /// Those that guests of this bundle have reached first before.
    soon: BTreeSet<u32>,
    /// Those that are being fetched.
    fetching: BTreeSet<u32>,
    /// Those that came, and are verified and written.
    installing: BTreeSet<u32>,
    /// Where to look for what is missing and nobody waits for.
    next: u32,
    /// What came since this agent opened it, in that order.
    came: Vec<u32>,
    /// Those that did not come, and are still missing.
    failed: BTreeMap<u32, Failed>,
    /// Why the last of these did not.
    trouble: Option<String>,
    /// It is of no use to anybody any more.
    is_over: bool,
}

impl State {
    /// The chunk to fetch next: what a guest waits for, then what one will soon, then what comes next in memory. The last of
    /// [`AT_ONCE_MAX`] places is for the first of these only: it does not wait behind what nobody waits for.
    fn take(&mut self, chunks: u32, now: Instant, is_missing: impl Fn(u32) -> bool) -> Option<u32> {
        let Self { wanted, soon, fetching, installing, failed, next, .. } = self;
        wanted.retain(|&chunk| is_missing(chunk));
        soon.retain(|&chunk| is_missing(chunk));
        let may_go_ahead = fetching.len() + 1 < AT_ONCE_MAX && installing.len() < INSTALLS_MAX;
        let may_come = |chunk: &u32| {
            let is_coming = fetching.contains(chunk) || installing.contains(chunk);
            !is_coming && failed.get(chunk).is_none_or(|failed| failed.again <= now)
        };
        let asked_for = wanted.iter().copied().find(may_come);
        let chunk = match asked_for.or_else(|| soon.iter().copied().find(may_come).filter(|_| may_go_ahead)) {
            Some(chunk) => chunk,
            None if !may_go_ahead => return None,
            None => {
                let chunk = (*next..chunks).find(|chunk| is_missing(*chunk) && may_come(chunk))?;
                // What was passed over is come back to.
                let passed = failed.range(*next..chunk).next().map(|(passed, _)| *passed);
                *next = passed.unwrap_or(chunk + 1);
                chunk
            }
        };
        fetching.insert(chunk);
        Some(chunk)
    }

    /// Its bytes are here, to be verified and written.
    fn fetched(&mut self, chunk: u32) {
        self.fetching.remove(&chunk);
        self.installing.insert(chunk);
    }

    /// It is there.
    fn came(&mut self, chunk: u32) {
        self.fetching.remove(&chunk);
        self.installing.remove(&chunk);
        self.failed.remove(&chunk);
        self.came.push(chunk);
        if self.failed.is_empty() {
            self.trouble = None;
        }
    }

    /// It did not come; whether that is the first trouble.
    fn did_not_come(&mut self, chunk: u32, now: Instant, why: String) -> bool {
        self.fetching.remove(&chunk);
        self.installing.remove(&chunk);
        self.next = self.next.min(chunk);
        let wait = self.failed.get(&chunk).map_or(CHUNK_AGAIN_FIRST, |failed| failed.wait * 2).min(CHUNK_AGAIN_LAST);
        self.failed.insert(chunk, Failed { again: now + wait, wait });
        self.trouble.replace(why).is_none()
    }

    /// When the first of those that did not come may be asked for again.
    fn again(&self) -> Option<Instant> {
        self.failed.values().map(|failed| failed.again).min()
    }
}

impl Filling {
    fn new(partial: Arc<Partial>) -> Self {
        Self {
            source: Mutex::new(From::new(partial.from())),
            partial,
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Held for look-ups only.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_change(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn source(&self) -> MutexGuard<'_, From> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it comes from, in words.
    pub(super) fn from(&self) -> String {
        self.source().words.clone()
    }

    /// It comes from here from now on.
    fn comes_from(&self, words: &str) {
        *self.source() = From::new(words);
        self.state().failed.clear();
        self.note_change();
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

    /// A guest is about to reach these pages: what they lie in comes before what nobody waits for.
    pub(super) fn expect(&self, set: &WorkingSet) {
        let chunk_pages = (u64::from(self.partial.manifest().memory.chunk_bytes) / PAGE_BYTES).max(1);
        let chunk = |page: u64| u32::try_from(page / chunk_pages).unwrap_or(u32::MAX);
        let chunks = |run: &Run| chunk(run.first)..=chunk(run.end().unwrap_or(u64::MAX).saturating_sub(1));
        let expected: Vec<u32> = set.written.iter().chain(&set.read).flat_map(chunks).collect();
        self.state().soon.extend(expected);
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
    /// By VM, with the number of the task that serves it.
    vms: Mutex<BTreeMap<VmId, (u64, VmFilling)>>,
    /// Tasks that were begun.
    serial: AtomicU64,
    /// Why VMs are ended whose memory cannot be served.
    lost: Mutex<BTreeMap<VmId, FailureCause>>,
}

impl Fillings {
    fn bundles(&self) -> MutexGuard<'_, BTreeMap<BundleId, Arc<Filling>>> {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, (u64, VmFilling)>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> MutexGuard<'_, BTreeMap<VmId, FailureCause>> {
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
        self.vms().get(vm).map(|(_, filling)| filling.clone())
    }

    /// Whether a VM is not to be asked for all of its memory: that is not here, or what it differs from is no bundle yet.
    pub(super) fn holds_back(&self, vm: &VmRecord) -> Option<(u32, u32)> {
        if let Some(VmFilling { mapped, chunks, .. }) = self.of_vm(&vm.id) {
            return Some((mapped, chunks));
        }
        let filling = vm.spec.bundle.as_ref().filter(|_| vm.spec.lazy).and_then(|bundle| self.of(bundle))?;
        let chunks = filling.partial.chunks();
        Some((chunks.saturating_sub(filling.partial.missing()), chunks))
    }

    /// Why a VM was ended, if that was because its memory could not be served. Told once.
    pub(super) fn loss(&self, vm: &VmId) -> Option<FailureCause> {
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

    /// Begins to have a bundle that is elsewhere; what is there of it already stays, and the rest comes from there.
    pub(super) async fn begin_filling(self: &Arc<Self>, coming: Coming) -> Result<Arc<Filling>, BundleError> {
        let (bundle, from) = (coming.bundle.clone(), coming.from.clone());
        self.world.bundles().begin_partial(coming).await?;
        match self.filling(&bundle).await? {
            Some(filling) => {
                filling.comes_from(&from);
                Ok(filling)
            }
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

    /// Ends a VM whose memory cannot be served. Its actor sees the end, and finds the reason.
    async fn lose(&self, vm: &VmId, cause: FailureCause) {
        let Some(record) = self.vms().get(vm).map(|vm| vm.record.borrow().clone()) else { return };
        tracing::error!(%vm, why = cause.detail(), "a VM is ended, as its memory cannot be served");
        self.fillings.lost().insert(vm.clone(), cause);
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

    /// Serves the memory of a VM that an earlier agent launched while some was missing, if some still is.
    pub(super) async fn go_on_serving(self: &Arc<Self>, vm: &VmRecord) {
        let Some(bundle) = vm.spec.bundle.clone().filter(|_| vm.spec.lazy) else { return };
        let Ok(Some(near)) = self.world.vmm().connect_to_fill(vm).await else { return };
        let (shared, vm) = (Arc::clone(self), vm.clone());
        // What is here of the bundle is read first, which takes its time.
        tokio::spawn(async move {
            loop {
                let chunks = match shared.filling(&bundle).await {
                    Ok(Some(filling)) => Ok(Chunks::Coming(filling)),
                    Ok(None) => {
                        shared.world.bundles().find(bundle.as_str()).await.map(|view| Chunks::Here(view.manifest))
                    }
                    Err(error) => Err(error),
                };
                match chunks {
                    Ok(chunks) => return shared.serve(&vm, chunks, near),
                    Err(error) => {
                        tracing::warn!(vm = %vm.id, %bundle, error = %chain(&error), "a VM's memory is not served yet");
                    }
                }
                tokio::time::sleep(LOOK_AGAIN).await;
                if !shared.vms().contains_key(&vm.id) {
                    return;
                }
            }
        });
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
        state.soon.extend([5, 6, 7]);
        let mut left = BTreeSet::from([0, 2, 3, 4, 5, 6, 7, 8]);
        let now = Instant::now();
        let mut taken = Vec::new();
        while let Some(chunk) = state.take(9, now, |chunk| left.contains(&chunk)) {
            left.remove(&chunk);
            state.came(chunk);
            taken.push(chunk);
        }
        assert_eq!(taken, [7, 3, 5, 6, 0, 2, 4, 8]);
    }

    #[test]
    fn one_place_is_kept_for_what_a_guest_waits_for() {
        let (mut state, now) = (State::default(), Instant::now());
        state.soon.insert(8);
        assert_eq!(std::array::from_fn(|_| state.take(9, now, |_| true)), [Some(8), Some(0), Some(1), None]);
        state.wanted.push_back(5);
        assert_eq!([state.take(9, now, |_| true), state.take(9, now, |_| true)], [Some(5), None]);
        state.came(5);
        let missing = |chunk| ![5, 8].contains(&chunk);
        assert_eq!(state.take(9, now, missing), None, "three that nobody waits for are under way");
        state.came(8);
        assert_eq!(state.take(9, now, missing), Some(2));
    }

    #[test]
    fn what_is_being_written_takes_no_place_and_is_not_asked_for_again() {
        let (mut state, now) = (State::default(), Instant::now());
        assert_eq!(std::array::from_fn(|_| state.take(9, now, |_| true)), [Some(0), Some(1), Some(2), None]);
        state.fetched(1);
        state.wanted.push_back(1);
        assert_eq!([state.take(9, now, |_| true), state.take(9, now, |_| true)], [Some(3), None]);
        // It was not what it has to be.
        assert!(state.did_not_come(1, now, "another digest".to_owned()));
        let later = state.again().unwrap();
        assert_eq!(state.take(9, later, |_| true), Some(1));
        // A disk that does not keep up is waited for, but not by guests.
        let mut state = State { installing: BTreeSet::from([4, 5, 6, 7]), ..State::default() };
        assert_eq!(state.take(9, now, |_| true), None);
        state.wanted.push_back(2);
        assert_eq!(state.take(9, now, |_| true), Some(2));
    }

    #[test]
    fn what_did_not_come_is_come_back_to() {
        let mut state = State::default();
        let (now, missing) = (Instant::now(), |chunk: u32| [2, 4].contains(&chunk));
        assert_eq!((state.take(9, now, missing), state.take(9, now, missing)), (Some(2), Some(4)));
        assert!(state.did_not_come(2, now, "one".to_owned()) && !state.did_not_come(4, now, "two".to_owned()));
        assert_eq!(state.take(9, now, missing), None);
        let later = state.again().unwrap();
        assert_eq!(
            (state.take(9, later, missing), state.take(9, later, missing), state.take(9, later, missing)),
            (Some(2), Some(4), None)
        );
        state.came(2);
        assert_eq!(state.trouble.as_deref(), Some("two"));
        state.came(4);
        assert_eq!((state.again(), state.trouble), (None, None));
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
            let mut now = Instant::now();
            loop {
                let Some(chunk) = state.take(40, now, |chunk| left.contains(&chunk)) else {
                    let Some(again) = state.again() else { break };
                    now = again;
                    continue;
                };
                prop_assert!(left.contains(&chunk) && !taken.contains(&chunk));
                if failing.next().unwrap_or(false) {
                    state.did_not_come(chunk, now, String::new());
                } else {
                    taken.push(chunk);
                    left.remove(&chunk);
                    state.came(chunk);
                }
            }
            prop_assert!(left.is_empty());
        }
    }
}
