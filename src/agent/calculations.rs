//! Calculations: taken down, given to members that have registered, and waited for. One task gives them out, level
//! triggered: it looks at what waits and at who is free whenever either changes. How one runs is in
//! [`super::calculation_run`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::Agent;
use super::calculation_record::{
    CalculationCause, CalculationOutput, CalculationRecord, CalculationState, INPUT_BYTES_MAX, TIMEOUT_S_DEFAULT,
    TIMEOUT_S_MAX, WORDS_BYTES_MAX,
};
use super::cluster_error::{CalculationError, ClusterError};
use super::cluster_record::{ClusterRecord, called};
use super::exec::{self, ExecSpec};
use super::launch::Key;
use super::ledger::{CalculationChange, ClusterRefusal, LedgerError, NewEvent, StoredAnswer, Taken, Write};
use super::record::{SCHEMA_VERSION, Subject, VmRecord};
use super::vm_state::VmState;
use super::world::{Records, World, random_array};
use crate::clock::{Clock, UnixNanos};
use crate::ids::{CalculationId, VmId};

/// Calculations that run in one member at once. More wait.
const PER_MEMBER_MAX: usize = 8;

/// Longest time between two looks at what waits: the host's clock may be set forward.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// A calculation to take down.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CalculationRequest {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `NAME=value` words added to the environment.
    pub env: Vec<String>,
    /// What it reads from its standard input.
    pub stdin: Vec<u8>,
    /// How long it has from now to its end, in seconds.
    pub timeout_s: Option<u32>,
    /// The member that is to run it, by its VM's id, the start of that, or its name.
    pub member: Option<String>,
    /// The member that is to run it, by its executor id.
    pub executor_id: Option<String>,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// What became of a request for a calculation.
#[derive(Debug, Clone)]
pub enum CalculationTaken {
    /// It is taken down, or the same request had it taken down.
    Calculation(Box<CalculationRecord>),
    /// The same request was answered like this.
    Answered(StoredAnswer),
}

/// What the agent keeps of calculations beside the ledger.
#[derive(Debug)]
pub(super) struct Calculations {
    /// Counts changes: those who wait for one look again.
    changed: watch::Sender<u64>,
    /// Whether some may wait for a member. Saves looking at the ledger whenever a VM changes.
    some_wait: AtomicBool,
    /// Those that this agent has given out, and to whom.
    running: Mutex<BTreeMap<CalculationId, VmId>>,
}

impl Default for Calculations {
    fn default() -> Self {
        // What an earlier agent left is looked at first.
        Self { changed: watch::Sender::new(0), some_wait: AtomicBool::new(true), running: Mutex::default() }
    }
}

impl Calculations {
    fn running(&self) -> MutexGuard<'_, BTreeMap<CalculationId, VmId>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some calculation is another than before.
    pub(super) fn note_change(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// How many calculations run in each member.
    pub(super) fn loads(&self) -> BTreeMap<VmId, usize> {
        let mut loads = BTreeMap::new();
        for vm in self.running().values() {
            *loads.entry(vm.clone()).or_insert(0) += 1;
        }
        loads
    }

    /// One that was given out is over.
    pub(super) fn ended(&self, id: &CalculationId) {
        self.running().remove(id);
        self.note_change();
    }
}

/// The event of a calculation's state.
pub(super) fn calculation_event(at: UnixNanos, record: &CalculationRecord) -> Write {
    let mut body = serde_json::json!({
        "calculation": record.id,
        "state": record.state.name(),
        "member": record.member,
        "executor_id": record.executor_id,
    });
    if let CalculationState::Failed { cause } = &record.state {
        body["cause"] = cause.name().into();
    }
    let (kind, subject) = ("calculation_state", Subject::Cluster(record.cluster.clone()));
    Write::Event(NewEvent { at, kind, subject, operation: None, body })
}

/// Whether a VM may be given calculations: it has registered, has heard of it, and runs.
fn is_ready(vm: &VmRecord) -> bool {
    vm.registration.is_some() && vm.state == VmState::Running
}

impl<W: World> Agent<W> {
    /// Checks a calculation and takes it down.
    pub(super) async fn take_calculation(
        &self,
        word: &str,
        request: CalculationRequest,
    ) -> Result<CalculationTaken, CalculationError> {
        if let Some(key) = &request.key
            && let Some(earlier) = self.earlier_calculation(word, key).await?
        {
            return Ok(earlier);
        }
        check(&request)?;
        let cluster = self.find_cluster(word).await?;
        let member = self.wanted_member(&cluster, &request)?;
        let random = random_array(&self.shared.world);
        let random = random.map_err(|source| ClusterError::Host { what: "read randomness", source })?;
        let now = self.shared.world.clock().wall();
        let CalculationRequest { argv, env, stdin, timeout_s, key, .. } = request;
        let record = CalculationRecord {
            schema_version: SCHEMA_VERSION,
            id: CalculationId::from_random(random),
            cluster: cluster.id.clone(),
            wanted: member.map(|vm| vm.id.clone()),
            member: None,
            executor_id: None,
            argv,
            env,
            timeout_s: timeout_s.unwrap_or(TIMEOUT_S_DEFAULT),
            state: CalculationState::Queued,
            stdout_truncated: false,
            stderr_truncated: false,
            created_at: now,
            started_at: None,
            ended_at: None,
        };
        let mut writes = vec![calculation_event(now, &record)];
        writes.extend(key.clone().map(|key| Write::Key(key.row(record.id.to_string(), self.shared.steady()))));
        let kept = record.clone();
        let queue = self.shared.world.records().with(move |store| store.queue_calculation(&kept, &stdin, &writes));
        match (queue.await, key) {
            (Ok(last), _) => self.shared.wake_readers(last),
            // The same request was faster.
            (Err(LedgerError::Taken { what: Taken::Key }), Some(key)) => {
                let earlier = self.earlier_calculation(word, &key).await?;
                return earlier.ok_or(CalculationError::Cluster(ClusterError::KeyMismatch));
            }
            (Err(LedgerError::Cluster(ClusterRefusal::TooManyCalculations { waiting })), _) => {
                return Err(CalculationError::TooMany { cluster: called(&cluster), waiting });
            }
            (Err(error), _) => return Err(ClusterError::refused(&cluster, error).into()),
        }
        self.shared.calculations.some_wait.store(true, Ordering::Release);
        self.shared.calculations.note_change();
        Ok(CalculationTaken::Calculation(Box::new(record)))
    }

    async fn earlier_calculation(&self, word: &str, key: &Key) -> Result<Option<CalculationTaken>, CalculationError> {
        let row = self.key_row(key).await.map_err(ClusterError::Ledger)?;
        let Some(row) = row else { return Ok(None) };
        if row.body_hash != key.body_hash {
            return Err(ClusterError::KeyMismatch.into());
        }
        if let Some(answer) = row.answer {
            return Ok(Some(CalculationTaken::Answered(answer)));
        }
        let cluster = self.find_cluster(word).await?;
        Ok(Some(CalculationTaken::Calculation(Box::new(self.find_calculation(&cluster, &row.object).await?))))
    }

    /// The member a request names, if it names one; it has to be registered.
    fn wanted_member(
        &self,
        cluster: &ClusterRecord,
        request: &CalculationRequest,
    ) -> Result<Option<Arc<VmRecord>>, CalculationError> {
        let no_member = |word: &str| CalculationError::NoMember { cluster: called(cluster), word: word.to_owned() };
        let mut living = self.cluster_members(&cluster.id);
        living.retain(|vm| vm.state.holds_resources());
        let executor_id = |vm: &VmRecord| vm.spec.cluster.as_ref().map(|member| member.executor_id.clone());
        let found = match (&request.member, &request.executor_id) {
            (None, None) => return Ok(None),
            (Some(_), Some(_)) => return Err(CalculationError::MemberAndExecutor),
            (Some(word), None) => {
                let vm = self.find(word).map_err(|_| no_member(word))?.id;
                living.into_iter().find(|member| member.id == vm).ok_or_else(|| no_member(word))?
            }
            (None, Some(word)) => {
                let found = living.into_iter().find(|vm| executor_id(vm).as_ref() == Some(word));
                found.ok_or_else(|| no_member(word))?
            }
        };
        if !is_ready(&found) {
            let executor_id = executor_id(&found).unwrap_or_default();
            let state = found.state.name();
            return Err(CalculationError::NotRegistered { cluster: called(cluster), executor_id, state });
        }
        Ok(Some(found))
    }

    /// The calculation of a cluster that a word means: its id, or the start of it.
    async fn find_calculation(
        &self,
        cluster: &ClusterRecord,
        word: &str,
    ) -> Result<CalculationRecord, CalculationError> {
        let start = word.strip_prefix(CalculationId::PREFIX).unwrap_or(word);
        let unknown = || CalculationError::Unknown { cluster: called(cluster), word: word.to_owned() };
        if start.is_empty() {
            return Err(unknown());
        }
        let (id, prefix) = (cluster.id.clone(), format!("{}{start}", CalculationId::PREFIX));
        let found = self.shared.world.records().with(move |store| store.calculations_by_prefix(&id, &prefix)).await;
        let mut found = found.map_err(ClusterError::Ledger)?;
        match (found.pop(), found.len()) {
            (Some(calculation), 0) => Ok(calculation),
            (Some(_), _) => Err(CalculationError::Ambiguous { word: word.to_owned() }),
            (None, _) => Err(unknown()),
        }
    }

    /// A calculation and what it wrote, once it is over; as it is when that takes longer than `wait`.
    pub(super) async fn await_calculation(
        &self,
        cluster: &str,
        word: &str,
        wait: Duration,
    ) -> Result<(CalculationRecord, CalculationOutput), CalculationError> {
        let until = Instant::now() + wait;
        let cluster = self.find_cluster(cluster).await?;
        let mut changed = self.shared.calculations.changed.subscribe();
        let record = loop {
            let record = self.find_calculation(&cluster, word).await?;
            if record.state.is_over() || timeout_at(until, changed.changed()).await.is_err() {
                break record;
            }
        };
        let id = record.id.clone();
        let output = self.shared.world.records().with(move |store| store.calculation_output(&id)).await;
        Ok((record, output.map_err(ClusterError::Ledger)?))
    }

    /// A cluster's calculations that are kept, newest first.
    pub(super) async fn list_calculations(&self, word: &str) -> Result<Vec<CalculationRecord>, CalculationError> {
        let id = self.find_cluster(word).await?.id;
        let all = self.shared.world.records().with(move |store| store.calculations(&id)).await;
        Ok(all.map_err(ClusterError::Ledger)?)
    }

    /// For good: gives calculations to members. What an earlier agent had given out is lost.
    pub(super) async fn give_out_calculations(self) {
        let mut vms = self.shared.vms_changed.subscribe();
        let mut calculations = self.shared.calculations.changed.subscribe();
        if let Err(error) = self.lose_what_ran().await {
            self.shared.declare_broken(&error);
            return;
        }
        loop {
            vms.mark_unchanged();
            calculations.mark_unchanged();
            let wait = match self.give_out().await {
                Ok(wait) => wait,
                Err(error) => {
                    self.shared.declare_broken(&error);
                    return;
                }
            };
            let change = async {
                tokio::select! {
                    _ = vms.changed() => {}
                    _ = calculations.changed() => {}
                }
            };
            let _ = timeout(wait, change).await;
        }
    }

    /// Nobody knows how far a calculation came whose agent has ended: it is not begun again.
    async fn lose_what_ran(&self) -> Result<(), LedgerError> {
        let under_way = self.shared.world.records().with(|store| store.calculations_under_way()).await?;
        for record in under_way.into_iter().filter(|record| record.state == CalculationState::Running) {
            let detail = "the agent ended while it ran".to_owned();
            self.end_calculation(record, CalculationState::Lost { detail }, None).await?;
        }
        Ok(())
    }

    /// One look at what waits and who is free; how long until the next.
    async fn give_out(&self) -> Result<Duration, LedgerError> {
        let calculations = &self.shared.calculations;
        if !calculations.some_wait.swap(false, Ordering::AcqRel) {
            return Ok(LOOK_INTERVAL);
        }
        let under_way = self.shared.world.records().with(|store| store.calculations_under_way()).await?;
        let mut wait = LOOK_INTERVAL;
        for record in under_way.into_iter().filter(|record| record.state == CalculationState::Queued) {
            let (now, deadline) = (self.shared.world.clock().wall(), record.deadline());
            if deadline <= now {
                let cause = CalculationCause::NobodyTookIt;
                self.end_calculation(record, CalculationState::Failed { cause }, None).await?;
                continue;
            }
            let members = self.cluster_members(&record.cluster);
            let lives = |vm: &VmId| members.iter().any(|member| member.id == *vm && member.state.holds_resources());
            if record.wanted.as_ref().is_some_and(|wanted| !lives(wanted)) {
                let cause = CalculationCause::MemberGone;
                self.end_calculation(record, CalculationState::Failed { cause }, None).await?;
                continue;
            }
            match choose(&members, record.wanted.as_ref(), &calculations.loads()) {
                Some(member) => self.give(record, member).await?,
                None => {
                    calculations.some_wait.store(true, Ordering::Release);
                    wait = wait.min(Duration::from_nanos(deadline.0 - now.0));
                }
            }
        }
        Ok(wait)
    }

    /// Gives a calculation to a member: in the ledger first.
    async fn give(&self, record: CalculationRecord, member: Arc<VmRecord>) -> Result<(), LedgerError> {
        let now = self.shared.world.clock().wall();
        let record = CalculationRecord {
            state: CalculationState::Running,
            member: Some(member.id.clone()),
            executor_id: member.spec.cluster.as_ref().map(|member| member.executor_id.clone()),
            started_at: Some(now),
            ..record
        };
        let writes = vec![calculation_event(now, &record)];
        let change = CalculationChange { from: "queued", record: record.clone(), output: None, writes };
        let changed = self.shared.world.records().with(move |store| store.change_calculation(&change)).await?;
        let Some(last) = changed else { return Ok(()) };
        self.shared.wake_readers(last);
        self.shared.calculations.running().insert(record.id.clone(), member.id.clone());
        self.shared.calculations.note_change();
        tracing::info!(calculation = %record.id, vm = %member.id, "a calculation begins");
        tokio::spawn(self.clone().calculate(record, member));
        Ok(())
    }

    /// Writes how a calculation ended, if nobody was faster.
    pub(super) async fn end_calculation(
        &self,
        record: CalculationRecord,
        state: CalculationState,
        output: Option<CalculationOutput>,
    ) -> Result<(), LedgerError> {
        let now = self.shared.world.clock().wall();
        let from = record.state.name();
        let record = CalculationRecord { state, ended_at: Some(now), ..record };
        tracing::info!(calculation = %record.id, state = record.state.name(), "a calculation is over");
        let writes = vec![calculation_event(now, &record)];
        let change = CalculationChange { from, record, output, writes };
        let changed = self.shared.world.records().with(move |store| store.change_calculation(&change)).await?;
        if let Some(last) = changed {
            self.shared.wake_readers(last);
        }
        self.shared.calculations.note_change();
        Ok(())
    }
}

/// The member to give a calculation to: the wanted one, or the one that has least to do and has been there longest.
fn choose(members: &[Arc<VmRecord>], wanted: Option<&VmId>, loads: &BTreeMap<VmId, usize>) -> Option<Arc<VmRecord>> {
    let load = |vm: &Arc<VmRecord>| loads.get(&vm.id).copied().unwrap_or(0);
    let ready = members.iter().filter(|vm| is_ready(vm) && wanted.is_none_or(|wanted| *wanted == vm.id));
    let free = ready.filter(|vm| load(vm) < PER_MEMBER_MAX);
    // The first of several: members are in the order they were made.
    free.min_by_key(|vm| load(vm)).cloned()
}

/// What can be said of a request without looking at the cluster.
fn check(request: &CalculationRequest) -> Result<(), CalculationError> {
    let CalculationRequest { argv, env, stdin, timeout_s, .. } = request;
    exec::check(&ExecSpec { argv: argv.clone(), env: env.clone(), ..ExecSpec::default() })?;
    let found = argv.iter().chain(env).map(String::len).sum();
    if found > WORDS_BYTES_MAX {
        return Err(CalculationError::Words { found });
    }
    if stdin.len() > INPUT_BYTES_MAX {
        return Err(CalculationError::Input { found: stdin.len() });
    }
    match timeout_s {
        Some(found) if !(1..=TIMEOUT_S_MAX).contains(found) => Err(CalculationError::Timeout { found: *found }),
        Some(_) | None => Ok(()),
    }
}
