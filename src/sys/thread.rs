//! Threads of a process whose threads are told apart: each is of a class, and the first thing a new one does is what
//! the process has for that class (a VMM: its system call filter).
//!
//! Like a signal handler this belongs to the process, not to who starts a thread: a thread that was started through
//! this door cannot have been forgotten, however deep below it was started.
#![expect(unsafe_code, reason = "the C library's allocator is set up by a call of its own")]

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadClass {
    /// Serves all devices of a machine.
    Devices,
    /// Waits for one disk.
    Disk,
    /// Waits for one volume's server.
    Volume,
    /// Runs one vCPU.
    Vcpu,
    /// Sends or takes a migration's stream.
    Stream,
    /// Fills guest memory that is not all here yet.
    Fill,
}

/// What every new thread does first. It has to end the process if the thread must not go on.
pub type OnStart = fn(ThreadClass);

static ON_START: OnceLock<OnStart> = OnceLock::new();

/// Says what every thread does first that is started from here on; the first word holds for the process's life. A
/// process that never says so starts threads as ever.
pub fn on_start(hook: OnStart) {
    let _ = ON_START.set(hook);
}

/// Arenas of the C library's allocator: one, shared by all threads. A VMM's threads allocate little, and each has a cache.
const ARENAS_MAX: libc::c_int = 1;

/// Has all threads share one arena of the allocator. With more, glibc opens files on any thread: for the number of
/// processors at the ninth arena, and for the kernel's overcommit policy when a thread frees a large block. A thread
/// that may not would be ended for it. Call before there are threads.
pub fn share_arena() -> io::Result<()> {
    // SAFETY: mallopt takes two integers; this parameter only bounds what later allocations do.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
    // It sets no errno.
    if set == 1 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Starts a thread of a class. `name` shows in `/proc/PID/task/TID/comm`, which holds 15 bytes.
pub fn start<T: Send + 'static>(
    class: ThreadClass,
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name).spawn(move || {
        if let Some(hook) = ON_START.get() {
            hook(class);
        }
        body()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    // Other tests of this program start threads as well: only this test's class is counted.
    static DISKS: AtomicU32 = AtomicU32::new(0);

    fn count(class: ThreadClass) {
        if class == ThreadClass::Disk && std::thread::current().name() == Some("a-test-of-hooks") {
            DISKS.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_hook_runs_before_the_body_on_the_new_thread() {
        on_start(count);
        for seen in 1..=2 {
            let name = "a-test-of-hooks".to_owned();
            let thread = start(ThreadClass::Disk, name, || DISKS.load(Ordering::SeqCst)).unwrap();
            assert_eq!(thread.join().unwrap(), seen);
        }
    }
}
