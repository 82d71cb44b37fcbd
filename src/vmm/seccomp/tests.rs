//! The lines keep what is said of them, and confined threads of real processes end as they should.

use std::collections::BTreeSet;

use super::*;

const CLASSES: [(&str, Class); 8] = [
    ("building", BUILDING),
    ("control", CONTROL),
    ("devices", DEVICES),
    ("disk", DISK),
    ("vcpu", VCPU),
    ("stream", STREAM),
    ("fill", FILL),
    ("volume", VOLUME),
];

#[test]
fn every_filter_compiles_and_has_room() {
    for (name, class) in CLASSES {
        let program = compile(name, class).unwrap();
        // BPF_MAXINSNS (linux/bpf_common.h) is what the kernel takes.
        assert!(program.len() < 4096, "{name}: {} instructions", program.len());
    }
    assert!(!without_clone3().unwrap().is_empty());
}

#[test]
fn every_line_has_a_reason_and_somebody_who_needs_it() {
    for line in lines() {
        assert!(line.reason.len() >= 5 && !line.reason.ends_with('.'), "call {}: {:?}", line.call, line.reason);
        assert_ne!(line.classes.0, 0, "call {}: {}", line.call, line.reason);
    }
}

/// A line without conditions would swallow those with conditions of the same call.
#[test]
fn a_call_is_allowed_always_or_by_conditions() {
    let always: BTreeSet<i64> = lines().filter(|line| line.when == When::Always).map(|line| line.call).collect();
    let mut seen = BTreeSet::new();
    for line in lines() {
        assert!(line.when == When::Always || !always.contains(&line.call), "call {}", line.call);
        assert!(seen.insert((line.call, format!("{:?}", line.when))), "call {} twice: {:?}", line.call, line.when);
    }
}

/// Calls that would be a way out, or make what is handed over by others, are on no line.
#[test]
fn there_is_no_line_for_a_way_out() {
    let out = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_capset,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_keyctl,
        libc::SYS_pidfd_getfd,
        libc::SYS_init_module,
    ];
    let allowed: BTreeSet<i64> = lines().map(|line| line.call).collect();
    for call in out {
        assert!(!allowed.contains(&call), "call {call} is on a line");
    }
}

#[test]
fn only_a_thread_that_builds_starts_threads_or_loads_filters() {
    for call in [libc::SYS_clone, libc::SYS_clone3, libc::SYS_prctl, libc::SYS_seccomp] {
        for line in lines().filter(|line| line.call == call) {
            assert_eq!(line.classes, BUILDING, "call {call}: {}", line.reason);
        }
    }
}

/// What can be asked of a ring, the filters do not see: none is made or changed under them, but for its file.
#[test]
fn rings_are_used_by_threads_that_serve_devices_and_get_their_file_before() {
    let of = |call| lines().filter(move |line| line.call == call);
    let register: Vec<_> = of(libc::SYS_io_uring_register).map(|line| (line.when, line.classes)).collect();
    assert_eq!(register, [(When::Is(1, crate::sys::uring::REGISTER_FILE), BUILDING)]);
    let serving = DEVICES.and(VCPU);
    assert_eq!(of(libc::SYS_io_uring_enter).count(), 2);
    assert!(of(libc::SYS_io_uring_enter).all(|line| line.classes == serving && line.when != When::Always));
}

#[test]
fn only_a_vcpu_thread_runs_a_guest() {
    let run = When::Is(1, crate::sys::kvm::requests::KVM_RUN);
    let line = lines().find(|line| line.call == libc::SYS_ioctl && line.when == run).unwrap();
    assert_eq!(line.classes, VCPU);
}

#[test]
fn the_kick_is_the_signal_that_is_sent() {
    let kick = When::Is(2, libc::SIGRTMIN().cast_unsigned());
    assert!(lines().any(|line| line.call == libc::SYS_tgkill && line.when == kick));
}

/// Tells a test of this program that it is the process to be confined, and to what.
const CONFINED: &str = "HEARTH_TEST_CONFINED";

/// Said by a confined process when it has done what it may.
const ALLOWED: &str = "did what it may";

/// Runs one test of this program in a process of its own that confines itself to `class`; what it said and its end.
fn confined(test: &str, class: &str) -> (String, std::process::ExitStatus) {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args([&format!("vmm::seccomp::tests::{test}"), "--exact", "--nocapture"]).env(CONFINED, class);
    let output = command.output().unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status)
}

/// The class that this process is to confine itself to, if it is such a process.
fn to_be_confined() -> Option<(&'static str, Class)> {
    let wanted = std::env::var(CONFINED).ok()?;
    CLASSES.into_iter().find(|(name, _)| *name == wanted)
}

fn ended_by_filter(status: std::process::ExitStatus) -> bool {
    std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGSYS)
}

#[test]
fn a_confined_thread_does_what_it_may_and_ends_the_process_otherwise() {
    if let Some((name, class)) = to_be_confined() {
        load(name, &compile(name, class).unwrap()).unwrap();
        // Memory, locks, the time.
        let large = vec![1_u8; 1 << 20];
        let sum: u64 = large.iter().map(|byte| u64::from(*byte)).sum();
        assert_eq!(*std::sync::Mutex::new(sum).lock().unwrap(), 1 << 20);
        println!("{ALLOWED}");
        let opened = std::fs::File::open("/");
        println!("goes on: {opened:?}");
        return;
    }
    for (name, _) in CLASSES {
        let (said, status) = confined("a_confined_thread_does_what_it_may_and_ends_the_process_otherwise", name);
        assert!(ended_by_filter(status), "{name}: {status}, {said}");
        assert!(said.contains(ALLOWED) && !said.contains("goes on"), "{name}: {said}");
    }
}

#[test]
fn a_building_thread_starts_threads_that_confine_themselves_and_no_process() {
    if to_be_confined().is_some() {
        begin().unwrap();
        let thread = thread::start(ThreadClass::Disk, "disk-3".to_owned(), || 7).unwrap();
        assert_eq!(thread.join().unwrap(), 7);
        println!("{ALLOWED}");
        let started = std::process::Command::new("/bin/true").status();
        println!("goes on: {started:?}");
        return;
    }
    let name = "a_building_thread_starts_threads_that_confine_themselves_and_no_process";
    let (said, status) = confined(name, "building");
    assert!(ended_by_filter(status), "{status}, {said}");
    assert!(said.contains(ALLOWED) && !said.contains("goes on"), "{said}");
}

#[test]
fn a_thread_that_confined_itself_cannot_do_what_building_could() {
    if to_be_confined().is_some() {
        begin().unwrap();
        println!("{ALLOWED}");
        let thread = thread::start(ThreadClass::Disk, "disk-3".to_owned(), || {
            // Building may: it starts threads.
            println!("goes on: {:?}", std::thread::spawn(|| 7).join());
        });
        println!("goes on: {:?}", thread.unwrap().join());
        return;
    }
    let (said, status) = confined("a_thread_that_confined_itself_cannot_do_what_building_could", "building");
    assert!(ended_by_filter(status), "{status}, {said}");
    assert!(said.contains(ALLOWED) && !said.contains("goes on"), "{said}");
}

/// A ring that was made before works for a thread that serves devices, which can make no other.
#[test]
fn a_confined_thread_uses_its_ring_and_makes_none() {
    use crate::machine::ram;
    use crate::sys::uring::{By, Operation, Ring};
    use crate::units::{Bytes, GuestPhys, MIB};
    use nix::sys::resource::{Resource, setrlimit};
    if to_be_confined().is_some() {
        let ring = Ring::make(1).unwrap().pop().unwrap();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let ram = ram::make(crate::machine::RamBacking::SharedMemfd, Bytes(64 * MIB)).unwrap();
        // As in the jail: no memory to lock, few threads, and nobody who may do more.
        let threads = crate::sys::jail::USER_THREADS_MAX;
        setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, threads, threads).unwrap();
        if nix::unistd::geteuid().is_root() {
            let (uid, gid) = (nix::unistd::Uid::from_raw(150_000), nix::unistd::Gid::from_raw(150_000));
            nix::unistd::setresgid(gid, gid, gid).unwrap();
            nix::unistd::setresuid(uid, uid, uid).unwrap();
        }
        begin().unwrap();
        let mut ring = ring.serve(&file, ram).unwrap();
        let thread = thread::start(ThreadClass::Devices, "devices".to_owned(), move || {
            let to = [(GuestPhys(0), 4)];
            ring.begin(0, Operation::Read { to: &to, offset: 0 }, By::Worker).unwrap();
            ring.wait().unwrap();
            assert_eq!(ring.take_completions()[0].result.as_ref().unwrap(), &4);
            println!("{ALLOWED}");
            println!("goes on: {:?}", Ring::make(1).is_ok());
        });
        println!("goes on: {:?}", thread.unwrap().join());
        return;
    }
    if Ring::make(1).is_err() {
        return;
    }
    let (said, status) = confined("a_confined_thread_uses_its_ring_and_makes_none", "building");
    assert!(ended_by_filter(status), "{status}, {said}");
    assert!(said.contains(ALLOWED) && !said.contains("goes on"), "{said}");
}

/// A panic on a confined thread says its words and ends the process, by abort: its own law's end, not the filter's.
#[test]
fn a_confined_thread_that_panics_says_so() {
    if to_be_confined().is_some() {
        std::panic::set_hook(Box::new(|panic| println!("last words: {panic}")));
        begin().unwrap();
        let thread = thread::start(ThreadClass::Vcpu, "vcpu0".to_owned(), || panic!("on purpose"));
        let _ = thread.unwrap().join();
        return;
    }
    let (said, status) = confined("a_confined_thread_that_panics_says_so", "vcpu");
    assert!(said.contains("last words:") && said.contains("on purpose"), "{said}");
    assert!(!ended_by_filter(status), "{status}");
}
