//! `hearth host`: what this host can do, and what its agent has.
//!
//! The probe asks KVM, which this floor must not: it runs `hearth vmm --probe` and shows what that prints.

use std::io;
use std::process::{Output as Finished, Stdio};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::process::Command;

use super::Error;
use super::call::Agent;
use super::isolation;
use super::output::{Output, OutputError};
use super::progress::shown;
use super::table::{age, bytes, pairs, plain};
use crate::api::types::{Fabric, FabricPeer, Host, HostFailure, HostLedger, HostPressure, HostWarning};

/// How long a probe may take; it is meant to take two seconds.
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// Why there is no usable answer from the probe.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// This program cannot find or start itself.
    #[error("start the probe")]
    Start(#[source] io::Error),
    /// It does not end.
    #[error("the probe did not end within {} s", PROBE_LIMIT.as_secs())]
    Silent,
    /// It ended without an answer.
    #[error("the probe failed ({status}): {said}")]
    Failed {
        /// Exit status.
        status: std::process::ExitStatus,
        /// What it wrote to standard error.
        said: String,
    },
    /// It answered: this host cannot run VMs.
    #[error("this host cannot run VMs: {}", .problems.join("; "))]
    Unusable {
        /// Each reason, with what to do.
        problems: Vec<String>,
    },
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl ProbeError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Unusable { problems } if problems.is_empty() => Some(
                "the table above shows what was found; /dev/kvm has to exist and to be open to this user".to_owned(),
            ),
            Self::Start(_) | Self::Silent | Self::Failed { .. } | Self::Unusable { .. } | Self::Output(_) => None,
        }
    }
}

pub(super) async fn probe(out: Output) -> Result<(), ProbeError> {
    let finished = shown("probe this host", run_probe()).await?;
    let Ok(facts @ Value::Object(_)) = serde_json::from_slice::<Value>(&finished.stdout) else {
        let said = plain(String::from_utf8_lossy(&finished.stderr).trim());
        return Err(ProbeError::Failed { status: finished.status, said });
    };
    out.value(&facts, table)?;
    if facts.get("usable").and_then(Value::as_bool) == Some(false) {
        let problems = facts.get("problems").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        return Err(ProbeError::Unusable { problems: problems.iter().map(text).collect() });
    }
    Ok(())
}

async fn run_probe() -> Result<Finished, ProbeError> {
    let program = std::env::current_exe().map_err(ProbeError::Start)?;
    let mut command = Command::new(program);
    command.args(["vmm", "--probe"]).stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(PROBE_LIMIT, command.output()).await {
        Ok(finished) => finished.map_err(ProbeError::Start),
        Err(_) => Err(ProbeError::Silent),
    }
}

/// One section for each object, single facts first.
fn table(facts: &Value) -> String {
    let none = Map::new();
    let facts = facts.as_object().unwrap_or(&none);
    let (sections, single): (Vec<_>, Vec<_>) = facts.iter().partition(|(_, value)| value.is_object());
    let mut blocks = Vec::new();
    for (name, section) in sections {
        let mut rows = Vec::new();
        flatten("", section, &mut rows);
        let rows = rows.iter().map(|(name, value)| (name.as_str(), Some(value.clone())));
        blocks.push(format!("{name}\n{}", indent(&pairs(rows))));
    }
    let single: Vec<_> = single.iter().map(|(name, value)| (name.replace('_', " "), text(value))).collect();
    blocks.push(pairs(single.iter().map(|(name, value)| (name.as_str(), Some(value.clone())))));
    blocks.join("\n\n")
}

fn indent(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(|line| format!("  {line}")).collect();
    lines.join("\n")
}

fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    if let Value::Object(fields) = value {
        for (name, value) in fields {
            let name = name.replace('_', " ");
            let name = if prefix.is_empty() { name } else { format!("{prefix} {name}") };
            flatten(&name, value, rows);
        }
    } else {
        let (name, value) = fact(prefix, value);
        rows.push((name.to_owned(), value));
    }
}

/// A fact for people: sizes in bytes get a unit that can be read.
fn fact<'a>(name: &'a str, value: &Value) -> (&'a str, String) {
    match (name.strip_suffix(" bytes"), value.as_u64()) {
        (Some(name), Some(size)) => (name, bytes(size)),
        (Some(_) | None, _) => (name, text(value)),
    }
}

/// A value for people.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) if text.is_empty() => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Number(number) => number.to_string(),
        Value::Object(_) => value.to_string(),
    }
}

pub(super) async fn show(agent: &Agent, out: Output) -> Result<(), Error> {
    let host: Host = agent.get("/v1/host").await?;
    out.value(&host, glance)?;
    Ok(())
}

/// Health at a glance: what is wrong first, then what there is and what is left.
fn glance(host: &Host) -> String {
    let mut blocks = vec![warnings(host)];
    let (room, vms) = (&host.room, &host.vms);
    let states: Vec<_> = host.vm_states.iter().map(|(state, count)| format!("{count} {state}")).collect();
    let states = if states.is_empty() { String::new() } else { format!(" ({})", states.join(", ")) };
    let free = |free, what: String| format!("{} free{what}", bytes(free));
    blocks.push(pairs([
        ("name", Some(host.name.clone())),
        ("agent", Some(format!("version {}, pid {}", host.version, host.agent_pid))),
        ("agent up since", Some(format!("{:.0} ({} ago)", host.started_at, age(host.started_at)))),
        ("state directory", Some(host.state_dir.clone())),
        (
            "vms",
            Some(format!(
                "{} alive, {} changing, {} failed, {} in all{states}",
                vms.alive, vms.changing, vms.failed, vms.total
            )),
        ),
        (
            "memory",
            Some(free(
                host.memory_available_bytes,
                format!(" of {}; {} promised to VMs", bytes(host.memory_bytes), bytes(room.memory_promised_bytes)),
            )),
        ),
        (
            "disk",
            Some(free(
                room.disk_free_bytes,
                format!(" of {}; {} kept", bytes(room.disk_total_bytes), bytes(room.disk_reserve_bytes)),
            )),
        ),
        ("descriptors", Some(format!("{} of {} open", room.descriptors_open, room.descriptors_max))),
        ("connections", Some(format!("{} of {} open", room.connections_open, room.connections_max))),
        ("cpus", Some(format!("{}; {}", host.cpus, pressure(host)))),
        ("kvm", Some(kvm(host.probe.as_ref()))),
        ("ledger", Some(host.ledger.as_ref().map_or_else(|| "does not answer".to_owned(), ledger))),
    ]));
    if !host.failures.is_empty() {
        let lines = host.failures.iter().map(failure).collect::<Vec<_>>().join("\n");
        blocks.push(format!("failed of late\n{}", indent(&lines)));
    }
    if let Some(found) = &host.isolation {
        blocks.push(format!("isolation\n{}", indent(&isolation::host(found))));
    }
    blocks.push(fabric(host.fabric.as_ref()));
    blocks.join("\n\n")
}

fn warnings(host: &Host) -> String {
    if host.warnings.is_empty() {
        return "nothing to worry about".to_owned();
    }
    let line = |warning: &HostWarning| format!("! {}\n  {}", plain(&warning.what), plain(&warning.todo));
    host.warnings.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Shares of the last ten seconds in which something waited.
fn pressure(host: &Host) -> String {
    let HostPressure { cpu_percent, memory_percent, io_percent } = host.pressure;
    let said: Vec<_> = [("cpu", cpu_percent), ("memory", memory_percent), ("disk", io_percent)]
        .into_iter()
        .filter_map(|(what, percent)| Some(format!("{what} {:.0} %", percent?)))
        .collect();
    if said.is_empty() { "pressure unknown".to_owned() } else { format!("waited for: {}", said.join(", ")) }
}

/// What KVM is like, in a line.
fn kvm(probe: Option<&Value>) -> String {
    let Some(kvm) = probe.and_then(|probe| probe.get("kvm")) else {
        return "unknown: the probe has not answered (`hearth host probe`)".to_owned();
    };
    let is = |name: &str| kvm.get(name).and_then(Value::as_bool);
    let vendor = kvm.get("vendor_signature").and_then(Value::as_str).unwrap_or("unknown vendor");
    let mode = match is("kernel_mode_native") {
        Some(true) => "guest kernels run on the processor",
        Some(false) => "guest kernels are emulated",
        None => "how guest kernels run is unknown",
    };
    plain(&format!("{vendor}, {mode}"))
}

fn ledger(ledger: &HostLedger) -> String {
    let backup = ledger.last_backup.map_or_else(|| "no backup".to_owned(), |at| format!("last backup {} ago", age(at)));
    format!("{}, {backup}; {} events from {} on", bytes(ledger.bytes), ledger.events, ledger.oldest_event)
}

/// A failed operation in two lines.
fn failure(failure: &HostFailure) -> String {
    let ago = failure.at.map_or_else(|| "-".to_owned(), |at| format!("{} ago", age(at)));
    plain(&format!("{ago}: {} of {} ({})\n  {}", failure.kind, failure.object, failure.operation, failure.message))
}

/// What VMs' addresses are made of, and the other hosts.
fn fabric(fabric: Option<&Fabric>) -> String {
    let Some(fabric) = fabric else {
        return "fabric  none: add [fabric] to the configuration to have sessions".to_owned();
    };
    let ipv4 = match &fabric.ipv4 {
        Some(ipv4) => format!(
            "{} (host {} bits, session {}, VM {})",
            ipv4.subnet, ipv4.host_bits, ipv4.session_bits, ipv4.local_bits
        ),
        None => "none".to_owned(),
    };
    let underlay = match (fabric.vxlan_id, fabric.vxlan_port) {
        (Some(id), Some(port)) => format!("{} (id {id}, port {port})", fabric.underlay),
        (_, _) => fabric.underlay.clone(),
    };
    let peers: Vec<_> = fabric.peers.iter().map(peer).collect();
    let rows = pairs([
        ("ipv6 prefix", Some(fabric.ipv6_prefix.clone())),
        ("host number", Some(fabric.host_number.to_string())),
        ("ipv6 subnet", Some(fabric.ipv6_subnet.clone())),
        ("ipv4 subnet", Some(ipv4)),
        ("underlay", Some(underlay)),
        ("mtu", Some(fabric.mtu.to_string())),
        ("between agents", between_agents(&fabric.peer_transport)),
        ("peers", Some(if peers.is_empty() { "none".to_owned() } else { peers.join("\n") })),
        ("conflicts", (!fabric.conflicts.is_empty()).then(|| fabric.conflicts.join("; "))),
    ]);
    format!("fabric\n{}", indent(&rows))
}

/// How agents speak to each other; nothing of an older agent, which does not say.
fn between_agents(transport: &str) -> Option<String> {
    let told = match transport {
        "" => return None,
        "tls" => "TLS",
        "tls_or_plain" => "TLS, or without where a peer has none (fabric.plain_peers)",
        "plain" => "without TLS, hello only: there is no fabric.key_file",
        other => other,
    };
    Some(plain(told))
}

/// A peer in one line: who, where, and how it answers.
fn peer(peer: &FabricPeer) -> String {
    let mut line = format!("{} (host {}) at {}: {}", peer.name, peer.host_number, peer.address, peer.state);
    if let Some(ago_ms) = peer.last_hello_ago_ms {
        line.push_str(&format!(", last hello {} s ago", ago_ms / 1000));
    }
    if let Some(reason) = &peer.reason {
        line.push_str(&format!(" ({reason})"));
    }
    plain(&line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn facts_of_any_shape_make_a_table() {
        let facts = json!({
            "kvm": {"api_version": 12, "dirty_ring_bytes": 1_048_576, "capabilities": {"irqfd": true, "tsc_control": false}},
            "usable": true, "problems": [], "command_line_additions": "",
        });
        let lines: Vec<_> = table(&facts).lines().map(|line| line.trim_end().to_owned()).collect();
        assert_eq!(
            lines,
            [
                "kvm",
                "  api version               12",
                "  capabilities irqfd        yes",
                "  capabilities tsc control  no",
                "  dirty ring                1.0 MiB",
                "",
                "command line additions  none",
                "problems                none",
                "usable                  yes",
            ]
        );
        assert_eq!(table(&json!({})), "");
    }
}
