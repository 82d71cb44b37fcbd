//! `hearth bench migrate`: how long a guest stands still while it moves to another host, and how long all of it takes.

use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::in_guest::{self, Running};
use super::launched::{Bench, launch_limit, without_bundle};
use super::logging::{self, Overhead};
use super::seen::{Stalls, Window, Written, rate_in};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::{Host, MigrateRequest, Operation, OperationList, Vm, VmLaunchRequest};
use crate::cli::BenchMigrateArgs;
use crate::clock::Clock;
use crate::ctl::call::Agent;
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Longest wait for one way.
const WAY_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Most MiB that a program in the guest writes again and again.
const BUFFER_MIB_MAX: u64 = 32;

/// How long a guest still has to do with what was started in it.
const SETTLE: Duration = Duration::from_secs(1);

/// How long a guest is looked at before it is moved: for what it is used to.
const LOOK_BEFORE: Duration = Duration::from_secs(3);

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    to: String,
    vcpus: u32,
    memory_mib: u64,
    populated_mib: u64,
    series: Vec<Series>,
    overhead: Vec<Overhead>,
}

/// Ways, there and back, with one rate of writing.
#[derive(Debug, Serialize)]
struct Series {
    connections: u8,
    /// Whether a program looked at the clock in the guest, which takes a processor of the host.
    watched: bool,
    /// What the guest writes; null if it is idle.
    writes: Option<Writes>,
    count: usize,
    /// How long no vCPU ran.
    pause_ms: Option<Summary>,
    /// Of that, until it stood ready on the other host.
    held_ms: Option<Summary>,
    /// Longest that a packet for it can have waited.
    network_ms: Option<Summary>,
    /// The longest gap that a program in the guest saw meanwhile, in each way.
    guest_gap_ms: Option<Summary>,
    /// The longest gap that it saw at other times.
    guest_gap_beside_ms: Option<f64>,
    /// How often a clock of the guest went back.
    guest_clock_backwards: Option<u64>,
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

/// What a guest writes, in millions of bytes a second.
#[derive(Debug, Clone, Copy, Serialize)]
struct Writes {
    asked_mb_per_s: u32,
    buffer_mib: u64,
    /// Before it was moved.
    before_mb_per_s: Option<f64>,
    /// From the first way's beginning to the last one's end: slowed down and stopped, as it was.
    meanwhile_mb_per_s: Option<f64>,
}

/// One way.
#[derive(Debug, Clone, Copy)]
struct Way {
    window: Window,
    total_ms: f64,
    pause_ms: Option<f64>,
    held_ms: Option<f64>,
    network_ms: Option<f64>,
    rounds: Option<u32>,
    bytes: Option<u64>,
    rate_bytes: Option<f64>,
}

/// What is moved, and how.
#[derive(Debug, Clone, Copy)]
struct Plan<'a> {
    args: &'a BenchMigrateArgs,
    other: &'a Agent,
    vcpus: u32,
    buffer_mib: u64,
}

/// One series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    connections: u8,
    mb_per_s: u32,
    watched: bool,
}

/// What is measured, in this order. An idle guest that somebody watches is not idle: it is moved without that as well.
fn kinds(connections: &[u8], writes: &[u32], has_probe: bool) -> Vec<Kind> {
    let rates = if writes.is_empty() { &[0][..] } else { writes };
    let mut kinds = Vec::new();
    for (&connections, &mb_per_s) in connections.iter().flat_map(|one| rates.iter().map(move |rate| (one, rate))) {
        if has_probe {
            kinds.push(Kind { connections, mb_per_s, watched: true });
        }
        if mb_per_s == 0 {
            kinds.push(Kind { connections, mb_per_s, watched: false });
        }
    }
    kinds
}

/// Boots a VM and moves it there and back.
pub(super) async fn measure(agent: &Agent, args: &BenchMigrateArgs) -> Result<Report, BenchError> {
    let host: Host = agent.get("/v1/host").await?;
    let other = Agent::at(args.back_socket.clone());
    // One who writes and one who looks at the clock disturb each other on one processor.
    let is_written = !args.overhead.is_empty() || args.writes.iter().any(|rate| *rate > 0);
    let vcpus = args.vcpus.unwrap_or(if is_written { 2 } else { 1 });
    let plan = Plan { args, other: &other, vcpus, buffer_mib: BUFFER_MIB_MAX.min(args.memory / 4) };
    let request = VmLaunchRequest {
        image: Some(args.image.clone()),
        vcpus: Some(vcpus),
        memory_mib: Some(args.memory),
        ..VmLaunchRequest::default()
    };
    let session = args.session.as_ref().map(|session| session.as_str().to_owned());
    let (series, overhead) = without_bundle(agent, &other, session, async |bench| {
        let (vms, _) = bench.launch("boot the VM to move", 1, &request, launch_limit(1)).await?;
        let (mut series, mut overhead) = (Vec::new(), Vec::new());
        for vm in vms.iter().map(|vm| vm.id.as_str()) {
            let held = bench.prepare(vm, args).await?;
            for kind in kinds(&args.connections, &args.writes, args.probe.is_some()) {
                series.push(bench.series(vm, plan, kind).await?);
            }
            for rate in &args.overhead {
                let measured = bench.overhead(vm, args.to.as_str(), (plan.buffer_mib, vcpus - 1), *rate);
                overhead.push(shown("compare how fast the guest writes", measured).await?);
            }
            if let Some(held) = held {
                held.let_go(agent, vm).await?;
            }
        }
        Ok((series, overhead))
    })
    .await?;
    Ok(Report {
        host: host.name,
        to: args.to.as_str().to_owned(),
        vcpus,
        memory_mib: args.memory,
        populated_mib: args.populate.unwrap_or(0),
        series,
        overhead,
    })
}

impl Bench<'_> {
    /// Copies the program into the guest, and has it fill memory if that is asked for.
    async fn prepare(&self, vm: &str, args: &BenchMigrateArgs) -> Result<Option<Running>, BenchError> {
        let Some(file) = &args.probe else { return Ok(None) };
        shown("copy the program into the guest", in_guest::install(self.agent, vm, file)).await?;
        match args.populate.filter(|mib| *mib > 0) {
            Some(mib) => shown("fill the guest's memory", Running::hold(self.agent, vm, mib)).await.map(Some),
            None => Ok(None),
        }
    }

    /// Ways there and back, while the guest writes at a rate.
    async fn series(&self, vm: &str, plan: Plan<'_>, kind: Kind) -> Result<Series, BenchError> {
        let (agent, mb_per_s, mut ways) = (self.agent, kind.mb_per_s, Vec::new());
        let writing = if mb_per_s > 0 {
            let writing = Running::rewrite(agent, vm, (plan.buffer_mib, plan.vcpus - 1), Some(mb_per_s));
            Some(shown("have the guest write", writing).await?)
        } else {
            None
        };
        // Behind that: what is written the first time takes the guest long, and others of its programs wait for it.
        let stall = if kind.watched { Some(Running::stall(agent, vm).await?) } else { None };
        if plan.args.probe.is_some() {
            tokio::time::sleep(SETTLE).await;
        }
        let from_us = self.wall_us();
        if kind.watched {
            tokio::time::sleep(LOOK_BEFORE).await;
        }
        let began_us = self.wall_us();
        for index in 1..=plan.args.count {
            let title = format!("there and back, {index} of {}", plan.args.count);
            ways.extend(shown(&title, self.there_and_back(vm, plan, kind.connections)).await?);
        }
        let moving = Window { from_us: began_us, to_us: self.wall_us() };
        let written = match writing {
            Some(writing) => Some(writing.written(agent, vm).await?),
            None => None,
        };
        let stalls = match stall {
            Some(stall) => Some(stall.stalls(agent, vm).await?),
            None => None,
        };
        let look = Window { from_us, to_us: began_us };
        let writes = written.map(|lines| writes(&lines, (mb_per_s, plan.buffer_mib), look, moving));
        let figures = series(&ways, stalls.as_ref(), Window { from_us, ..moving }, plan.args.memory);
        Ok(Series { connections: kind.connections, watched: kind.watched, writes, ..figures })
    }

    async fn there_and_back(&self, vm: &str, plan: Plan<'_>, connections: u8) -> Result<[Way; 2], BenchError> {
        let args = plan.args;
        let there = self.way(self.agent, vm, args.to.as_str(), connections).await?;
        Ok([there, self.way(plan.other, vm, args.back_to.as_str(), connections).await?])
    }

    async fn way(&self, from: &Agent, vm: &str, to: &str, connections: u8) -> Result<Way, BenchError> {
        let (begun, from_us) = (self.clock.monotonic(), self.wall_us());
        let request = MigrateRequest { to: to.to_owned(), connections: Some(connections), ..MigrateRequest::default() };
        let _: Vm = from.post(&format!("/v1/vms/{vm}/migrate"), &request, WAY_LIMIT).await?;
        let (total_ms, to_us) = (milliseconds_since(&self.clock, begun), self.wall_us());
        let list: OperationList = from.get("/v1/operations").await?;
        let left = |operation: &&Operation| operation.kind == "vm_leave" && operation.object == vm;
        let left = list.operations.iter().find(left);
        let moved = left.and_then(|left| left.moved);
        Ok(Way {
            window: Window { from_us, to_us },
            total_ms,
            pause_ms: left.and_then(|left| left.pause_ms),
            held_ms: moved.map(|moved| moved.held_ms),
            network_ms: moved.and_then(|moved| moved.network_ms),
            rounds: moved.map(|moved| moved.rounds),
            bytes: moved.map(|moved| moved.bytes),
            rate_bytes: moved.map(|moved| float(moved.bytes) * 1000.0 / (moved.running_ms + moved.held_ms)),
        })
    }
}

fn writes(lines: &[Written], (asked_mb_per_s, buffer_mib): (u32, u64), look: Window, moving: Window) -> Writes {
    let (before_mb_per_s, meanwhile_mb_per_s) = (rate_in(lines, look), rate_in(lines, moving));
    Writes { asked_mb_per_s, buffer_mib, before_mb_per_s, meanwhile_mb_per_s }
}

/// The figures of some ways, and of what the guest saw from before them until after them.
fn series(ways: &[Way], stalls: Option<&Stalls>, all: Window, memory_mib: u64) -> Series {
    let memory = float(memory_mib << 20);
    let windows: Vec<Window> = ways.iter().map(|way| way.window).collect();
    // Not what it saw of programs that were started and ended in it.
    let beside = |stalls: &Stalls| stalls.longest_beside(&windows, all);
    Series {
        connections: 1,
        watched: false,
        writes: None,
        count: ways.len(),
        pause_ms: Summary::of(ways.iter().filter_map(|way| way.pause_ms)),
        held_ms: Summary::of(ways.iter().filter_map(|way| way.held_ms)),
        network_ms: Summary::of(ways.iter().filter_map(|way| way.network_ms)),
        guest_gap_ms: stalls
            .and_then(|stalls| Summary::of(windows.iter().filter_map(|window| stalls.longest_in(*window)))),
        guest_gap_beside_ms: stalls.and_then(beside),
        guest_clock_backwards: stalls.map(Stalls::backwards),
        total_ms: Summary::of(ways.iter().map(|way| way.total_ms)),
        rounds: Summary::of(ways.iter().filter_map(|way| way.rounds).map(f64::from)),
        bytes: Summary::of(ways.iter().filter_map(|way| way.bytes).map(float)),
        of_memory: Summary::of(ways.iter().filter_map(|way| way.bytes).map(|bytes| float(bytes) / memory)),
        rate_bytes: Summary::of(ways.iter().filter_map(|way| way.rate_bytes)),
    }
}

/// The report for people.
pub(super) fn table(report: &Report) -> String {
    let populated = if report.populated_mib == 0 {
        String::new()
    } else {
        format!(", {} MiB of them filled with random data", report.populated_mib)
    };
    let mut text = format!(
        "a VM ({} vCPU, {} MiB{populated}) between {} and {}\n",
        report.vcpus, report.memory_mib, report.host, report.to
    );
    for series in &report.series {
        text += &format!(
            "\n{}, {} ways{}\n\n{}\n",
            title(series),
            series.count,
            by(series.connections),
            series_table(series)
        );
    }
    for overhead in &report.overhead {
        text += &format!("\n{}\n", logging::told(overhead));
    }
    text
}

fn by(connections: u8) -> String {
    if connections == 1 { " by one connection".to_owned() } else { format!(" by {connections} connections") }
}

fn title(series: &Series) -> String {
    let Some(writes) = &series.writes else {
        return if series.watched { "idle but for who looks at the clock" } else { "idle" }.to_owned();
    };
    let rate = |rate: Option<f64>| rate.map_or_else(|| "?".to_owned(), |rate| format!("{rate:.1}"));
    format!(
        "writes {} MiB at {} MB/s (before it was moved {}, meanwhile {})",
        writes.buffer_mib,
        writes.asked_mb_per_s,
        rate(writes.before_mb_per_s),
        rate(writes.meanwhile_mb_per_s),
    )
}

fn series_table(series: &Series) -> String {
    let size = |value: f64| bytes(whole(value));
    let number = |value: f64| format!("{value:.0}");
    let part = |value: f64| format!("{value:.3}");
    let mut rows = Vec::new();
    let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
        let Some(summary) = summary else { return };
        rows.push(summary.row(what.to_owned(), print));
    };
    add("pause", series.pause_ms.as_ref(), &milliseconds);
    add("held until ready", series.held_ms.as_ref(), &milliseconds);
    add("without network", series.network_ms.as_ref(), &milliseconds);
    add("seen in the guest", series.guest_gap_ms.as_ref(), &milliseconds);
    add("beside that", Summary::of(series.guest_gap_beside_ms).as_ref(), &milliseconds);
    add("call to running there", series.total_ms.as_ref(), &milliseconds);
    add("rounds", series.rounds.as_ref(), &number);
    add("on the wire", series.bytes.as_ref(), &size);
    add("of its memory", series.of_memory.as_ref(), &part);
    add("rate per second", series.rate_bytes.as_ref(), &size);
    columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_guests_are_moved_unwatched_as_well() {
        let kinds_of = |connections: &[u8], writes: &[u32], has_probe| -> Vec<(u8, u32, bool)> {
            let kinds = kinds(connections, writes, has_probe);
            kinds.iter().map(|kind| (kind.connections, kind.mb_per_s, kind.watched)).collect()
        };
        assert_eq!(kinds_of(&[1], &[], false), [(1, 0, false)]);
        assert_eq!(kinds_of(&[1], &[], true), [(1, 0, true), (1, 0, false)]);
        let wanted = [(1, 0, true), (1, 0, false), (1, 10, true), (2, 0, true), (2, 0, false), (2, 10, true)];
        assert_eq!(kinds_of(&[1, 2], &[0, 10], true), wanted);
    }
}
