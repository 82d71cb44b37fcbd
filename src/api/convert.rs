//! Records of the agent → bodies of the API, field by field: what is inside may change, what is said may not.

mod balloon;
mod bundle;
mod cluster;
mod fetch;
mod image;
mod isolation;
mod migration;
mod pool;
mod session;
mod swap;
mod usage;
mod volume;

use std::time::Duration;

use jiff::Timestamp;

use axum::http::StatusCode;

use super::error::ApiError;
use super::types::{
    Cause, Disk, Drain, ErrorDetail, Event, FlowLimits, FlowStats, Host, HostFailure, HostLedger, HostPressure,
    HostRoom, HostVms, HostWarning, InterfaceStats, NetworkLimits, Operation, OperationState, Quarantine, Stats, Step,
    StepState, Timings, Vm, VmState, VmmStats,
};
use crate::agent;
use crate::clock::UnixNanos;
use crate::report::Retry;
use crate::units::{self, MIB, NetLimits, Rate};

pub(super) use balloon::balloon;
pub(super) use bundle::{bundle, bundles};
pub(super) use cluster::{calculation, cluster, member};
pub(super) use fetch::{fetch, memory};
pub(super) use image::{image, import};
pub(super) use isolation::{host_isolation, vm_jail};
pub(super) use migration::{estimate, migrate_order, migration, moved};
pub(super) use pool::pool;
pub(super) use session::{addressing, egress, fabric, published_port, session};
pub(super) use swap::{swap_decision, swap_mode, swap_policy};
pub(super) use usage::usage;
pub(super) use volume::{changes, digest, lease, lease_mode, leases, slots, vm_volumes, volume, volume_snapshot, wish};

/// Nanoseconds as a time of day; what jiff cannot show (after the year 9999) becomes its last moment.
pub(super) fn timestamp(at: UnixNanos) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(at.0)).unwrap_or(Timestamp::MAX)
}

fn ms(us: Option<u64>) -> Option<f64> {
    us.map(|us| Duration::from_micros(us).as_secs_f64() * 1000.0)
}

/// Why a VM ended; nothing for one that did not.
fn cause(vm: &agent::VmRecord) -> Option<Cause> {
    let left = vm.remains.as_ref();
    if let agent::VmState::Failed { cause } = &vm.state {
        let detail = [cause.detail(), left.and_then(|left| left.exit.clone())];
        let detail = detail.into_iter().flatten().collect::<Vec<_>>().join("; VMM: ");
        return Some(Cause { code: cause.name().to_owned(), detail });
    }
    if vm.state != agent::VmState::Stopped {
        return None;
    }
    // A VMM that was killed after a stop was asked for has no words.
    let code = left.and_then(|left| left.cause.clone()).unwrap_or_else(|| "killed".to_owned());
    let detail = match code.as_str() {
        "guest_powered_off" => "the guest powered off",
        "guest_rebooted" => "the guest rebooted, which ends a VM",
        _ => "it was stopped by request",
    };
    Some(Cause { code, detail: detail.to_owned() })
}

/// How far draining is.
pub(super) fn drain(draining: &agent::Draining) -> Drain {
    Drain {
        vms: draining.vms as u64,
        stopped: draining.stopped as u64,
        left: draining.left.clone(),
        done: draining.is_over,
    }
}

/// A VM.
pub(super) fn vm(vm: &agent::VmRecord, host: &str) -> Vm {
    let timings = &vm.timings;
    Vm {
        id: vm.id.clone(),
        name: vm.name.clone(),
        state: state(&vm.state),
        cause: cause(vm),
        image: Some(vm.spec.image.clone()),
        bundle_id: vm.spec.bundle.as_ref().map(ToString::to_string),
        session_id: vm.network.as_ref().map(|network| network.session.clone()),
        session_network_id: vm.network.as_ref().map(|network| network.session_network_id.into()),
        addresses: session::addresses(vm),
        cluster_id: vm.spec.cluster.as_ref().map(|member| member.cluster.clone()),
        executor_id: vm.spec.cluster.as_ref().map(|member| member.executor_id.clone()),
        registered_at: vm.registration.map(|registered| timestamp(registered.at)),
        role: vm.spec.role.clone(),
        generation: vm.generation.clone(),
        host: host.to_owned(),
        vcpus: vm.spec.vcpus.into(),
        memory_mib: vm.spec.memory_mib.into(),
        disks: vm.spec.disks.iter().map(disk).collect(),
        volumes: slots(vm),
        network_limits: shown_limits(vm.spec.network_limits),
        published: vm.network.iter().flat_map(|network| network.published.iter().map(session::shown_port)).collect(),
        created_at: timestamp(vm.created_at),
        timings: Timings {
            spawn_ms: ms(timings.spawn_us),
            network_ms: ms(timings.network_us),
            load_ms: ms(timings.build_us),
            resumed_ms: ms(timings.resumed_us),
            answered_ms: ms(timings.answered_us),
            registered_ms: ms(timings.registered_us),
            load_vm_ms: ms(timings.vm_us),
            load_kernel_ms: ms(timings.load_us),
            load_devices_ms: ms(timings.devices_us),
            first_entry_ms: ms(timings.first_entry_us),
            kernel_ms: ms(timings.kernel_us),
            init_ms: ms(timings.init_us),
            total_ms: ms(timings.total_us),
        },
        quarantine: vm
            .quarantine
            .as_ref()
            .map(|found| Quarantine { since: timestamp(found.at), report: found.report.clone() }),
        handed_to: handed_to(vm),
        migration_id: vm.migration.as_ref().map(|way| way.id.clone()),
        swap_policy: swap::shown_policy(&vm.spec.swap),
        swapped: swap::swapped(vm),
        pid: vm.process.and_then(|process| u32::try_from(process.pid).ok()),
        jail: None,
        operation_id: vm.operation.clone(),
        last_console_lines: vm.remains.as_ref().map(|left| left.console.clone()).unwrap_or_default(),
    }
}

fn disk(disk: &agent::DiskSpec) -> Disk {
    Disk { path: disk.path.clone(), read_only: disk.read_only, shared: disk.shared }
}

/// The host a VM was handed over to.
fn handed_to(vm: &agent::VmRecord) -> Option<String> {
    let way = vm.migration.as_ref().filter(|_| vm.state == agent::VmState::HandedOver)?;
    Some(way.peer.clone())
}

fn state(state: &agent::VmState) -> VmState {
    match state {
        agent::VmState::Reserved => VmState::Reserved,
        agent::VmState::Launching => VmState::Launching,
        agent::VmState::Registering => VmState::Registering,
        agent::VmState::Running => VmState::Running,
        agent::VmState::Paused => VmState::Paused,
        agent::VmState::Saving { .. } => VmState::Saving,
        agent::VmState::HandingOver { .. } => VmState::HandingOver,
        agent::VmState::ChangingVolumes { .. } => VmState::ChangingVolumes,
        agent::VmState::SwappingOut { .. } => VmState::SwappingOut,
        agent::VmState::SwappedOut { .. } => VmState::SwappedOut,
        agent::VmState::Waking { .. } => VmState::Waking,
        agent::VmState::Sending => VmState::Sending,
        agent::VmState::HandedOver => VmState::HandedOver,
        agent::VmState::Arriving { .. } => VmState::Arriving,
        agent::VmState::Stopping => VmState::Stopping,
        agent::VmState::Stopped => VmState::Stopped,
        agent::VmState::Failed { .. } => VmState::Failed,
        agent::VmState::Gone => VmState::Gone,
    }
}

/// An operation.
pub(super) fn operation(operation: &agent::OperationRecord) -> Operation {
    let kind = match operation.goal {
        agent::Goal::Launch => "vm_launch",
        agent::Goal::Pause => "vm_pause",
        agent::Goal::Resume => "vm_resume",
        agent::Goal::Stop => "vm_stop",
        agent::Goal::Remove => "vm_remove",
        agent::Goal::Build => "bundle_build",
        agent::Goal::Snapshot => "vm_snapshot",
        agent::Goal::Undo => "vm_undo",
        agent::Goal::Enlist => "vm_launch",
        agent::Goal::Register => "vm_register",
        agent::Goal::SwapOut => "vm_swap_out",
        agent::Goal::Wake => "vm_wake",
        agent::Goal::HandOver => "vm_hand_over",
        agent::Goal::ChangeVolumes => "vm_volumes",
        agent::Goal::Migrate => "vm_migrate",
        agent::Goal::Leave => "vm_leave",
        agent::Goal::Arrive => "vm_arrive",
    };
    let state = match operation.state {
        agent::OperationState::Running => OperationState::Running,
        agent::OperationState::Succeeded => OperationState::Succeeded,
        agent::OperationState::Failed => OperationState::Failed,
        agent::OperationState::Cancelled => OperationState::Cancelled,
    };
    let saved = operation.makes.as_ref().and_then(|makes| makes.pause_us);
    let pause_us = saved.or(operation.moved.and_then(|moved| moved.pause_us));
    Operation {
        id: operation.id.clone(),
        kind: kind.to_owned(),
        object: operation.vm.to_string(),
        state,
        steps: steps(&operation.steps, state == OperationState::Running),
        bundle_id: operation.makes.as_ref().and_then(|makes| makes.bundle.clone()),
        pause_ms: ms(pause_us),
        moved: operation.moved.as_ref().map(moved),
        memory_bytes: operation.makes.as_ref().and_then(|makes| makes.memory_bytes),
        copy_rounds: operation.makes.as_ref().and_then(|makes| makes.rounds),
        quiesced: operation.makes.as_ref().and_then(|makes| makes.quiesced),
        error: operation.error.as_ref().map(error_detail),
        created_at: timestamp(operation.created_at),
        finished_at: operation.ended_at.map(timestamp),
    }
}

/// Steps of what is `under_way`, or over.
fn steps(steps: &[agent::StepRecord], mut under_way: bool) -> Vec<Step> {
    let step = |step: &agent::StepRecord| {
        let state = match step.state {
            agent::StepState::Done => StepState::Done,
            agent::StepState::Failed => StepState::Failed,
            // The first that is not done is the one being done.
            agent::StepState::Pending if std::mem::take(&mut under_way) => StepState::Running,
            agent::StepState::Pending => StepState::Pending,
        };
        Step { name: step.effect.name().to_owned(), state, took_ms: ms(step.took_us) }
    };
    steps.iter().map(step).collect()
}

fn error_detail(error: &agent::OperationError) -> ErrorDetail {
    ErrorDetail { code: error.code.clone(), message: error.message.clone(), detail: None, retry: error.retry.into() }
}

/// An event.
pub(super) fn event(event: agent::EventRecord) -> Event {
    let agent::EventRecord { seq, at, kind, subject, operation, body } = event;
    // What happened to an operation is told of the operation; its VM is in the detail.
    let mut detail = body;
    let object = match (kind.as_str(), operation) {
        ("operation_state", Some(operation)) => {
            detail["vm"] = subject.to_string().into();
            operation.to_string()
        }
        (_, Some(operation)) => {
            detail["operation"] = operation.to_string().into();
            subject.to_string()
        }
        (_, None) => subject.to_string(),
    };
    Event { seq, at: timestamp(at), kind, object, detail }
}

/// What a VM uses and says of itself.
pub(super) fn stats(vm: &agent::VmRecord, stats: &agent::VmStats) -> Stats {
    let vmm = stats.process.zip(stats.vmm).map(|((pid, usage), status)| VmmStats {
        pid: pid.cast_unsigned(),
        memory_bytes: status.memory_bytes,
        guest_memory_host_address: status.guest_memory_host_address,
        stray_accesses: status.stray_accesses,
        console_bytes: status.console_bytes,
        resident_bytes: usage.resident_bytes,
        swapped_bytes: usage.swapped_bytes,
        cpu_ms: usage.cpu.map(|cpu| cpu.as_secs_f64() * 1000.0),
    });
    let guest = stats.guest.map(|guest| super::types::GuestStats {
        uptime_ms: Duration::from_nanos(guest.uptime_ns).as_secs_f64() * 1000.0,
        wall_clock: timestamp(UnixNanos(guest.wall_ns)),
        memory_total_bytes: guest.memory_total_bytes,
        memory_available_bytes: guest.memory_available_bytes,
        processes: guest.processes,
        load1: f64::from(guest.load1_hundredths) / 100.0,
        execs_running: guest.execs_running,
    });
    let network = stats.network.iter().map(interface).collect();
    let balloon = stats.balloon.as_ref().map(balloon);
    Stats { id: vm.id.clone(), vmm, network, balloon, guest }
}

fn interface(found: &agent::InterfaceStatus) -> InterfaceStats {
    let flow = |flow: agent::FlowStatus| {
        let agent::FlowStatus { frames, bytes, dropped, throttled } = flow;
        FlowStats { packets: frames, bytes, dropped, throttled }
    };
    let &agent::InterfaceStatus { index, link_up, rx, tx } = found;
    InterfaceStats { slot: index, link_up, rx: flow(rx), tx: flow(tx) }
}

/// The limits a client asks for. Whether somebody can mean their numbers is decided with the rest of the launch.
pub(super) fn network_limits(asked: NetworkLimits) -> Result<NetLimits, ApiError> {
    let flow = |direction: &str, asked: FlowLimits| {
        let FlowLimits { bytes_per_s, burst_bytes, packets_per_s, burst_packets } = asked;
        for (rate, burst, named) in [(bytes_per_s, burst_bytes, "bytes"), (packets_per_s, burst_packets, "packets")] {
            if rate.is_none() && burst.is_some() {
                let message = format!("network limit {direction}.burst_{named} has no {direction}.{named}_per_s");
                return Err(ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "invalid_network_limits",
                    message,
                    Retry::WithChange,
                ));
            }
        }
        let bytes = bytes_per_s.map(|rate| Rate::bytes(rate, burst_bytes));
        let frames = packets_per_s.map(|rate| Rate::frames(rate, burst_packets));
        Ok(units::FlowLimits { bytes, frames })
    };
    Ok(NetLimits { rx: flow("rx", asked.rx)?, tx: flow("tx", asked.tx)? })
}

fn shown_limits(limits: NetLimits) -> NetworkLimits {
    let flow = |limits: units::FlowLimits| FlowLimits {
        bytes_per_s: limits.bytes.map(|rate| rate.per_s),
        burst_bytes: limits.bytes.map(|rate| rate.burst),
        packets_per_s: limits.frames.map(|rate| rate.per_s),
        burst_packets: limits.frames.map(|rate| rate.burst),
    };
    NetworkLimits { rx: flow(limits.rx), tx: flow(limits.tx) }
}

fn failure(record: &agent::OperationRecord) -> HostFailure {
    let operation = operation(record);
    let (code, message) = operation.error.map(|error| (error.code, error.message)).unwrap_or_default();
    HostFailure {
        operation: operation.id.to_string(),
        kind: operation.kind,
        object: operation.object,
        code,
        message,
        at: operation.finished_at,
    }
}

/// This host.
pub(super) fn host(
    view: agent::HostView,
    vms: &[std::sync::Arc<agent::VmRecord>],
    fabric: Option<&agent::FabricView>,
) -> Host {
    let agent::HostView { facts, started_at, state_dir, vm_states, limits, ledger, warnings, pressure, .. } = view;
    let room = HostRoom {
        draining: view.is_draining,
        memory_promised_bytes: view.promised_bytes,
        memory_reserve_bytes: limits.memory_reserve_mib.saturating_mul(MIB),
        disk_total_bytes: facts.disk_total_bytes,
        disk_free_bytes: facts.disk_free_bytes,
        disk_reserve_bytes: limits.disk_reserve_mib.saturating_mul(MIB),
        descriptors_open: facts.descriptors_open,
        descriptors_max: facts.descriptors_max,
        connections_open: view.connections as u64,
        connections_max: limits.connections_max,
    };
    let mut count = HostVms { total: u32::try_from(vms.len()).unwrap_or(u32::MAX), ..HostVms::default() };
    for vm in vms {
        match state(&vm.state) {
            VmState::Running | VmState::Paused => count.alive += 1,
            VmState::Failed => count.failed += 1,
            VmState::Stopped | VmState::Gone | VmState::SwappedOut | VmState::HandedOver => {}
            VmState::Reserved
            | VmState::Launching
            | VmState::Registering
            | VmState::Saving
            | VmState::HandingOver
            | VmState::ChangingVolumes
            | VmState::SwappingOut
            | VmState::Waking
            | VmState::Sending
            | VmState::Arriving
            | VmState::Stopping => count.changing += 1,
        }
    }
    Host {
        name: facts.name,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent_pid: std::process::id(),
        started_at: timestamp(started_at),
        state_dir,
        cpus: facts.cpus,
        memory_bytes: facts.memory_bytes,
        memory_available_bytes: facts.memory_available_bytes,
        isolation: facts.isolation.map(host_isolation),
        vms: count,
        vm_states,
        room,
        pressure: HostPressure { cpu_percent: pressure.cpu, memory_percent: pressure.memory, io_percent: pressure.io },
        failures: ledger.iter().flat_map(|ledger| ledger.failures.iter().map(failure)).collect(),
        ledger: ledger.map(|ledger| HostLedger {
            bytes: ledger.bytes,
            last_backup: ledger.last_backup.map(timestamp),
            backups: ledger.backups as u64,
            events: ledger.events,
            oldest_event: ledger.oldest_event,
        }),
        warnings: warnings.into_iter().map(|warning| HostWarning { what: warning.what, todo: warning.todo }).collect(),
        fabric: fabric.map(session::fabric),
        probe: facts.probe,
    }
}
