//! `hearth bench snapshot`: how long a VM stands still while it becomes a bundle, as a whole, as a difference, and with
//! its memory copied before; and what is written for it.

use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::in_guest::{self, Running};
use super::launched::{Bench, from, launch_limit, with_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Bundle, Host, Operation, OperationState, SnapshotRequest};
use crate::cli::BenchSnapshotArgs;
use crate::clock::Clock;
use crate::ctl::bundle::DISK_LIMIT;
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Memory that a program in the guest writes again and again, in MiB.
const BUFFER_MIB: u64 = 16;

/// Snapshots of one kind.
#[derive(Debug, Serialize)]
struct Series {
    /// `full`, `diff` or `live`.
    name: &'static str,
    count: usize,
    /// How long no vCPU ran.
    pause_ms: Option<Summary>,
    /// From the call to a bundle that can be launched.
    total_ms: Option<Summary>,
    /// Guest memory that was written.
    memory_bytes: Option<Summary>,
    /// What the bundle takes on disk.
    disk_bytes: Option<Summary>,
    /// Of how many the guest's file systems were at rest.
    quiesced: usize,
}

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    bundle: String,
    vcpus: u32,
    memory_mib: u64,
    idle_ms: u32,
    populated_mib: u64,
    writes_mb_per_s: u32,
    series: Vec<Series>,
}

/// How a snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of all memory, while the VM stands still.
    Full,
    /// Of what differs from its bundle.
    Diff,
    /// Of all memory, most of it while the VM runs.
    Live,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Full, Self::Diff, Self::Live];

    const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Diff => "diff",
            Self::Live => "live",
        }
    }
}

/// One snapshot.
#[derive(Debug, Clone, Copy)]
struct Taken {
    kind: Kind,
    pause_ms: Option<f64>,
    total_ms: f64,
    memory_bytes: Option<u64>,
    disk_bytes: u64,
    quiesced: bool,
}

/// Launches a VM and takes snapshots of it, of each kind by turns.
pub(super) async fn measure(agent: &Agent, args: &BenchSnapshotArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let (bundle, taken) = with_bundle(agent, &args.source, async |bench, bundle| {
        let title = "launch the VM to take snapshots of";
        let (vms, _) = bench.launch(title, 1, &from(bundle), launch_limit(1)).await?;
        let idle = Duration::from_millis(args.idle.into());
        let mut taken = Vec::new();
        for vm in vms.iter().map(|vm| vm.id.as_str()) {
            let busy = bench.occupy(vm, args).await?;
            for index in 1..=args.count {
                for kind in Kind::ALL {
                    if kind == Kind::Diff {
                        // What is measured: a guest that did nothing for a while.
                        tokio::time::sleep(idle).await;
                    }
                    let title = format!("{} snapshot {index} of {}", kind.name(), args.count);
                    taken.push(shown(&title, bench.take(vm, kind)).await?);
                }
            }
            for program in busy {
                program.let_go(agent, vm).await?;
            }
        }
        Ok(taken)
    })
    .await?;
    Ok(Report {
        host: host.name,
        bundle: bundle.name.clone().unwrap_or_else(|| bundle.id.to_string()),
        vcpus: bundle.vcpus,
        memory_mib: bundle.memory_mib,
        idle_ms: args.idle,
        populated_mib: args.populate.unwrap_or(0),
        writes_mb_per_s: args.writes,
        series: Kind::ALL.into_iter().map(|kind| series(kind, &taken)).collect(),
    })
}

impl Bench<'_> {
    /// Has the guest hold and write memory, as far as that is asked for.
    async fn occupy(&self, vm: &str, args: &BenchSnapshotArgs) -> Result<Vec<Running>, BenchError> {
        let Some(file) = &args.probe else { return Ok(Vec::new()) };
        shown("copy the program into the guest", in_guest::install(self.agent, vm, file)).await?;
        let mut busy = Vec::new();
        if let Some(mib) = args.populate.filter(|mib| *mib > 0) {
            busy.push(shown("fill the guest's memory", Running::hold(self.agent, vm, mib)).await?);
        }
        if args.writes > 0 {
            let writing = Running::rewrite(self.agent, vm, (BUFFER_MIB, 0), Some(args.writes));
            busy.push(shown("have the guest write", writing).await?);
        }
        Ok(busy)
    }

    /// Takes one snapshot and removes it.
    async fn take(&mut self, vm: &str, kind: Kind) -> Result<Taken, BenchError> {
        let name = self.name(&format!("{}-", kind.name()));
        self.owes_bundle(name.clone());
        let (diff, live) = (kind == Kind::Diff, kind == Kind::Live);
        let request = SnapshotRequest { bundle_name: Some(name.clone()), diff, live, with_secrets: false };
        let begun = self.clock.monotonic();
        let operation: Operation = self.agent.post(&format!("/v1/vms/{vm}/snapshot"), &request, DISK_LIMIT).await?;
        let total_ms = milliseconds_since(&self.clock, begun);
        if operation.state != OperationState::Succeeded {
            let message = operation.error.map_or_else(|| "it was given up".to_owned(), |error| error.message);
            return Err(BenchError::Snapshot { vm: vm.to_owned(), message });
        }
        let bundle: Bundle = self.agent.get(&format!("/v1/bundles/{name}")).await?;
        self.agent.delete(&format!("/v1/bundles/{name}"), PROMPT).await?;
        self.owes_no_bundle(&name);
        Ok(Taken {
            kind,
            pause_ms: operation.pause_ms,
            total_ms,
            memory_bytes: operation.memory_bytes,
            disk_bytes: bundle.disk_bytes,
            quiesced: operation.quiesced == Some(true),
        })
    }
}

fn series(kind: Kind, taken: &[Taken]) -> Series {
    let of_kind: Vec<&Taken> = taken.iter().filter(|taken| taken.kind == kind).collect();
    Series {
        name: kind.name(),
        count: of_kind.len(),
        pause_ms: Summary::of(of_kind.iter().filter_map(|taken| taken.pause_ms)),
        total_ms: Summary::of(of_kind.iter().map(|taken| taken.total_ms)),
        memory_bytes: Summary::of(of_kind.iter().filter_map(|taken| taken.memory_bytes).map(float)),
        disk_bytes: Summary::of(of_kind.iter().map(|taken| float(taken.disk_bytes))),
        quiesced: of_kind.iter().filter(|taken| taken.quiesced).count(),
    }
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let size = |value: f64| bytes(whole(value));
    let mut rows = Vec::new();
    for series in &report.series {
        let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
            let Some(summary) = summary else { return };
            let name = format!("{}: {what}", series.name);
            rows.push(summary.row(name, print));
        };
        add("pause", series.pause_ms.as_ref(), &milliseconds);
        add("call to bundle", series.total_ms.as_ref(), &milliseconds);
        add("memory written", series.memory_bytes.as_ref(), &size);
        add("on disk", series.disk_bytes.as_ref(), &size);
    }
    let unquiet: usize = report.series.iter().map(|series| series.count - series.quiesced).sum();
    let mut text = format!(
        "snapshots of a VM of {} ({} vCPU, {} MiB) on {}\n{} MiB of it filled, {} MB/s written; each difference after {} of \
         idleness\n\n{}",
        report.bundle,
        report.vcpus,
        report.memory_mib,
        report.host,
        report.populated_mib,
        report.writes_mb_per_s,
        milliseconds(report.idle_ms.into()),
        columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows),
    );
    if unquiet > 0 {
        text.push_str(&format!("\n\nin {unquiet} of them the guest's file systems did not come to rest in time"));
    }
    text
}
