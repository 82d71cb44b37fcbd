//! Control groups on the real kernel: a mount of version 2 of this test's own, a process that is cloned into a group of
//! it, and the group's end. The hierarchy is the host's whatever the mount, so the groups have names of this test's.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use hearth::sys::cgroup::{self, Group};
use hearth::sys::process::{self, SpawnNetwork, SpawnVmm, Spawned};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Longest wait for a killed process.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs `body` with a mount of cgroup2 that nobody else sees.
fn with_mount(test: &str, body: impl FnOnce(&Group) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            const NONE: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
            let dir = tempfile::tempdir().unwrap();
            mount(Some("none"), dir.path(), Some("cgroup2"), MsFlags::empty(), NONE).unwrap();
            let base = Group::at(dir.path().join(format!("hearth-test-{}-{test}", std::process::id())));
            base.make().unwrap();
            body(&base);
            assert!(base.remove_if_empty().unwrap(), "the base is left");
            umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
        });
        thread.join().unwrap();
    });
}

fn sleeper(group: &Group) -> Spawned {
    let (exe, null) = (File::open("/bin/sleep").unwrap(), File::open("/dev/null").unwrap());
    let directory = group.open().unwrap();
    let spec = SpawnVmm {
        exe: exe.as_fd(),
        arguments: &["60"],
        start_message: b"",
        control: null.as_fd(),
        last_words: null.as_fd(),
        log: null.as_fd(),
        network: SpawnNetwork::Inherit,
        group: Some(directory.as_fd()),
    };
    process::spawn_vmm(&spec).unwrap()
}

#[test]
fn a_process_begins_in_its_group_and_ends_with_it() {
    with_mount("ends", |base| {
        let group = base.child("hth0-vm-one");
        group.make().unwrap();
        group.make().expect("again is harmless");
        let sleeper = sleeper(&group);
        let name = base.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(cgroup::of_process(sleeper.pid), Some(format!("/{name}/hth0-vm-one")));
        assert_eq!(group.get("cgroup.procs").unwrap().lines().count(), 1);
        assert!(!group.remove_if_empty().unwrap(), "something is in it");
        assert_eq!(base.children().unwrap(), ["hth0-vm-one"]);
        group.end(LIMIT).unwrap();
        assert!(process::has_ended(&sleeper.pidfd).unwrap(), "killed with its group");
        let _ = process::reap(&sleeper.pidfd);
        assert!(!Path::new(group.path()).exists());
        group.end(LIMIT).expect("again is harmless");
        assert_eq!(base.children().unwrap(), [""; 0]);
    });
}

#[test]
fn what_a_kernel_does_not_offer_is_refused() {
    with_mount("refused", |base| {
        assert!(base.hand_on("no-such-controller").is_err());
        assert!(base.set("memory.max.of.nothing", "1").is_err());
        let offered = base.controllers().unwrap();
        assert!(!offered.contains("no-such-controller"), "{offered:?}");
    });
}
