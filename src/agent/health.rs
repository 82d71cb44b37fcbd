//! How this host is, at a glance: what it has and what is left of it, what failed of late, and what to do about it.
//! Finding what to warn of is pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::config::Config;
use super::door::HostView;
use super::record::OperationRecord;
use super::room::DESCRIPTORS_PER_VM;
use crate::clock::UnixNanos;
use crate::units::MIB;

/// Failed operations that are shown.
pub(crate) const FAILURES_SHOWN: u32 = 5;

/// A ledger without a backup of the last two days is worth a word: the daily one did not come.
const BACKUP_AGE_MAX: Duration = Duration::from_secs(48 * 3600);

/// Share of ten seconds in percent in which something waited for a processor, from which on a host is called busy.
const PRESSURE_MAX: f64 = 50.0;

/// What is known of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LedgerView {
    /// Size of its file and its log.
    pub bytes: u64,
    /// When the newest automatic backup was made.
    pub last_backup: Option<UnixNanos>,
    /// How many automatic backups there are.
    pub backups: usize,
    /// Events that are kept.
    pub events: u64,
    /// The number of the oldest of them.
    pub oldest_event: u64,
    /// The last operations that failed, newest first.
    pub failures: Vec<OperationRecord>,
    /// Why nothing can be written to it, if that is so.
    pub unwritable: Option<String>,
}

/// How pressed the host is: percent of the last ten seconds in which something waited.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// For a processor.
    pub cpu: Option<f64>,
    /// For memory.
    pub memory: Option<f64>,
    /// For a disk.
    pub io: Option<f64>,
}

/// Something to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What it is.
    pub what: String,
    /// What to do about it.
    pub todo: String,
}

fn warn(what: impl Into<String>, todo: impl Into<String>) -> Warning {
    Warning { what: what.into(), todo: todo.into() }
}

/// What to look at on this host, the most pressing first.
pub(crate) fn warnings(view: &HostView, config: &Config, now: UnixNanos) -> Vec<Warning> {
    let mut found = Vec::new();
    let facts = &view.facts;
    if view.is_draining {
        found.push(warn("this agent is draining: new work is refused", "wait for its end, then start it again"));
    }
    if let Some(why) = view.ledger.as_ref().and_then(|ledger| ledger.unwritable.as_ref()) {
        found.push(warn(
            format!("ledger: it cannot be written, so new work is refused; what runs goes on: {why}"),
            format!(
                "look at the file system of {}: `dmesg`, `df`, `mount`; then start the agent again",
                view.state_dir
            ),
        ));
    }
    let (free, reserve) = (facts.disk_free_bytes / MIB, config.limits.disk_reserve_mib);
    if free < reserve {
        found.push(warn(
            format!("disk: {free} MiB free, below the reserve of {reserve} MiB: new work is refused"),
            "remove bundles that nobody needs: `hearth bundle ls`, `hearth bundle rm`",
        ));
    } else if free < reserve.saturating_mul(2) {
        found.push(warn(
            format!("disk: {free} MiB free; below {reserve} MiB new work is refused"),
            "remove bundles that nobody needs before that",
        ));
    }
    let room = facts.descriptors_max.saturating_sub(facts.descriptors_open) / DESCRIPTORS_PER_VM;
    if room < 100 {
        found.push(warn(
            format!("descriptors: {} of {} are open", facts.descriptors_open, facts.descriptors_max),
            "raise LimitNOFILE= of the agent's unit; it counts from its next start",
        ));
    }
    if facts.memory_available_bytes / MIB < config.limits.memory_reserve_mib {
        found
            .push(warn("memory: less is available than the reserve: launches are refused", "stop VMs: `hearth vm ls`"));
    }
    found.extend(view.conflicts.iter().map(|conflict| {
        warn(format!("network: {conflict}"), "sessions are refused until the hosts agree: compare their [fabric]")
    }));
    if let Some(ledger) = &view.ledger {
        let age = ledger.last_backup.map(|at| Duration::from_nanos(now.0.saturating_sub(at.0)));
        if age.is_none_or(|age| age > BACKUP_AGE_MAX) {
            found.push(warn(
                "ledger: no backup of the last two days",
                "`hearth ledger backup` makes one, or says why not",
            ));
        }
    }
    if let Some(cpu) = view.pressure.cpu.filter(|cpu| *cpu >= PRESSURE_MAX) {
        let what = format!("processors: in {cpu:.0} % of the last ten seconds something waited for one");
        found.push(warn(what, "fewer VMs, or more processors; guests answer late"));
    }
    if facts.probe.as_ref().is_some_and(|probe| probe.get("usable") == Some(&serde_json::Value::Bool(false))) {
        found.push(warn("this host cannot run VMs", "`hearth host probe` says why"));
    }
    found
}

/// VMs by state.
pub(crate) fn count<'a>(states: impl Iterator<Item = &'a str>) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for state in states {
        *counts.entry(state.to_owned()).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::{Limits, Overrides, load};
    use crate::agent::world::HostFacts;

    fn view() -> HostView {
        let facts = HostFacts {
            memory_available_bytes: 8 << 30,
            disk_free_bytes: 100 << 30,
            descriptors_open: 50,
            descriptors_max: 1 << 20,
            ..HostFacts::default()
        };
        let ledger = LedgerView { last_backup: Some(UnixNanos(1_000)), ..LedgerView::default() };
        HostView {
            facts,
            started_at: UnixNanos(0),
            state_dir: String::new(),
            epoch: 1,
            vm_states: BTreeMap::new(),
            promised_bytes: 0,
            limits: Limits::default(),
            is_draining: false,
            connections: 0,
            pressure: Pressure::default(),
            conflicts: Vec::new(),
            ledger: Some(ledger),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn a_host_that_is_well_has_no_warnings_and_each_lack_has_its_own() {
        let config = load(Overrides::default()).unwrap();
        let now = UnixNanos(2_000);
        assert_eq!(warnings(&view(), &config, now), []);
        type Change = fn(&mut HostView);
        let lacks: [(&str, Change); 9] = [
            ("draining", |view| view.is_draining = true),
            ("below the reserve of 512 MiB", |view| view.facts.disk_free_bytes = 511 << 20),
            ("below 512 MiB new work", |view| view.facts.disk_free_bytes = 1023 << 20),
            ("descriptors: 50 of 1024", |view| view.facts.descriptors_max = 1024),
            ("memory: less", |view| view.facts.memory_available_bytes = 255 << 20),
            ("network: b contradicts", |view| view.conflicts = vec!["b contradicts".to_owned()]),
            ("ledger: no backup", |view| view.ledger = Some(LedgerView::default())),
            ("ledger: it cannot be written", |view| {
                let ledger = view.ledger.get_or_insert_default();
                ledger.unwritable = Some("why".to_owned());
            }),
            ("in 51 % of", |view| view.pressure.cpu = Some(51.0)),
        ];
        for (wanted, change) in lacks {
            let mut ill = view();
            change(&mut ill);
            let found = warnings(&ill, &config, now);
            assert_eq!(found.len(), 1, "{wanted}: {found:?}");
            assert!(found[0].what.contains(wanted) && !found[0].todo.is_empty(), "{wanted}: {found:?}");
        }
    }
}
