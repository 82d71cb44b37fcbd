//! Machines kept ready: restored from a bundle, paused, in jails that are closed. A launch from the bundle takes one over
//! instead of making its own; its identity comes last, as ever, and another one is made behind it.
//!
//! ```text
//!  make ── uid lent, jail, directory, VMM, restored ──▶ ready ── claimed by a launch ──▶ a VM like any other
//!                                                        └──── its VMM ended, too many, memory short ──▶ ended
//! ```
//! Nobody was ever anything in one of these: what a launch took, and could not use, goes back only if its guest never ran.
//! The ledger knows how many are wanted and which uids are lent, and nothing else of them. An agent that finds the rest of
//! an earlier one's sees directories, jails and processes that belong to no VM, and removes those anyway.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use tokio::sync::Notify;

use super::launch::LaunchRequest;
use super::record::VmRecord;
use super::world::{VmmHost, VmmProcess, World};
use crate::clock::Monotonic;
use crate::ids::{BundleId, VmId};
use crate::units::MIB;

mod door;
mod keeping;
mod plan;

pub use door::{PoolDoor, PoolError, PoolView};
use plan::PoolFacts;

/// Most machines that are kept ready of one bundle.
pub const POOL_SIZE_MAX: u32 = 256;

type Process<W> = <<W as World>::Vmm as VmmHost>::Process;

/// A machine that is ready: a VM's record that is in no ledger, and its process.
pub(super) struct Spare<W: World> {
    pub(super) record: VmRecord,
    pub(super) process: Process<W>,
}

/// The machines of one bundle.
struct Pool<W: World> {
    size: u32,
    ready: VecDeque<Spare<W>>,
    /// Launches that took one, and that found none.
    claimed: u64,
    missed: u64,
    /// Why the last one was not made, how often in a row, and when that was.
    trouble: Option<(String, u32, Monotonic)>,
}

impl<W: World> Pool<W> {
    fn new(size: u32) -> Self {
        Self { size, ready: VecDeque::new(), claimed: 0, missed: 0, trouble: None }
    }
}

/// The machines that are kept ready.
pub(super) struct Pools<W: World> {
    state: Mutex<State<W>>,
    /// Something is different from before.
    changed: Notify,
    /// One of them is not there any more.
    gone: Notify,
}

struct State<W: World> {
    pools: BTreeMap<BundleId, Pool<W>>,
    /// Everything that is there of these, with its jail: ready, being made, being ended, on its way to be a VM.
    there: BTreeMap<VmId, u16>,
    /// Those of which something could not be taken away.
    left: VecDeque<Left<W>>,
    is_closing: bool,
}

/// What is left, and its process if that may be there.
type Left<W> = (VmRecord, Option<Process<W>>);

impl<W: World> Default for Pools<W> {
    fn default() -> Self {
        let state = State { pools: BTreeMap::new(), there: BTreeMap::new(), left: VecDeque::new(), is_closing: false };
        Self { state: Mutex::new(state), changed: Notify::new(), gone: Notify::new() }
    }
}

impl<W: World> Pools<W> {
    /// Held for look-ups only, never across a wait.
    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is one of these, and no VM.
    pub(super) fn has(&self, id: &VmId) -> bool {
        self.state().there.contains_key(id)
    }

    /// The jails of these and of these VMs: no other gets them.
    pub(super) fn jails_beside(&self, vms: &[Arc<VmRecord>]) -> BTreeSet<u16> {
        let state = self.state();
        vms.iter().map(|vm| vm.jail).chain(state.there.values().copied()).collect()
    }

    /// How many of a bundle are wanted, if any.
    pub(super) fn size(&self, bundle: &BundleId) -> Option<u32> {
        self.state().pools.get(bundle).map(|pool| pool.size).filter(|size| *size > 0)
    }

    /// One that fits a launch, which makes a VM of it ([`Pools::became_vm`]) or gives it back.
    pub(super) fn claim(&self, request: &LaunchRequest, bundle: &BundleId) -> Option<Spare<W>> {
        let mut state = self.state();
        let pool = state.pools.get_mut(bundle).filter(|pool| pool.size > 0)?;
        let is_plain = request.disks.is_empty() && request.network_limits == Default::default();
        // One whose process has just ended is left to those who watch it.
        let lives = |spare: &Spare<W>| spare.process.ended().now_or_never().is_none();
        let at = pool.ready.iter().position(lives).filter(|_| is_plain);
        let spare = at.and_then(|at| pool.ready.remove(at));
        match &spare {
            Some(_) => pool.claimed += 1,
            None => pool.missed += 1,
        }
        drop(state);
        self.changed.notify_one();
        spare
    }

    /// One that a launch took and made no VM of: nothing was done with it.
    pub(super) fn give_back(&self, spare: Spare<W>) {
        let Some(bundle) = spare.record.spec.bundle.clone() else { return };
        let mut state = self.state();
        let pool = state.pools.entry(bundle).or_insert_with(|| Pool::new(0));
        pool.claimed = pool.claimed.saturating_sub(1);
        // Nobody watches one any more that ended meanwhile.
        if spare.process.ended().now_or_never().is_some() {
            state.left.push_back((spare.record, Some(spare.process)));
        } else {
            pool.ready.push_front(spare);
        }
    }

    /// A launch made a VM of it, and the VM is known.
    pub(super) fn became_vm(&self, id: &VmId) {
        self.state().there.remove(id);
        self.gone.notify_waiters();
    }

    /// How many machines are wanted, and how many are ready.
    pub(super) fn totals(&self) -> (u64, u64) {
        let state = self.state();
        let counts = state.pools.values().map(|pool| (u64::from(pool.size), pool.ready.len() as u64));
        counts.fold((0, 0), |(wanted, ready), (more, here)| (wanted + more, ready + here))
    }

    fn bytes(&self) -> u64 {
        let state = self.state();
        let ready = state.pools.values().flat_map(|pool| &pool.ready);
        ready.map(|spare| u64::from(spare.record.spec.memory_mib).saturating_mul(MIB)).sum()
    }

    fn facts(&self, now: Monotonic) -> Vec<PoolFacts> {
        let state = self.state();
        let facts = |(bundle, pool): (&BundleId, &Pool<W>)| PoolFacts {
            bundle: bundle.clone(),
            size: pool.size as usize,
            ready: pool.ready.len(),
            failed: pool.trouble.as_ref().map(|(_, times, at)| (*times, now.since(*at))),
        };
        state.pools.iter().map(facts).collect()
    }
}
