//! The lines of every system call but ioctl(2). What the C library and the standard library need beside our own calls
//! was found by tracing whole lives (boot, restore, exec, console, pause, save, a lost tap, every end) and by reading
//! the two; glibc is meant, which is what builds link.

use super::When::{Always, Both, Is, Lacks};
use super::{BUILDING, CONTROL, Class, DEVICES, DISK, FILL, Line, STREAM, VCPU, VOLUME, line};
use crate::sys::uring;

/// Every class.
const ALL: Class = BUILDING.and(CONTROL).and(DEVICES).and(DISK).and(VCPU).and(STREAM).and(FILL).and(VOLUME);

/// Classes that serve devices: vCPU threads do it when the guest writes a register.
const SERVING: Class = DEVICES.and(VCPU);

/// Threads and nothing else: exactly what glibc's pthread_create asks clone(2) for.
const THREAD: u32 = flag(
    libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID,
);

/// The signal that takes a vCPU out of guest mode: the first real-time signal that the C library leaves free
/// (signal(7): two are its own).
const KICK: u32 = 34;

/// A C constant as a filter compares it.
const fn flag(value: libc::c_int) -> u32 {
    value.cast_unsigned()
}

pub(super) const LINES: &[Line] = &[
    // Memory of the process: the allocator's.
    line(libc::SYS_brk, Always, ALL, "malloc grows its heap"),
    line(
        libc::SYS_mmap,
        Lacks(2, flag(libc::PROT_EXEC)),
        ALL,
        "malloc, thread stacks, guest memory and what takes its place; never code",
    ),
    line(libc::SYS_mprotect, Lacks(2, flag(libc::PROT_EXEC)), ALL, "malloc opens an arena's reserve; never code"),
    line(libc::SYS_munmap, Always, ALL, "malloc, the end of a thread, guest memory at the end"),
    line(libc::SYS_mremap, Always, ALL, "realloc of a large block"),
    line(
        libc::SYS_madvise,
        Is(2, flag(libc::MADV_DONTNEED)),
        ALL,
        "free gives an arena back, a thread its stack, a balloon a guest's private pages",
    ),
    line(
        libc::SYS_madvise,
        Is(2, flag(libc::MADV_POPULATE_READ)),
        STREAM,
        "pages that arrived, or will be read, are mapped",
    ),
    line(libc::SYS_madvise, Is(2, flag(libc::MADV_POPULATE_WRITE)), STREAM, "pages that will be written are mapped"),
    // Waiting and the end.
    line(libc::SYS_futex, Always, ALL, "locks, condition variables, channels, join"),
    line(libc::SYS_sched_yield, Always, ALL, "channels spin for a moment before they sleep"),
    line(libc::SYS_restart_syscall, Always, ALL, "the kernel goes on with a wait after a stop signal"),
    line(libc::SYS_rt_sigreturn, Always, ALL, "the end of a signal handler: kick, stack overflow"),
    line(libc::SYS_rt_sigprocmask, Always, ALL, "kicks are unblocked; abort and thread ends block signals"),
    line(libc::SYS_rt_sigaction, Always, ALL, "the kick's handler; abort and stack overflow set defaults"),
    line(libc::SYS_sigaltstack, Always, ALL, "a thread's stack for overflows, taken down at its end"),
    line(libc::SYS_gettid, Always, ALL, "abort names its thread"),
    line(libc::SYS_getpid, Always, ALL, "abort and kicks name the process"),
    line(libc::SYS_tgkill, Is(2, flag(libc::SIGABRT)), ALL, "abort, which is how a panic ends"),
    line(libc::SYS_tgkill, Is(2, KICK), BUILDING.and(CONTROL), "takes a vCPU out of guest mode"),
    line(libc::SYS_exit, Always, ALL, "the end of a thread"),
    line(libc::SYS_exit_group, Always, ALL, "the end of the process"),
    line(libc::SYS_clock_gettime, Always, ALL, "reads the time where the vDSO cannot"),
    // Descriptors it has.
    line(libc::SYS_close, Always, ALL, "connections, files that were read, what a reset device held"),
    line(libc::SYS_fcntl, Is(1, flag(libc::F_GETFD)), ALL, "debug builds look before they close"),
    line(
        libc::SYS_fcntl,
        Is(1, flag(libc::F_DUPFD_CLOEXEC)),
        BUILDING,
        "the memory file and console get a second owner",
    ),
    line(libc::SYS_fcntl, Is(1, flag(libc::F_ADD_SEALS)), BUILDING, "guest memory's size is sealed"),
    line(libc::SYS_fcntl, Is(1, flag(libc::F_GETFL)), BUILDING.and(CONTROL), "a tap is made non-blocking"),
    line(libc::SYS_fcntl, Is(1, flag(libc::F_SETFL)), BUILDING.and(CONTROL), "a tap is made non-blocking"),
    line(libc::SYS_read, Always, ALL, "taps, event counters, kernel and state files"),
    line(libc::SYS_write, Always, ALL, "event counters and interrupts, the log, last words of a panic"),
    line(libc::SYS_pread64, Always, BUILDING.and(CONTROL).and(STREAM), "page map and memory image"),
    line(libc::SYS_pwrite64, Always, ALL, "console file, saved memory, zeroes on a disk, last words"),
    line(libc::SYS_preadv, Always, DISK, "a guest reads its disk"),
    line(libc::SYS_pwritev, Always, DISK, "a guest writes its disk"),
    line(libc::SYS_fdatasync, Always, DISK, "a guest flushes its disk"),
    line(
        libc::SYS_fallocate,
        Is(1, flag(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)),
        DISK.and(DEVICES),
        "a guest discards a range of a disk, or gives memory back to a shared file",
    ),
    line(
        libc::SYS_fallocate,
        Is(1, flag(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)),
        DISK,
        "a guest zeroes a range of a disk",
    ),
    // A ring takes reads, writes, flushes and changes of its one file, and nothing else (sys/uring): it was made and
    // restricted before there was a filter.
    line(
        libc::SYS_io_uring_register,
        Is(1, uring::REGISTER_FILE),
        BUILDING,
        "a disk's file, the one that its ring works on",
    ),
    line(libc::SYS_io_uring_enter, Is(3, 0), SERVING, "a guest's requests go to its disk"),
    line(libc::SYS_io_uring_enter, Is(3, uring::ENTER_WAIT), SERVING, "a pause or a reset waits for a disk's requests"),
    line(
        libc::SYS_readv,
        Always,
        SERVING.and(VOLUME),
        "frames from a tap, or a volume's data, into the guest's buffers",
    ),
    line(libc::SYS_writev, Always, SERVING.and(STREAM), "frames from the guest's buffers to a tap; TLS records"),
    line(libc::SYS_lseek, Always, BUILDING.and(CONTROL).and(STREAM), "reading a kernel; holes of guest memory"),
    line(libc::SYS_ftruncate, Always, BUILDING.and(CONTROL), "size of guest memory, console file, saved image"),
    line(libc::SYS_statx, Always, BUILDING.and(CONTROL), "sizes of files that were handed over"),
    line(libc::SYS_memfd_create, Always, BUILDING, "guest memory"),
    // Events.
    line(libc::SYS_epoll_create1, Always, BUILDING, "each device's and the loops' own"),
    line(libc::SYS_epoll_ctl, Always, BUILDING.and(CONTROL).and(SERVING), "connections and streams come and go"),
    line(libc::SYS_epoll_wait, Always, CONTROL.and(SERVING), "the loops"),
    line(libc::SYS_poll, Always, FILL.and(VOLUME), "who waits for memory; agents; a volume's server"),
    line(libc::SYS_eventfd2, Always, BUILDING, "interrupts, queue notifications, commands"),
    line(libc::SYS_timerfd_create, Always, SERVING, "a limited interface waits for its turn"),
    line(libc::SYS_timerfd_settime, Always, SERVING, "a limited interface waits for its turn"),
    // Sockets it was handed, and connections they take. It cannot make one.
    line(
        libc::SYS_accept4,
        Always,
        CONTROL.and(DEVICES).and(FILL).and(VOLUME),
        "agents, console clients, vsock streams, a volume's server",
    ),
    line(libc::SYS_recvmsg, Always, CONTROL, "requests with descriptors"),
    line(
        libc::SYS_recvfrom,
        Always,
        CONTROL.and(SERVING).and(STREAM).and(FILL).and(VOLUME),
        "requests, console input, vsock and migration streams, which memory is here, a volume's answers",
    ),
    line(
        libc::SYS_sendto,
        Always,
        CONTROL.and(SERVING).and(STREAM).and(FILL).and(VOLUME),
        "answers, console output, vsock and migration streams, which memory is wanted, a volume's requests",
    ),
    line(
        libc::SYS_sendmsg,
        Always,
        SERVING.and(VOLUME),
        "vsock streams and a volume's data out of the guest's buffers",
    ),
    line(libc::SYS_shutdown, Always, SERVING, "half of a vsock stream ends"),
    line(
        libc::SYS_setsockopt,
        Both((1, flag(libc::SOL_SOCKET)), (2, flag(libc::SO_RCVTIMEO))),
        CONTROL.and(STREAM),
        "an agent or another host that stops in the middle of a frame does not hold the thread",
    ),
    line(
        libc::SYS_setsockopt,
        Both((1, flag(libc::SOL_SOCKET)), (2, flag(libc::SO_SNDTIMEO))),
        CONTROL.and(STREAM),
        "an agent or another host that takes nothing does not hold the thread",
    ),
    // Randomness.
    line(
        libc::SYS_getrandom,
        Always,
        BUILDING.and(CONTROL).and(SERVING).and(STREAM),
        "the guest's entropy device; malloc; TLS",
    ),
    // Threads, while the machine is built: what the C library does for a new one before it runs.
    line(libc::SYS_clone, Is(0, THREAD), BUILDING, "starts a thread, and cannot start a process"),
    line(libc::SYS_clone3, Always, BUILDING, "answered with ENOSYS by a filter of its own"),
    line(libc::SYS_set_robust_list, Always, BUILDING, "the C library prepares a thread"),
    line(libc::SYS_rseq, Always, BUILDING, "the C library prepares a thread"),
    line(libc::SYS_sched_getaffinity, Always, BUILDING, "the standard library finds a thread's stack"),
    line(libc::SYS_prctl, Is(0, flag(libc::PR_SET_NAME)), BUILDING, "names a thread"),
    line(libc::SYS_prctl, Is(0, flag(libc::PR_SET_NO_NEW_PRIVS)), BUILDING, "demanded before a filter is loaded"),
    line(libc::SYS_seccomp, Is(0, libc::SECCOMP_SET_MODE_FILTER), BUILDING, "a thread narrows its filter"),
];
