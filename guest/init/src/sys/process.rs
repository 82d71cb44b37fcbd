//! Processes: starting, signalling, reaping.
#![expect(unsafe_code, reason = "system calls with pointers; a child that borrows this program's memory")]

use alloc::boxed::Box;
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::ptr;

use hearth_guest_wire::Exit;

use super::file::{Fd, exists, make_directory, mount_disk, unmount};
use super::raw::{Errno, Plain, Register, plain, small, syscall};

const RT_SIGPROCMASK: u64 = 14;
const IOCTL: u64 = 16;
const DUP2: u64 = 33;
const EXECVE: u64 = 59;
const WAIT4: u64 = 61;
const CHDIR: u64 = 80;

const SIGCHLD: u64 = 17;
const CLONE_VM: u64 = 0x100;
const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_VFORK: u64 = 0x4000;

const SIGKILL: u8 = 9;

// A child that shares this program's memory: it starts on a stack of its own, so the frames of its parent stay whole,
// and calls a function that never returns. `clone` keeps every register but rax, rcx and r11, in both of them.
//
// fn start_sharing(flags: u64, stack_top: *mut u8, function: extern "C" fn(*mut u8) -> !, argument: *mut u8) -> i64
global_asm!(
    ".pushsection .text.hearth_start_sharing, \"ax\", @progbits",
    ".globl hearth_start_sharing",
    "hearth_start_sharing:",
    "mov %rdx, %r9",
    "mov %rcx, %r8",
    // Parent and child thread ids are not asked for, and there is no thread-local storage.
    "xor %edx, %edx",
    "xor %r10d, %r10d",
    // r8 is clone's `tls`, looked at only with CLONE_SETTLS.
    "mov $56, %eax",
    "syscall",
    "test %rax, %rax",
    "jnz 1f",
    "xor %ebp, %ebp",
    "mov %r8, %rdi",
    "call *%r9",
    "ud2",
    "1: ret",
    ".popsection",
    options(att_syntax),
);

unsafe extern "C" {
    fn hearth_start_sharing(
        flags: u64,
        stack_top: *mut u8,
        function: unsafe extern "C" fn(*mut u8) -> !,
        argument: *mut u8,
    ) -> i64;
}

/// Room for a child's few frames.
#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; 16 * 1024]>);

// SAFETY: used by one child at a time; this program, its only parent, is suspended while that child lives on it.
unsafe impl Sync for Stack {}

static LAUNCH_STACK: Stack = Stack(UnsafeCell::new([0; 16 * 1024]));

impl Stack {
    fn top(&self) -> *mut u8 {
        self.0.get().cast::<u8>().wrapping_add(size_of::<Self>())
    }
}

/// A program about to be started.
pub(crate) struct Launch<'a> {
    /// Paths to try in turn.
    pub(crate) paths: &'a [CString],
    /// Arguments, the program's name first.
    pub(crate) arguments: &'a [CString],
    /// `NAME=value` words.
    pub(crate) environment: &'a [&'a CStr],
    /// Working directory.
    pub(crate) directory: &'a CStr,
    /// Standard input, output and error.
    pub(crate) streams: [&'a Fd; 3],
    /// Make standard input the controlling terminal.
    pub(crate) terminal: bool,
}

/// Where a launch failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LaunchError {
    /// No process could be made.
    Process(Errno),
    /// The working directory could not be entered.
    Directory(Errno),
    /// The terminal or the streams could not be given to it.
    Streams(Errno),
    /// No path could be executed.
    Program(Errno),
}

impl LaunchError {
    /// What the kernel said.
    pub(crate) const fn errno(self) -> Errno {
        match self {
            Self::Process(errno) | Self::Directory(errno) | Self::Streams(errno) | Self::Program(errno) => errno,
        }
    }
}

/// What the child needs, all of it owned by the suspended parent, and what it has to say.
struct Plan {
    paths: *const *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    directory: *const c_char,
    streams: [i32; 3],
    terminal: bool,
    failed: Option<LaunchError>,
}

/// Pointers to the strings, and a null one.
fn pointers<'a>(strings: impl Iterator<Item = &'a CStr>) -> Vec<*const c_char> {
    strings.map(CStr::as_ptr).chain([ptr::null()]).collect()
}

/// Starts a program in a session and process group of its own, both numbered as the process is.
///
/// The child borrows this program's memory and suspends it until it executes the program or gives up: no page table is
/// copied, which on an emulated kernel is most of a fork's cost.
pub(crate) fn spawn(launch: &Launch<'_>) -> Result<i32, LaunchError> {
    let paths = pointers(launch.paths.iter().map(CString::as_c_str));
    let arguments = pointers(launch.arguments.iter().map(CString::as_c_str));
    let environment = pointers(launch.environment.iter().copied());
    let mut plan = Plan {
        paths: paths.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        directory: launch.directory.as_ptr(),
        streams: launch.streams.map(Fd::number),
        terminal: launch.terminal,
        failed: None,
    };
    // SAFETY: with CLONE_VFORK this call returns when the child has executed a program or exited, so `plan`, all it
    // points to, and the one launch stack outlive the child's use of them.
    let result = unsafe {
        hearth_start_sharing(CLONE_VM | CLONE_VFORK | SIGCHLD, LAUNCH_STACK.top(), launched, (&raw mut plan).cast())
    };
    let pid = match i32::try_from(result) {
        Ok(pid @ 1..) => pid,
        Ok(error) => return Err(LaunchError::Process(Errno::from_number(error.saturating_neg()))),
        Err(_) => return Err(LaunchError::Process(Errno::INVAL)),
    };
    // SAFETY: `plan` is ours again; the child wrote to it behind the compiler's back.
    match unsafe { (&raw const plan.failed).read_volatile() } {
        None => Ok(pid),
        Some(error) => {
            wait(pid);
            Err(error)
        }
    }
}

/// The child's side of [`spawn`].
unsafe extern "C" fn launched(plan: *mut u8) -> ! {
    let plan: *mut Plan = plan.cast();
    // SAFETY: `spawn` passes a plan that lives until this child is gone from this memory, and does not run meanwhile.
    let failed = unsafe { execute(&*plan) };
    // SAFETY: as above.
    unsafe { (&raw mut (*plan).failed).write_volatile(Some(failed)) };
    exit(127)
}

/// Becomes the program; comes back with what went wrong.
///
/// # Safety
/// The pointers of `plan` are what its field names say, null-terminated.
unsafe fn execute(plan: &Plan) -> LaunchError {
    const SIG_SETMASK: u32 = 2;
    const TIOCSCTTY: u32 = 0x540E;
    if let Err(error) = plain(Plain::SetSid, []) {
        return LaunchError::Streams(error);
    }
    if plan.terminal {
        let [input, ..] = plan.streams;
        // SAFETY: takes numbers.
        if let Err(error) = unsafe { syscall!(IOCTL, input, TIOCSCTTY, 0_u32) } {
            return LaunchError::Streams(error);
        }
    }
    for (number, stream) in (0_i32..).zip(plan.streams) {
        // SAFETY: takes numbers; this child has a descriptor table of its own. The streams are never 0 to 2 (those
        // are held from the start), so the copies are not closed by the exec.
        if let Err(error) = unsafe { syscall!(DUP2, stream, number) } {
            return LaunchError::Streams(error);
        }
    }
    // SAFETY: `directory` is a C string.
    if let Err(error) = unsafe { syscall!(CHDIR, plan.directory) } {
        return LaunchError::Directory(error);
    }
    let none = 0_u64;
    // SAFETY: the kernel reads eight bytes of mask. A program starts with no signal blocked.
    let _ = unsafe { syscall!(RT_SIGPROCMASK, SIG_SETMASK, &raw const none, ptr::null_mut::<u64>(), 8_u32) };
    // As execvp: a path that is forbidden is reported only if no later one works, a path that is absent last of all.
    let mut failed = Errno::NOENT;
    for index in 0.. {
        // SAFETY: entries up to and including the null one exist.
        let path = unsafe { *plan.paths.add(index) };
        if path.is_null() {
            break;
        }
        // SAFETY: a C string and two null-terminated arrays of C strings.
        match unsafe { syscall!(EXECVE, path, plan.arguments, plan.environment) } {
            Err(Errno::NOENT | Errno::NOTDIR) | Ok(_) => {}
            Err(Errno::ACCES) => failed = Errno::ACCES,
            Err(error) => return LaunchError::Program(error),
        }
    }
    LaunchError::Program(failed)
}

/// Work that may block for long, done by a child so that the loop never waits.
pub(crate) enum Errand {
    /// Write everything to disk.
    Sync,
    /// Write everything to disk, then unmount these.
    SyncAndUnmount(Vec<CString>),
    /// Mount a disk.
    Mount(MountDisk),
}

/// A disk to be mounted; the child ends with 0, or with what the kernel said last.
pub(crate) struct MountDisk {
    /// The disk.
    pub(crate) disk: CString,
    /// Where.
    pub(crate) target: CString,
    /// The file systems to try, in turn.
    pub(crate) kinds: Vec<CString>,
    /// Flags of the mount.
    pub(crate) flags: u32,
    /// Directories to make in it that are missing: whoever looks at them afterwards does not wait for the disk.
    pub(crate) directories: Vec<CString>,
}

impl MountDisk {
    /// Allocates nothing.
    fn run(&self) -> u8 {
        let Self { disk, target, kinds, flags, directories } = self;
        let mut failed = Errno::NODEV;
        for kind in kinds {
            match mount_disk(disk, target, kind, *flags) {
                Ok(()) => {
                    for directory in directories {
                        if !exists(directory) {
                            // Whoever needs it says so.
                            let _ = make_directory(directory, 0o755);
                        }
                    }
                    return 0;
                }
                Err(errno) => failed = errno,
            }
            // Anything else than "not of this kind" is not about the kind.
            if failed != Errno::INVAL {
                break;
            }
        }
        u8::try_from(failed.number()).unwrap_or(u8::MAX)
    }
}

/// An errand under way. It is kept until its child is reaped: the child uses its memory.
pub(crate) struct Running {
    pid: i32,
    _stack: Box<Stack>,
    _errand: Box<Errand>,
}

impl Running {
    /// The child's process id.
    pub(crate) const fn pid(&self) -> i32 {
        self.pid
    }
}

/// Starts an errand.
pub(crate) fn start_errand(errand: Errand) -> Result<Running, Errno> {
    let stack = Box::new(Stack(UnsafeCell::new([0; 16 * 1024])));
    let mut errand = Box::new(errand);
    // The child shares the descriptor table too: a copy would keep connections open that are closed meanwhile.
    // SAFETY: the stack and the errand are on the heap and stay there until the child is reaped (`Running`); the
    // child reads the errand, makes system calls and exits. It allocates nothing.
    let result = unsafe {
        hearth_start_sharing(
            CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD,
            stack.top(),
            run_errand,
            (&raw mut *errand).cast(),
        )
    };
    match i32::try_from(result) {
        Ok(pid @ 1..) => Ok(Running { pid, _stack: stack, _errand: errand }),
        Ok(error) => Err(Errno::from_number(error.saturating_neg())),
        Err(_) => Err(Errno::INVAL),
    }
}

unsafe extern "C" fn run_errand(errand: *mut u8) -> ! {
    let errand: *const Errand = errand.cast();
    // SAFETY: `start_errand` passes an errand that outlives this child, and nobody changes it.
    let errand = unsafe { &*errand };
    let code = match errand {
        Errand::Mount(disk) => disk.run(),
        Errand::Sync => {
            let _ = plain(Plain::Sync, []);
            0
        }
        Errand::SyncAndUnmount(targets) => {
            let _ = plain(Plain::Sync, []);
            for target in targets {
                let _ = unmount(target);
            }
            0
        }
    };
    exit(code)
}

/// A child that ended.
pub(crate) struct Reaped {
    /// Its process id.
    pub(crate) pid: i32,
    /// How it ended.
    pub(crate) exit: Exit,
}

/// Takes one child that ended. `Ok(None)`: children exist but none has ended. `Err(CHILD)`: there are none.
pub(crate) fn reap() -> Result<Option<Reaped>, Errno> {
    const WNOHANG: u32 = 1;
    let mut status = 0_u32;
    // SAFETY: the kernel writes one int to `status`; usage is not asked for.
    match unsafe { syscall!(WAIT4, -1_i32, &raw mut status, WNOHANG, ptr::null_mut::<u8>()) }.map(small) {
        Ok(0) => Ok(None),
        Ok(pid) => {
            let [low, code, ..] = status.to_le_bytes();
            let exit = if low & 0x7f == 0 { Exit::Code(code) } else { Exit::Signal(low & 0x7f) };
            Ok(Some(Reaped { pid, exit }))
        }
        Err(error) => Err(error),
    }
}

/// Waits for a child that is about to end.
fn wait(pid: i32) {
    let none = ptr::null_mut::<u8>();
    // SAFETY: status and usage are not asked for.
    while let Err(Errno::INTR) = unsafe { syscall!(WAIT4, pid, none, 0_u32, none) } {}
}

/// Sends a signal to one process.
pub(crate) fn send_signal(pid: i32, signal: u8) -> Result<(), Errno> {
    plain(Plain::Kill, [pid.register(), u64::from(signal)]).map(drop)
}

/// Sends a signal to a process group.
pub(crate) fn send_signal_to_group(group: i32, signal: u8) -> Result<(), Errno> {
    // 0 and 1 would be our own group and everything.
    if group <= 1 {
        return Err(Errno::INVAL);
    }
    send_signal(-group, signal)
}

/// Sends a signal to every process but this one; for PID 1.
pub(crate) fn send_signal_to_all(signal: u8) -> Result<(), Errno> {
    send_signal(-1, signal)
}

/// Whether this is PID 1.
pub(crate) fn is_first_process() -> bool {
    plain(Plain::GetPid, []) == Ok(1)
}

/// Goes before the guest's programs when both want the processor: niceness is 20 at the nicest, -20 at the least.
pub(crate) fn go_first() -> Result<(), Errno> {
    const PRIO_PROCESS: u64 = 0;
    const NICENESS: i32 = -10;
    plain(Plain::SetPriority, [PRIO_PROCESS, 0, NICENESS.register()]).map(drop)
}

/// Gives a program's group the priority of any program. It was started with ours, so that it was started soon.
pub(crate) fn queue_group(group: i32) {
    const PRIO_GROUP: u64 = 1;
    // It may have ended.
    let _ = plain(Plain::SetPriority, [PRIO_GROUP, group.register(), 0]);
}

/// Makes orphans of our programs our children, as they are PID 1's.
pub(crate) fn adopt_orphans() -> Result<(), Errno> {
    const PR_SET_CHILD_SUBREAPER: u64 = 36;
    plain(Plain::Prctl, [PR_SET_CHILD_SUBREAPER, 1]).map(drop)
}

/// Whether `pid` is a process and not a kernel thread: those are in process group 0, with nobody but PID 1.
pub(crate) fn user_process(pid: i32) -> bool {
    pid == 1 || matches!(plain(Plain::GetPgid, [pid.register()]), Ok(1..))
}

/// Ends this program.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        let _ = plain(Plain::ExitGroup, [u64::from(code)]);
    }
}

/// Ends a process group.
pub(crate) fn kill_group(group: i32) {
    // It may have ended by itself.
    let _ = send_signal_to_group(group, SIGKILL);
}
