//! The processor's time stamp counter.

#![expect(unsafe_code, reason = "the counter is read by an intrinsic function that is declared unsafe")]

/// The counter, now.
pub(crate) fn read() -> u64 {
    // SAFETY: RDTSC (Intel SDM volume 2B) reads a register and has no other effect. Every x86_64 processor has it, and
    // Linux lets programs use it: who asks to be denied it, by PR_SET_TSC, ends by a signal here.
    unsafe { core::arch::x86_64::_rdtsc() }
}
