//! `hearth bench migrate`: how long a guest stands still while it moves to another host, and how long all of it takes.

use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::launched::{Bench, launch_limit, without_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Host, MigrateRequest, Operation, OperationList, Vm, VmLaunchRequest};
use crate::cli::BenchMigrateArgs;
use crate::clock::Clock;
use crate::ctl::call::Agent;
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Longest wait for one way.
const WAY_LIMIT: Duration = Duration::from_secs(15 * 60);

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    to: String,
    vcpus: u32,
    memory_mib: u64,
    connections: u8,
    /// Ways, there and back.
    count: usize,
    /// How long no vCPU ran.
    pause_ms: Option<Summary>,
    /// Of that, until it stood ready on the other host.
    held_ms: Option<Summary>,
    /// From the call until it is told that it runs there.
    total_ms: Option<Summary>,
    /// Rounds in which memory was copied.
    rounds: Option<Summary>,
    /// Bytes on the wire.
    bytes: Option<Summary>,
    /// The same over the guest's memory.
    of_memory: Option<Summary>,
    /// Bytes a second on the wire, of all but preparing and starting.
    rate_bytes: Option<Summary>,
}

/// One way.
#[derive(Debug, Clone, Copy)]
struct Way {
    total_ms: f64,
    pause_ms: Option<f64>,
    held_ms: Option<f64>,
    rounds: Option<u32>,
    bytes: Option<u64>,
    rate_bytes: Option<f64>,
}

/// Boots a VM and moves it there and back.
pub(super) async fn measure(agent: &Agent, args: &BenchMigrateArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let other = Agent::at(args.back_socket.clone());
    let request = VmLaunchRequest {
        image: Some(args.image.clone()),
        vcpus: Some(args.vcpus),
        memory_mib: Some(args.memory),
        ..VmLaunchRequest::default()
    };
    let session = args.session.as_ref().map(|session| session.as_str().to_owned());
    let ways = without_bundle(agent, session, async |bench| {
        let (vms, _) = bench.launch("boot the VM to move", 1, &request, launch_limit(1)).await?;
        let mut ways = Vec::new();
        for (vm, index) in vms.iter().flat_map(|vm| (1..=args.count).map(move |index| (vm, index))) {
            let id = vm.id.as_str();
            let title = format!("there and back, {index} of {}", args.count);
            let round = async {
                let there = bench.way(agent, id, args.to.as_str(), args.connections).await?;
                Ok::<_, BenchError>([there, bench.way(&other, id, args.back_to.as_str(), args.connections).await?])
            };
            ways.extend(shown(&title, round).await?);
        }
        Ok(ways)
    })
    .await?;
    let memory = float(args.memory << 20);
    Ok(Report {
        host: host.name,
        to: args.to.as_str().to_owned(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        connections: args.connections,
        count: ways.len(),
        pause_ms: Summary::of(ways.iter().filter_map(|way| way.pause_ms)),
        held_ms: Summary::of(ways.iter().filter_map(|way| way.held_ms)),
        total_ms: Summary::of(ways.iter().map(|way| way.total_ms)),
        rounds: Summary::of(ways.iter().filter_map(|way| way.rounds).map(f64::from)),
        bytes: Summary::of(ways.iter().filter_map(|way| way.bytes).map(float)),
        of_memory: Summary::of(ways.iter().filter_map(|way| way.bytes).map(|bytes| float(bytes) / memory)),
        rate_bytes: Summary::of(ways.iter().filter_map(|way| way.rate_bytes)),
    })
}

impl Bench<'_> {
    async fn way(&self, from: &Agent, vm: &str, to: &str, connections: u8) -> Result<Way, BenchError> {
        let begun = self.clock.monotonic();
        let request = MigrateRequest { to: to.to_owned(), connections: Some(connections), ..MigrateRequest::default() };
        let _: Vm = from.post(&format!("/v1/vms/{vm}/migrate"), &request, WAY_LIMIT).await?;
        let total_ms = milliseconds_since(&self.clock, begun);
        let list: OperationList = from.get("/v1/operations").await?;
        let left = |operation: &&Operation| operation.kind == "vm_leave" && operation.object == vm;
        let left = list.operations.iter().find(left);
        let moved = left.and_then(|left| left.moved);
        Ok(Way {
            total_ms,
            pause_ms: left.and_then(|left| left.pause_ms),
            held_ms: moved.map(|moved| moved.held_ms),
            rounds: moved.map(|moved| moved.rounds),
            bytes: moved.map(|moved| moved.bytes),
            rate_bytes: moved.map(|moved| float(moved.bytes) * 1000.0 / (moved.running_ms + moved.held_ms)),
        })
    }
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let size = |value: f64| bytes(whole(value));
    let number = |value: f64| format!("{value:.0}");
    let part = |value: f64| format!("{value:.3}");
    let mut rows = Vec::new();
    let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
        let Some(summary) = summary else { return };
        rows.push(summary.row(what.to_owned(), print));
    };
    add("pause", report.pause_ms.as_ref(), &milliseconds);
    add("held until ready", report.held_ms.as_ref(), &milliseconds);
    add("call to running there", report.total_ms.as_ref(), &milliseconds);
    add("rounds", report.rounds.as_ref(), &number);
    add("on the wire", report.bytes.as_ref(), &size);
    add("of its memory", report.of_memory.as_ref(), &part);
    add("rate per second", report.rate_bytes.as_ref(), &size);
    let by = if report.connections == 1 {
        "one connection".to_owned()
    } else {
        format!("{} connections", report.connections)
    };
    format!(
        "a VM ({} vCPU, {} MiB) between {} and {} by {by}, {} ways\n\n{}",
        report.vcpus,
        report.memory_mib,
        report.host,
        report.to,
        report.count,
        columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows),
    )
}
