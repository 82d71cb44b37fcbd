//! `hearth bench snapshot`: how long a VM stands still while it becomes a bundle, as a whole and as a difference, and
//! what is written for it.

use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::launched::{Bench, from, launch_limit, with_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Bundle, Host, Operation, OperationState, SnapshotRequest};
use crate::cli::BenchSnapshotArgs;
use crate::clock::Clock;
use crate::ctl::bundle::DISK_LIMIT;
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Snapshots of one kind.
#[derive(Debug, Serialize)]
struct Series {
    /// `full` or `diff`.
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
    series: Vec<Series>,
}

/// One snapshot.
#[derive(Debug, Clone, Copy)]
struct Taken {
    diff: bool,
    pause_ms: Option<f64>,
    total_ms: f64,
    memory_bytes: Option<u64>,
    disk_bytes: u64,
    quiesced: bool,
}

/// Launches a VM and takes snapshots of it, a full one and a difference by turns.
pub(super) async fn measure(agent: &Agent, args: &BenchSnapshotArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let (bundle, taken) = with_bundle(agent, &args.source, async |bench, bundle| {
        let title = "launch the VM to take snapshots of";
        let (vms, _) = bench.launch(title, 1, &from(bundle), launch_limit(1)).await?;
        let idle = Duration::from_millis(args.idle.into());
        let mut taken = Vec::new();
        for vm in &vms {
            for index in 1..=args.count {
                for diff in [false, true] {
                    if diff {
                        // What is measured: a guest that did nothing for a while.
                        tokio::time::sleep(idle).await;
                    }
                    let kind = if diff { "difference" } else { "full snapshot" };
                    let title = format!("{kind} {index} of {}", args.count);
                    taken.push(shown(&title, bench.take(vm.id.as_str(), diff)).await?);
                }
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
        series: vec![series("full", &taken, false), series("diff", &taken, true)],
    })
}

impl Bench<'_> {
    /// Takes one snapshot and removes it.
    async fn take(&mut self, vm: &str, diff: bool) -> Result<Taken, BenchError> {
        let name = self.name(if diff { "diff-" } else { "full-" });
        self.owes_bundle(name.clone());
        let request = SnapshotRequest { bundle_name: Some(name.clone()), diff };
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
            diff,
            pause_ms: operation.pause_ms,
            total_ms,
            memory_bytes: operation.memory_bytes,
            disk_bytes: bundle.disk_bytes,
            quiesced: operation.quiesced == Some(true),
        })
    }
}

fn series(name: &'static str, taken: &[Taken], diff: bool) -> Series {
    let of_kind: Vec<&Taken> = taken.iter().filter(|taken| taken.diff == diff).collect();
    Series {
        name,
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
        "snapshots of a VM of {} ({} vCPU, {} MiB) on {}\neach difference after {} of idleness\n\n{}",
        report.bundle,
        report.vcpus,
        report.memory_mib,
        report.host,
        milliseconds(report.idle_ms.into()),
        columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows),
    );
    if unquiet > 0 {
        text.push_str(&format!("\n\nin {unquiet} of them the guest's file systems did not come to rest in time"));
    }
    text
}
