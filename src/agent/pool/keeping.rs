//! Makes machines ready, watches them, and ends those that are too many.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::plan::{self, Next};
use super::{Pool, Process, Spare};
use crate::agent::Agent;
use crate::agent::admit::{Facts, admit, promised_bytes};
use crate::agent::launch::{LaunchRequest, image_of};
use crate::agent::ledger::Write;
use crate::agent::record::VmRecord;
use crate::agent::room::{NewWork, check};
use crate::agent::world::{Ask, Records, RestorePlan, VmBundles, VmDisk, VmNetworks, VmmHost, VmmProcess, World};
use crate::clock::Clock;
use crate::ids::{BundleId, VmId};
use crate::report::chain;
use crate::units::MIB;

/// How long after a change the next is made: the launch that took one goes first.
const MAKE_DELAY: Duration = Duration::from_millis(20);

/// How often is looked without a reason, for what nobody tells: memory that is short.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Longest wait for a process that was killed to be gone.
const END_LIMIT: Duration = Duration::from_secs(30);

impl<W: World> Agent<W> {
    /// In the background: has as many machines ready as are wanted.
    pub(in crate::agent) async fn keep_pools(self) {
        let wanted = match self.shared.world.records().with(|store| store.pools()).await {
            Ok(wanted) => wanted,
            Err(error) => return self.shared.declare_broken(&error),
        };
        {
            let mut state = self.shared.pools.state();
            for (bundle, size) in wanted {
                // The API is open: somebody may have said since how many.
                state.pools.entry(bundle).or_insert_with(|| Pool::new(size));
            }
        }
        loop {
            let wait = self.next_for_pools().await;
            let changed = self.shared.pools.changed.notified();
            // Whether something changed or time passed: it is looked.
            let _ = timeout(wait.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL), changed).await;
            sleep(MAKE_DELAY).await;
        }
    }

    /// Does what is to be done, until there is nothing; how long that may be so.
    async fn next_for_pools(&self) -> Option<Duration> {
        self.clean_what_is_left().await;
        loop {
            if self.shared.pools.state().is_closing || self.shared.is_draining() {
                self.end_spares().await;
                return None;
            }
            let facts = self.shared.pools.facts(self.shared.world.clock().monotonic());
            if facts.iter().all(|pool| pool.size == 0 && pool.ready == 0) {
                return None;
            }
            // Each guest on its way to its identity would be later for a machine that nobody waits for.
            let is_busy = self.shared.turns.available_permits() == 0;
            match plan::next(&facts, is_busy, self.is_short_of_memory().await) {
                Next::Make(bundle) => self.make_one(&bundle).await,
                Next::End(bundle) => {
                    if let Some(spare) = self.take_spare(|one| *one == bundle) {
                        self.end_spare(spare).await;
                    }
                }
                Next::Rest(wait) => return wait,
            }
        }
    }

    /// Whether VMs and machines together were promised more than there is. A host that does not tell is not short.
    async fn is_short_of_memory(&self) -> bool {
        let Ok(host) = self.shared.world.disk().host().await else { return false };
        let reserve = self.shared.config.limits.memory_reserve_mib.saturating_mul(MIB);
        let promised = promised_bytes(&self.records()).saturating_add(self.shared.pools.bytes());
        promised > host.memory_bytes.saturating_sub(reserve) || host.memory_available_bytes < reserve
    }

    async fn make_one(&self, bundle: &BundleId) {
        let made = self.make_spare(bundle).await;
        let now = self.shared.world.clock().monotonic();
        let mut state = self.shared.pools.state();
        let Some(pool) = state.pools.get_mut(bundle) else { return };
        match made {
            Ok(()) => pool.trouble = None,
            Err(why) => {
                let times = pool.trouble.as_ref().map_or(1, |(_, times, _)| times.saturating_add(1));
                tracing::warn!(%bundle, why, times, "no machine of this bundle is made ready");
                pool.trouble = Some((why, times, now));
            }
        }
    }

    /// Makes a machine of the bundle ready, or leaves nothing and says why.
    async fn make_spare(&self, bundle: &BundleId) -> Result<(), String> {
        let record = self.lend(bundle).await?;
        let id = record.id.clone();
        match self.prepare(record.clone()).await {
            Ok(spare) => {
                let process = spare.process.clone();
                {
                    let mut state = self.shared.pools.state();
                    let pool = state.pools.entry(bundle.clone()).or_insert_with(|| Pool::new(0));
                    pool.ready.push_back(spare);
                }
                tracing::debug!(vm = %id, %bundle, "a machine is ready");
                tokio::spawn(self.clone().watch_spare(bundle.clone(), id, process));
                Ok(())
            }
            Err((why, process)) => {
                self.clean(record, process).await;
                Err(why)
            }
        }
    }

    /// What a launch would be lent, for one that nobody asked for.
    async fn lend(&self, bundle: &BundleId) -> Result<VmRecord, String> {
        let request = LaunchRequest { bundle: Some(bundle.to_string()), ..LaunchRequest::default() };
        let bundles = self.shared.world.bundles();
        let view = bundles.find(bundle.as_str()).await.map_err(|error| chain(&error))?;
        self.shared.require_trust(&view).map_err(|error| chain(&error))?;
        let manifest = bundles.check(bundle).await.map_err(|error| chain(&error))?;
        // Names, memory and uids are handed out one by one.
        let _admission = self.shared.admission.lock().await;
        let disk = self.shared.world.disk();
        let host = disk.host().await.map_err(|error| format!("ask the host: {error}"))?;
        check(NewWork::Vm, &host, &self.shared.config, self.shared.is_draining()).map_err(|error| chain(&error))?;
        let additions = disk.command_line_additions().await;
        let (image, vms) = (image_of(&manifest), self.records());
        let mut limits = self.shared.config.limits;
        limits.memory_reserve_mib = limits.memory_reserve_mib.saturating_add(self.shared.pools.bytes() / MIB);
        let bundle = Some((bundle, &*manifest));
        let facts = Facts { limits: &limits, host: &host, image: &image, bundle, additions: &additions, vms: &vms };
        let spec = admit(&request, &facts).map_err(|error| chain(&error))?;
        let mut record = self.reserve(&request, spec).await.map_err(|error| chain(&error))?;
        let networks = self.shared.world.networks();
        record.jail =
            networks.take(&self.shared.pools.jails_beside(&vms)).ok_or_else(|| "there are no more jails".to_owned())?;
        // Before anything is there of it: the next agent knows by this that the uid is nobody's.
        let lease = Write::Lease { uid: record.uid, vm: record.id.clone() };
        self.shared.pools.state().there.insert(record.id.clone(), record.jail);
        if let Err(error) = self.shared.commit(vec![lease]).await {
            self.shared.pools.state().there.remove(&record.id);
            networks.give_back(record.jail);
            return Err(chain(&error));
        }
        Ok(record)
    }

    /// What a launch does before its guest runs.
    async fn prepare(&self, mut record: VmRecord) -> Result<Spare<W>, (String, Option<Process<W>>)> {
        let world = &self.shared.world;
        let early = |why| (why, None);
        world.disk().make(&record.id).await.map_err(|error| early(format!("make its directory: {error}")))?;
        world.networks().make(&record).await.map_err(|error| early(format!("make its jail: {}", chain(&error))))?;
        let process = world.vmm().start(&record).await.map_err(|error| early(chain(&error)))?;
        record.process = Some(process.record());
        let Some(bundle) = record.spec.bundle.clone() else {
            return Err(("it has no bundle".to_owned(), Some(process)));
        };
        let plan = RestorePlan {
            bundle,
            memory_bytes: u64::from(record.spec.memory_mib).saturating_mul(MIB),
            disks: Vec::new(),
            network_limits: record.spec.network_limits,
            filling: None,
        };
        let set = self.shared.working_set(&record).await;
        match world.vmm().ask(&record, self.shared.epoch, Ask::Restore(plan)).await {
            Ok(_) => {
                if let Some(set) = set {
                    self.shared.prefault(&record, set).await;
                }
                Ok(Spare { record, process })
            }
            Err(error) => Err((chain(&error), Some(process))),
        }
    }

    /// Takes one away whose process ends by itself. Ends when a launch took it: that VM's actor watches it then.
    async fn watch_spare(self, bundle: BundleId, id: VmId, process: Process<W>) {
        let end = process.ended().await;
        let spare = {
            let mut state = self.shared.pools.state();
            state.pools.get_mut(&bundle).and_then(|pool| {
                let at = pool.ready.iter().position(|spare| spare.record.id == id)?;
                pool.ready.remove(at)
            })
        };
        if let Some(spare) = spare {
            tracing::warn!(vm = %id, %bundle, %end, "a machine that was ready has ended");
            self.end_spare(spare).await;
            self.shared.pools.changed.notify_one();
        }
    }

    async fn end_spare(&self, spare: Spare<W>) {
        let Spare { record, process } = spare;
        self.clean(record, Some(process)).await;
    }

    /// Has nothing of it, or tries again later.
    async fn clean(&self, record: VmRecord, process: Option<Process<W>>) {
        if let Err((why, process)) = self.try_to_clean(&record, process).await {
            tracing::warn!(vm = %record.id, why, "something is left of a machine that was kept ready");
            self.shared.pools.state().left.push_back((record, process));
            return;
        }
        self.shared.pools.state().there.remove(&record.id);
        self.shared.pools.gone.notify_waiters();
    }

    async fn try_to_clean(
        &self,
        record: &VmRecord,
        process: Option<Process<W>>,
    ) -> Result<(), (String, Option<Process<W>>)> {
        let world = &self.shared.world;
        let process = match process {
            Some(process) => Some(process),
            // It may have been started, and not have been told of.
            None => {
                let found = world.vmm().find_stray(&record.id).await;
                found.map_err(|error| (format!("look for its process: {error}"), None))?
            }
        };
        // In this order: a process is never without what it lives in.
        if let Some(process) = process {
            let failed = |why| (why, Some(process.clone()));
            process.kill().map_err(|error| failed(format!("end its process: {error}")))?;
            let ended = timeout(END_LIMIT, process.ended()).await;
            ended.map_err(|_| failed("its process is not gone after it was killed".to_owned()))?;
        }
        let failed = |why| (why, None);
        let removed = world.networks().remove(record).await;
        removed.map_err(|error| failed(format!("remove its jail: {}", chain(&error))))?;
        let removed = world.disk().remove(&record.id).await;
        removed.map_err(|error| failed(format!("remove its directory: {error}")))?;
        let until = self.shared.steady().after(self.shared.config.uids.quarantine());
        let release = Write::Release { vm: record.id.clone(), quarantine_until: until };
        self.shared.commit(vec![release]).await.map_err(|error| failed(chain(&error)))
    }

    /// Takes away what could not be taken away before.
    async fn clean_what_is_left(&self) {
        let left = std::mem::take(&mut self.shared.pools.state().left);
        for (record, process) in left {
            self.clean(record, process).await;
        }
    }

    /// Ends all of them: the agent ends, and what is ready is of use to it alone.
    pub(in crate::agent) async fn close_pools(&self) {
        self.shared.pools.state().is_closing = true;
        // One that is being made is made first; the loop ends it.
        self.shared.pools.changed.notify_one();
        let are_gone = async {
            loop {
                let gone = self.shared.pools.gone.notified();
                self.end_spares().await;
                self.clean_what_is_left().await;
                if self.shared.pools.state().there.is_empty() {
                    return;
                }
                gone.await;
            }
        };
        if timeout(END_LIMIT, are_gone).await.is_err() {
            tracing::warn!("machines that were kept ready are left to the next agent");
        }
    }

    async fn end_spares(&self) {
        while let Some(spare) = self.take_spare(|_| true) {
            self.end_spare(spare).await;
        }
    }

    pub(super) async fn end_spares_of(&self, bundle: &BundleId) {
        while let Some(spare) = self.take_spare(|one| one == bundle) {
            self.end_spare(spare).await;
        }
    }

    fn take_spare(&self, is_one: impl Fn(&BundleId) -> bool) -> Option<Spare<W>> {
        let mut state = self.shared.pools.state();
        let mut pools = state.pools.iter_mut().filter(|(bundle, _)| is_one(bundle));
        pools.find_map(|(_, pool)| pool.ready.pop_front())
    }
}
