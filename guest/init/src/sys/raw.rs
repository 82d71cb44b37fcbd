//! The one instruction by which everything leaves this program.
#![expect(unsafe_code, reason = "the system call instruction")]

use core::arch::asm;

/// A Linux error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(i32);

impl Errno {
    pub(crate) const PERM: Self = Self(1);
    pub(crate) const NOENT: Self = Self(2);
    pub(crate) const SRCH: Self = Self(3);
    pub(crate) const INTR: Self = Self(4);
    pub(crate) const NXIO: Self = Self(6);
    pub(crate) const TOO_BIG: Self = Self(7);
    pub(crate) const BADF: Self = Self(9);
    pub(crate) const AGAIN: Self = Self(11);
    pub(crate) const ACCES: Self = Self(13);
    pub(crate) const BUSY: Self = Self(16);
    pub(crate) const EXIST: Self = Self(17);
    pub(crate) const NODEV: Self = Self(19);
    pub(crate) const NOTDIR: Self = Self(20);
    pub(crate) const ISDIR: Self = Self(21);
    pub(crate) const INVAL: Self = Self(22);
    pub(crate) const MFILE: Self = Self(24);
    pub(crate) const NOSPC: Self = Self(28);
    pub(crate) const ROFS: Self = Self(30);
    pub(crate) const PIPE: Self = Self(32);
    pub(crate) const NOSYS: Self = Self(38);
    pub(crate) const NODATA: Self = Self(61);
    pub(crate) const PROTO: Self = Self(71);
    pub(crate) const OVERFLOW: Self = Self(75);
    pub(crate) const NOTSUPP: Self = Self(95);
    pub(crate) const AFNOSUPPORT: Self = Self(97);
    pub(crate) const ADDRNOTAVAIL: Self = Self(99);
    pub(crate) const TIMEDOUT: Self = Self(110);
    pub(crate) const INPROGRESS: Self = Self(115);
    pub(crate) const UCLEAN: Self = Self(117);
    pub(crate) const NOMEDIUM: Self = Self(123);

    /// The number itself, for messages and the wire.
    pub(crate) const fn number(self) -> i32 {
        self.0
    }

    /// An error by its number, as a netlink answer or a child brings it.
    pub(crate) const fn from_number(number: i32) -> Self {
        Self(number)
    }
}

/// One argument register of a system call.
pub(super) trait Register {
    /// The value as the kernel sees it.
    fn register(self) -> u64;
}

impl Register for u64 {
    fn register(self) -> u64 {
        self
    }
}

impl Register for usize {
    fn register(self) -> u64 {
        self as u64
    }
}

impl Register for u32 {
    fn register(self) -> u64 {
        u64::from(self)
    }
}

impl Register for i32 {
    fn register(self) -> u64 {
        i64::from(self).cast_unsigned()
    }
}

impl<T> Register for *const T {
    fn register(self) -> u64 {
        self.expose_provenance() as u64
    }
}

impl<T> Register for *mut T {
    fn register(self) -> u64 {
        self.expose_provenance() as u64
    }
}

/// Makes the system call `number`.
///
/// # Safety
/// The arguments are valid for that call: every pointer among them points to memory that the call may read or write
/// as it documents, for as long as it does.
#[inline(never)]
pub(super) unsafe fn call(number: u64, arguments: [u64; 6]) -> Result<u64, Errno> {
    let result: i64;
    // SAFETY: `syscall` changes rax, rcx and r11 only, and memory as the caller of this function answers for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    match i32::try_from(result) {
        Ok(error @ -4095..=-1) => Err(Errno(-error)),
        Ok(_) | Err(_) => Ok(result.cast_unsigned()),
    }
}

/// [`call`] with as many arguments as are given.
macro_rules! syscall {
    ($number:expr $(, $argument:expr)* $(,)?) => {{
        let given = [$($crate::sys::raw::Register::register($argument)),*];
        let mut arguments = [0; 6];
        arguments[..given.len()].copy_from_slice(&given);
        $crate::sys::raw::call($number, arguments)
    }};
}
pub(super) use syscall;

/// System calls that take numbers only, no pointer: no argument of theirs can break memory safety.
/// (`exit` ends the program; `close` is not here, because closing a descriptor that someone owns is the owner's.)
#[derive(Clone, Copy)]
#[repr(u64)]
pub(super) enum Plain {
    GetPid = 39,
    Kill = 62,
    SetSid = 112,
    GetPgid = 121,
    SetPriority = 141,
    Prctl = 157,
    Sync = 162,
    ExitGroup = 231,
}

/// Makes a system call that takes numbers only.
pub(super) fn plain<const N: usize>(which: Plain, given: [u64; N]) -> Result<u64, Errno> {
    let mut arguments = [0; 6];
    for (to, from) in arguments.iter_mut().zip(given) {
        *to = from;
    }
    // SAFETY: the calls in `Plain` take no pointers, with the options used here (see each caller's constants).
    unsafe { call(which as u64, arguments) }
}

/// A result that is a small count or descriptor.
pub(super) fn small(result: u64) -> i32 {
    // The kernel's descriptors, process ids and flags are ints.
    i32::try_from(result).unwrap_or(i32::MAX)
}

/// A result that is a byte count; never more than the buffer given.
pub(super) fn count(result: u64) -> usize {
    usize::try_from(result).unwrap_or(usize::MAX)
}
