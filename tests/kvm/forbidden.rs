//! A system call that no VMM makes, made by a thread of a running one: the VM ends, with that cause, and no other.
//!
//! The call is put into the very program that ships, from outside: a thread is traced (ptrace(2)), and at its next system
//! call the number is another one. The kernel asks the filter after the tracer, so it sees what is really made.

use std::fs;

use hearth::sys::uring::Ring;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::fixture::Agent;

/// linux/ptrace.h PTRACE_SYSCALL_INFO_ENTRY.
const ENTRY: u8 = 1;

/// The first kernel that tells a stranger how a process ended after somebody else reaped it.
const TELLS_STRANGERS: (u32, u32) = (6, 15);

/// The thread of a VMM with this name; the first thread is `main`.
fn thread(vmm: u32, name: &str) -> Pid {
    let tasks = fs::read_dir(format!("/proc/{vmm}/task")).expect("its threads");
    let ids: Vec<u32> = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect();
    let called = |id: &u32| fs::read_to_string(format!("/proc/{vmm}/task/{id}/comm")).unwrap_or_default();
    let found = ids.iter().find(|id| if name == "main" { **id == vmm } else { called(id).trim().starts_with(name) });
    let found =
        *found.unwrap_or_else(|| panic!("no thread {name} among {:?}", ids.iter().map(called).collect::<Vec<_>>()));
    Pid::from_raw(found.try_into().expect("a thread id"))
}

/// Has a thread make `call` in the place of its next system call. Returns when the thread has ended, or begins another
/// call.
fn make_call(thread: Pid, call: i64) -> WaitStatus {
    ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD).expect("trace a thread");
    ptrace::interrupt(thread).expect("stop a thread");
    loop {
        let status = waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait for a thread");
        match status {
            WaitStatus::PtraceSyscall(_) if ptrace::syscall_info(thread).expect("its call").op == ENTRY => break,
            WaitStatus::Stopped(_, _) | WaitStatus::PtraceEvent(..) | WaitStatus::PtraceSyscall(_) => {
                ptrace::syscall(thread, None).expect("go on to a system call");
            }
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) | WaitStatus::Continued(_) | WaitStatus::StillAlive => {
                panic!("before it made a call: {status:?}");
            }
        }
    }
    let mut registers = ptrace::getregs(thread).expect("its registers");
    registers.orig_rax = call.cast_unsigned();
    ptrace::setregs(thread, registers).expect("set its registers");
    let mut signal = None;
    loop {
        ptrace::syscall(thread, signal).expect("make the call");
        let status = waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait for a thread");
        signal = match status {
            // The end of the call is told also of one that was not made. Another one's start is a thread that goes on.
            WaitStatus::PtraceSyscall(_) if ptrace::syscall_info(thread).expect("its call").op != ENTRY => None,
            WaitStatus::Stopped(_, signal) => Some(signal),
            WaitStatus::PtraceSyscall(_) | WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return status,
            WaitStatus::PtraceEvent(..) | WaitStatus::Continued(_) | WaitStatus::StillAlive => None,
        };
    }
}

/// Has a thread of a VM make `call`; the VM has to end of it, and `other` has to go on.
fn ends_of(agent: &Agent, (vm, name, call): (&str, &str, i64), other: &str) {
    let pid = agent.vmm_pid(other);
    let ended = make_call(thread(agent.vmm_pid(vm), name), call);
    let is_over = matches!(ended, WaitStatus::Signaled(..) | WaitStatus::Exited(..));
    assert!(is_over, "{name} made call {call} and goes on: {ended:?}");
    let failed = agent.wait_for_state(vm, "failed");
    assert_eq!(failed["cause"]["code"], "vmm_killed", "{failed:#}");
    let detail = failed["cause"]["detail"].as_str().expect("a detail");
    assert!(detail.contains("SIGSYS") && detail.contains("signal 31"), "{detail}");
    assert_eq!(agent.sh(other, "echo still here"), "still here");
    assert_eq!(agent.vmm_pid(other), pid, "the other VM's process is another one");
    agent.ok(&["vm", "rm", vm]);
}

pub(crate) fn a_forbidden_call_ends_that_vm_and_no_other(agent: &Agent) {
    let other = agent.shared();
    let disk = tempfile::NamedTempFile::new().expect("a file");
    disk.as_file().set_len(1 << 20).expect("a size");
    let path = disk.path().to_str().expect("a path");
    agent.launch("with-disk", &["--disk", path]);
    // With io_uring the thread of all devices serves a disk: it uses the disk's ring, and cannot make another one.
    let (name, call) =
        if Ring::make(1).is_ok() { ("devices", libc::SYS_io_uring_setup) } else { ("disk-", libc::SYS_socket) };
    // A disk's thread sleeps until there is something to do: reading gives it its next call.
    let vmm = agent.vmm_pid("with-disk");
    let serves = thread(vmm, name);
    assert_eq!(agent.sh("with-disk", "dd if=/dev/vda of=/dev/null count=1 2>/dev/null; echo read"), "read");
    assert_eq!(thread(vmm, name), serves, "one thread serves a disk");
    ends_of(agent, ("with-disk", name, call), other);

    agent.ok(&["vm", "snapshot", other, "--bundle-name", "forbidden"]);
    for (name, call) in [("main", libc::SYS_openat), ("devices", libc::SYS_execve), ("vcpu0", libc::SYS_clone)] {
        agent.launch(name, &["--bundle", "forbidden"]);
        ends_of(agent, (name, name, call), other);
    }
    // What the first thread may while it builds a machine, it may not with one.
    agent.launch("built", &["--bundle", "forbidden"]);
    ends_of(agent, ("built", "main", libc::SYS_memfd_create), other);
    agent.ok(&["bundle", "rm", "forbidden"]);
}

pub(crate) fn an_adopted_vm_that_makes_a_forbidden_call_is_told_as_such(agent: &Agent) {
    let other = agent.shared();
    agent.launch("adopted", &[]);
    agent.kill_and_restart();
    agent.wait_for_state("adopted", "running");
    if kernel() >= TELLS_STRANGERS {
        return ends_of(agent, ("adopted", "devices", libc::SYS_connect), other);
    }
    make_call(thread(agent.vmm_pid("adopted"), "devices"), libc::SYS_connect);
    let code = agent.wait_for_state("adopted", "failed")["cause"]["code"].clone();
    assert!(["vmm_killed", "vmm_gone"].contains(&code.as_str().expect("a code")), "{code}");
    agent.ok(&["vm", "rm", "adopted"]);
}

/// Major and minor number of this host's kernel.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    (numbers.next().expect("a major number"), numbers.next().expect("a minor number"))
}
