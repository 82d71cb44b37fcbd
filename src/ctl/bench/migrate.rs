//! `hearth bench migrate`: how long a guest stands still while it moves to another host, and how long all of it takes.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::launched::{Bench, launch_limit, without_bundle};
use super::summary::{Summary, float, milliseconds_since, whole};
use crate::api::types::encode_base64;
use crate::api::types::{ExecRequest, ExecResult, Host, MigrateRequest, Operation, OperationList, Vm, VmLaunchRequest};
use crate::cli::BenchMigrateArgs;
use crate::clock::Clock;
use crate::ctl::call::Agent;
use crate::ctl::progress::shown;
use crate::ctl::table::{bytes, columns, milliseconds};

/// Longest wait for one way.
const WAY_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Longest wait for a command in the guest.
const EXEC_LIMIT: Duration = Duration::from_secs(120);

/// Bytes of the traffic tool that go into the guest at once: a multiple of three, so that their text can be cut there.
const CHUNK_BYTES: usize = 60_000;

/// Times in which the guest did not run that it tells, at most.
const STALLS_MAX: usize = 16;

/// Bytes the tool writes at once, and how much it writes all over.
const PART_BYTES: u32 = 256 << 10;
const WRITTEN_MIB_MAX: u64 = 64;

/// The bench's result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: String,
    to: String,
    vcpus: u32,
    memory_mib: u64,
    connections: u8,
    series: Vec<Series>,
}

/// Ways of a guest that writes so much.
#[derive(Debug, Serialize)]
struct Series {
    /// MB a second it was asked to write.
    writes: u32,
    /// What it wrote, by its own count.
    written_mb_s: Option<f64>,
    /// Ways, there and back.
    count: usize,
    /// How long no vCPU ran.
    pause_ms: Option<Summary>,
    /// Of that, until it stood ready on the other host.
    held_ms: Option<Summary>,
    /// How long its program did not get to run, by its time stamp counter.
    seen_ms: Option<Summary>,
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
    let writes = if args.writes.is_empty() { vec![0] } else { args.writes.clone() };
    let series = without_bundle(agent, session, async |bench| {
        let (vms, _) = bench.launch("boot the VM to move", 1, &request, launch_limit(1)).await?;
        let mut series = Vec::new();
        for vm in &vms {
            let id = vm.id.as_str();
            if let Some(probe) = &args.probe {
                shown("copy the traffic tool into the guest", install(agent, id, probe)).await?;
            }
            for rate in &writes {
                series.push(bench.series(id, &other, args, *rate).await?);
            }
        }
        Ok(series)
    })
    .await?;
    Ok(Report {
        host: host.name,
        to: args.to.as_str().to_owned(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        connections: args.connections,
        series,
    })
}

/// Runs a command in the guest that has to succeed; what it says.
async fn run(agent: &Agent, vm: &str, words: &[&str]) -> Result<String, BenchError> {
    let argv = words.iter().map(|&word| word.to_owned()).collect();
    let request = ExecRequest { argv, ..ExecRequest::default() };
    let done: ExecResult = agent.post(&format!("/v1/vms/{vm}/exec"), &request, EXEC_LIMIT).await?;
    match done.exit_code {
        Some(0) => Ok(done.stdout.text),
        _ => Err(BenchError::Guest { vm: vm.to_owned(), command: words.join(" "), said: done.stderr.text }),
    }
}

async fn install(agent: &Agent, vm: &str, probe: &Path) -> Result<(), BenchError> {
    let failed = |source| BenchError::File { path: probe.to_owned(), source };
    let program = std::fs::read(probe).map_err(failed)?;
    for chunk in program.chunks(CHUNK_BYTES) {
        run(agent, vm, &["sh", "-c", "printf %s $0 | base64 -d >> /tmp/probe", &encode_base64(chunk)]).await?;
    }
    run(agent, vm, &["chmod", "+x", "/tmp/probe"]).await?;
    Ok(())
}

/// A number that a line of the tool has.
fn number(line: &str, name: &str) -> Option<f64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get(name)?.as_f64()
}

impl Bench<'_> {
    /// So many times there and back, with a guest that writes so much.
    async fn series(
        &self,
        vm: &str,
        other: &Agent,
        args: &BenchMigrateArgs,
        writes: u32,
    ) -> Result<Series, BenchError> {
        let here = self.agent;
        if let (Some(_), Some(parts)) =
            (&args.probe, writes.checked_mul(1_000_000 / PART_BYTES).filter(|rate| *rate > 0))
        {
            let (mib, rest) = ((args.memory / 4).clamp(1, WRITTEN_MIB_MAX), 1000 / parts.min(1000));
            let write = format!(
                "setsid /tmp/probe rewrite --mib {mib} --seconds 3600 --every-ms {rest} > /tmp/written < /dev/null 2>&1 & until [ -s /tmp/written ]; do sleep 0.1; done"
            );
            run(here, vm, &["sh", "-c", &write]).await?;
        }
        let begun = self.clock.monotonic();
        let passes = self.passes(here, vm).await;
        if args.probe.is_some() {
            // Each way takes some tenths of a second, most of the time; it is looked for as long as it takes below.
            let watch = "setsid /tmp/probe stall --seconds 3600 > /tmp/seen < /dev/null 2>&1 & until [ -s /tmp/seen ]; do sleep 0.1; done; sleep 1";
            run(here, vm, &["sh", "-c", watch]).await?;
        }
        let mut ways = Vec::new();
        for index in 1..=args.count {
            let title = format!("there and back, {index} of {}", args.count);
            let round = async {
                let there = self.way(here, vm, args.to.as_str(), args.connections).await?;
                Ok::<_, BenchError>([there, self.way(other, vm, args.back_to.as_str(), args.connections).await?])
            };
            ways.extend(shown(&title, round).await?);
        }
        let took = milliseconds_since(&self.clock, begun) / 1000.0;
        let written = match (passes, self.passes(here, vm).await) {
            (Some(before), Some(after)) => {
                let bytes = float(((args.memory / 4).clamp(1, WRITTEN_MIB_MAX)) << 20);
                Some((after - before) * bytes / 1e6 / took)
            }
            (_, _) => None,
        };
        let mut seen = Vec::new();
        if args.probe.is_some() {
            // Told to end, it says what it saw.
            let end = "kill -INT $(pidof probe) 2>/dev/null; for i in $(seq 100); do pidof probe > /dev/null || break; sleep 0.1; done; tail -n 1 /tmp/seen; rm -f /tmp/seen /tmp/written";
            let said = run(here, vm, &["sh", "-c", end]).await?;
            let told: serde_json::Value = serde_json::from_str(said.trim()).unwrap_or_default();
            let longest = told["longest"].as_array().cloned().unwrap_or_default();
            seen = longest.iter().filter_map(|gap| gap["ms"].as_f64()).take(ways.len().min(STALLS_MAX)).collect();
        }
        let memory = float(args.memory << 20);
        Ok(Series {
            writes,
            written_mb_s: written,
            count: ways.len(),
            pause_ms: Summary::of(ways.iter().filter_map(|way| way.pause_ms)),
            held_ms: Summary::of(ways.iter().filter_map(|way| way.held_ms)),
            seen_ms: Summary::of(seen),
            total_ms: Summary::of(ways.iter().map(|way| way.total_ms)),
            rounds: Summary::of(ways.iter().filter_map(|way| way.rounds).map(f64::from)),
            bytes: Summary::of(ways.iter().filter_map(|way| way.bytes).map(float)),
            of_memory: Summary::of(ways.iter().filter_map(|way| way.bytes).map(|bytes| float(bytes) / memory)),
            rate_bytes: Summary::of(ways.iter().filter_map(|way| way.rate_bytes)),
        })
    }

    /// How often the guest has written its buffer, if it does.
    async fn passes(&self, agent: &Agent, vm: &str) -> Option<f64> {
        let said = run(agent, vm, &["sh", "-c", "tail -n 1 /tmp/written 2>/dev/null"]).await.ok()?;
        number(said.trim(), "passes")
    }

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
    let mut text = format!(
        "a VM ({} vCPU, {} MiB) between {} and {}, {} at a time\n",
        report.vcpus,
        report.memory_mib,
        report.host,
        report.to,
        if report.connections == 1 {
            "one connection".to_owned()
        } else {
            format!("{} connections", report.connections)
        },
    );
    for series in &report.series {
        let mut rows = Vec::new();
        let mut add = |what: &str, summary: Option<&Summary>, print: &dyn Fn(f64) -> String| {
            let Some(summary) = summary else { return };
            rows.push(summary.row(what.to_owned(), print));
        };
        add("pause", series.pause_ms.as_ref(), &milliseconds);
        add("held until ready", series.held_ms.as_ref(), &milliseconds);
        add("as the guest saw it", series.seen_ms.as_ref(), &milliseconds);
        add("call to running there", series.total_ms.as_ref(), &milliseconds);
        add("rounds", series.rounds.as_ref(), &number);
        add("on the wire", series.bytes.as_ref(), &size);
        add("of its memory", series.of_memory.as_ref(), &part);
        add("rate per second", series.rate_bytes.as_ref(), &size);
        let wrote = match series.written_mb_s {
            Some(wrote) => format!("it wrote {wrote:.1} MB/s ({} asked for)", series.writes),
            None => "idle".to_owned(),
        };
        text.push_str(&format!("\n{wrote}, {} ways\n\n", series.count));
        text.push_str(&columns(&["WHAT", "P50", "P99", "MIN", "MAX"], rows));
        text.push('\n');
    }
    text
}
