//! Floor 3: the process that runs one VM.
//!
//! It is started by the agent (`sys::process::spawn_vmm`) with five descriptors, closes its jail first thing, and then
//! serves its control socket until the guest ends or the agent says Stop. Everything it works with comes as a
//! descriptor; after the jail there is no path it could open, and a system call that it has no need of ends it
//! ([`seccomp`]). One thread (this one) owns the machine and the control socket; the vCPUs and the devices have threads
//! of their own inside the machine, one more sleeps until the machine is sent to another host ([`send`]), and one fills
//! memory that is not all on this host yet ([`fill`]).
//!
//! Whatever ends it, it writes its last words first.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use crate::report;
use crate::sys::process::{CONTROL_FD, LAST_WORDS_FD, START_MESSAGE_BYTES_MAX};
use crate::sys::{fd, jail};
use crate::wire::control::StartMessage;
use crate::wire::last_words::{DETAIL_BYTES_MAX, LastWords};

mod balloon;
mod connection;
mod console;
mod event_loop;
mod fill;
mod launch;
mod log;
mod probe;
mod receive;
mod rings;
mod save;
mod seccomp;
mod send;
mod session;
mod socket;
mod tls;
mod volumes;

pub use seccomp::FilterError;

/// Why a VMM could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It was not started by an agent.
    #[error("`hearth vmm` is started by the agent, not by hand: descriptor {number} is not open")]
    NotStartedByAgent {
        /// The descriptor that is missing.
        number: i32,
    },
    /// The start message is not one.
    #[error("read the start message")]
    StartMessage(#[source] io::Error),
    /// The jail did not close.
    #[error("enter the jail")]
    Jail(#[source] jail::EnterJailError),
    /// The threads' system calls are not filtered.
    #[error("confine the threads")]
    Filter(#[source] FilterError),
    /// The event loop failed.
    #[error("{what}")]
    Loop {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// What `hearth vmm` is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmOptions {
    /// Run a VM for the agent that started this process.
    Serve,
    /// Print what this host really offers.
    Probe,
}

/// Does what is asked.
pub fn run(options: VmmOptions) -> Result<(), VmmError> {
    match options {
        VmmOptions::Serve => run_vm().map(drop),
        VmmOptions::Probe => probe::print().map_err(|source| VmmError::Loop { what: "print the host's facts", source }),
    }
}

/// Runs a VMM to its end. Returns how it ended; an error means that it could not go on.
fn run_vm() -> Result<LastWords, VmmError> {
    let inherited = |number| fd::take_inherited(number).ok_or(VmmError::NotStartedByAgent { number });
    let control = UnixListener::from(inherited(CONTROL_FD)?);
    let last_words = File::from(inherited(LAST_WORDS_FD)?);
    last_words_on_panic(&last_words).map_err(VmmError::StartMessage)?;
    let result = serve(control);
    let words = match &result {
        Ok(words) => words.clone(),
        Err(error) => LastWords::VmmError { detail: bounded(report::chain(error)) },
    };
    // Nobody is left to tell if this fails; the exit status still says whether it ended in order.
    let _ = last_words.write_all_at(&words.to_line(), 0);
    result
}

fn serve(control: UnixListener) -> Result<LastWords, VmmError> {
    let mut message = Vec::new();
    let mut input = io::stdin().lock().take(START_MESSAGE_BYTES_MAX as u64);
    input.read_to_end(&mut message).map_err(VmmError::StartMessage)?;
    let start = StartMessage::parse(&message).map_err(|error| VmmError::StartMessage(error.into()))?;
    // While this user may make them, and before there is a filter that forbids it.
    let rings = rings::Rings::make();
    jail::enter(start.uid, start.file_bytes_max).map_err(VmmError::Jail)?;
    // Before the first byte of an agent is read: what comes from here on is decoded under the filter.
    seccomp::begin().map_err(VmmError::Filter)?;
    event_loop::EventLoop::new(control, start.nonce, rings)?.run()
}

/// A panic ends the process (`panic = "abort"`), and pid 1 of a namespace does not even die of its own SIGABRT in
/// order: so the words are written here, before the abort.
fn last_words_on_panic(file: &File) -> io::Result<()> {
    let file = file.try_clone()?;
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let words = LastWords::VmmError { detail: bounded(panic.to_string()) };
        let _ = file.write_all_at(&words.to_line(), 0);
        default(panic);
    }));
    Ok(())
}

fn bounded(mut text: String) -> String {
    let mut end = DETAIL_BYTES_MAX.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
