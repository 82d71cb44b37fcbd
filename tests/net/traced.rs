//! A process that is killed as it enters the n-th of its system calls that change something: what a power cut or
//! `kill -9` between any two steps leaves, every time the same.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use hearth::sys::process;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Tells a test of this program that it is the process to be killed.
const TO_BE_KILLED: &str = "HEARTH_TEST_TO_BE_KILLED";

/// Said by the process when it may be traced from.
const READY: &str = "ready to begin";

/// Said to it then.
const BEGIN: &str = "begin";

/// System calls by which a process changes its network, and waits for those who do it for it: netlink, taps, names of
/// namespaces, settings and what nft is given, the end of nft.
const STEPS: [i64; 13] = [
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_ioctl,
    libc::SYS_write,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// linux/ptrace.h PTRACE_SYSCALL_INFO_ENTRY.
const ENTRY: u8 = 1;

/// How a process ended, and how many of its steps it had begun.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) steps: u32,
}

impl Ended {
    /// It was killed where it should be.
    pub(crate) fn is_killed(&self) -> bool {
        self.status.signal() == Some(libc::SIGKILL)
    }
}

/// Whether this process is the one to be killed. If so, waits until it is traced.
pub(crate) fn is_to_be_killed() -> bool {
    if std::env::var_os(TO_BE_KILLED).is_none() {
        return false;
    }
    println!("{READY}");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(line.trim(), BEGIN);
    true
}

/// Runs a test of this program in a process of its own, and kills it before its step `at`, from 1.
pub(crate) fn killed_before(test: &str, at: u32) -> Ended {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(TO_BE_KILLED, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
    #[expect(clippy::zombie_processes, reason = "`follow` waits for it")]
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(READY) {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "{test} ended");
    }
    seize(&child);
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{BEGIN}").unwrap();
    let ended = follow(Pid::from_raw(child.id().try_into().unwrap()), at);
    wait_for_orphans();
    ended
}

fn threads(child: &Child) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let ids = tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap());
    ids.map(Pid::from_raw).collect()
}

/// Takes hold of all threads of a process. They wait for a word or for each other: no new ones come.
fn seize(child: &Child) {
    for thread in threads(child) {
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
        ptrace::seize(thread, options).unwrap();
        ptrace::interrupt(thread).unwrap();
    }
}

/// Follows a process to its end, which is before step `at` at the latest.
fn follow(process: Pid, at: u32) -> Ended {
    let mut steps = 0;
    // Only what this thread traces: other tests have processes as well.
    let options = Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD);
    loop {
        let (thread, signal) = match waitpid(None, options).unwrap() {
            WaitStatus::Exited(pid, code) if pid == process => {
                return Ended { status: ExitStatus::from_raw(code << 8), steps };
            }
            WaitStatus::Signaled(pid, signal, _) if pid == process => {
                return Ended { status: ExitStatus::from_raw(signal as i32), steps };
            }
            WaitStatus::PtraceSyscall(thread) => {
                steps += u32::from(enters_a_step(thread));
                if steps == at {
                    kill(process, Signal::SIGKILL).unwrap();
                }
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            // A thread's end; the rest is not asked for.
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) | WaitStatus::Continued(_) | WaitStatus::StillAlive => {
                continue;
            }
        };
        // One that was killed in the meantime cannot go on.
        let _ = ptrace::syscall(thread, signal);
    }
}

fn enters_a_step(thread: Pid) -> bool {
    // None of one that was killed in the meantime.
    let (Ok(info), Ok(registers)) = (ptrace::syscall_info(thread), ptrace::getregs(thread)) else { return false };
    info.op == ENTRY && i64::try_from(registers.orig_rax).is_ok_and(|number| STEPS.contains(&number))
}

/// Waits for what the process had started and what nobody waits for now: whoever else is in this thread's mount
/// namespace. An nft that was just begun goes on without its agent.
fn wait_for_orphans() {
    let own = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for pid in processes {
        if fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|other| other == own)
            && let Ok(ticks) = process::start_ticks(pid)
            && let Ok(Some(pidfd)) = process::find(pid, ticks)
        {
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, 30_000_u16).unwrap(), 1, "process {pid} goes on");
        }
    }
}
