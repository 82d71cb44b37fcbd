//! The root file system on a disk, instead of the one in memory that the guest began with.
//!
//! ```text
//!   InMemory ──asked──▶ Mounting: a child mounts it beside, since it waits for the disk
//!      ▲                   │ reaped
//!      └─────failed────────┴──▶ mounts moved into it, put in the place of the root ──▶ OnDisk; the old files go when idle
//! ```
//!
//! Programs have the new root by being started by this one, which is the only process by then. This program's own file is
//! removed with the others and is still there for whoever runs it: `/proc/1/exe` needs no path.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;

use hearth_guest_wire::Exit;

use crate::directory::names;
use crate::disk;
use crate::link::Refusal;
use crate::role::Role;
use crate::sys::{self, Errand, Errno, Fd, MountDisk, Running};

/// Where it is mounted until it takes the place of the root.
const BESIDE: &CStr = c"/.root";

/// Mounts that go along, and where they then are: what is in them is the guest's, not the disk's.
const MOVED: [(&CStr, &CStr); 4] =
    [(c"/dev", c"/.root/dev"), (c"/proc", c"/.root/proc"), (c"/sys", c"/.root/sys"), (c"/run", c"/.root/run")];

/// The temporary files in memory: they go along where the disk's directory cannot be written to.
const TEMPORARY: (&CStr, &CStr) = (c"/tmp", c"/.root/tmp");

/// One of them is in any root file system with a program.
const PROGRAMS: [&CStr; 2] = [c"/.root/bin", c"/.root/usr"];

/// A disk that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    disk: CString,
    read_only: bool,
}

/// Which root file system the guest has.
pub(crate) enum Root {
    /// The one that came with the kernel.
    InMemory,
    /// That one still: a child mounts another.
    Mounting { wanted: Wanted, child: Running },
    /// A disk's.
    OnDisk { disk: CString },
}

/// What became of the request for a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entered {
    /// It is the root.
    Now,
    /// It is being mounted.
    Later,
}

impl Root {
    /// Has a disk's file system become the root.
    pub(crate) fn ask(&mut self, role: Role, disk: &str, read_only: bool) -> Result<Entered, Refusal> {
        if role != Role::FirstProcess {
            return Err(refused(Errno::PERM, String::from("this agent is not the guest's first process")));
        }
        let disk = CString::new(disk).map_err(|_| Refusal::from(Errno::INVAL))?;
        let wanted = Wanted { disk, read_only };
        match self {
            Self::InMemory => {
                let child = begin(&wanted)?;
                *self = Self::Mounting { wanted, child };
                Ok(Entered::Later)
            }
            Self::Mounting { wanted: other, .. } if *other == wanted => Ok(Entered::Later),
            Self::OnDisk { disk } if *disk == wanted.disk => Ok(Entered::Now),
            Self::Mounting { wanted: Wanted { disk, .. }, .. } | Self::OnDisk { disk } => {
                Err(refused(Errno::BUSY, format!("the root is {} already", printed(disk))))
            }
        }
    }

    /// A child ended: if it was the one that mounts, the root is changed, or not. Gives what is left in memory.
    pub(crate) fn reaped(&mut self, pid: i32, exit: Exit) -> Option<Result<OldRoot, Refusal>> {
        let Self::Mounting { wanted, child } = self else { return None };
        if child.pid() != pid {
            return None;
        }
        let wanted = wanted.clone();
        let entered = mounted(&wanted, exit).and_then(|()| enter(&wanted));
        *self = if entered.is_ok() { Self::OnDisk { disk: wanted.disk } } else { Self::InMemory };
        Some(entered)
    }
}

fn begin(wanted: &Wanted) -> Result<Running, Refusal> {
    let Wanted { disk, read_only } = wanted;
    match sys::make_directory(BESIDE, 0o755) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(refused(errno, String::from("make a directory to mount the root at"))),
    }
    let mut kinds = disk::kinds().map_err(|(_, what)| refused(Errno::NODEV, what))?;
    // A kernel names those it knows in the order in which it came to know them, and ext4 after what it makes old: each that
    // does not fit costs a look at the disk and a complaint.
    kinds.reverse();
    let directories = MOVED.iter().chain([&TEMPORARY]).map(|(_, there)| CString::from(*there)).collect();
    let flags = if *read_only { disk::READ_ONLY } else { 0 };
    let errand = MountDisk { disk: disk.clone(), target: BESIDE.into(), kinds, flags, directories };
    sys::start_errand(Errand::Mount(errand)).map_err(|errno| refused(errno, String::from("start a child that mounts")))
}

/// Whether the child mounted it, or why not, in words.
fn mounted(Wanted { disk, read_only }: &Wanted, exit: Exit) -> Result<(), Refusal> {
    let name = printed(disk);
    let errno = match exit {
        Exit::Code(0) => return Ok(()),
        Exit::Code(code) => Errno::from_number(i32::from(code)),
        Exit::Signal(_) | Exit::TimedOut => return Err(refused(Errno::INTR, String::from("the mount was broken off"))),
    };
    let what = match errno {
        Errno::NOENT => format!("there is no {name}"),
        Errno::NXIO | Errno::NOMEDIUM => format!("{name} is empty"),
        Errno::INVAL if disk::is_empty(disk).unwrap_or(false) => format!("{name} is empty"),
        Errno::INVAL | Errno::NODEV => format!("{name} has no file system that this kernel knows"),
        Errno::ROFS if *read_only => {
            format!("{name} was not unmounted and cannot be read as it is: launch it once so that it can be written")
        }
        Errno::UCLEAN => format!("the file system of {name} is damaged"),
        errno => format!("mount {name}: errno {}", errno.number()),
    };
    Err(refused(errno, what))
}

/// Puts what is mounted beside the root in its place.
fn enter(Wanted { disk, read_only }: &Wanted) -> Result<OldRoot, Refusal> {
    let name = printed(disk);
    let failed = |what: String| {
        move |errno: Errno| {
            // Nothing is there yet, so it is not busy.
            let _ = sys::unmount_now(BESIDE);
            refused(errno, what)
        }
    };
    if !PROGRAMS.iter().any(|path| sys::exists(path)) {
        return Err(failed(format!("{name} has no root file system: neither /bin nor /usr is there"))(Errno::NOENT));
    }
    for (here, there) in MOVED {
        if !sys::exists(there) {
            let directory = printed(here);
            return Err(failed(format!("{name} has no directory {directory} and none can be made"))(Errno::NOENT));
        }
    }
    let old = sys::open_read(c"/").map_err(failed(String::from("open the root in memory")))?;
    // From here on nothing is taken back: what fails is no file system's doing.
    let moved = |errno: Errno| refused(errno, format!("put {name} in the place of the root"));
    for (here, there) in MOVED {
        sys::move_mount(here, there).map_err(moved)?;
    }
    let (here, there) = TEMPORARY;
    if *read_only && sys::exists(there) {
        sys::move_mount(here, there).map_err(moved)?;
    } else {
        // Those on the disk take its place. It may hold something of a program that was started before.
        let _ = sys::unmount_now(here);
    }
    sys::enter_root(BESIDE).map_err(moved)?;
    Ok(OldRoot::new(old))
}

fn refused(errno: Errno, what: String) -> Refusal {
    Refusal { errno, what: Some(what) }
}

fn printed(path: &CStr) -> String {
    format!("{}", path.to_bytes().escape_ascii())
}

/// The files of the root in memory, which nobody finds any more: removing them gives their memory back.
pub(crate) struct OldRoot {
    /// Directories on the way down, and what is left in each.
    open: Vec<Directory>,
}

struct Directory {
    fd: Fd,
    /// Its name in the one above.
    name: CString,
    left: Vec<CString>,
}

impl OldRoot {
    fn new(root: Fd) -> Self {
        let left = names(&root).unwrap_or_default();
        Self { open: vec![Directory { fd: root, name: CString::default(), left }] }
    }

    /// Removes one; says whether there was one. What cannot be removed, as something is mounted there, stays.
    pub(crate) fn remove_one(&mut self) -> bool {
        let Some(directory) = self.open.last_mut() else { return false };
        let Some(name) = directory.left.pop() else {
            let emptied = self.open.pop();
            if let (Some(Directory { name, .. }), Some(above)) = (emptied, self.open.last()) {
                let _ = sys::remove_directory_in(&above.fd, &name);
            }
            return true;
        };
        if sys::remove_in(&directory.fd, &name) == Err(Errno::ISDIR)
            && let Ok(fd) = sys::open_directory_in(&directory.fd, &name)
        {
            let left = names(&fd).unwrap_or_default();
            self.open.push(Directory { fd, name, left });
        }
        true
    }
}
