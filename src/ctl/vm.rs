//! `hearth vm`: looking at VMs, and the verbs that are one call.

use std::time::Duration;

use serde::Serialize;

use super::call::{Agent, CallError, PROMPT};
use super::isolation;
use super::launch::called;
use super::output::Output;
use super::progress::shown;
use super::table::{age, bytes, columns, milliseconds, or_dash, pairs, plain, word};
use super::{Error, OutputError};
use crate::api::types::{
    Disk, FlowLimits, InterfaceStats, Operation, PortProtocol, PublishedPort, Stats, StopRequest, SwapChoice, Swapped,
    Timings, Vm, VmList, VolumeSlot,
};
use crate::cli::{ReferenceWord, RemoveArgs, StopArgs};

/// What the agent allows a guest for powering itself off when nothing else is asked for.
const STOP_TIMEOUT_DEFAULT_MS: u32 = 10_000;

/// An empty JSON object: the body of verbs without parameters.
#[derive(Serialize)]
struct Nothing {}

/// What `vm rm` did.
#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

pub(super) async fn list(agent: &Agent, out: Output) -> Result<(), Error> {
    let list: VmList = agent.get("/v1/vms").await?;
    out.value(&list, |list| {
        let header = ["NAME", "ID", "STATE", "IMAGE", "VCPUS", "MEMORY", "ADDRESSES", "AGE"];
        columns(&header, list.vms.iter().map(row))
    })?;
    Ok(())
}

fn row(vm: &Vm) -> Vec<String> {
    vec![
        or_dash(vm.name.as_deref()),
        vm.id.to_string(),
        state(vm),
        or_dash(vm.image.as_deref().or(vm.bundle_id.as_deref())),
        vm.vcpus.to_string(),
        format!("{} MiB", vm.memory_mib),
        if vm.addresses.is_empty() { "-".to_owned() } else { vm.addresses.join(",") },
        age(vm.created_at),
    ]
}

/// `failed (guest_panic)`: the state with the word for its cause.
pub(super) fn state(vm: &Vm) -> String {
    if vm.quarantine.is_some() {
        return format!("{} (quarantined)", word(&vm.state));
    }
    match &vm.cause {
        Some(cause) => format!("{} ({})", word(&vm.state), cause.code),
        None => word(&vm.state),
    }
}

pub(super) async fn show(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let vm: Vm = agent.get(&path(vm)).await?;
    out.value(&vm, |vm| {
        let mut text = pairs([
            ("name", vm.name.clone()),
            ("id", Some(vm.id.to_string())),
            ("state", Some(state(vm))),
            ("cause", vm.cause.as_ref().map(|cause| cause.detail.clone())),
            ("runs on", vm.handed_to.clone()),
            ("quarantine", vm.quarantine.as_ref().map(|found| plain(&found.report))),
            ("image", vm.image.clone()),
            ("bundle", vm.bundle_id.clone()),
            ("cluster", vm.cluster_id.as_ref().map(ToString::to_string)),
            ("executor", vm.executor_id.clone()),
            ("registered", vm.registered_at.map(|at| format!("{at:.0}"))),
            ("session network", vm.session_network_id.map(|id| id.to_string())),
            ("addresses", (!vm.addresses.is_empty()).then(|| vm.addresses.join(", "))),
            ("published", (!vm.published.is_empty()).then(|| published(&vm.published))),
            ("role", vm.role.as_deref().map(plain)),
            ("vcpus", Some(vm.vcpus.to_string())),
            ("memory", Some(format!("{} MiB", vm.memory_mib))),
            ("disks", (!vm.disks.is_empty()).then(|| disks(&vm.disks))),
            ("volumes", (!vm.volumes.is_empty()).then(|| volumes(&vm.volumes))),
            ("limit to guest", limits(vm.network_limits.rx)),
            ("limit from guest", limits(vm.network_limits.tx)),
            ("swap policy", (vm.swap_policy.mode != SwapChoice::Never).then(|| word(&vm.swap_policy.mode))),
            ("memory is out", vm.swapped.as_ref().map(swapped)),
            ("host", Some(vm.host.clone())),
            ("vmm pid", vm.pid.map(|pid| pid.to_string())),
            ("jail", vm.jail.as_ref().map(isolation::jail)),
            ("generation", Some(vm.generation.clone())),
            ("created", Some(format!("{:.0} ({} ago)", vm.created_at, age(vm.created_at)))),
            ("operation", vm.operation_id.as_ref().map(ToString::to_string)),
        ]);
        text.push_str(&timings(&vm.timings));
        if !vm.last_console_lines.is_empty() {
            text.push_str("\n\nlast lines of the console");
            for line in &vm.last_console_lines {
                text.push_str("\n  | ");
                text.push_str(&plain(line));
            }
        }
        text
    })?;
    Ok(())
}

/// `page, for 5m: somebody asked for it; wakes at 2026-11-24T18:00:00Z`.
fn swapped(swapped: &Swapped) -> String {
    let mode = swapped.mode.map_or_else(|| "-".to_owned(), |mode| word(&mode));
    let until = swapped.wake_at.map(|at| format!("; wakes at {at:.0}")).unwrap_or_default();
    format!("{mode}, for {}: {}{until}", age(swapped.since), plain(&swapped.because))
}

fn volumes(slots: &[VolumeSlot]) -> String {
    let words = slots.iter().map(|slot| match &slot.volume_id {
        None => "(free)".to_owned(),
        Some(volume) => {
            let read_only = if slot.read_only { " (read only)" } else { "" };
            let mount = slot.mount.as_deref().map(|mount| format!(" at {}", plain(mount))).unwrap_or_default();
            format!("{volume}{read_only}{mount}")
        }
    });
    words.collect::<Vec<_>>().join(", ")
}

fn disks(disks: &[Disk]) -> String {
    let words: Vec<_> = disks
        .iter()
        .map(|disk| match (disk.read_only, disk.shared) {
            (false, false) => disk.path.clone(),
            (true, false) => format!("{} (ro)", disk.path),
            (false, true) => format!("{} (shared)", disk.path),
            (true, true) => format!("{} (ro, shared)", disk.path),
        })
        .collect();
    words.join(", ")
}

/// As on the command line.
fn published(ports: &[PublishedPort]) -> String {
    let words = ports.iter().map(|port| {
        let protocol = match port.protocol {
            PortProtocol::Tcp => "",
            PortProtocol::Udp => "/udp",
        };
        format!("{}:{}{protocol}", port.host_port, port.guest_port)
    });
    words.collect::<Vec<_>>().join(", ")
}

/// `9.5 MiB/s (at once 976.6 KiB), 5000 packets/s (at once 500)`; nothing for what is not limited.
fn limits(limits: FlowLimits) -> Option<String> {
    let amount = |packets: u64| packets.to_string();
    let shown = |rate: Option<u64>, burst: Option<u64>, unit: &str, show: &dyn Fn(u64) -> String| {
        let burst = burst.map(|burst| format!(" (at once {})", show(burst))).unwrap_or_default();
        rate.map(|rate| format!("{}{unit}{burst}", show(rate)))
    };
    let of_bytes = shown(limits.bytes_per_s, limits.burst_bytes, "/s", &bytes);
    let of_packets = shown(limits.packets_per_s, limits.burst_packets, " packets/s", &amount);
    let all: Vec<String> = of_bytes.into_iter().chain(of_packets).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

fn timings(timings: &Timings) -> String {
    let rows = [
        ("  network", timings.network_ms),
        ("  spawn", timings.spawn_ms),
        ("  load", timings.load_ms),
        ("  first entry", timings.first_entry_ms),
        ("  kernel", timings.kernel_ms),
        ("  init", timings.init_ms),
        ("  total", timings.total_ms),
    ];
    if rows.iter().all(|(_, ms)| ms.is_none()) {
        return String::new();
    }
    format!("\n\nlaunch\n{}", pairs(rows.map(|(name, ms)| (name, ms.map(milliseconds)))))
}

pub(super) async fn stop(agent: &Agent, out: Output, args: &StopArgs) -> Result<(), Error> {
    let path = format!("{}/stop", path(&args.vm));
    let request = StopRequest { timeout_ms: args.timeout };
    let call = agent.post(&path, &request, patience(args.timeout));
    let vm: Vm = shown(&format!("stop {}", args.vm.as_str()), call).await?;
    Ok(done(out, &vm)?)
}

pub(super) async fn pause(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let vm: Vm = agent.post(&format!("{}/pause", path(vm)), &Nothing {}, PROMPT).await?;
    Ok(done(out, &vm)?)
}

pub(super) async fn resume(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let vm: Vm = agent.post(&format!("{}/resume", path(vm)), &Nothing {}, PROMPT).await?;
    Ok(done(out, &vm)?)
}

pub(super) async fn hand_over(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let to = format!("{}/hand-over", path(vm));
    let call = agent.post(&to, &Nothing {}, HAND_OVER_LIMIT);
    let vm: Vm = shown(&format!("hand over {}", vm.as_str()), call).await?;
    let done = stood_still(agent, &vm).await;
    let process = vm.pid.map(|pid| format!(" in process {pid}")).unwrap_or_default();
    out.value(&vm, |vm| format!("{} is {}{process}{done}", called(vm), state(vm)))?;
    Ok(())
}

/// How long no vCPU ran for a VM's last operation, if that is known.
async fn stood_still(agent: &Agent, vm: &Vm) -> String {
    let Some(id) = &vm.operation_id else { return String::new() };
    let done = agent.get::<Operation>(&format!("/v1/operations/{id}")).await;
    let pause = done.ok().and_then(|done| done.pause_ms);
    pause.map(|pause| format!("; it stood still for {}", milliseconds(pause))).unwrap_or_default()
}

/// Longest wait for a VM to be in another process: pages of its own are copied, and its bundle is looked at.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(180);

pub(super) fn done(out: Output, vm: &Vm) -> Result<(), OutputError> {
    out.value(vm, |vm| format!("{} is {}", called(vm), state(vm)))
}

pub(super) async fn remove(agent: &Agent, out: Output, args: &RemoveArgs) -> Result<(), Error> {
    let vms = if args.all {
        let list: VmList = agent.get("/v1/vms").await?;
        list.vms.into_iter().map(|vm| vm.id.to_string()).collect()
    } else {
        args.vms.iter().map(|vm| vm.as_str().to_owned()).collect::<Vec<_>>()
    };
    let mut removed = Vec::new();
    for vm in vms {
        match shown(&format!("remove {vm}"), remove_one(agent, &vm, args.timeout)).await {
            Ok(()) => removed.push(vm),
            // Someone else was faster: with --all, gone is what was asked for.
            Err(error) if args.all && error.code() == Some("not_found") => {}
            Err(error) => return Err(error.into()),
        }
    }
    out.value(&Removed { removed }, |done| {
        let lines: Vec<_> = done.removed.iter().map(|vm| format!("{vm} is removed")).collect();
        lines.join("\n")
    })?;
    Ok(())
}

/// Removes one VM by any word for it.
pub(super) async fn remove_one(agent: &Agent, vm: &str, timeout_ms: Option<u32>) -> Result<(), CallError> {
    let query = timeout_ms.map(|ms| format!("?timeout_ms={ms}")).unwrap_or_default();
    agent.delete(&format!("/v1/vms/{vm}{query}"), patience(timeout_ms)).await
}

/// How long to wait for an answer to a call that ends a guest.
fn patience(timeout_ms: Option<u32>) -> Duration {
    PROMPT + Duration::from_millis(timeout_ms.unwrap_or(STOP_TIMEOUT_DEFAULT_MS).into())
}

pub(super) async fn stats(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let stats: Stats = agent.get(&format!("{}/stats", path(vm))).await?;
    out.value(&stats, |stats| {
        let vmm = stats.vmm.as_ref();
        let guest = stats.guest.as_ref();
        let mut text = pairs([
            ("vmm pid", vmm.map(|vmm| vmm.pid.to_string())),
            ("vmm resident", vmm.and_then(|vmm| vmm.resident_bytes).map(bytes)),
            ("vmm in swap", vmm.and_then(|vmm| vmm.swapped_bytes).filter(|count| *count > 0).map(bytes)),
            ("vmm cpu time", vmm.and_then(|vmm| vmm.cpu_ms).map(milliseconds)),
            ("console output", vmm.map(|vmm| bytes(vmm.console_bytes))),
            ("stray accesses", vmm.map(|vmm| vmm.stray_accesses.to_string())),
            ("guest", Some(if guest.is_some() { "answers" } else { "does not answer" }.to_owned())),
            ("guest uptime", guest.map(|guest| milliseconds(guest.uptime_ms))),
            ("guest clock", guest.map(|guest| guest.wall_clock.to_string())),
            ("guest memory", guest.map(|guest| bytes(guest.memory_total_bytes))),
            ("guest memory free", guest.map(|guest| bytes(guest.memory_available_bytes))),
            ("guest processes", guest.map(|guest| guest.processes.to_string())),
            ("guest load", guest.map(|guest| format!("{:.2}", guest.load1))),
            ("guest execs", guest.map(|guest| guest.execs_running.to_string())),
        ]);
        if let Some(balloon) = &stats.balloon {
            text.push_str("\n\n");
            text.push_str(&super::balloon::rows(balloon));
        }
        if !stats.network.is_empty() {
            text.push_str("\n\n");
            let header = ["NETWORK", "LINK", "DIRECTION", "PACKETS", "BYTES", "DROPPED", "THROTTLED"];
            text.push_str(&columns(&header, stats.network.iter().flat_map(flows)));
        }
        text
    })?;
    Ok(())
}

/// A row for each direction of an interface.
fn flows(interface: &InterfaceStats) -> [Vec<String>; 2] {
    let link = if interface.link_up { "up" } else { "down" };
    [("to guest", interface.rx), ("from guest", interface.tx)].map(|(direction, flow)| {
        vec![
            interface.slot.to_string(),
            link.to_owned(),
            direction.to_owned(),
            flow.packets.to_string(),
            bytes(flow.bytes),
            flow.dropped.to_string(),
            flow.throttled.to_string(),
        ]
    })
}

pub(super) fn path(vm: &ReferenceWord) -> String {
    format!("/v1/vms/{}", vm.as_str())
}
