//! The jail a VMM puts itself into, first thing after exec: an empty root, resource limits, no capabilities, a uid of its
//! own, no way to gain privileges back, and with Landlock nothing to reach by name. Its namespaces and its control
//! group come from the clone that started it (`process::spawn_vmm`). Afterwards the process holds what it was handed as
//! descriptors and nothing else. What system calls its threads may make is the process's own law (`vmm::seccomp`).

use std::io;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, sethostname, setresgid, setresuid};

use super::landlock;

/// Most open descriptors of a VMM: control, console and vsock streams (1024 at most), queues and eventfds.
pub const DESCRIPTORS_MAX: u64 = 2048;

/// Most threads of a VMM: the first, one for devices, one to send, one to fill memory, 32 vCPUs, 6 disks, 9 of the
/// kernel's for disks' rings (`uring::WORKERS_MAX` and one), and room for those that are just ending when a machine that
/// could not be built is built again.
pub const THREADS_MAX: u64 = 60;

/// Most threads of a VM's user id (RLIMIT_NPROC): a VM that is handed over has two VMMs.
pub const USER_THREADS_MAX: u64 = 2 * THREADS_MAX;

/// Bytes that a VMM may write beyond its largest disk or its guest's memory, in any one file (RLIMIT_FSIZE): saved state
/// is below 16 MiB, the log and the console file far below.
pub const FILE_BYTES_SPARE: u64 = 64 << 20;

/// Why the jail could not be closed. The process must end.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct EnterJailError {
    /// What was tried.
    pub step: &'static str,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

fn step<T>(step: &'static str, result: nix::Result<T>) -> Result<T, EnterJailError> {
    result.map_err(|error| EnterJailError { step, source: error.into() })
}

/// Enters the jail for good. Call while the process has one thread. `file_bytes_max` is what it may make of any one
/// file, in bytes.
pub fn enter(uid: u32, file_bytes_max: u64) -> Result<(), EnterJailError> {
    step("set the host name of the uts namespace", sethostname("vmm"))?;
    empty_root()?;
    limits(file_bytes_max)?;
    drop_privileges(uid)?;
    give_up_names()
}

/// Makes an empty, read-only file system the root and forgets the old one.
fn empty_root() -> Result<(), EnterJailError> {
    const NONE: Option<&str> = None;
    let bare = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    step("make mounts private", mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE))?;
    // Any directory serves as the place for the new root; /proc is there on every host.
    step("mount an empty root", mount(Some("none"), "/proc", Some("tmpfs"), bare, Some("size=4k,mode=0555")))?;
    step("go to the empty root", chdir("/proc"))?;
    step("change the root", pivot_root(".", "."))?;
    // The old root is stacked on the new one at "."; detaching it leaves the new one.
    step("detach the old root", umount2(".", MntFlags::MNT_DETACH))?;
    step("go to the root", chdir("/"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | bare;
    step("make the root read-only", mount(NONE, "/", NONE, read_only, NONE))
}

/// Limits go down only: what is lower already stays. Address space is not limited: the allocator reserves far more than
/// it uses, and what is used is the control group's to bound.
fn limits(file_bytes_max: u64) -> Result<(), EnterJailError> {
    let limits = [
        ("forbid core dumps, which would hold guest memory", Resource::RLIMIT_CORE, 0),
        ("limit open descriptors", Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX),
        ("limit threads", Resource::RLIMIT_NPROC, USER_THREADS_MAX),
        ("limit the size of files", Resource::RLIMIT_FSIZE, file_bytes_max),
        ("forbid locked memory, of which it needs none", Resource::RLIMIT_MEMLOCK, 0),
        ("forbid message queues, of which it needs none", Resource::RLIMIT_MSGQUEUE, 0),
    ];
    for (what, resource, most) in limits {
        let (_, hard) = step(what, getrlimit(resource))?;
        step(what, setrlimit(resource, most.min(hard), most.min(hard)))?;
    }
    Ok(())
}

fn drop_privileges(uid: u32) -> Result<(), EnterJailError> {
    for capability in caps::runtime::thread_all_supported() {
        let dropped = caps::drop(None, caps::CapSet::Bounding, capability);
        dropped.map_err(|error| EnterJailError {
            step: "drop a capability from the bounding set",
            source: io::Error::other(error.to_string()),
        })?;
    }
    step("leave supplementary groups", setgroups(&[]))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    step("change the group", setresgid(gid, gid, gid))?;
    // From root to another user: the kernel clears the permitted, effective and ambient sets (capabilities(7)).
    step("change the user", setresuid(uid, uid, uid))?;
    for set in [caps::CapSet::Inheritable, caps::CapSet::Effective, caps::CapSet::Permitted] {
        caps::clear(None, set).map_err(|error| EnterJailError {
            step: "clear a capability set",
            source: io::Error::other(error.to_string()),
        })?;
    }
    step("forbid new privileges", nix::sys::prctl::set_no_new_privs())
}

/// Keeps of root's powers only what the files and sockets of other users, and low ports, need; for a process that never
/// runs another program. Call while the process has one thread.
pub fn keep_access_to_files() -> Result<(), EnterJailError> {
    use caps::{CapSet, Capability};
    let kept = [Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_NET_BIND_SERVICE];
    let failed = |step: &'static str| {
        move |error: caps::errors::CapsError| EnterJailError { step, source: io::Error::other(error.to_string()) }
    };
    let had = caps::read(None, CapSet::Permitted).map_err(failed("read the capability sets"))?;
    let kept = had.into_iter().filter(|capability| kept.contains(capability)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(failed("give up capabilities"))?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed("clear a capability set"))
}

/// Where the kernel has Landlock, a jail without it is not closed.
fn give_up_names() -> Result<(), EnterJailError> {
    let failed = |source| EnterJailError { step: "give up everything that has a name", source };
    match landlock::give_up_everything() {
        Ok(landlock::Enforced::Fully | landlock::Enforced::Partly) => Ok(()),
        Ok(landlock::Enforced::Not) if landlock::version().is_err() => Ok(()),
        Ok(landlock::Enforced::Not) => Err(failed(io::Error::other("the kernel has Landlock, and did not apply it"))),
        Err(error) => Err(failed(io::Error::other(error))),
    }
}
