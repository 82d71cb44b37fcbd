//! Entry, panic, and the memory functions that a C library would have brought.
#![expect(unsafe_code, reason = "the program's entry, and symbols the compiler calls")]

use alloc::vec::Vec;
use core::arch::{asm, global_asm};
use core::ffi::{CStr, c_char};
use core::fmt::Write;
use core::panic::PanicInfo;

use super::file::Console;

global_asm!(
    ".globl _start",
    "_start:",
    // The outermost frame; the kernel leaves the argument block at the stack pointer.
    "xor %ebp, %ebp",
    "mov %rsp, %rdi",
    "and $-16, %rsp",
    "call {entry}",
    "ud2",
    entry = sym entry,
    options(att_syntax),
);

/// What the kernel started this program with.
pub(crate) struct Started {
    /// Arguments, the program's name first.
    pub(crate) arguments: Vec<&'static CStr>,
    /// `NAME=value` words; for PID 1, words of the kernel command line that were not the kernel's.
    pub(crate) environment: Vec<&'static CStr>,
}

extern "C" fn entry(block: *const *const c_char) -> ! {
    // SAFETY: `_start` passes the stack pointer as the kernel left it: argc, argv, null, envp, null, all of it
    // static for the life of the program.
    let started = unsafe {
        let argc = block.addr_value();
        let arguments = strings(block.add(1));
        let environment = strings(block.add(1 + argc + 1));
        Started { arguments, environment }
    };
    crate::run(&started)
}

trait AddressValue {
    /// The word at this place, as a number.
    unsafe fn addr_value(self) -> usize;
}

impl AddressValue for *const *const c_char {
    unsafe fn addr_value(self) -> usize {
        // SAFETY: the caller answers for the pointer; a pointer-sized word is read as one.
        unsafe { self.read() }.addr()
    }
}

/// The strings of a null-terminated array.
///
/// # Safety
/// `array` is an array of pointers to static C strings that ends with a null pointer.
unsafe fn strings(array: *const *const c_char) -> Vec<&'static CStr> {
    let mut found = Vec::new();
    for index in 0.. {
        // SAFETY: entries up to and including the null one exist.
        let word = unsafe { *array.add(index) };
        if word.is_null() {
            break;
        }
        // SAFETY: an entry that is not null is a static C string.
        found.push(unsafe { CStr::from_ptr(word) });
    }
    found
}

/// Says what happened on the console and ends the program. For PID 1 that is a kernel panic, which the host sees.
#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "hearth-init: {info}");
    super::process::exit(101)
}

/// Copies `count` bytes; the regions do not overlap.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: `rep movsb` copies exactly `count` bytes between regions the caller answers for.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// Copies `count` bytes; the regions may overlap.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: `to` is not inside the source, so copying upwards reads each byte before it is written.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: copying downwards from the last byte; `count` is at least one here. The direction flag is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// Fills `count` bytes.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: `rep stosb` writes exactly `count` bytes to a region the caller answers for; al is value's low byte.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("eax") value,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares `count` bytes.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: `index` is below `count`, which the caller answers for.
        let (l, r) = unsafe { (left.add(index).read(), right.add(index).read()) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// Whether `count` bytes differ.
///
/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, count) }
}

/// Length of a C string.
///
/// # Safety
/// As C's `strlen`.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const c_char) -> usize {
    let mut length = 0;
    // SAFETY: bytes up to and including the null one exist.
    while unsafe { text.add(length).read() } != 0 {
        length += 1;
    }
    length
}
