//! Signals this process gets while it is joined to a command or a console.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// SIGINT: Ctrl-C outside raw mode.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal is gone.
    HangUp,
    /// SIGWINCH: the terminal has another size.
    Resize,
}

impl Asked {
    /// Its Linux number.
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::HangUp => 1,
            Self::Interrupt => 2,
            Self::Terminate => 15,
            Self::Resize => 28,
        }
    }
}

/// From its making on, these signals do not end the process but are told by [`Signals::next`].
#[derive(Debug)]
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
}

impl Signals {
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            resize: signal(SignalKind::window_change())?,
        })
    }

    /// The next signal. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.interrupt.recv() => Asked::Interrupt,
            _ = self.terminate.recv() => Asked::Terminate,
            _ = self.hang_up.recv() => Asked::HangUp,
            _ = self.resize.recv() => Asked::Resize,
        }
    }

    /// The next signal that asks this process to end.
    pub(super) async fn end(&mut self) -> Asked {
        loop {
            match self.next().await {
                Asked::Resize => {}
                asked @ (Asked::Interrupt | Asked::Terminate | Asked::HangUp) => return asked,
            }
        }
    }
}
