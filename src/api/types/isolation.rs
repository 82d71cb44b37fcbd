//! What keeps VMs apart: what the host's kernel offers, and what of a VM's jail is in force.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a host's kernel offers to keep VMs apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostIsolation {
    /// Version of the kernel's Landlock; null without. Where there is one, no VM runs without it.
    pub landlock_version: Option<u32>,
    /// Why there is no Landlock; null where there is.
    pub landlock_absent: Option<String>,
    /// The kernel ends a process for a system call that its filter forbids. No VM runs without.
    pub seccomp_kills: bool,
    /// Why disks on files have a thread each; null: the kernel's io_uring serves them.
    pub io_uring_absent: Option<String>,
    /// Directory of the control group below which VMs have theirs; null without.
    pub cgroup: Option<String>,
    /// Why there is no control group; null where there is.
    pub cgroup_absent: Option<String>,
    /// The controllers that VMs are to be bounded with.
    pub controllers: Vec<CgroupController>,
}

/// A controller of control groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CgroupController {
    /// `cpu`, `memory`, `io` or `pids`.
    pub name: String,
    /// Why it does not bound VMs on this host; null: it does.
    pub absent: Option<String>,
}

/// A VM's jail, as the agent sees it from outside at this moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmJail {
    /// User id of its process, which no other VM has.
    pub uid: u32,
    /// Namespaces of its own: `pid net mnt ipc uts`.
    pub namespaces: Vec<String>,
    /// Its root directory is empty.
    pub empty_root: bool,
    /// It has no capability and none to gain.
    pub no_capabilities: bool,
    /// It cannot gain privileges.
    pub no_new_privileges: bool,
    /// Every thread's system calls are filtered.
    pub seccomp: bool,
    /// Its threads.
    pub threads: Vec<VmJailThread>,
    /// Version of the Landlock that it is under: the kernel's. Null without.
    pub landlock_version: Option<u32>,
    /// Its control group, from the mount; null without.
    pub cgroup: Option<String>,
    /// Its limits there.
    pub limits: Vec<VmJailLimit>,
}

/// A thread of a VM's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmJailThread {
    /// Its name: `hearth` is the first, `devices`, `disk-N` and `vcpuN` are the others.
    pub name: String,
    /// `Seccomp` in proc_pid_status(5): 2 is a filter.
    pub seccomp_mode: u32,
    /// How many filters it is under, of which the strictest holds; null before Linux 5.9.
    pub seccomp_filters: Option<u32>,
}

/// A limit of a VM's control group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmJailLimit {
    /// The file that has it.
    #[schema(example = "memory.max")]
    pub file: String,
    /// What is in force, as the kernel writes it; null when nothing is.
    pub value: Option<String>,
    /// Why nothing is in force; null when something is.
    pub absent: Option<String>,
}
