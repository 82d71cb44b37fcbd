//! Machines on their way here, as far as they are in this agent's memory: who waits for what, and what was decided. What
//! has to outlive the agent is in the VMs' records.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use super::peers::ArrivalReady;
use crate::clock::Monotonic;
use crate::ids::MigrationId;
use crate::wire::control::StreamToken;

/// Whose a machine is that stands ready on two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The target's.
    HandedOver,
    /// The source's.
    Kept,
}

/// A machine that is to be received.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Where it comes from.
    pub(super) from: IpAddr,
    /// What the source's stream begins with.
    pub(super) token: StreamToken,
    /// The source's certificate.
    pub(super) peer: Vec<u8>,
    /// Number of connections it makes.
    pub(super) connections: u8,
    /// Whether only what differs from its bundle comes.
    pub(super) on_base: bool,
    /// Who waits for the place to send it to.
    pub(super) ready: oneshot::Sender<ArrivalReady>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    waiting: Mutex<BTreeMap<MigrationId, Waiting>>,
    decisions: Mutex<BTreeMap<MigrationId, Arc<Deciding>>>,
}

/// What becomes of a machine that stands ready here.
#[derive(Debug)]
struct Deciding {
    decision: watch::Sender<Option<Decision>>,
    /// When it was run here.
    ran_at: OnceLock<Monotonic>,
}

/// Decisions that are kept: those of machines that are here by now are not asked for.
const DECISIONS_MAX: usize = 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arrivals {
    /// A machine is to come. Whether it is the first that is to come by this migration.
    pub(super) fn expect(&self, id: MigrationId, waiting: Waiting) -> bool {
        let mut all = lock(&self.waiting);
        let is_first = !all.contains_key(&id);
        if is_first {
            all.insert(id, waiting);
        }
        is_first
    }

    /// What is to be received by this migration, once.
    pub(super) fn take(&self, id: &MigrationId) -> Option<Waiting> {
        lock(&self.waiting).remove(id)
    }

    fn deciding(&self, id: &MigrationId) -> Arc<Deciding> {
        let mut decisions = lock(&self.decisions);
        if decisions.len() >= DECISIONS_MAX {
            decisions.retain(|_, deciding| deciding.decision.receiver_count() > 0);
        }
        let undecided = || Arc::new(Deciding { decision: watch::Sender::new(None), ran_at: OnceLock::new() });
        Arc::clone(decisions.entry(id.clone()).or_insert_with(undecided))
    }

    /// What was decided, when it was.
    pub(super) fn decision(&self, id: &MigrationId) -> watch::Receiver<Option<Decision>> {
        self.deciding(id).decision.subscribe()
    }

    /// The source has decided: once.
    pub(super) fn decide(&self, id: &MigrationId, decision: Decision) {
        self.deciding(id).decision.send_if_modified(|known| {
            let is_first = known.is_none();
            *known = known.or(Some(decision));
            is_first
        });
    }

    /// The machine that came by this migration runs from now on.
    pub(super) fn ran(&self, id: &MigrationId, now: Monotonic) {
        // One that was run before has run since then.
        let _ = self.deciding(id).ran_at.set(now);
    }

    /// For how long it has run.
    pub(super) fn ran_for(&self, id: &MigrationId, now: Monotonic) -> Duration {
        self.deciding(id).ran_at.get().map_or(Duration::ZERO, |at| now.since(*at))
    }
}
