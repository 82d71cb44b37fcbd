//! Named network namespaces: as `ip netns` sees them, after crashes, for the processes started in them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use hearth::sys::process::{self, SpawnNetwork, SpawnVmm, Spawned};
use hearth::sys::{file, netconf, netns};
use nix::sys::stat::fstat;

use crate::host::{on_own_host, run};

fn kind<T>(result: io::Result<T>) -> Result<(), io::ErrorKind> {
    result.map(drop).map_err(|error| error.kind())
}

/// Which namespace it is: its inode number in nsfs.
fn identity(namespace: &OwnedFd) -> u64 {
    fstat(namespace).unwrap().st_ino
}

#[test]
fn a_named_namespace_lasts_until_it_is_deleted() {
    on_own_host(|| {
        assert_eq!(netns::list_named("").unwrap(), [""; 0], "no directory yet");
        let made = netns::create_named("hth1-0").unwrap();
        assert_ne!(identity(&made), identity(&netns::own().unwrap()));
        assert_eq!(identity(&netns::open_named("hth1-0").unwrap()), identity(&made));
        assert_eq!(kind(netns::create_named("hth1-0")), Err(io::ErrorKind::AlreadyExists));
        // What is set in it stays although nobody is in it.
        netns::in_fd(&made, || netconf::write("ipv4/ip_forward", "1").unwrap()).unwrap();
        drop(made);
        let again = netns::open_named("hth1-0").unwrap();
        assert_eq!(netns::in_fd(&again, || netconf::read("ipv4/ip_forward").unwrap()).unwrap(), "1");

        netns::create_named("hth1-10").unwrap();
        netns::create_named("other").unwrap();
        assert_eq!(netns::list_named("hth1-").unwrap(), ["hth1-0", "hth1-10"]);
        for name in ["hth1-0", "hth1-10", "other", "never-there"] {
            netns::delete_named(name).unwrap();
        }
        assert_eq!(netns::list_named("").unwrap(), [""; 0]);
        assert_eq!(kind(netns::open_named("hth1-0")), Err(io::ErrorKind::NotFound));
    });
}

#[test]
fn ip_netns_and_this_crate_see_the_same() {
    on_own_host(|| {
        netns::create_named("made-here").unwrap();
        assert_eq!(run("ip netns list").trim(), "made-here");
        assert!(run("ip netns exec made-here ip -o link").contains("lo:"));
        run("ip netns add made-there");
        assert_eq!(netns::list_named("made").unwrap(), ["made-here", "made-there"]);
        netns::open_named("made-there").unwrap();
        run("ip netns delete made-here");
        assert_eq!(kind(netns::open_named("made-here")), Err(io::ErrorKind::NotFound));
        netns::delete_named("made-there").unwrap();
        assert_eq!(run("ip netns list"), "");
        // One mount of the directory, shared, whoever was first.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let of_dir: Vec<&str> = mounts.lines().filter(|line| line.contains(" /run/netns ")).collect();
        assert_eq!(of_dir.len(), 1, "{of_dir:?}");
        assert!(of_dir[0].contains(" shared:"), "{of_dir:?}");
    });
}

#[test]
fn a_plain_file_left_by_a_crash_is_listed_replaced_and_deleted() {
    on_own_host(|| {
        let left = |name: &str| drop(file::create(format!("/run/netns/{name}").as_ref()).unwrap());
        fs::create_dir("/run/netns").unwrap();
        left("hth1-1");
        left("hth1-2");
        assert_eq!(netns::list_named("hth1-").unwrap(), ["hth1-1", "hth1-2"]);
        assert_eq!(kind(netns::open_named("hth1-1")), Err(io::ErrorKind::NotFound));
        let made = netns::create_named("hth1-1").unwrap();
        assert_eq!(identity(&netns::open_named("hth1-1").unwrap()), identity(&made));
        netns::delete_named("hth1-1").unwrap();
        netns::delete_named("hth1-2").unwrap();
        assert_eq!(netns::list_named("").unwrap(), [""; 0]);
    });
}

#[test]
fn many_threads_at_once_make_one_namespace_per_name() {
    on_own_host(|| {
        let made = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|n| scope.spawn(move || netns::create_named(&format!("n{}", n / 2)))).collect();
            threads.into_iter().map(|thread| kind(thread.join().unwrap())).collect::<Vec<_>>()
        });
        assert_eq!(made.iter().filter(|result| result.is_ok()).count(), 4, "{made:?}");
        assert!(made.iter().all(|result| matches!(result, Ok(()) | Err(io::ErrorKind::AlreadyExists))), "{made:?}");
        for name in ["n0", "n1", "n2", "n3"] {
            netns::open_named(name).unwrap();
            netns::delete_named(name).unwrap();
        }
        assert_eq!(netns::list_named("").unwrap(), [""; 0]);
    });
}

/// A program that sleeps, started as a VMM is; ended and reaped at the end of the test.
struct Sleeper(Spawned);

impl Sleeper {
    fn start(network: SpawnNetwork<'_>) -> Self {
        let (exe, null) = (File::open("/bin/sleep").unwrap(), File::open("/dev/null").unwrap());
        let spec = SpawnVmm {
            exe: exe.as_fd(),
            arguments: &["60"],
            start_message: b"",
            control: null.as_fd(),
            last_words: null.as_fd(),
            log: null.as_fd(),
            network,
            group: None,
        };
        Self(process::spawn_vmm(&spec).unwrap())
    }

    fn namespace(&self) -> u64 {
        identity(&File::open(format!("/proc/{}/ns/net", self.0.pid)).unwrap().into())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        let _ = process::kill(&self.0.pidfd);
        let _ = waitid(Id::PIDFd(self.0.pidfd.as_fd()), WaitPidFlag::WEXITED);
    }
}

#[test]
fn a_process_starts_in_the_namespace_it_is_given() {
    on_own_host(|| {
        let own = identity(&netns::own().unwrap());
        let jail = netns::create_named("jail").unwrap();
        assert_eq!(Sleeper::start(SpawnNetwork::Inherit).namespace(), own);
        let new = Sleeper::start(SpawnNetwork::New).namespace();
        assert!(new != own && new != identity(&jail));
        let inside = Sleeper::start(SpawnNetwork::In(jail.as_fd()));
        assert_eq!(inside.namespace(), identity(&jail));
        assert_eq!(identity(&netns::own().unwrap()), own);
        // The name may go while a process is there.
        netns::delete_named("jail").unwrap();
        assert_eq!(inside.namespace(), identity(&jail));
    });
}
