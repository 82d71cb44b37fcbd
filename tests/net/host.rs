//! A host for one test: a thread with a mount namespace where `/run` is empty, and with an empty network namespace.
//! Both end with the thread and what it started.

use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Runs `test` there; its panic is this thread's.
pub(crate) fn on_own_host<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    const NONE: Option<&str> = None;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("namespaces need root");
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
            // Below the new /run it would stay in the list of mounts.
            while umount2("/run/netns", MntFlags::MNT_DETACH).is_ok() {}
            mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            test()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs a program of this host and returns what it says; it has to succeed.
pub(crate) fn run(words: &str) -> String {
    let mut words = words.split(' ');
    let program = words.next().unwrap_or_default();
    let output = std::process::Command::new(program).args(words).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
