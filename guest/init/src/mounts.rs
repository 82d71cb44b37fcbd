//! File systems and names that programs expect, made by PID 1.
//!
//! In three steps by need: what this program itself needs before it listens, what any program needs before one is
//! started, and the rest, done when the loop has nothing else to do or a program is about to start.

use core::ffi::CStr;
use core::fmt::Write as _;

use crate::sys::{self, Console, Errno};

const NOSUID: u32 = 2;
const NODEV: u32 = 4;
const NOEXEC: u32 = 8;

/// Before anything is opened: descriptors 0 to 2 must be taken. The kernel opens them on /dev/console when its
/// built-in archive has that node; otherwise devtmpfs has it.
pub(crate) fn before_listening() {
    if sys::hold_standard_streams(c"/dev/console").is_err() {
        mount(c"devtmpfs", c"/dev", NOSUID | NOEXEC, c"mode=0755");
        if sys::hold_standard_streams(c"/dev/console").is_err() {
            // Nothing can be said without a console. /dev/null at least keeps the numbers.
            let _ = sys::hold_standard_streams(c"/dev/null");
        }
    }
}

/// What every program may need at once: devices and processes.
pub(crate) fn before_programs() {
    mount(c"devtmpfs", c"/dev", NOSUID | NOEXEC, c"mode=0755");
    mount(c"proc", c"/proc", NOSUID | NODEV | NOEXEC, c"");
}

/// The rest, one step at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    /// The name a guest has until it is given one.
    Hostname,
    /// The loopback interface.
    Loopback,
    /// /sys
    Sysfs,
    /// /tmp
    Tmp,
    /// /run
    Run,
    /// /dev/pts
    Terminals,
    /// /dev/shm
    SharedMemory,
}

impl Rest {
    /// The first step.
    pub(crate) const FIRST: Self = Self::Hostname;

    /// Does this step and names the next.
    pub(crate) fn step(self) -> Option<Self> {
        match self {
            Self::Hostname => {
                report("hostname", sys::set_hostname("hearth"));
                Some(Self::Loopback)
            }
            Self::Loopback => {
                report("loopback", sys::loopback_up());
                Some(Self::Sysfs)
            }
            Self::Sysfs => {
                mount(c"sysfs", c"/sys", NOSUID | NODEV | NOEXEC, c"");
                Some(Self::Tmp)
            }
            Self::Tmp => {
                mount(c"tmpfs", c"/tmp", NOSUID | NODEV, c"mode=1777");
                Some(Self::Run)
            }
            Self::Run => {
                mount(c"tmpfs", c"/run", NOSUID | NODEV, c"mode=0755");
                Some(Self::Terminals)
            }
            Self::Terminals => {
                // A kernel without terminal pairs has no such file system; exec with a terminal then says so.
                let _ = mount_here(c"devpts", c"/dev/pts", NOSUID | NOEXEC, c"mode=0620,ptmxmode=0666");
                Some(Self::SharedMemory)
            }
            Self::SharedMemory => {
                mount(c"tmpfs", c"/dev/shm", NOSUID | NODEV, c"mode=1777");
                None
            }
        }
    }
}

fn mount(kind: &CStr, target: &CStr, flags: u32, options: &CStr) {
    match mount_here(kind, target, flags, options) {
        // Mounted already, by the step before or by the kernel.
        Err(Errno::BUSY) => {}
        other => report(target.to_str().unwrap_or_default(), other),
    }
}

/// Mounts, and makes the directory when that is what is missing.
fn mount_here(kind: &CStr, target: &CStr, flags: u32, options: &CStr) -> Result<(), Errno> {
    match sys::mount(kind, target, flags, options) {
        Err(Errno::NOENT) => {
            sys::make_directory(target, 0o755)?;
            sys::mount(kind, target, flags, options)
        }
        other => other,
    }
}

/// A step that failed is told on the console; the guest goes on without it.
fn report(what: &str, result: Result<(), Errno>) {
    if let Err(error) = result {
        let _ = writeln!(Console, "hearth-init: {what}: errno {}", error.number());
    }
}
