//! The VMs' control groups: one per VMM below a group that is the agent's, named as everything of this host is
//! (`hth<host>-<VM's id>`, and the second while a VM is handed over). What a VM may use follows from its record ([`settings`], pure). What this host's kernel does
//! not offer is not pretended: [`HostCgroups::controllers`] says what holds and why the rest does not.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::record::VmRecord;
use crate::ids::VmId;
use crate::sys::cgroup::{self, Group, Hierarchy};
use crate::sys::jail::THREADS_MAX;
use crate::units::MIB;

/// End of the name of the second of a VM's two groups.
const OTHER_SUFFIX: &str = "-other";

/// The controllers that limits are made with.
pub(super) const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];

/// Microseconds over which processor time is counted: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// Processor time beyond the vCPUs', in processors: threads that serve devices and disks.
const CPUS_SPARE: u64 = 1;

/// Share of a VM's vCPU when processors are short: the kernel's default for a group, so that two vCPUs get twice of it.
const CPU_WEIGHT_PER_VCPU: u64 = 100;

/// Largest weight (cgroup-v2.rst, "cpu.weight" and "io.weight").
const WEIGHT_MAX: u64 = 10_000;

/// Every VM's share of a disk when it is short: the kernel's default.
const IO_WEIGHT: u64 = 100;

/// Memory of a VMM beyond its guest's: program, queues, sockets' buffers (1024 vsock streams of 64 KiB at the very
/// most), kernel memory for its descriptors and page tables. Page cache of its files is reclaimed before this counts.
const MEMORY_SPARE_BYTES: u64 = 128 * MIB;

/// Page tables, of the process and of the guest's physical memory: 8 bytes for each page in each, rounded up.
const MEMORY_PER_PAGE_TABLE_BYTE: u64 = 128;

/// Longest wait for the last process of a group to end, in each of its steps.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Last part of the agent's own group, where systemd puts it (`DelegateSubgroup=`): the VMs' groups go beside it, since
/// a group with processes of its own cannot hand controllers on.
const AGENTS_OWN: &str = "/agent";

/// One file to write into a VM's group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    /// The controller that has it.
    pub controller: &'static str,
    /// The file.
    pub file: &'static str,
    /// What to write.
    pub text: String,
}

/// What a VM may use. Swap is left to the host: what is swapped out is not lost, and memory.max bounds the rest.
pub(super) fn settings(vcpus: u32, memory_mib: u32) -> Vec<Setting> {
    let vcpus = u64::from(vcpus);
    let memory = u64::from(memory_mib).saturating_mul(MIB);
    let memory_max = memory + memory / MEMORY_PER_PAGE_TABLE_BYTE + MEMORY_SPARE_BYTES;
    let setting = |controller, file, text| Setting { controller, file, text };
    vec![
        setting("cpu", "cpu.max", format!("{} {CPU_PERIOD_US}", (vcpus + CPUS_SPARE) * CPU_PERIOD_US)),
        setting("cpu", "cpu.weight", (vcpus * CPU_WEIGHT_PER_VCPU).clamp(1, WEIGHT_MAX).to_string()),
        setting("memory", "memory.max", memory_max.to_string()),
        // Out of memory ends the VM, never one of its threads.
        setting("memory", "memory.oom.group", "1".to_owned()),
        setting("io", "io.weight", format!("default {IO_WEIGHT}")),
        setting("pids", "pids.max", THREADS_MAX.to_string()),
    ]
}

/// Whether a controller bounds VMs here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// Its name.
    pub name: &'static str,
    /// Why it does not; `None`: it does.
    pub absent: Option<String>,
}

/// The group below which VMs have theirs, or why there is none.
#[derive(Debug)]
enum Base {
    Group(Group),
    None(String),
}

/// The VMs' control groups on this host.
#[derive(Debug, Clone)]
pub(super) struct HostCgroups {
    base: Arc<Base>,
    controllers: Arc<[Controller]>,
    prefix: Arc<str>,
}

impl HostCgroups {
    /// Has the group below which VMs get theirs, with what controllers there are. A host without any is told of, not
    /// refused. `parent` is the configuration's, from the mount of version 2.
    pub(super) fn open(parent: Option<&str>, host_number: u16) -> Self {
        let prefix: Arc<str> = format!("hth{host_number}-").into();
        let made = base(parent);
        let (base, controllers) = match made {
            Ok((hierarchy, group)) => {
                let offered =
                    CONTROLLERS.map(|name| Controller { name, absent: hand_on(&hierarchy, &group, name).err() });
                (Base::Group(group), offered)
            }
            Err(reason) => {
                (Base::None(reason.clone()), CONTROLLERS.map(|name| Controller { name, absent: Some(reason.clone()) }))
            }
        };
        Self { base: Arc::new(base), controllers: Arc::new(controllers), prefix }
    }

    /// The controllers, each with why it does not bound VMs.
    pub(super) fn controllers(&self) -> &[Controller] {
        &self.controllers
    }

    /// The directory below which VMs have theirs, or why there is none.
    pub(super) fn place(&self) -> Result<String, String> {
        match &*self.base {
            Base::Group(group) => Ok(group.path().display().to_string()),
            Base::None(reason) => Err(reason.clone()),
        }
    }

    /// One of the two groups a VM's processes can be in, whether it is there or not; `None` on a host without groups. A
    /// VM that is handed over has two processes, each with the limits of one.
    fn group(&self, vm: &VmId, is_other: bool) -> Option<Group> {
        let suffix = if is_other { OTHER_SUFFIX } else { "" };
        match &*self.base {
            Base::Group(group) => Some(group.child(&format!("{}{}{suffix}", self.prefix, vm.as_str()))),
            Base::None(_) => None,
        }
    }

    /// The group of a VM's process; `None` when that cannot be told: nothing is done to a group that is not known.
    pub(super) fn group_of(&self, vm: &VmId, pid: i32) -> Option<Group> {
        let own = [false, true].into_iter().filter_map(|is_other| self.group(vm, is_other));
        let path = cgroup::of_process(pid)?;
        own.into_iter().find(|group| group.path().ends_with(path.trim_start_matches('/')))
    }

    /// Has a group for a VM's process, with all limits that this host's controllers can hold: not the one that the
    /// process `beside` is in, if it is given.
    pub(super) fn make(&self, vm: &VmRecord, beside: Option<i32>) -> io::Result<Option<Group>> {
        let is_other = beside.is_some_and(|pid| !is_in_other(pid));
        let Some(group) = self.group(&vm.id, is_other) else { return Ok(None) };
        group.make()?;
        for setting in settings(vm.spec.vcpus.into(), vm.spec.memory_mib) {
            let held = self.controllers.iter().any(|one| one.name == setting.controller && one.absent.is_none());
            if !held {
                continue;
            }
            if let Err(error) = group.set(setting.file, &setting.text) {
                let _ = group.remove_if_empty();
                let what =
                    format!("write {:?} into {}/{}: {error}", setting.text, group.path().display(), setting.file);
                return Err(io::Error::new(error.kind(), what));
            }
        }
        Ok(Some(group))
    }

    /// Removes a VM's group after its process. Nothing can be left in it; what is there all the same is ended. Call
    /// inside the runtime.
    pub(super) fn end(&self, group: &Group) {
        match group.remove_if_empty() {
            Ok(true) => {}
            Ok(false) => {
                let group = group.clone();
                let end = move || group.end(END_LIMIT).unwrap_or_else(|error| cannot_remove(&group, &error));
                drop(tokio::task::spawn_blocking(end));
            }
            Err(error) => cannot_remove(group, &error),
        }
    }

    /// Removes the groups of this host in which nothing runs: an earlier agent left them. Gives their names.
    pub(super) fn sweep(&self) -> io::Result<Vec<String>> {
        let Base::Group(base) = &*self.base else { return Ok(Vec::new()) };
        let mut removed = Vec::new();
        for name in base.children()?.into_iter().filter(|name| name.starts_with(&*self.prefix)) {
            if base.child(&name).remove_if_empty()? {
                removed.push(name);
            }
        }
        Ok(removed)
    }
}

fn is_in_other(pid: i32) -> bool {
    cgroup::of_process(pid).is_some_and(|path| path.ends_with(OTHER_SUFFIX))
}

fn cannot_remove(group: &Group, error: &io::Error) {
    tracing::warn!(group = %group.path().display(), %error, "cannot remove a VM's control group");
}

/// Where the VMs' groups go, made.
fn base(parent: Option<&str>) -> Result<(Hierarchy, Group), String> {
    let found = Hierarchy::find().map_err(|error| format!("look for control groups: {error}"))?;
    let hierarchy = found.ok_or("no cgroup2 file system is mounted")?;
    let group = hierarchy.group(&place(parent, &hierarchy.own));
    group.make().map_err(|error| format!("make {}: {error}", group.path().display()))?;
    Ok((hierarchy, group))
}

/// The configured place, or one beside the agent's own group, or below it.
fn place(parent: Option<&str>, own: &str) -> String {
    match (parent, own) {
        (Some(parent), _) => parent.to_owned(),
        (None, "/") => "/hearth".to_owned(),
        (None, own) => format!("{}/vms", own.strip_suffix(AGENTS_OWN).unwrap_or(own)),
    }
}

/// Has a controller reach the groups below `base`; the error says why it does not.
fn hand_on(hierarchy: &Hierarchy, base: &Group, name: &str) -> Result<(), String> {
    let failed = |group: &Group, error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => {
                " (it has processes of its own: start the agent with systemd's Delegate=yes and \
                DelegateSubgroup=agent, or say another place as cgroup.parent)"
            }
            Some(_) | None => "",
        };
        format!("hand {name} on in {}: {error}{hint}", group.path().display())
    };
    let has = |group: &Group| group.controllers().map(|all| all.contains(name)).map_err(|error| failed(group, error));
    if !has(base)? {
        let parent = base.parent().filter(|parent| parent.path().starts_with(&hierarchy.mount));
        if let Some(parent) = parent.filter(|parent| has(parent) == Ok(true)) {
            parent.hand_on(name).map_err(|error| failed(&parent, error))?;
        }
    }
    if !has(base)? {
        return Err(match hierarchy.version1.get(if name == "io" { "blkio" } else { name }) {
            Some(at) => format!("cgroup version 1 has it, at {}", at.display()),
            None => format!("{} does not have it: it was not delegated, or the kernel lacks it", base.path().display()),
        });
    }
    base.hand_on(name).map_err(|error| failed(base, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_from_what_a_vm_is() {
        let written = |vcpus, memory_mib| -> Vec<String> {
            let all = settings(vcpus, memory_mib).into_iter();
            all.map(|setting| format!("{} {}", setting.file, setting.text)).collect()
        };
        let small = [
            "cpu.max 200000 100000",
            "cpu.weight 100",
            "memory.max 269484032",
            "memory.oom.group 1",
            "io.weight default 100",
            "pids.max 60",
        ];
        assert_eq!(written(1, 128), small);
        let large = written(32, 65_536);
        assert_eq!(
            large[..3],
            ["cpu.max 3300000 100000", "cpu.weight 3200", "memory.max 69390565376"].map(str::to_owned)
        );
        // At the largest weight, and one vCPU beyond.
        assert_eq!(written(100, 128)[1], "cpu.weight 10000");
        assert_eq!(written(101, 128)[1], "cpu.weight 10000");
    }

    #[test]
    fn every_setting_is_of_a_controller_that_is_reported() {
        for setting in settings(1, 128) {
            assert!(CONTROLLERS.contains(&setting.controller), "{setting:?}");
            assert!(setting.file.starts_with(&format!("{}.", setting.controller)), "{setting:?}");
        }
    }

    #[test]
    fn the_place_is_configured_or_follows_from_the_agents_own() {
        assert_eq!(place(Some("/vms.slice"), "/system.slice/x"), "/vms.slice");
        assert_eq!(place(None, "/"), "/hearth");
        assert_eq!(place(None, "/system.slice/hearth.service/agent"), "/system.slice/hearth.service/vms");
        assert_eq!(place(None, "/user.slice/me"), "/user.slice/me/vms");
    }
}
