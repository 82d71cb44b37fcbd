//! The standard input as the word to go on or to end, for whoever cannot send signals into a guest.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::words::Words;
use crate::{ProbeError, failed};

/// Whether the standard input says when to end.
#[derive(Clone, Copy)]
pub(crate) struct Stdin {
    is_asked: bool,
    /// When it is looked at next: each look is a system call, and a guest's take a third of a millisecond.
    next: Instant,
}

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(200);

impl Stdin {
    /// As the option `--while stdin` has it: until the other end closes it.
    pub(crate) fn of(words: &mut Words) -> Result<Self, ProbeError> {
        let asked: Option<String> = words.option("while")?;
        match asked.as_deref() {
            None | Some("stdin") => Ok(Self { is_asked: asked.is_some(), next: Instant::now() }),
            Some(other) => Err(ProbeError::Words(format!("--while {other}?"))),
        }
    }

    /// Whether it means anything when it is closed.
    pub(crate) const fn is_asked(&self) -> bool {
        self.is_asked
    }

    /// Whether it was closed, if that means anything.
    pub(crate) fn has_ended(&mut self) -> Result<bool, ProbeError> {
        if !self.is_asked || Instant::now() < self.next {
            return Ok(false);
        }
        self.next = Instant::now() + EVERY;
        wait_for_end(Duration::ZERO)
    }
}

/// Waits until the standard input is closed; false when that takes longer. What comes by it is passed over.
pub(crate) fn wait_for_end(limit: Duration) -> Result<bool, ProbeError> {
    let deadline = Instant::now() + limit;
    let mut stdin = std::io::stdin();
    let mut buffer = [0; 64];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(false),
            Ok(_) => match stdin.read(&mut buffer).map_err(failed("read the standard input"))? {
                0 => return Ok(true),
                _ => continue,
            },
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("wait for the standard input")(errno)),
        }
    }
}
