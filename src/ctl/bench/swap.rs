//! `hearth bench swap`: how long an idle VM's way out of memory and back takes, and what is left of it meanwhile.

use serde::Serialize;

use super::BenchError;
use super::launched::{Bench, from, launch_limit, with_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Host, Operation, Stats, SwapMode, SwapOutRequest, Vm};
use crate::cli::BenchSwapArgs;
use crate::clock::Clock;
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds, word};

/// One mode's rounds.
#[derive(Debug, Serialize)]
struct Series {
    mode: SwapMode,
    count: usize,
    /// From the call until its memory is out.
    out_ms: Option<Summary>,
    /// From the wake until its vCPUs run.
    resumed_ms: Option<Summary>,
    /// From the call to wake it until it is awake and its clock is right.
    awake_ms: Option<Summary>,
    /// Resident memory of its process while it is out; nothing without a process.
    resident_bytes: Option<Summary>,
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

/// Out and back, once.
#[derive(Debug, Clone, Copy)]
struct Round {
    mode: SwapMode,
    out_ms: f64,
    resumed_ms: Option<f64>,
    awake_ms: f64,
    resident_bytes: Option<u64>,
}

/// An empty JSON object.
#[derive(Serialize)]
struct Nothing {}

/// Launches a VM and moves it out and back.
pub(super) async fn measure(agent: &Agent, args: &BenchSwapArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let modes: Vec<SwapMode> = match args.mode {
        Some(mode) => vec![mode.into()],
        None => vec![SwapMode::Page, SwapMode::Hibernate],
    };
    let (bundle, rounds) = with_bundle(agent, &args.source, async |bench, bundle| {
        let (vms, _) = bench.launch("launch the VM to move out", 1, &from(bundle), launch_limit(1)).await?;
        let mut rounds = Vec::new();
        for vm in &vms {
            for mode in &modes {
                for index in 1..=args.count {
                    let title = format!("{} {index} of {}", word(mode), args.count);
                    rounds.push(shown(&title, bench.out_and_back(vm.id.as_str(), *mode)).await?);
                }
            }
        }
        Ok(rounds)
    })
    .await?;
    Ok(Report {
        host: host.name,
        bundle: bundle.name.clone().unwrap_or_else(|| bundle.id.to_string()),
        vcpus: bundle.vcpus,
        memory_mib: bundle.memory_mib,
        series: modes.iter().map(|mode| series(*mode, &rounds)).collect(),
    })
}

impl Bench<'_> {
    async fn out_and_back(&mut self, vm: &str, mode: SwapMode) -> Result<Round, BenchError> {
        let path = format!("/v1/vms/{vm}");
        let begun = self.clock.monotonic();
        let request = SwapOutRequest { mode, wake_after_s: None };
        let _: Vm = self.agent.post(&format!("{path}/swap-out"), &request, PROMPT).await?;
        let out_ms = milliseconds_since(&self.clock, begun);
        let stats: Stats = self.agent.get(&format!("{path}/stats")).await?;
        let begun = self.clock.monotonic();
        let awake: Vm = self.agent.post(&format!("{path}/wake"), &Nothing {}, PROMPT).await?;
        let awake_ms = milliseconds_since(&self.clock, begun);
        let mut resumed_ms = None;
        if let Some(operation) = &awake.operation_id {
            let operation: Operation = self.agent.get(&format!("/v1/operations/{operation}")).await?;
            let last = operation.steps.iter().position(|step| step.name == "run_machine");
            let steps = last.map(|last| &operation.steps[..=last]).unwrap_or_default();
            resumed_ms = (!steps.is_empty()).then(|| steps.iter().filter_map(|step| step.took_ms).sum());
        }
        let resident_bytes = stats.vmm.and_then(|vmm| vmm.resident_bytes);
        Ok(Round { mode, out_ms, resumed_ms, awake_ms, resident_bytes })
    }
}

fn series(mode: SwapMode, rounds: &[Round]) -> Series {
    let of_mode: Vec<&Round> = rounds.iter().filter(|round| round.mode == mode).collect();
    Series {
        mode,
        count: of_mode.len(),
        out_ms: Summary::of(of_mode.iter().map(|round| round.out_ms)),
        resumed_ms: Summary::of(of_mode.iter().filter_map(|round| round.resumed_ms)),
        awake_ms: Summary::of(of_mode.iter().map(|round| round.awake_ms)),
        resident_bytes: Summary::of(of_mode.iter().filter_map(|round| round.resident_bytes).map(float)),
    }
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let size = |value: f64| bytes(whole(value));
    let mut rows = Vec::new();
    for series in &report.series {
        let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
            let Some(summary) = summary else { return };
            let name = format!("{}: {what}", word(&series.mode));
            rows.push(summary.row(name, print));
        };
        add("call to out", series.out_ms.as_ref(), &milliseconds);
        add("process while it is out", series.resident_bytes.as_ref(), &size);
        add("wake to vCPUs running", series.resumed_ms.as_ref(), &milliseconds);
        add("call to awake", series.awake_ms.as_ref(), &milliseconds);
    }
    format!(
        "a VM of {} ({} vCPU, {} MiB) on {}, out of memory and back\n\n{}",
        report.bundle,
        report.vcpus,
        report.memory_mib,
        report.host,
        columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows),
    )
}
