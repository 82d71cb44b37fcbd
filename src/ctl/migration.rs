//! `hearth vm migrate`, `hearth migration` and `hearth host evacuate`.

use std::future::Future;
use std::io::IsTerminal;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use serde::Serialize;

use super::Error;
use super::call::{Agent, CallError};
use super::launch::called;
use super::output::{Output, note};
use super::progress::{Copying, words};
use super::table::{age, bytes, columns, milliseconds, or_dash, pairs, word};
use super::vm::{path, state};
use crate::api::types::{
    Compress, MigrateRequest, Migration, MigrationEstimate, MigrationList, Moved, OnNonconverge, Uncompressed, Vm,
    VmList, VmState,
};
use crate::cli::{CompressWord, EvacuateArgs, MigrateArgs, MigrationCommand, NonconvergeWord, PolicyWords};

/// How much longer than its rounds may take a migration is waited for: the last of them, the pause, and both hosts'
/// records.
const MIGRATE_LIMIT: Duration = Duration::from_secs(10 * 60);

/// What the rounds may take when nothing else is asked for, in seconds: the agent's own default.
const DEADLINE_DEFAULT_S: u32 = 600;

/// Longest wait for an estimate: the other host may look at a bundle for the first time.
const ESTIMATE_LIMIT: Duration = Duration::from_secs(60);

/// Longest wait for a migration to be given up.
const CANCEL_LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at a migration.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// An empty JSON object: the body of verbs without parameters.
#[derive(Serialize)]
struct Nothing {}

fn request(to: &str, policy: PolicyWords, wait: bool) -> MigrateRequest {
    MigrateRequest {
        to: to.to_owned(),
        wait: Some(wait),
        connections: policy.connections,
        pause_ms_max: policy.pause,
        rounds_max: policy.rounds,
        deadline_s: policy.deadline,
        rate_bytes_max: policy.rate,
        throttle: policy.no_throttle.then_some(false),
        on_nonconverge: policy.on_nonconverge.map(|word| match word {
            NonconvergeWord::Force => OnNonconverge::Force,
            NonconvergeWord::Abort => OnNonconverge::Abort,
        }),
        compress: policy.compress.map(|word| match word {
            CompressWord::None => Compress::None,
            CompressWord::Lz4 => Compress::Lz4,
        }),
    }
}

fn limit(policy: PolicyWords) -> Duration {
    MIGRATE_LIMIT + Duration::from_secs(policy.deadline.unwrap_or(DEADLINE_DEFAULT_S).into())
}

pub(super) async fn migrate(agent: &Agent, out: Output, args: &MigrateArgs) -> Result<(), Error> {
    let to = format!("{}/migrate", path(&args.vm));
    if args.estimate {
        let request = request(args.to.as_str(), args.policy, true);
        let estimate: MigrationEstimate = agent.post(&format!("{to}/estimate"), &request, ESTIMATE_LIMIT).await?;
        return Ok(out.value(&estimate, estimated)?);
    }
    let request = request(args.to.as_str(), args.policy, !args.no_wait);
    if args.no_wait {
        let vm: Vm = agent.post(&to, &request, ESTIMATE_LIMIT).await?;
        let id = vm.migration_id.as_ref().map(ToString::to_string).unwrap_or_default();
        return Ok(out.value(&vm, |vm| format!("{} is {}: migration {id}", called(vm), state(vm)))?);
    }
    let title = format!("migrate {} to {}", args.vm.as_str(), args.to.as_str());
    let vm: Vm = watched(agent, &title, args.vm.as_str(), agent.post(&to, &request, limit(args.policy))).await?;
    let migration = match &vm.migration_id {
        Some(id) => agent.get::<Migration>(&format!("/v1/migrations/{id}")).await.ok(),
        None => None,
    };
    out.value(&vm, |vm| {
        let host = migration.as_ref().map_or_else(|| args.to.as_str().to_owned(), |migration| migration.peer.clone());
        format!("{} is on {host}{}", called(vm), migration.as_ref().map(took).unwrap_or_default())
    })?;
    Ok(())
}

/// Why memory goes as it is although it was to be compressed, in words.
const fn told(why: Uncompressed) -> &'static str {
    match why {
        Uncompressed::OlderHost => "no: the other host's agent is of an earlier version",
        Uncompressed::OlderVmm => "no: its VMM is of an earlier version (`hearth vm hand-over` renews it)",
    }
}

/// `12000 pages, 46.9 MiB, as 13.1 MiB`.
fn compressed(moved: &Moved) -> Option<String> {
    match (moved.compress, moved.uncompressed) {
        (_, Some(why)) => Some(told(why).to_owned()),
        (Compress::None, None) => None,
        (Compress::Lz4, None) => {
            let (pages, before) = (moved.packed_pages, moved.packed_pages.saturating_mul(4096));
            Some(format!("{pages} pages, {}, as {}", bytes(before), bytes(moved.packed_bytes)))
        }
    }
}

/// `; it stood still for 8.6 ms (3 rounds, 12.6 MiB)`, and what came of compressing it.
fn took(migration: &Migration) -> String {
    let (Some(pause), Some(moved)) = (migration.pause_ms, &migration.moved) else { return String::new() };
    let rounds = if moved.rounds == 1 { "round" } else { "rounds" };
    let compressed = compressed(moved).map(|told| format!("; compressed: {told}")).unwrap_or_default();
    let (pause, count, went) = (milliseconds(pause), moved.rounds, bytes(moved.bytes));
    format!("; it stood still for {pause} ({count} {rounds}, {went}){compressed}")
}

/// Waits for `work`, which moves a VM, and shows how far that is.
async fn watched<T>(agent: &Agent, title: &str, vm: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let bar = Copying::start(title);
    loop {
        tokio::select! {
            value = &mut work => return value,
            () = tokio::time::sleep(LOOK_INTERVAL) => {
                // Without an answer the last one stays.
                if let Some(migration) = present(agent, vm).await {
                    bar.tell(&migration);
                }
            }
        }
    }
}

/// The migration a VM is on.
async fn present(agent: &Agent, vm: &str) -> Option<Migration> {
    let vm: Vm = agent.get(&format!("/v1/vms/{vm}")).await.ok()?;
    let id = vm.migration_id.filter(|_| matches!(vm.state, VmState::Sending | VmState::HandedOver))?;
    agent.get(&format!("/v1/migrations/{id}")).await.ok()
}

fn estimated(estimate: &MigrationEstimate) -> String {
    let based_on = match estimate.based_on {
        0 => "no migration to that host is known: time and pause are not".to_owned(),
        count => format!("the last {count} migrations to that host"),
    };
    let asked = (estimate.compress != Compress::None).then(|| word(&estimate.compress));
    pairs([
        ("to", Some(format!("{}, which would take it", estimate.to))),
        ("free memory there", Some(bytes(estimate.memory_available_bytes))),
        ("its bundle there", Some(if estimate.has_base { "yes: what differs is copied" } else { "no" }.to_owned())),
        ("to copy, at most", Some(bytes(estimate.copy_bytes))),
        ("compressed", estimate.uncompressed.map(|why| told(why).to_owned()).or(asked)),
        ("rate", estimate.rate_bytes.map(|rate| format!("{}/s", bytes(rate)))),
        ("copying", estimate.copy_ms.map(milliseconds)),
        ("pause", estimate.pause_ms.map(milliseconds)),
        ("based on", Some(based_on)),
    ])
}

pub(super) async fn run(agent: &Agent, out: Output, command: MigrationCommand) -> Result<(), Error> {
    match command {
        MigrationCommand::Ls => {
            let list: MigrationList = agent.get("/v1/migrations").await?;
            let header = ["ID", "VM", "WAY", "HOST", "STATE", "PAUSE", "COPIED", "AGE"];
            out.value(&list, |list| columns(&header, list.migrations.iter().map(row)))?;
        }
        MigrationCommand::Show { migration } => {
            let migration: Migration = agent.get(&format!("/v1/migrations/{}", migration.as_str())).await?;
            out.value(&migration, details)?;
        }
        MigrationCommand::Cancel { migration } => {
            let to = format!("/v1/migrations/{}/cancel", migration.as_str());
            let migration: Migration = agent.post(&to, &Nothing {}, CANCEL_LIMIT).await?;
            out.value(&migration, |migration| {
                let vm = migration.vm_name.clone().unwrap_or_else(|| migration.vm_id.to_string());
                format!("{} is {}; {vm} goes on here", migration.id, word(&migration.state))
            })?;
        }
    }
    Ok(())
}

fn row(migration: &Migration) -> Vec<String> {
    let copied = migration.moved.map(|moved| moved.bytes);
    let copied = copied.or(migration.progress.map(|progress| progress.sent_bytes));
    vec![
        migration.id.to_string(),
        migration.vm_name.clone().unwrap_or_else(|| migration.vm_id.to_string()),
        word(&migration.direction),
        migration.peer.clone(),
        word(&migration.state),
        or_dash(migration.pause_ms.map(milliseconds).as_deref()),
        or_dash(copied.map(bytes).as_deref()),
        age(migration.created_at),
    ]
}

fn details(migration: &Migration) -> String {
    let (error, moved) = (migration.error.as_ref(), migration.moved.as_ref());
    let progress = migration.progress.as_ref();
    let mut text = pairs([
        ("id", Some(migration.id.to_string())),
        ("vm", Some(migration.vm_name.clone().unwrap_or_else(|| migration.vm_id.to_string()))),
        ("way", Some(format!("{} {}", word(&migration.direction), migration.peer))),
        ("state", Some(word(&migration.state))),
        ("round", progress.map(|now| (now.rounds + 1).to_string())),
        ("of this round", progress.map(|now| format!("{} of {}", bytes(now.round_sent_bytes), bytes(now.round_bytes)))),
        ("rate", progress.map(|now| format!("{}/s", bytes(now.rate_bytes)))),
        ("guest writes", progress.map(|now| format!("{}/s", bytes(now.dirty_rate_bytes)))),
        ("pause, if now", progress.map(|now| milliseconds(now.expected_pause_ms))),
        (
            "guest runs",
            progress.filter(|now| now.vcpu_share < 100).map(|now| format!("{} % of the time", now.vcpu_share)),
        ),
        ("error", error.map(|error| error.message.clone())),
        ("error code", error.map(|error| error.code.clone())),
        ("stood still", migration.pause_ms.map(milliseconds)),
        ("  stopping", moved.map(|moved| milliseconds(moved.steps.stop_ms))),
        ("  last pages", moved.map(|moved| milliseconds(moved.steps.last_pages_ms))),
        ("  made there", moved.map(|moved| milliseconds(moved.steps.ready_ms))),
        ("  decided", moved.map(|moved| milliseconds(moved.steps.decide_ms))),
        ("  started there", moved.map(|moved| milliseconds(moved.steps.start_ms))),
        ("copied before", moved.map(|moved| format!("{} in {} rounds", milliseconds(moved.running_ms), moved.rounds))),
        (
            "pages",
            moved.map(|moved| {
                format!(
                    "{}, {} of them while it stood still; {} more were all zeroes",
                    moved.pages, moved.last_pages, moved.zero_pages
                )
            }),
        ),
        ("on the wire", moved.map(|moved| bytes(moved.bytes))),
        ("compressed", moved.and_then(compressed)),
        ("without network", moved.and_then(|moved| moved.network_ms).map(milliseconds)),
        ("packets that followed", moved.map(|moved| moved.packets.to_string())),
        ("created", Some(format!("{:.3}", migration.created_at))),
        ("finished", migration.finished_at.map(|at| format!("{at:.3}"))),
    ]);
    let steps = migration
        .steps
        .iter()
        .map(|step| vec![words(&step.name), word(&step.state), or_dash(step.took_ms.map(milliseconds).as_deref())]);
    text.push_str("\n\n");
    text.push_str(&columns(&["STEP", "STATE", "TOOK"], steps));
    text
}

/// What became of each VM.
#[derive(Debug, Serialize)]
struct Evacuated {
    moved: Vec<MovedVm>,
    left: Vec<LeftVm>,
}

#[derive(Debug, Serialize)]
struct MovedVm {
    vm: String,
    to: Option<String>,
    pause_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
struct LeftVm {
    vm: String,
    why: String,
}

/// Moves all VMs that can be moved; whether all are gone.
pub(super) async fn evacuate(agent: &Agent, out: Output, args: &EvacuateArgs) -> Result<bool, Error> {
    let list: VmList = agent.get("/v1/vms").await?;
    let here = |vm: &Vm| !matches!(vm.state, VmState::Stopped | VmState::Failed | VmState::Gone | VmState::HandedOver);
    let vms: Vec<Vm> = list.vms.into_iter().filter(here).collect();
    let request = request(args.to.as_str(), args.policy, true);
    let one = async |vm: Vm| {
        let to = format!("/v1/vms/{}/migrate", vm.id);
        let moved: Result<Vm, CallError> = agent.post(&to, &request, limit(args.policy)).await;
        (called(&vm).to_owned(), moved)
    };
    let mut done = Evacuated { moved: Vec::new(), left: Vec::new() };
    let mut counted = super::progress::Counted::start("move VMs to other hosts", vms.len());
    let mut moving = std::pin::pin!(stream::iter(vms).map(one).buffer_unordered(args.at_once.into()));
    while let Some((vm, moved)) = moving.next().await {
        counted.one_more();
        match moved {
            Ok(record) => {
                let migration = match &record.migration_id {
                    Some(id) => agent.get::<Migration>(&format!("/v1/migrations/{id}")).await.ok(),
                    None => None,
                };
                let to = migration.as_ref().map(|migration| migration.peer.clone());
                done.moved.push(MovedVm { vm, to, pause_ms: migration.and_then(|migration| migration.pause_ms) });
            }
            // Somebody else was faster: gone is what was asked for.
            Err(error) if error.code() == Some("not_found") => {}
            Err(error) => done.left.push(LeftVm { vm, why: crate::report::chain(&error) }),
        }
    }
    drop(counted);
    let is_empty = done.left.is_empty();
    out.value(&done, |done| {
        let moved = done.moved.iter().map(|one| {
            let to = or_dash(one.to.as_deref());
            vec![one.vm.clone(), to, or_dash(one.pause_ms.map(milliseconds).as_deref())]
        });
        let left = done.left.iter().map(|one| vec![one.vm.clone(), "-".to_owned(), format!("stays: {}", one.why)]);
        columns(&["VM", "TO", "PAUSE"], moved.chain(left))
    })?;
    if !is_empty {
        note("some VMs stay on this host");
    }
    Ok(is_empty)
}
