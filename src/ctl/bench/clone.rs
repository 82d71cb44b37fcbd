//! `hearth bench launch` and `hearth bench clone`: where the time goes from the launch call to a VM that goes on where
//! its bundle was frozen, and what a clone takes of the host's memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::firecracker::{self, Anchor};
use super::launched::{Bench, from, launch_limit, with_bundle};
use super::process;
use super::summary::{Summary, float, whole};
use crate::api::types::{Bundle, Host, Timings, Vm, VmLaunchRequest};
use crate::cli::{BenchCloneArgs, BenchLaunchArgs, BenchSource};
use crate::ctl::call::Agent;
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Most machines that a pool may have.
const POOL_SIZE_MAX: u32 = 256;

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
    /// Page faults of each one's vCPUs until it ran.
    vcpu_faults: Option<Summary>,
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

/// What is seen to before each launch.
#[derive(Debug, Clone, Copy)]
enum Before<'a> {
    Nothing,
    /// Nothing of the bundle is in memory.
    Cold,
    /// So many machines of the bundle are ready.
    Ready(&'a Bundle, u32),
}

impl Bench<'_> {
    /// One after the other, each removed before the next.
    async fn one_by_one(
        &mut self,
        name: &str,
        count: u32,
        request: &VmLaunchRequest,
        before: Before<'_>,
    ) -> Result<Series, BenchError> {
        let (mut vms, mut faults, mut wall_ms) = (Vec::new(), Vec::new(), 0.0);
        for index in 0..count {
            match before {
                Before::Nothing => {}
                Before::Cold => drop_caches()?,
                Before::Ready(bundle, size) => self.fill_pool(bundle, size).await?,
            }
            let title = format!("{name}: launch {} of {count}", index + 1);
            let (launched, took) = self.launch(&title, 1, request, launch_limit(1)).await?;
            faults.extend(faults_of(&launched));
            vms.extend(launched);
            wall_ms += took;
            self.clear().await;
        }
        Ok(Series { vcpu_faults: Summary::of(faults), ..series(name.to_owned(), &vms, wall_ms) })
    }

    /// All at once.
    async fn at_once(
        &mut self,
        count: u32,
        request: &VmLaunchRequest,
        limit: Option<Duration>,
    ) -> Result<Series, BenchError> {
        let name = format!("{count} at once");
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let limit = limit.unwrap_or_else(|| launch_limit(wanted));
        let (vms, wall_ms) = self.launch(&name, wanted, request, limit).await?;
        let pss = vms.iter().filter_map(|vm| process::pss_bytes(vm.pid?)).map(float);
        let (pss_bytes, vcpu_faults) = (Summary::of(pss), Summary::of(faults_of(&vms)));
        shown(&format!("remove {count} VMs"), self.clear()).await;
        Ok(Series { vcpu_faults, pss_bytes, ..series(name, &vms, wall_ms) })
    }
}

fn faults_of(vms: &[Vm]) -> impl Iterator<Item = f64> {
    vms.iter().filter_map(|vm| process::vcpu_faults(vm.pid?)).map(float)
}

fn series(name: String, vms: &[Vm], wall_ms: f64) -> Series {
    let phases = PHASES.into_iter().filter_map(|name| {
        let values = vms.iter().filter_map(|vm| phase(&vm.timings, name));
        Some((name, Summary::of(values)?))
    });
    Series { name, count: vms.len(), phases_ms: phases.collect(), wall_ms, vcpu_faults: None, pss_bytes: None }
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

/// Launches one by one: warm, cold, beside a boot and, when asked for, Firecracker.
pub(super) async fn launches(agent: &Agent, args: &BenchLaunchArgs) -> Result<Report, BenchError> {
    measure(agent, &args.source, async |bench, bundle| {
        let request = from(bundle);
        let mut all = vec![bench.one_by_one("warm", args.count, &request, Before::Nothing).await?];
        if args.cold {
            all.push(bench.one_by_one("cold page cache", args.count.min(10), &request, Before::Cold).await?);
        }
        if let Some(size) = args.pool {
            let name = format!("pool of {size}");
            all.push(bench.one_by_one(&name, args.count, &request, Before::Ready(bundle, size)).await?);
            bench.leave_pool().await;
        }
        if args.boot > 0 {
            let boot = VmLaunchRequest {
                image: Some(bundle.image.clone()),
                vcpus: Some(bundle.vcpus),
                memory_mib: Some(bundle.memory_mib),
                ..VmLaunchRequest::default()
            };
            all.push(bench.one_by_one("boot", args.boot, &boot, Before::Nothing).await?);
        }
        let anchor = match &args.firecracker {
            Some(binary) => {
                let host: Host = agent.get("/v1/host").await?;
                let guest = firecracker::Guest::of(&host, bundle, args.images.as_deref())?;
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
    measure(agent, &args.source, async |bench, bundle| {
        let mut all = Vec::new();
        let limit = args.timeout.map(|ms| Duration::from_millis(ms.into()));
        for count in &args.at_once {
            if args.pool {
                let ready = bench.fill_pool(bundle, (*count).min(POOL_SIZE_MAX));
                shown(&format!("make {count} machines ready"), ready).await?;
            }
            all.push(bench.at_once(*count, &from(bundle), limit).await?);
        }
        Ok((all, None))
    })
    .await
}

/// The report of what `work` measures.
async fn measure(
    agent: &Agent,
    wanted: &BenchSource,
    work: impl AsyncFnOnce(&mut Bench<'_>, &Bundle) -> Result<(Vec<Series>, Option<Anchor>), BenchError>,
) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let (bundle, (series, firecracker)) = with_bundle(agent, wanted, work).await?;
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
    let row = |name: String, summary: &Summary, print: &dyn Fn(f64) -> String| summary.row(name, print);
    let mut rows = Vec::new();
    for series in &report.series {
        for phase in PHASES {
            if let Some(summary) = series.phases_ms.get(phase) {
                rows.push(row(format!("{}: {phase}", series.name), summary, &milliseconds));
            }
        }
        let faults = series.vcpu_faults.as_ref();
        rows.extend(
            faults
                .map(|faults| row(format!("{}: vCPU faults", series.name), faults, &|value| whole(value).to_string())),
        );
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
