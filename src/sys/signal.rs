//! The kick: a signal that makes a vCPU thread leave guest mode.
//!
//! The handler runs on the vCPU's own thread and sets `immediate_exit` in its `kvm_run`, so a kick that arrives just
//! before KVM_RUN is not lost. The handler is installed without SA_RESTART: KVM_RUN ends with EINTR.
#![expect(unsafe_code, reason = "a signal handler that writes through a thread-local pointer")]

use std::cell::Cell;
use std::io;
use std::os::raw::{c_int, c_void};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    // Constant and without destructor: reading it in a handler neither allocates nor registers anything.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(std::ptr::null()) };
}

/// The first real-time signal: none of the C library's own, and not one a terminal or the kernel sends.
fn kick_signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_signal: c_int, _detail: *mut libc::siginfo_t, _context: *mut c_void) {
    let target = IMMEDIATE_EXIT.get();
    if !target.is_null() {
        // SAFETY: the pointer is this thread's, set by `bind` to a field that stays valid until `unbind`, which runs on
        // this thread before the vCPU is dropped; an atomic store is async-signal-safe.
        unsafe { &*target }.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler, for the whole process; again is harmless.
pub fn install() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)?;
    Ok(())
}

/// Lets the calling thread be kicked, whatever it inherited.
pub fn unblock() -> io::Result<()> {
    unblock_signal(kick_signal()).map_err(|error| io::Error::other(error.to_string()))
}

/// Kicks a thread. One that has ended is not an error.
pub fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    thread.kill(kick_signal())?;
    Ok(())
}

/// Names the calling thread's `immediate_exit`, valid until [`unbind`]; called by `sys::kvm` only.
pub(super) fn bind(immediate_exit: *const AtomicU8) {
    let before = IMMEDIATE_EXIT.replace(immediate_exit);
    assert!(before.is_null(), "one vCPU per thread");
}

/// Forgets what [`bind`] named.
pub(super) fn unbind() {
    IMMEDIATE_EXIT.set(std::ptr::null());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_kick_sets_the_flag_of_the_thread_it_is_sent_to() {
        install().unwrap();
        let flag = Arc::new(AtomicU8::new(0));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (go, may_go) = std::sync::mpsc::channel::<()>();
        let seen = Arc::clone(&flag);
        let thread = std::thread::spawn(move || {
            bind(Arc::as_ptr(&seen));
            ready.send(()).unwrap();
            let _ = may_go.recv();
            unbind();
        });
        is_ready.recv().unwrap();
        kick(&thread).unwrap();
        while flag.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        drop(go);
        thread.join().unwrap();
    }
}
