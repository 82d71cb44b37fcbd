//! What keeps VMs apart, as the API shows it.

use crate::agent;
use crate::api::types::{CgroupController, HostIsolation, VmJail, VmJailLimit, VmJailThread};

/// What a host's kernel offers.
pub(in crate::api) fn host_isolation(host: agent::HostIsolation) -> HostIsolation {
    let agent::HostIsolation { landlock, seccomp_kills, io_uring, cgroup, controllers } = host;
    let (landlock_version, landlock_absent) = either(landlock);
    let (cgroup, cgroup_absent) = either(cgroup);
    let controllers = controllers.into_iter();
    HostIsolation {
        landlock_version,
        landlock_absent,
        seccomp_kills,
        io_uring_absent: io_uring.err(),
        cgroup,
        cgroup_absent,
        controllers: controllers
            .map(|agent::Controller { name, absent }| CgroupController { name: name.to_owned(), absent })
            .collect(),
    }
}

/// A VM's jail.
pub(in crate::api) fn vm_jail(jail: agent::VmJail) -> VmJail {
    let threads = jail.threads.into_iter().map(|one| VmJailThread {
        name: one.thread,
        seccomp_mode: one.mode,
        seccomp_filters: one.filters,
    });
    let threads: Vec<VmJailThread> = threads.collect();
    let limits = jail.limits.into_iter().map(|limit| {
        let (value, absent) = either(limit.value);
        VmJailLimit { file: limit.file.to_owned(), value, absent }
    });
    VmJail {
        uid: jail.uid,
        namespaces: jail.namespaces.into_iter().map(str::to_owned).collect(),
        empty_root: jail.empty_root,
        no_capabilities: jail.no_capabilities,
        no_new_privileges: jail.no_new_privileges,
        // proc_pid_status(5): 2 is SECCOMP_MODE_FILTER. A process without a thread has ended.
        seccomp: !threads.is_empty() && threads.iter().all(|thread| thread.seccomp_mode == 2),
        threads,
        landlock_version: jail.landlock,
        cgroup: jail.cgroup,
        limits: limits.collect(),
    }
}

fn either<T>(result: Result<T, String>) -> (Option<T>, Option<String>) {
    match result {
        Ok(value) => (Some(value), None),
        Err(reason) => (None, Some(reason)),
    }
}
