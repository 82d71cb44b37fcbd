//! `hearth bench boot`: where the time goes from the launch call to the first answer of a command in the guest, and
//! what a VM that does nothing costs.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::process::{self, Overhead};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::stream::Exit;
use crate::api::types::{Host, Stats, Timings, Vm, VmLaunchRequest, Wait};
use crate::cli::BenchBootArgs;
use crate::clock::{Clock, SystemClock};
use crate::ctl::call::Agent;
use crate::ctl::output::note;
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds, pairs};
use crate::ctl::{exec, vm};

/// How long one launch may take, on hosts that emulate the guest's kernel.
const LAUNCH_LIMIT: Duration = Duration::from_secs(180);

/// How long a fresh guest has to come to rest before its idle CPU use is measured.
const SETTLE: Duration = Duration::from_secs(1);

/// The phases in order, as they are printed. The last two are sums.
const PHASES: [&str; 9] = ["network", "spawn", "load", "entry", "kernel", "init", "exec", "running", "total"];

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    image: String,
    vcpus: u32,
    memory_mib: u64,
    count: usize,
    /// By phase, in milliseconds. `running` ends when the VM runs, `total` with the first answer of a command.
    phases_ms: BTreeMap<&'static str, Summary>,
    /// VMM memory that is neither the guest's nor unchanged pages of the program's file.
    vmm_overhead_bytes: Option<Summary>,
    /// Guest memory in use after the first command.
    guest_memory_bytes: Option<Summary>,
    /// CPU use of an idle VM in percent of one processor.
    idle_cpu_percent: Option<Summary>,
    agent_resident_before_bytes: Option<u64>,
    agent_resident_after_bytes: Option<u64>,
    /// VMs alive when `agent_resident_after_bytes` was read.
    vms_alive: usize,
    launches: Vec<Launch>,
}

/// One launch.
#[derive(Debug, Clone, Serialize)]
struct Launch {
    id: String,
    timings: Timings,
    exec_ms: f64,
    vmm_overhead_bytes: Option<u64>,
    guest_memory_bytes: Option<u64>,
    idle_cpu_percent: Option<f64>,
}

impl Launch {
    fn phase(&self, name: &str) -> Option<f64> {
        let timings = &self.timings;
        match name {
            "network" => timings.network_ms,
            "spawn" => timings.spawn_ms,
            "load" => timings.load_ms,
            "entry" => timings.first_entry_ms,
            "kernel" => timings.kernel_ms,
            "init" => timings.init_ms,
            "exec" => Some(self.exec_ms),
            "running" => timings.total_ms,
            _ => timings.total_ms.map(|total| total + self.exec_ms),
        }
    }
}

/// Launches, measures and removes. Whatever happens, the VMs are removed in the end.
pub(super) async fn measure(agent: &Agent, args: &BenchBootArgs) -> Result<Report, BenchError> {
    let mut names = Vec::new();
    let outcome = tokio::select! {
        outcome = launch_all(agent, args, &mut names) => outcome,
        _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
    };
    for name in names {
        // A launch that was cut short may have left no VM; what cannot be removed is named.
        match shown(&format!("remove {name}"), vm::remove_one(agent, &name, Some(0))).await {
            Ok(()) => {}
            Err(error) if error.code().is_some() && outcome.is_err() => {}
            Err(error) => note(&format!("{name} could not be removed: {error}")),
        }
    }
    outcome
}

async fn launch_all(agent: &Agent, args: &BenchBootArgs, names: &mut Vec<String>) -> Result<Report, BenchError> {
    let clock = SystemClock::new();
    let host: Host = agent.get("/v1/host").await?;
    let before = process::resident_bytes(host.agent_pid);
    let (mut launches, mut after, mut alive) = (Vec::new(), None, 0);
    for index in 0..args.count {
        let name = format!("bench-{}-{index}", std::process::id());
        names.push(name.clone());
        let title = format!("boot {} of {}", index + 1, args.count);
        launches.push(shown(&title, launch_one(agent, args, &clock, &name)).await?);
        after = process::resident_bytes(host.agent_pid);
        alive = names.len();
        if !args.together {
            vm::remove_one(agent, &name, Some(0)).await?;
            names.pop();
        }
    }
    let summary = |value: &dyn Fn(&Launch) -> Option<f64>| Summary::of(launches.iter().filter_map(value));
    Ok(Report {
        host: host.name,
        image: args.image.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        count: launches.len(),
        phases_ms: PHASES
            .into_iter()
            .filter_map(|phase| Some((phase, summary(&|launch| launch.phase(phase))?)))
            .collect(),
        vmm_overhead_bytes: summary(&|launch| launch.vmm_overhead_bytes.map(float)),
        guest_memory_bytes: summary(&|launch| launch.guest_memory_bytes.map(float)),
        idle_cpu_percent: summary(&|launch| launch.idle_cpu_percent),
        agent_resident_before_bytes: before,
        agent_resident_after_bytes: after,
        vms_alive: alive,
        launches,
    })
}

async fn launch_one(
    agent: &Agent,
    args: &BenchBootArgs,
    clock: &SystemClock,
    name: &str,
) -> Result<Launch, BenchError> {
    let request = VmLaunchRequest {
        image: Some(args.image.clone()),
        name: Some(name.to_owned()),
        vcpus: Some(args.vcpus),
        memory_mib: Some(args.memory),
        session: args.session.as_ref().map(|session| session.as_str().to_owned()),
        // Looking at the operation again and again would take processor time from the guest.
        wait: Wait::Running,
        ..VmLaunchRequest::default()
    };
    let vm: Vm = agent.post("/v1/vms", &request, LAUNCH_LIMIT).await?;
    let asked = clock.monotonic();
    let exit = exec::quietly(agent, vm.id.as_str(), &["true"]).await;
    let exec_ms = milliseconds_since(clock, asked);
    match exit {
        Ok(Exit::Code(0)) => {}
        Ok(exit @ (Exit::Code(_) | Exit::Signal(_) | Exit::TimedOut)) => {
            return Err(BenchError::NotTrue { vm: name.to_owned(), exit });
        }
        Err(source) => return Err(BenchError::Exec { vm: name.to_owned(), source }),
    }
    let idle_cpu_percent = match vm.pid {
        Some(pid) if args.idle_seconds > 0 => idle(clock, pid, args.idle_seconds).await,
        Some(_) | None => None,
    };
    let overhead = overhead(agent, &vm).await?;
    Ok(Launch {
        id: vm.id.to_string(),
        timings: vm.timings,
        exec_ms,
        vmm_overhead_bytes: overhead.map(Overhead::own_bytes),
        guest_memory_bytes: overhead.map(|overhead| overhead.guest_bytes),
        idle_cpu_percent,
    })
}

async fn overhead(agent: &Agent, vm: &Vm) -> Result<Option<Overhead>, BenchError> {
    let stats: Stats = agent.get(&format!("/v1/vms/{}/stats", vm.id)).await?;
    Ok(stats.vmm.and_then(|vmm| {
        let start = vmm.guest_memory_host_address;
        process::overhead(vmm.pid, &(start..start.saturating_add(vmm.memory_bytes)))
    }))
}

/// CPU use in percent of one processor, over some seconds in which nobody asks the VM for anything.
async fn idle(clock: &SystemClock, pid: u32, seconds: u32) -> Option<f64> {
    tokio::time::sleep(SETTLE).await;
    let (from, before) = (clock.monotonic(), process::cpu_seconds(pid)?);
    tokio::time::sleep(Duration::from_secs(seconds.into())).await;
    let used = process::cpu_seconds(pid)? - before;
    Some(100_000.0 * used / milliseconds_since(clock, from))
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let size = |value: f64| bytes(whole(value));
    let percent = |value: f64| format!("{value:.1} %");
    let cells = |name: &str, summary: &Summary, print: &dyn Fn(f64) -> String| summary.row(name, print);
    let phases = PHASES.iter().filter_map(|phase| Some((*phase, report.phases_ms.get(phase)?)));
    let mut rows: Vec<_> = phases.map(|(phase, summary)| cells(phase, summary, &milliseconds)).collect();
    rows.extend(report.vmm_overhead_bytes.iter().map(|summary| cells("vmm overhead", summary, &size)));
    rows.extend(report.guest_memory_bytes.iter().map(|summary| cells("guest memory used", summary, &size)));
    rows.extend(report.idle_cpu_percent.iter().map(|summary| cells("idle cpu", summary, &percent)));
    let agent = format!("agent memory with {} VM{}", report.vms_alive, if report.vms_alive == 1 { "" } else { "s" });
    format!(
        "{} boots of {} with {} vCPU and {} MiB on {}\n\n{}\n\n{}",
        report.count,
        report.image,
        report.vcpus,
        report.memory_mib,
        report.host,
        columns(&["PHASE", "P50", "P99", "MIN", "MAX"], rows),
        pairs([
            ("agent memory before", report.agent_resident_before_bytes.map(bytes)),
            (agent.as_str(), report.agent_resident_after_bytes.map(bytes)),
        ]),
    )
}
