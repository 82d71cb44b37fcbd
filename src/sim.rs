//! A simulated host: the agent's world from one seed, with virtual time, faults at every effect, and crashes of the
//! agent between any two of them. What the fakes hold outlives an agent, as a real host does, so the next one has to
//! make sense of it. Ordinary code, not mocks: the same [`World`] the agent runs on.
#![forbid(unsafe_code)]

mod bundles;
mod disk;
mod fetched;
mod guest;
mod leases;
mod manifest;
mod networks;
mod records;
mod registrar;
mod road;
mod swap;
mod vmm;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::agent::Store;
use crate::agent::world::World;
use crate::bundle::admit::HostFacts;
use crate::clock::{Clock, Monotonic, UnixNanos, Uptime};
use crate::ids::VmId;

pub use guest::Fate;
pub use registrar::Manners;
pub use vmm::SimProcess;

/// Where virtual wall time begins: a round number of seconds in the year 2026.
const WALL_ORIGIN_NS: u64 = 1_780_000_000_000_000_000;

/// Where faults may strike, and how often. In thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// An effect fails.
    pub fail_permille: u64,
    /// The agent dies before or after an effect.
    pub crash_permille: u64,
    /// A guest does something else than boot and obey.
    pub odd_guest_permille: u64,
    /// The agent dies at exactly this point, counted from the start of its life.
    pub crash_at_point: Option<u64>,
    /// The effect fails at exactly this point, if one can fail there.
    pub fail_at_point: Option<u64>,
    /// From this point on nothing can be written to the ledger: its disk is full.
    pub ledger_full_at_point: Option<u64>,
}

/// A host that outlives its agents. Clones are the same host.
#[derive(Clone)]
pub struct SimHost {
    state: Arc<Mutex<State>>,
    /// Something changed that a waiting fake may want to see.
    changed: Arc<Notify>,
    /// The agent has to die now.
    crash: Arc<Notify>,
    /// The way to other hosts.
    road: road::Road,
    /// Whose hands it is in: those of this life's agent, or of a test (0).
    life: u64,
}

impl std::fmt::Debug for SimHost {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("SimHost").finish_non_exhaustive()
    }
}

struct State {
    random: u64,
    faults: Faults,
    /// Points passed in this life.
    points: u64,
    crashed: bool,
    /// Which agent's life this is, from 1.
    life: u64,
    /// Virtual time at the start of this life, and tokio's instant for it.
    base_ns: u64,
    origin: Option<Instant>,
    /// How much the wall clock was set forward.
    wall_moved_ns: i64,
    store: Store,
    vmms: BTreeMap<i32, vmm::Vmm>,
    next_pid: i32,
    directories: BTreeSet<VmId>,
    jails: BTreeMap<u16, networks::Jail>,
    violations: Vec<String>,
    /// Space that is free on its disk.
    disk_free_bytes: u64,
    /// How long guests boot.
    boot: Duration,
    /// Connections to guests' agents that are open.
    guest_streams: usize,
    leases: leases::Leases,
    registrar: registrar::Registrar,
    bundles: bundles::Bundles,
    /// What it is, as far as guests care.
    facts: HostFacts,
    swap: swap::Swap,
    volumes: volumes::Volumes,
    /// What guests say they hold.
    secrets: Vec<String>,
}

/// How long addresses and session numbers have to rest on a simulated host: what agents do by default.
const REST_NS: u64 = 120 * 1_000_000_000;

impl State {
    fn now_ns(&self) -> u64 {
        let lived = self.origin.map(|origin| origin.elapsed()).unwrap_or_default();
        self.base_ns.saturating_add(u64::try_from(lived.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Notes what must never be in the ledger.
    fn look_at_ledger(&mut self) {
        let now_ns = self.now_ns();
        let wrong = self.leases.look(&self.store, now_ns);
        self.violations.extend(wrong);
        let wrong = self.registrar.look(&self.store);
        self.violations.extend(wrong);
    }

    /// SplitMix64: small, and the same everywhere.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn roll(&mut self, permille: u64) -> bool {
        permille > 0 && self.next_random() % 1000 < permille
    }
}

impl SimHost {
    /// A host made of this seed, with an image `demo` and nothing else.
    ///
    /// # Panics
    /// If SQLite cannot make a database in memory.
    pub fn new(seed: u64) -> Self {
        let store = Store::in_memory().expect("a database in memory");
        let state = State {
            random: seed,
            faults: Faults::default(),
            points: 0,
            crashed: false,
            life: 0,
            base_ns: 0,
            origin: None,
            wall_moved_ns: 0,
            store,
            vmms: BTreeMap::new(),
            next_pid: 100,
            directories: BTreeSet::new(),
            jails: BTreeMap::new(),
            disk_free_bytes: 1 << 39,
            violations: Vec::new(),
            boot: guest::BOOT,
            guest_streams: 0,
            leases: leases::Leases::resting_for(REST_NS),
            registrar: registrar::Registrar::default(),
            bundles: bundles::Bundles::default(),
            facts: manifest::facts(),
            swap: swap::Swap::default(),
            volumes: volumes::Volumes::default(),
            secrets: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            changed: Arc::default(),
            crash: Arc::default(),
            road: road::Road::default(),
            life: 0,
        }
    }

    /// From now on it has a processor of another vendor.
    pub fn become_another_processor(&self) {
        self.state().facts.cpu_vendor = "another".to_owned();
    }

    /// The same host, on the road of another one: machines go from one to the other.
    #[must_use]
    pub fn beside(mut self, other: &Self) -> Self {
        self.road = other.road.clone();
        self.state().swap.share_witness(&other.state().swap);
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the life of the next agent, inside its runtime, with these faults.
    pub fn begin_life(&self, faults: Faults) -> SimWorld {
        let mut state = self.state();
        state.base_ns = state.now_ns();
        state.origin = Some(Instant::now());
        state.faults = faults;
        state.points = 0;
        state.crashed = false;
        state.life += 1;
        state.swap.forget_held();
        SimWorld { host: Self { life: state.life, ..self.clone() } }
    }

    /// Ends the life of an agent: call before its runtime is dropped.
    pub fn end_life(&self) {
        let mut state = self.state();
        state.base_ns = state.now_ns();
        state.origin = None;
    }

    /// Waits until a fault kills the agent.
    pub async fn crashed(&self) {
        loop {
            let crash = self.crash.notified();
            if self.state().crashed {
                return;
            }
            crash.await;
        }
    }

    /// Which agent's life it is, from 1.
    pub fn life(&self) -> u64 {
        self.state().life
    }

    /// The agent dies so many points from now.
    pub fn crash_in(&self, points: u64) {
        let mut state = self.state();
        state.faults.crash_at_point = Some(state.points + points);
    }

    /// The effect that many points from now fails, if one can fail there: no space, no memory, a link that cannot be made.
    pub fn fail_in(&self, points: u64) {
        let mut state = self.state();
        state.faults.fail_at_point = Some(state.points + points);
    }

    /// The agent dies no more by [`Self::crash_in`].
    pub fn crash_never(&self) {
        self.state().faults.crash_at_point = None;
    }

    /// Whether the agent of this life is dead.
    pub fn has_crashed(&self) -> bool {
        self.state().crashed
    }

    /// Points passed in this life.
    pub fn points(&self) -> u64 {
        self.state().points
    }

    /// A number below `bound` from the host's seed.
    pub fn pick(&self, bound: u64) -> u64 {
        self.state().next_random() % bound.max(1)
    }

    /// Space that is free on its disk from now on.
    pub fn set_disk_free(&self, bytes: u64) {
        self.state().disk_free_bytes = bytes;
    }

    fn disk_free_bytes(&self) -> u64 {
        self.state().disk_free_bytes
    }

    /// Lets guests boot faster or slower from now on: for tests in real time.
    pub fn set_boot(&self, boot: Duration) {
        self.state().boot = boot;
    }

    /// Connections to guests' agents that are open.
    pub fn guest_streams(&self) -> usize {
        self.state().guest_streams
    }

    /// What was seen that must never be.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// The VMs that have a living VMM.
    pub fn living(&self) -> Vec<VmId> {
        let mut state = self.state();
        state.settle();
        state.vmms.values().filter(|vmm| vmm.end.is_none()).map(|vmm| vmm.vm.clone()).collect()
    }

    /// The VMs that have a directory.
    pub fn directories(&self) -> Vec<VmId> {
        self.state().directories.iter().cloned().collect()
    }

    /// The VMs that have a jail.
    pub fn jailed(&self) -> Vec<VmId> {
        self.state().jails.values().map(|jail| jail.vm.clone()).collect()
    }

    /// Looks into the ledger.
    pub fn with_store<T>(&self, look: impl FnOnce(&mut Store) -> T) -> T {
        look(&mut self.state().store)
    }

    /// Sets the wall clock, forward or back.
    pub fn move_wall_clock(&self, seconds: i64) {
        let mut state = self.state();
        state.wall_moved_ns = state.wall_moved_ns.saturating_add(seconds.saturating_mul(1_000_000_000));
    }

    /// Kills a random VMM, as an administrator may.
    pub fn kill_some_vmm(&self) {
        let mut state = self.state();
        let living: Vec<i32> = state.vmms.values().filter(|vmm| vmm.end.is_none()).map(|vmm| vmm.pid).collect();
        if living.is_empty() {
            return;
        }
        let count = u64::try_from(living.len()).unwrap_or(1);
        let index = usize::try_from(state.next_random() % count).unwrap_or(0);
        state.end_vmm(living[index], crate::agent::world::ProcessEnd::Signalled(9), None);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Ends all VMMs, as an administrator may.
    pub fn end_vmms(&self) {
        let mut state = self.state();
        let living: Vec<i32> = state.vmms.values().filter(|vmm| vmm.end.is_none()).map(|vmm| vmm.pid).collect();
        for pid in living {
            state.end_vmm(pid, crate::agent::world::ProcessEnd::Signalled(9), None);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// A point where a fault may strike: the effect is about to happen, or has just happened.
    async fn point(&self, may_fail: bool) -> io::Result<()> {
        if self.life != 0 && self.life != self.life() {
            // What is left of an agent that died does nothing more.
            return std::future::pending().await;
        }
        let (crash, fail) = {
            let mut state = self.state();
            state.points += 1;
            let faults = state.faults;
            let crash = faults.crash_at_point == Some(state.points) || state.roll(faults.crash_permille);
            let fail = may_fail && (faults.fail_at_point == Some(state.points) || state.roll(faults.fail_permille));
            state.crashed |= crash;
            (state.crashed, fail)
        };
        if crash {
            self.crash.notify_waiters();
            // The agent does nothing more: its runtime is dropped.
            std::future::pending::<()>().await;
        }
        // Everything takes a moment, so that things can happen between.
        tokio::time::sleep(Duration::from_micros(100)).await;
        if fail { Err(io::Error::other("simulated fault")) } else { Ok(()) }
    }
}

/// One agent's view of a simulated host.
#[derive(Debug, Clone)]
pub struct SimWorld {
    host: SimHost,
}

impl Clock for SimHost {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.state().now_ns())
    }

    fn wall(&self) -> UnixNanos {
        let state = self.state();
        UnixNanos((WALL_ORIGIN_NS + state.now_ns()).saturating_add_signed(state.wall_moved_ns))
    }
}

impl World for SimWorld {
    type Clock = SimHost;
    type Vmm = SimHost;
    type Disk = SimHost;
    type Networks = SimHost;
    type Bundles = SimHost;
    type Volumes = SimHost;
    type Records = SimHost;

    fn clock(&self) -> &SimHost {
        &self.host
    }

    fn vmm(&self) -> &SimHost {
        &self.host
    }

    fn disk(&self) -> &SimHost {
        &self.host
    }

    fn networks(&self) -> &SimHost {
        &self.host
    }

    fn bundles(&self) -> &SimHost {
        &self.host
    }

    fn volumes(&self) -> &SimHost {
        &self.host
    }

    fn records(&self) -> &SimHost {
        &self.host
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.host.state();
        for chunk in bytes.chunks_mut(8) {
            let random = state.next_random().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
        Ok(())
    }

    fn uptime(&self) -> Uptime {
        Uptime { boot: 1, since_boot: Duration::from_nanos(self.host.state().now_ns()) }
    }
}
