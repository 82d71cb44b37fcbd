//! `hearth bench launch` and `hearth bench clone`: where the time goes from the launch call to a VM that goes on where
//! its bundle was frozen, and what a clone takes of the host's memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;

use super::BenchError;
use super::firecracker::{self, Anchor};
use super::process;
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{
    Bundle, BundleBuildRequest, Host, Operation, OperationState, Timings, Vm, VmLaunchRequest, Wait,
};
use crate::cli::{BenchCloneArgs, BenchLaunchArgs, BenchSource};
use crate::clock::{Clock, SystemClock};
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::output::note;
use crate::ctl::progress::{follow, shown};
use crate::ctl::table::{bytes, columns, milliseconds};
use crate::ctl::vm;

/// How long one launch may take, with a hundred others beside it.
const LAUNCH_LIMIT: Duration = Duration::from_secs(300);

/// The phases in order, as they are printed: each from the call on, but for the second and third.
const PHASES: [&str; 7] = ["network", "spawn", "restore", "resumed", "answered", "registered", "running"];

/// Launches under one condition.
#[derive(Debug, Serialize)]
pub(super) struct Series {
    /// What was different: `warm`, `cold`, `boot`, `10 at once` ...
    name: String,
    count: usize,
    /// By phase, in milliseconds since the call. `network`, `spawn` and `restore` are parts of `resumed`.
    phases_ms: BTreeMap<&'static str, Summary>,
    /// From the first call to the last VM that runs.
    wall_ms: f64,
    /// Proportional set size of each VMM, its guest's memory included, while all of them live.
    pss_bytes: Option<Summary>,
}

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    bundle: String,
    vcpus: u32,
    memory_mib: u64,
    /// Bytes the bundle takes on disk.
    bundle_bytes: u64,
    series: Vec<Series>,
    /// The same kernel and memory size under Firecracker, if a binary was given.
    firecracker: Option<Anchor>,
}

/// The bundle to launch from, and whether it was built for this.
struct Source {
    bundle: Bundle,
    built: bool,
}

/// VMs and what else has to go in the end.
struct Bench<'a> {
    agent: &'a Agent,
    clock: SystemClock,
    session: Option<String>,
    left: Vec<String>,
    number: usize,
}

impl Bench<'_> {
    /// Launches `count` VMs at once; they stay.
    async fn launch(&mut self, count: usize, request: &VmLaunchRequest) -> Result<(Vec<Vm>, f64), BenchError> {
        let begun = self.clock.monotonic();
        let mut calls = Vec::with_capacity(count);
        for _ in 0..count {
            let name = format!("bench-{}-{}", std::process::id(), self.number);
            self.number += 1;
            self.left.push(name.clone());
            let (agent, session) = (self.agent, self.session.clone());
            let request = VmLaunchRequest { name: Some(name), session, wait: Wait::Running, ..request.clone() };
            calls.push(async move { agent.post::<Vm>("/v1/vms", &request, LAUNCH_LIMIT).await });
        }
        let vms = join_all(calls).await.into_iter().collect::<Result<Vec<Vm>, _>>()?;
        Ok((vms, milliseconds_since(&self.clock, begun)))
    }

    /// Removes what was launched, all at once.
    async fn clear(&mut self) {
        let (left, agent) = (std::mem::take(&mut self.left), self.agent);
        let removals = left.iter().map(|name| async move { (name, vm::remove_one(agent, name, Some(0)).await) });
        for (name, removed) in join_all(removals).await {
            match removed {
                Ok(()) => {}
                // A launch that was cut short may have left no VM.
                Err(error) if error.code() == Some("not_found") => {}
                Err(error) => note(&format!("{name} could not be removed: {error}")),
            }
        }
    }

    /// One after the other, each removed before the next.
    async fn one_by_one(
        &mut self,
        name: &str,
        count: u32,
        request: &VmLaunchRequest,
        cold: bool,
    ) -> Result<Series, BenchError> {
        let (mut vms, mut wall_ms) = (Vec::new(), 0.0);
        for index in 0..count {
            if cold {
                drop_caches()?;
            }
            let title = format!("{name}: launch {} of {count}", index + 1);
            let (launched, took) = shown(&title, self.launch(1, request)).await?;
            vms.extend(launched);
            wall_ms += took;
            self.clear().await;
        }
        Ok(series(name.to_owned(), &vms, wall_ms, None))
    }

    /// All at once.
    async fn at_once(&mut self, count: u32, request: &VmLaunchRequest) -> Result<Series, BenchError> {
        let name = format!("{count} at once");
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let (vms, wall_ms) = shown(&name, self.launch(wanted, request)).await?;
        let pss = vms.iter().filter_map(|vm| process::pss_bytes(vm.pid?)).map(float);
        let pss = Summary::of(pss);
        self.clear().await;
        Ok(series(name, &vms, wall_ms, pss))
    }
}

fn series(name: String, vms: &[Vm], wall_ms: f64, pss_bytes: Option<Summary>) -> Series {
    let phases = PHASES.into_iter().filter_map(|name| {
        let values = vms.iter().filter_map(|vm| phase(&vm.timings, name));
        Some((name, Summary::of(values)?))
    });
    Series { name, count: vms.len(), phases_ms: phases.collect(), wall_ms, pss_bytes }
}

fn phase(timings: &Timings, name: &str) -> Option<f64> {
    match name {
        "network" => timings.network_ms,
        "spawn" => timings.spawn_ms,
        "restore" => timings.load_ms,
        "resumed" => timings.resumed_ms,
        "answered" => timings.answered_ms,
        "registered" => timings.registered_ms,
        _ => timings.total_ms,
    }
}

/// What the page cache holds is forgotten, so that the next launch reads the disk.
fn drop_caches() -> Result<(), BenchError> {
    let path = PathBuf::from("/proc/sys/vm/drop_caches");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"3"))
        .map_err(|source| BenchError::File { path, source })
}

async fn source(agent: &Agent, wanted: &BenchSource) -> Result<Source, BenchError> {
    if let Some(bundle) = &wanted.bundle {
        let bundle: Bundle = agent.get(&format!("/v1/bundles/{}", bundle.as_str())).await?;
        return Ok(Source { bundle, built: false });
    }
    let request = BundleBuildRequest {
        image: wanted.image.clone(),
        vcpus: Some(wanted.vcpus),
        memory_mib: Some(wanted.memory),
        ..BundleBuildRequest::default()
    };
    let operation: Operation = agent.post("/v1/bundles", &request, PROMPT).await?;
    let operation = follow(agent, "build a bundle", &operation.id).await?;
    match operation.bundle_id.as_ref().filter(|_| operation.state == OperationState::Succeeded) {
        Some(id) => Ok(Source { bundle: agent.get(&format!("/v1/bundles/{id}")).await?, built: true }),
        None => {
            let message = operation.error.map_or_else(|| "it was given up".to_owned(), |error| error.message);
            Err(BenchError::Build { message })
        }
    }
}

/// Launches one by one: warm, cold, beside a boot and, when asked for, Firecracker.
pub(super) async fn launches(agent: &Agent, args: &BenchLaunchArgs) -> Result<Report, BenchError> {
    measure(agent, &args.source, async |bench, source| {
        let request = from(source);
        let mut all = vec![bench.one_by_one("warm", args.count, &request, false).await?];
        if args.cold {
            all.push(bench.one_by_one("cold page cache", args.count.min(10), &request, true).await?);
        }
        if args.boot > 0 {
            let boot = VmLaunchRequest {
                image: Some(source.bundle.image.clone()),
                vcpus: Some(source.bundle.vcpus),
                memory_mib: Some(source.bundle.memory_mib),
                ..VmLaunchRequest::default()
            };
            all.push(bench.one_by_one("boot", args.boot, &boot, false).await?);
        }
        let anchor = match &args.firecracker {
            Some(binary) => {
                let host: Host = agent.get("/v1/host").await?;
                let guest = firecracker::Guest::of(&host, &source.bundle, args.images.as_deref())?;
                Some(shown("firecracker", firecracker::measure(binary, &guest, args.count)).await?)
            }
            None => None,
        };
        Ok((all, anchor))
    })
    .await
}

/// Launches many at once.
pub(super) async fn clones(agent: &Agent, args: &BenchCloneArgs) -> Result<Report, BenchError> {
    measure(agent, &args.source, async |bench, source| {
        let mut all = Vec::new();
        for count in &args.at_once {
            all.push(bench.at_once(*count, &from(source)).await?);
        }
        Ok((all, None))
    })
    .await
}

fn from(source: &Source) -> VmLaunchRequest {
    VmLaunchRequest { bundle: Some(source.bundle.id.to_string()), ..VmLaunchRequest::default() }
}

/// Whatever happens, VMs and a bundle that was built for this are removed in the end.
async fn measure(
    agent: &Agent,
    wanted: &BenchSource,
    work: impl AsyncFnOnce(&mut Bench<'_>, &Source) -> Result<(Vec<Series>, Option<Anchor>), BenchError>,
) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let source = source(agent, wanted).await?;
    let session = wanted.session.as_ref().map(|session| session.as_str().to_owned());
    let mut bench = Bench { agent, clock: SystemClock::new(), session, left: Vec::new(), number: 0 };
    let outcome = tokio::select! {
        outcome = work(&mut bench, &source) => outcome,
        _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
    };
    bench.clear().await;
    let bundle = &source.bundle;
    if source.built {
        let path = format!("/v1/bundles/{}", bundle.id);
        if let Err(error) = agent.delete(&path, PROMPT).await {
            note(&format!("{} could not be removed: {error}", bundle.id));
        }
    }
    let (series, firecracker) = outcome?;
    Ok(Report {
        host: host.name,
        bundle: bundle.name.clone().unwrap_or_else(|| bundle.id.to_string()),
        vcpus: bundle.vcpus,
        memory_mib: bundle.memory_mib,
        bundle_bytes: bundle.disk_bytes,
        series,
        firecracker,
    })
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let row = |name: String, summary: &Summary, print: &dyn Fn(f64) -> String| {
        vec![name, print(summary.p50), print(summary.p99), print(summary.min), print(summary.max)]
    };
    let mut rows = Vec::new();
    for series in &report.series {
        for phase in PHASES {
            if let Some(summary) = series.phases_ms.get(phase) {
                rows.push(row(format!("{}: {phase}", series.name), summary, &milliseconds));
            }
        }
        let pss = series.pss_bytes.as_ref();
        rows.extend(pss.map(|pss| row(format!("{}: memory (PSS)", series.name), pss, &|value| bytes(whole(value)))));
    }
    if let Some(anchor) = &report.firecracker {
        for (name, summary) in anchor.rows() {
            rows.push(row(format!("firecracker: {name}"), summary, &milliseconds));
        }
    }
    let walls = report.series.iter().map(|series| format!("{} {}", series.name, milliseconds(series.wall_ms)));
    format!(
        "{} ({} vCPU, {} MiB, {} on disk) on {}; milliseconds since the call\n\n{}\n\nall together: {}",
        report.bundle,
        report.vcpus,
        report.memory_mib,
        bytes(report.bundle_bytes),
        report.host,
        columns(&["PHASE", "P50", "P99", "MIN", "MAX"], rows),
        walls.collect::<Vec<_>>().join(", "),
    )
}
