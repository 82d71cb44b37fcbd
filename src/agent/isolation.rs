//! What of the jail is in force: for a VM as it is seen from outside in `/proc`, never as its VMM claims; for the host
//! as its kernel offers it.

use std::path::Path;

use super::cgroup::{Controller, HostCgroups, settings};
use crate::sys::landlock::version as landlock_version;
use crate::sys::{cgroup, uring};

/// The namespaces that a VMM has of its own.
const NAMESPACES: [&str; 5] = ["pid", "net", "mnt", "ipc", "uts"];

/// What this host's kernel offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostIsolation {
    /// Landlock's version; the error says why there is none. A VMM does not start without it where the kernel has it.
    pub landlock: Result<u32, String>,
    /// Whether the kernel can end a process for a system call (`SECCOMP_RET_KILL_PROCESS`); a VMM does not start
    /// without.
    pub seccomp_kills: bool,
    /// Whether disks on files are served by io_uring; the error says why each has a thread instead.
    pub io_uring: Result<(), String>,
    /// The control group below which VMs have theirs, or why there is none.
    pub cgroup: Result<String, String>,
    /// Controllers, and why those that bound nothing do not.
    pub controllers: Vec<Controller>,
}

/// What a thread may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadFilter {
    /// Its name.
    pub thread: String,
    /// `Seccomp` of proc_pid_status(5): 2 is a filter.
    pub mode: u32,
    /// How many filters it has: the strictest holds. `None` before Linux 5.9.
    pub filters: Option<u32>,
}

/// A limit of a control group as the kernel has it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLimit {
    /// The file.
    pub file: &'static str,
    /// What is in force; the error says why nothing is.
    pub value: Result<String, String>,
}

/// A VM's jail, looked at from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmJail {
    /// User id of its process.
    pub uid: u32,
    /// Namespaces that it does not share with the agent.
    pub namespaces: Vec<&'static str>,
    /// Nothing is in its root directory.
    pub empty_root: bool,
    /// It has no capability, and none to gain.
    pub no_capabilities: bool,
    /// It cannot gain privileges.
    pub no_new_privileges: bool,
    /// Its threads' filters of system calls.
    pub threads: Vec<ThreadFilter>,
    /// Version of the Landlock that it is under: the kernel's, since no VMM starts without it where the kernel has one.
    /// Whether it is there shows from outside nowhere else.
    pub landlock: Option<u32>,
    /// Its control group, from the mount; `None` when this host has none.
    pub cgroup: Option<String>,
    /// Its limits there.
    pub limits: Vec<GroupLimit>,
}

/// Asks this host's kernel.
pub(super) fn host(cgroups: &HostCgroups) -> HostIsolation {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    HostIsolation {
        landlock: landlock_version().map_err(|error| error.to_string()),
        seccomp_kills: actions.split_whitespace().any(|action| action == "kill_process"),
        io_uring: uring::Ring::make(1).map(drop).map_err(|error| error.to_string()),
        cgroup: cgroups.place(),
        controllers: cgroups.controllers().to_vec(),
    }
}

/// Looks at a process; `None` when it is gone.
pub(super) fn vm(pid: i32, cgroups: &HostCgroups, group: Option<&cgroup::Group>) -> Option<VmJail> {
    let process = Path::new("/proc").join(pid.to_string());
    let status = Status::read(&process)?;
    let own = |name: &&&'static str| {
        let its = std::fs::read_link(process.join("ns").join(name));
        let ours = std::fs::read_link(Path::new("/proc/self/ns").join(name));
        matches!((its, ours), (Ok(its), Ok(ours)) if its != ours)
    };
    let empty_root = std::fs::read_dir(process.join("root")).is_ok_and(|mut entries| entries.next().is_none());
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    Some(VmJail {
        uid: status.number("Uid")?,
        namespaces: NAMESPACES.iter().filter(own).copied().collect(),
        empty_root,
        no_capabilities: sets
            .iter()
            .all(|set| status.word(set).is_some_and(|bits| bits.bytes().all(|bit| bit == b'0'))),
        no_new_privileges: status.word("NoNewPrivs") == Some("1"),
        threads: threads(&process),
        landlock: landlock_version().ok(),
        cgroup: cgroup::of_process(pid).filter(|path| group.is_some_and(|group| is_of(path, group))),
        limits: group.map(|group| limits(cgroups, group)).unwrap_or_default(),
    })
}

/// Whether a path from the mount is this group's.
fn is_of(path: &str, group: &cgroup::Group) -> bool {
    group.path().ends_with(path.trim_start_matches('/'))
}

fn threads(process: &Path) -> Vec<ThreadFilter> {
    let Ok(tasks) = std::fs::read_dir(process.join("task")) else { return Vec::new() };
    let one = |task: std::fs::DirEntry| {
        let status = Status::read(&task.path())?;
        let mode = status.number("Seccomp")?;
        Some(ThreadFilter { thread: status.word("Name")?.to_owned(), mode, filters: status.number("Seccomp_filters") })
    };
    tasks.filter_map(|task| one(task.ok()?)).collect()
}

fn limits(cgroups: &HostCgroups, group: &cgroup::Group) -> Vec<GroupLimit> {
    let absent = |name| {
        let controller = cgroups.controllers().iter().find(|controller| controller.name == name);
        controller.and_then(|controller| controller.absent.clone())
    };
    // Which files there are does not depend on the VM.
    let files = settings(1, 1).into_iter().map(|setting| (setting.controller, setting.file));
    files
        .map(|(controller, file)| {
            let value = match absent(controller) {
                Some(reason) => Err(reason),
                None => group.get(file).map(|text| text.trim().to_owned()).map_err(|error| error.to_string()),
            };
            GroupLimit { file, value }
        })
        .collect()
}

/// `/proc/PID/status` or that of a thread.
struct Status(String);

impl Status {
    fn read(of: &Path) -> Option<Self> {
        std::fs::read_to_string(of.join("status")).ok().map(Self)
    }

    /// The first word of a field.
    fn word(&self, field: &str) -> Option<&str> {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(name, _)| *name == field)?.1.split_whitespace().next()
    }

    fn number(&self, field: &str) -> Option<u32> {
        self.word(field)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_a_jail_is_told_as_such() {
        let cgroups = HostCgroups::open(Some("/no-such-place/for-a-test/\0"), 0);
        let pid = std::process::id().cast_signed();
        let jail = vm(pid, &cgroups, None).unwrap();
        assert!(!jail.empty_root && jail.namespaces.is_empty(), "{jail:?}");
        assert!(jail.threads.iter().any(|thread| thread.mode == 0), "{jail:?}");
        assert_eq!((jail.cgroup, jail.limits), (None, Vec::new()));
        assert!(vm(-1, &cgroups, None).is_none(), "no process");
        let host = host(&cgroups);
        assert!(host.cgroup.is_err(), "{host:?}");
        assert!(host.controllers.iter().all(|controller| controller.absent.is_some()), "{host:?}");
    }

    #[test]
    fn fields_of_status_are_words_and_numbers() {
        let status = Status("Name:\tvcpu0\nSeccomp:\t2\nUid:\t7\t7\t7\t7\nGroups:\t \n".to_owned());
        assert_eq!(
            (status.word("Name"), status.number("Seccomp"), status.number("Uid")),
            (Some("vcpu0"), Some(2), Some(7))
        );
        assert_eq!((status.word("Groups"), status.word("Secc")), (None, None));
    }
}
