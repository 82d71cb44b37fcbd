//! Virtual machines.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Addressing, BalloonStats, InterfaceStats, LaunchMode, NetworkLimits, SwapPolicy, Swapped, VolumeSlot, VolumeWish,
};
use crate::ids::{ClusterId, MigrationId, OperationId, SessionId, VmId};

/// `POST /v1/vms`: answered 202 with the [`Vm`] when `wait` is `none`, else 201 with it once it is that far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmLaunchRequest {
    /// Image to boot; `demo` when neither image nor bundle is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "demo")]
    pub image: Option<String>,
    /// Bundle to launch from: its id, a unique start of it, or its name. Not together with an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<String>,
    /// Whether the VM may run before all of the bundle is on this host; `mmap` when left out. Only with a bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<LaunchMode>,
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter. Also the guest's host name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Number of vCPUs; 1 when left out, or what the bundle has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Guest memory in MiB; 128 when left out, or what the bundle has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Raw files of this host to attach as block devices, in order: at most 6.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Volumes that it gets. Disks, volumes and spare disks are at most 6 together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeWish>,
    /// Disks that are empty until a volume is attached: none when left out. Of a bundle, those it was made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 6)]
    pub spare_disks: Option<u8>,
    /// What may pass its network interface; without it everything may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_limits: Option<NetworkLimits>,
    /// Session to join: its id, name or network id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Who puts the VM's session addresses to use: the guest when left out. Only with a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addressing: Option<Addressing>,
    /// What the VM is in its session, for those who look: up to 63 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Cluster to join: its id, a unique start of it, or its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Who the VM is in its cluster: 1 to 63 of `a-z A-Z 0-9 . _ -`; the VM's id when left out. Without a cluster it
    /// joins one that is made for its session, or for this host: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executor_id: Option<String>,
    /// Ports of this host that lead to the VM, for clients outside of the fabric. Only with a session.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<PublishedPort>,
    /// When its memory is moved out without being asked for; never, when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapPolicy>,
    /// How many network interfaces it has, 1 to 8; 1 when left out. The first is in the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interfaces: Option<u8>,
    /// How far the VM has to be for the call to answer.
    #[serde(default)]
    pub wait: Wait,
}

/// How far a launch has to be for the call to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Accepted and recorded.
    #[default]
    None,
    /// Registered with its cluster; a VM in none is that far when it runs.
    Registered,
    /// Running, and the agent in the guest answers.
    Running,
}

/// A port of the host that leads to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// TCP when left out.
    #[serde(default)]
    pub protocol: PortProtocol,
    /// The host's port; one leads to one VM.
    pub host_port: u16,
    /// The VM's port.
    pub guest_port: u16,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Absolute path of a raw file or block device on this host.
    pub path: String,
    /// Refuse the guest's writes.
    #[serde(default)]
    pub read_only: bool,
    /// Other hosts see the same file at this path, and what one has written the next one reads: the VM can be moved to
    /// them. Left out when not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its id.
    #[schema(value_type = String, example = "vm-mzxw6ytbmzxw6ytb")]
    pub id: VmId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// What it does.
    pub state: VmState,
    /// Why it failed or stopped; null in other states.
    pub cause: Option<Cause>,
    /// Image it was booted from; null for a VM of a bundle.
    pub image: Option<String>,
    /// Bundle it was launched from; null for a VM of an image.
    pub bundle_id: Option<String>,
    /// Its session; null outside sessions.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub session_id: Option<SessionId>,
    /// Network id of its session; null outside sessions.
    pub session_network_id: Option<u32>,
    /// Its addresses, IPv6 first; none outside sessions and for a VM that ended.
    pub addresses: Vec<String>,
    /// Its cluster; null for a VM in none.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub cluster_id: Option<ClusterId>,
    /// Who it is in its cluster; null for a VM in none.
    #[serde(default)]
    pub executor_id: Option<String>,
    /// When its registration with its cluster was taken; null before.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub registered_at: Option<Timestamp>,
    /// What it is in its session; null when nobody said.
    #[serde(default)]
    pub role: Option<String>,
    /// VM generation id, 32 hexadecimal digits: differs for every launch and restore.
    pub generation: String,
    /// Name of the host it is on.
    pub host: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Its slots for volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeSlot>,
    /// What may pass its network interface.
    #[serde(default)]
    pub network_limits: NetworkLimits,
    /// Ports of this host that lead to it.
    #[serde(default)]
    pub published: Vec<PublishedPort>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Where the time of its launch went.
    pub timings: Timings,
    /// Why the agent leaves it alone; null ordinarily. It can be stopped and removed.
    #[serde(default)]
    pub quarantine: Option<Quarantine>,
    /// Name of the host it runs on, when it was handed over to another one; null while it is here.
    #[serde(default)]
    pub handed_to: Option<String>,
    /// Its last migration, or the one it is on; null if there was none.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub migration_id: Option<MigrationId>,
    /// When its memory is moved out without being asked for.
    #[serde(default)]
    pub swap_policy: SwapPolicy,
    /// Where its memory is; null while it runs.
    #[serde(default)]
    pub swapped: Option<Swapped>,
    /// Process id of its VMM on the host, while there is one.
    pub pid: Option<u32>,
    /// What of its jail is in force: where one VM is shown (`GET /v1/vms/{id}`), while it has a process; else null.
    #[serde(default)]
    pub jail: Option<super::VmJail>,
    /// The operation that works on it, or the last one that did.
    #[schema(value_type = Option<String>)]
    pub operation_id: Option<OperationId>,
    /// The last lines of its console: for failed VMs, where they tell why.
    #[serde(default)]
    pub last_console_lines: Vec<String>,
}

/// A VM that the agent leaves alone, as what it found of it contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quarantine {
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// What was found.
    pub report: String,
}

/// `GET /v1/vms`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    /// All VMs of this host, oldest first.
    pub vms: Vec<Vm>,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Recorded; nothing made yet.
    Reserved,
    /// Its process, machine and guest come up.
    Launching,
    /// Runs; its session's cluster does not know it yet.
    Registering,
    /// Runs and answers.
    Running,
    /// Its vCPUs and devices stand still.
    Paused,
    /// Being written into a bundle.
    Saving,
    /// Another VMM process takes it over.
    HandingOver,
    /// Volumes are being attached to it or taken from it.
    ChangingVolumes,
    /// Stands still; its memory is being moved out.
    SwappingOut,
    /// Stands still; its memory is out, see `swapped`.
    SwappedOut,
    /// Its memory comes back.
    Waking,
    /// Moving to another host.
    Sending,
    /// Another host owns it.
    HandedOver,
    /// Moving to this host.
    Arriving,
    /// Being ended.
    Stopping,
    /// Ended, by request or by its guest.
    Stopped,
    /// Ended by a failure: see `cause`.
    Failed,
    /// Removed.
    Gone,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cause {
    /// Stable snake_case word for programs.
    #[schema(example = "guest_panic")]
    pub code: String,
    /// For people.
    pub detail: String,
}

/// Where the time of a launch went. A phase that was not reached yet is null.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Timings {
    /// Request accepted → the VMM answered Hello.
    pub spawn_ms: Option<f64>,
    /// Making the jail and opening it for the VM.
    pub network_ms: Option<f64>,
    /// Launch sent → machine built.
    pub load_ms: Option<f64>,
    /// Part of `load_ms`: making the VM, its memory and interrupt controllers.
    pub load_vm_ms: Option<f64>,
    /// Part of `load_ms`: loading kernel and initrd.
    pub load_kernel_ms: Option<f64>,
    /// Part of `load_ms`: making devices and vCPUs.
    pub load_devices_ms: Option<f64>,
    /// Request accepted → the vCPUs run.
    pub resumed_ms: Option<f64>,
    /// Request accepted → the guest's agent first answered.
    pub answered_ms: Option<f64>,
    /// Request accepted → registered with its cluster.
    pub registered_ms: Option<f64>,
    /// First resume → first vCPU's entry into the guest.
    pub first_entry_ms: Option<f64>,
    /// First entry → the guest's own agent started.
    pub kernel_ms: Option<f64>,
    /// The guest's own agent started → it answered and took its identity.
    pub init_ms: Option<f64>,
    /// Request accepted → running.
    pub total_ms: Option<f64>,
}

/// `POST /v1/vms/{id}/stop`: answered with the [`Vm`] once it is stopped. The body may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Milliseconds the guest has to power itself off before it is killed; 0 kills at once. Default 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
}

/// Query of `DELETE /v1/vms/{id}`, which stops the VM and forgets it: 204 once it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct RemoveQuery {
    /// As in [`StopRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
}

/// Query of `/v1/vms/{id}/console`. `GET` answers with the bounded history as bytes. `POST` with
/// `Upgrade: hearth-stream/1` attaches: `stdout` frames carry what the guest writes, `stdin` frames what it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ConsoleQuery {
    /// Bytes of history: all that is kept (`GET`), or none before the live output (`POST`), when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_bytes: Option<u32>,
}

/// `GET /v1/vms/{id}/stats`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// The VM.
    #[schema(value_type = String)]
    pub id: VmId,
    /// What the VMM says of itself and the host says of it; null while there is no VMM.
    pub vmm: Option<VmmStats>,
    /// What passed its network interfaces; empty while there is no VMM.
    #[serde(default)]
    pub network: Vec<InterfaceStats>,
    /// Its balloon; null while there is no VMM, and for a VM without one.
    #[serde(default)]
    pub balloon: Option<BalloonStats>,
    /// What the guest's own agent says; null while it does not answer.
    pub guest: Option<GuestStats>,
}

/// A VMM process.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmmStats {
    /// Process id on the host.
    pub pid: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Where guest memory starts in the process; with `/proc/PID/smaps` it tells the VMM's own memory from the guest's.
    pub guest_memory_host_address: u64,
    /// Accesses of the guest to ports and addresses where nothing is.
    pub stray_accesses: u64,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
    /// Resident memory of the process, guest memory included.
    pub resident_bytes: Option<u64>,
    /// Memory of the process's own in the host's swap.
    #[serde(default)]
    pub swapped_bytes: Option<u64>,
    /// Processor time used so far, user and system.
    pub cpu_ms: Option<f64>,
}

/// A guest, as its own agent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestStats {
    /// Time since the guest's kernel started.
    pub uptime_ms: f64,
    /// The guest's wall clock.
    #[schema(value_type = String, format = DateTime)]
    pub wall_clock: Timestamp,
    /// Memory the guest's kernel manages.
    pub memory_total_bytes: u64,
    /// Memory available without swapping.
    pub memory_available_bytes: u64,
    /// Processes, kernel threads not counted.
    pub processes: u32,
    /// Load average over one minute.
    pub load1: f64,
    /// Commands started by exec that have not ended.
    pub execs_running: u32,
}
