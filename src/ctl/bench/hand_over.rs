//! `hearth bench hand-over`: how long a guest stands still while another VMM process takes it over.

use serde::Serialize;

use super::BenchError;
use super::launched::{Bench, from, launch_limit, with_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Host, Operation, Vm, VmLaunchRequest};
use crate::cli::BenchHandOverArgs;
use crate::clock::Clock;
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// One VM's rounds.
#[derive(Debug, Serialize)]
struct Series {
    /// `bundle` or `image`: what it was launched from.
    from: &'static str,
    count: usize,
    /// How long no vCPU ran.
    pause_ms: Option<Summary>,
    /// Of that, until it stood ready in the other process.
    held_ms: Option<Summary>,
    /// From the call until all is done.
    total_ms: Option<Summary>,
    /// Bytes that were copied.
    bytes: Option<Summary>,
}

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    bundle: String,
    vcpus: u32,
    memory_mib: u64,
    series: Vec<Series>,
}

/// Handed over, once.
#[derive(Debug, Clone, Copy)]
struct Round {
    pause_ms: Option<f64>,
    held_ms: Option<f64>,
    total_ms: f64,
    bytes: Option<u64>,
}

/// An empty JSON object.
#[derive(Serialize)]
struct Nothing {}

/// Launches two VMs and hands each over, again and again.
pub(super) async fn measure(agent: &Agent, args: &BenchHandOverArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let (bundle, series) = with_bundle(agent, &args.source, async |bench, bundle| {
        let of_bundle = from(bundle);
        let of_image = VmLaunchRequest {
            image: Some(bundle.image.clone()),
            vcpus: Some(bundle.vcpus),
            memory_mib: Some(bundle.memory_mib),
            ..VmLaunchRequest::default()
        };
        let mut all = Vec::new();
        for (name, request) in [("bundle", of_bundle), ("image", of_image)] {
            let title = format!("launch a VM of the {name}");
            let (vms, _) = bench.launch(&title, 1, &request, launch_limit(1)).await?;
            let mut rounds = Vec::new();
            for (vm, index) in vms.iter().flat_map(|vm| (1..=args.count).map(move |index| (vm, index))) {
                let title = format!("hand over the VM of the {name}, {index} of {}", args.count);
                rounds.push(shown(&title, bench.hand_over(vm.id.as_str())).await?);
            }
            bench.clear().await;
            all.push(series(name, &rounds));
        }
        Ok(all)
    })
    .await?;
    Ok(Report {
        host: host.name,
        bundle: bundle.name.clone().unwrap_or_else(|| bundle.id.to_string()),
        vcpus: bundle.vcpus,
        memory_mib: bundle.memory_mib,
        series,
    })
}

impl Bench<'_> {
    async fn hand_over(&mut self, vm: &str) -> Result<Round, BenchError> {
        let begun = self.clock.monotonic();
        let vm: Vm = self.agent.post(&format!("/v1/vms/{vm}/hand-over"), &Nothing {}, PROMPT).await?;
        let total_ms = milliseconds_since(&self.clock, begun);
        let Some(operation) = &vm.operation_id else {
            return Ok(Round { pause_ms: None, held_ms: None, total_ms, bytes: None });
        };
        let done: Operation = self.agent.get(&format!("/v1/operations/{operation}")).await?;
        let (held_ms, bytes) = (done.moved.map(|moved| moved.held_ms), done.moved.map(|moved| moved.bytes));
        Ok(Round { pause_ms: done.pause_ms, held_ms, total_ms, bytes })
    }
}

fn series(from: &'static str, rounds: &[Round]) -> Series {
    Series {
        from,
        count: rounds.len(),
        pause_ms: Summary::of(rounds.iter().filter_map(|round| round.pause_ms)),
        held_ms: Summary::of(rounds.iter().filter_map(|round| round.held_ms)),
        total_ms: Summary::of(rounds.iter().map(|round| round.total_ms)),
        bytes: Summary::of(rounds.iter().filter_map(|round| round.bytes).map(float)),
    }
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let size = |value: f64| bytes(whole(value));
    let mut rows = Vec::new();
    for series in &report.series {
        let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
            let Some(summary) = summary else { return };
            rows.push(summary.row(format!("{}: {what}", series.from), print));
        };
        add("pause", series.pause_ms.as_ref(), &milliseconds);
        add("held until ready", series.held_ms.as_ref(), &milliseconds);
        add("call to done", series.total_ms.as_ref(), &milliseconds);
        add("copied", series.bytes.as_ref(), &size);
    }
    format!(
        "VMs of {} ({} vCPU, {} MiB) on {}, handed over to new processes\n\n{}",
        report.bundle,
        report.vcpus,
        report.memory_mib,
        report.host,
        columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows),
    )
}
