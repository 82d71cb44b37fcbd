//! Processes: starting a VMM in namespaces of its own with one clone3(2), and holding on to processes by pidfd so that
//! a reused pid is never mistaken for the old one.
#![expect(unsafe_code, reason = "clone3 and what a child may do before exec have no safe wrapper")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::sys::netns;

/// Descriptor number of the listening control socket in a VMM.
pub const CONTROL_FD: RawFd = 3;

/// Descriptor number of the last-words file in a VMM.
pub const LAST_WORDS_FD: RawFd = 4;

/// Descriptors are parked at this number and above while they are put in their places.
const PARKING_FD: RawFd = 16;

/// Signals that may interrupt one wait.
const INTERRUPTS_MAX: u32 = 64;

/// `CLONE_INTO_CGROUP` (linux/sched.h, Linux 5.7): a flag of clone3 alone, beyond the 32 bits of clone's.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Most bytes of start-up message: a pipe takes this much without a reader.
pub const START_MESSAGE_BYTES_MAX: usize = 4096;

/// What a VMM is started with.
#[derive(Debug)]
pub struct SpawnVmm<'a> {
    /// The program: this one's own file, `/proc/self/exe` opened.
    pub exe: BorrowedFd<'a>,
    /// Words after the program's name.
    pub arguments: &'a [&'a str],
    /// Read by the VMM from standard input until the end; at most [`START_MESSAGE_BYTES_MAX`].
    pub start_message: &'a [u8],
    /// Listening control socket; becomes [`CONTROL_FD`].
    pub control: BorrowedFd<'a>,
    /// File for last words; becomes [`LAST_WORDS_FD`].
    pub last_words: BorrowedFd<'a>,
    /// Where standard output and error go.
    pub log: BorrowedFd<'a>,
    /// Its network namespace.
    pub network: SpawnNetwork<'a>,
    /// The directory of its control group (version 2); the caller's group without one.
    pub group: Option<BorrowedFd<'a>>,
}

/// In which network namespace a VMM starts.
#[derive(Debug, Clone, Copy)]
pub enum SpawnNetwork<'a> {
    /// The calling thread's.
    Inherit,
    /// A new one, which ends with it.
    New,
    /// This one.
    In(BorrowedFd<'a>),
}

/// A process that was started.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid in this process's namespace.
    pub pid: i32,
    /// Becomes readable when it ends.
    pub pidfd: OwnedFd,
    /// When it started, in clock ticks since boot (`/proc/PID/stat` field 22): with the pid it names the process even
    /// after the pid is used again.
    pub start_ticks: u64,
}

/// Why a VMM could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct SpawnVmmError {
    /// What was tried.
    pub step: &'static str,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> SpawnVmmError {
    move |source| SpawnVmmError { step, source }
}

/// Starts this program's `vmm` side in its own pid, mount, ipc and uts namespaces and in the network namespace asked
/// for, in its own session, with five descriptors and an empty environment. Blocks for about a millisecond.
pub fn spawn_vmm(spec: &SpawnVmm<'_>) -> Result<Spawned, SpawnVmmError> {
    let words = std::iter::once("hearth").chain(spec.arguments.iter().copied());
    let words: Result<Vec<CString>, _> = words.map(CString::new).collect();
    let words = words.map_err(|error| failed("pass arguments")(error.into()))?;
    if spec.start_message.len() > START_MESSAGE_BYTES_MAX {
        return Err(failed("pass the start message")(io::ErrorKind::FileTooLarge.into()));
    }
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed("make a pipe")(e.into()))?;
    File::from(writer).write_all(spec.start_message).map_err(failed("write the start message"))?;
    let places = [
        (park(reader.as_fd())?, 0),
        (park(spec.log)?, 1),
        (park(spec.log)?, 2),
        (park(spec.control)?, CONTROL_FD),
        (park(spec.last_words)?, LAST_WORDS_FD),
    ];
    let exe = park(spec.exe)?;
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let start = |flags| clone_and_exec(&exe, &words, &places, flags, spec.group);
    let (pid, pidfd) = match spec.network {
        SpawnNetwork::Inherit => start(flags),
        SpawnNetwork::New => start(flags | libc::CLONE_NEWNET),
        // The child begins in the namespace of the thread that clones it.
        SpawnNetwork::In(namespace) => {
            netns::in_fd(&namespace, || start(flags)).map_err(failed("enter the network namespace"))?
        }
    }
    .map_err(failed("clone3"))?;
    let start_ticks = start_ticks(pid).map_err(failed("read the new process's start time"))?;
    Ok(Spawned { pid, pidfd, start_ticks })
}

fn park(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, SpawnVmmError> {
    let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(PARKING_FD));
    let number = number.map_err(|error| failed("duplicate a descriptor")(error.into()))?;
    // SAFETY: F_DUPFD_CLOEXEC just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn clone_and_exec(
    exe: &OwnedFd,
    words: &[CString],
    places: &[(OwnedFd, RawFd)],
    flags: libc::c_int,
    group: Option<BorrowedFd<'_>>,
) -> io::Result<(i32, OwnedFd)> {
    // Everything the child touches is made before the clone: it may not allocate.
    let mut argv: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).collect();
    argv.push(std::ptr::null());
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((flags | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(group) = group {
        // From its first instruction it is where its limits are: no moment, and no page, is charged to the agent.
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(group.as_raw_fd().cast_unsigned());
    }
    // SAFETY: args is a valid clone_args of the size given; without CLONE_VM the child gets a copy of this memory and
    // goes on here with its own stack, exactly as after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match i32::try_from(pid) {
        Ok(0) => child(exe.as_raw_fd(), places, &argv, &environment),
        Ok(pid) if pid > 0 => {
            // SAFETY: the kernel stored a new descriptor of ours in pidfd because of CLONE_PIDFD.
            Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The child's side. Another thread of the parent may have held any lock at the clone, so only system calls are made.
fn child(
    exe: RawFd,
    places: &[(OwnedFd, RawFd)],
    argv: &[*const libc::c_char],
    environment: &[*const libc::c_char],
) -> ! {
    const EMPTY: &CStr = c"";
    // SAFETY: these calls take integers and pointers to memory that lives until exec: argv and environment are
    // null-terminated arrays of null-terminated strings made before the clone; sigset is initialised by sigfillset's
    // counterpart sigemptyset before use. Parked descriptors are all at PARKING_FD or above, so no dup2 overwrites a
    // source.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::setsid();
        for (parked, place) in places {
            if libc::dup2(parked.as_raw_fd(), *place) < 0 {
                libc::_exit(127);
            }
        }
        libc::syscall(libc::SYS_close_range, 5, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::syscall(
            libc::SYS_execveat,
            exe,
            EMPTY.as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(127)
    }
}

/// Field 22 of `/proc/PID/stat`: when the process started, in clock ticks since boot.
pub fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything, also ") ".
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let field = after_name.and_then(|rest| rest.split(' ').nth(19)).and_then(|field| field.parse().ok());
    field.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat has no start time"))
}

/// A pidfd of the process that has this pid now; `None` if none has.
fn open_pidfd(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open takes two integers.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let Ok(number) = RawFd::try_from(number) else { return Ok(None) };
    if number < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ESRCH | libc::EINVAL) => Ok(None),
            Some(_) | None => Err(error),
        };
    }
    // SAFETY: pidfd_open just made this descriptor for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// A pidfd of the process that has this pid and start time; `None` if it is gone, even if its pid is in use again.
pub fn find(pid: i32, wanted_ticks: u64) -> io::Result<Option<OwnedFd>> {
    let Some(pidfd) = open_pidfd(pid)? else { return Ok(None) };
    // Compared after the pidfd is held: from here on the pid cannot come to mean another process unnoticed.
    match start_ticks(pid) {
        Ok(found) if found == wanted_ticks && !has_ended(&pidfd)? => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the process has ended (it may still be unreaped).
pub fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// Waits for a child to end, for `limit` at most; then ends it (SIGKILL) and returns `None`. It is reaped either way.
pub fn wait_at_most(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    // Not reaped yet, so the pid is the child's also if it has ended.
    let pidfd = open_pidfd(child.id().cast_signed())?.ok_or(io::ErrorKind::NotFound)?;
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let mut interrupts = 0;
    let ended = loop {
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) if interrupts < INTERRUPTS_MAX => interrupts += 1,
            other => break other,
        }
    };
    if matches!(ended, Ok(1..)) {
        return child.wait().map(Some);
    }
    child.kill()?;
    child.wait()?;
    ended.map(|_| None).map_err(io::Error::from)
}

/// Name of a memory file that is guest memory, in `/proc/PID/maps` and `/proc/PID/fd`: so that its pages can be told from
/// the VMM's own, and the file be found.
pub const GUEST_MEMORY_NAME: &CStr = c"hearth-guest-ram";

/// A descriptor of ours for the process's guest memory, if that is a memory file of its own. Needs the right to trace the
/// process.
pub fn copy_guest_memory(pid: i32, pidfd: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let wanted = format!("/memfd:{}", GUEST_MEMORY_NAME.to_string_lossy());
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Closed meanwhile is as good as another kind of file.
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        if target.to_string_lossy().trim_end_matches(" (deleted)") == wanted {
            return copy_descriptor(pidfd, number).map(Some);
        }
    }
    Ok(None)
}

/// A descriptor of ours for what the process has open under this number (pidfd_getfd(2)): both share the open file.
/// Needs the right to trace the process.
pub fn copy_descriptor(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers.
    let copied = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    match RawFd::try_from(copied) {
        // SAFETY: pidfd_getfd just made this descriptor for us.
        Ok(copied) if copied >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(copied) }),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Ends the process at once (SIGKILL). Not an error if it has ended already.
pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal takes integers and a null siginfo, which means "as kill(2)".
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, none, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

/// The exit status of a child of this process that has ended, freeing its entry; `None` when it is not our child (it
/// was started by an agent before this one) or has not ended.
pub fn reap(pidfd: &OwnedFd) -> io::Result<Option<ExitStatus>> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    match waitid(Id::PIDFd(pidfd.as_fd()), flags) {
        Ok(WaitStatus::Exited(_, code)) => Ok(Some(ExitStatus::from_raw(code << 8))),
        Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Some(ExitStatus::from_raw(signal as i32))),
        Ok(_) | Err(nix::Error::ECHILD) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How a process that is not our child ended, as far as the kernel still tells: by its entry in `/proc` until its
/// parent reaped it (proc_pid_stat(5) field 52), and afterwards by its pidfd (`PIDFD_GET_INFO`, Linux 6.15).
pub fn exit_of_stranger(pidfd: &OwnedFd, pid: i32, wanted_ticks: u64) -> Option<ExitStatus> {
    exit_in_stat(pid, wanted_ticks).or_else(|| exit_by_pidfd(pidfd)).map(ExitStatus::from_raw)
}

fn exit_in_stat(pid: i32, wanted_ticks: u64) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_whitespace().collect();
    // Field 3 is the first of these.
    let field = |number: usize| fields.get(number - 3).copied();
    let same = field(22)?.parse() == Ok(wanted_ticks);
    if same && field(3)? == "Z" { field(52)?.parse().ok() } else { None }
}

fn exit_by_pidfd(pidfd: &OwnedFd) -> Option<i32> {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the request carries the size of its struct, `info` is one of that size, valid for reads and writes for the
    // call, and the descriptor is open.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (result == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

/// `PIDFD_INFO_EXIT` (linux/pidfd.h): the exit status is asked for, and in the answer: it is there.
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)` with the struct's first size, which every kernel takes.
const PIDFD_GET_INFO: libc::c_ulong = 3 << 30 | (size_of::<PidfdInfo>() as libc::c_ulong) << 16 | 0xff << 8 | 11;

/// `struct pidfd_info` (linux/pidfd.h) in its first size, 64 bytes.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    pids: [u32; 3],
    ids: [u32; 8],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_takes_too_long_is_ended() {
        let start = |words: &[&str]| std::process::Command::new(words[0]).args(&words[1..]).spawn().unwrap();
        let long = Duration::from_secs(60);
        assert_eq!(wait_at_most(&mut start(&["sh", "-c", "exit 3"]), long).unwrap().unwrap().code(), Some(3));
        let mut endless = start(&["sleep", "60"]);
        let pid = endless.id().cast_signed();
        assert!(wait_at_most(&mut endless, Duration::from_millis(1)).unwrap().is_none());
        assert!(open_pidfd(pid).unwrap().is_none(), "reaped");
    }

    #[test]
    fn a_stranger_tells_how_it_ended_before_and_after_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id().cast_signed();
        let ticks = start_ticks(pid).unwrap();
        let pidfd = find(pid, ticks).unwrap().unwrap();
        assert!(exit_of_stranger(&pidfd, pid, ticks).is_none(), "it lives");
        kill(&pidfd).unwrap();
        waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        let unreaped = exit_of_stranger(&pidfd, pid, ticks).and_then(|status| status.signal());
        assert_eq!(unreaped, Some(libc::SIGKILL));
        assert!(exit_in_stat(pid, ticks + 1).is_none(), "another process of this pid");
        child.wait().unwrap();
        // Kernels before 6.15 have forgotten it by now.
        let reaped = exit_of_stranger(&pidfd, pid, ticks).and_then(|status| status.signal());
        assert!([None, Some(libc::SIGKILL)].contains(&reaped), "{reaped:?}");
    }

    #[test]
    fn a_process_is_found_by_pid_and_start_time_only() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id().cast_signed();
        let ticks = start_ticks(pid).unwrap();
        assert!(find(pid, ticks + 1).unwrap().is_none());
        let pidfd = find(pid, ticks).unwrap().unwrap();
        assert!(!has_ended(&pidfd).unwrap());
        assert!(reap(&pidfd).unwrap().is_none());
        kill(&pidfd).unwrap();
        waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        assert!(find(pid, ticks).unwrap().is_none(), "an ended process is not found");
        assert_eq!(reap(&pidfd).unwrap().and_then(|status| status.signal()), Some(libc::SIGKILL));
        kill(&pidfd).unwrap();
        assert!(find(pid, ticks).unwrap().is_none());
        let _ = child.wait();
    }
}
