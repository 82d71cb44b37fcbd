//! The jail a VMM puts itself into, first thing after exec: an empty root, no capabilities, a uid of its own, no way to
//! gain privileges back. Its namespaces come from the clone that started it (`process::spawn_vmm`). Afterwards the
//! process holds what it was handed as descriptors and nothing else.

use std::io;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, sethostname, setresgid, setresuid};

/// Most open descriptors of a VMM: control, console and vsock streams (1024 at most), queues and eventfds.
pub const DESCRIPTORS_MAX: u64 = 2048;

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

/// Enters the jail for good. Call while the process has one thread.
pub fn enter(uid: u32) -> Result<(), EnterJailError> {
    step("set the host name of the uts namespace", sethostname("vmm"))?;
    empty_root()?;
    limits()?;
    drop_privileges(uid)
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

fn limits() -> Result<(), EnterJailError> {
    step("forbid core dumps", setrlimit(Resource::RLIMIT_CORE, 0, 0))?;
    step("limit open descriptors", setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX, DESCRIPTORS_MAX))
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
