//! A shell on the console for whoever types there.
//!
//! Starting one costs a third of a second on an emulated kernel and most guests never need it, so it is started by the
//! first line that comes in, which it then reads. When it ends, the next line starts another.

use alloc::ffi::CString;
use core::ffi::CStr;
use core::fmt::Write as _;

use crate::program::environment as environment_of;
use crate::sys::{self, Console, Epoll, Errno, Interest, Launch};

/// The shell, if the image has one.
const SHELL: &CStr = c"/bin/sh";

/// What is known of the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConsoleShell {
    /// Nobody listens to it, or nothing can be typed there.
    Off,
    /// The loop waits for a line.
    Waiting,
    /// A shell has it.
    Running {
        /// Its process id.
        pid: i32,
    },
}

impl ConsoleShell {
    /// Begins to wait for a line.
    pub(crate) fn wait(&mut self, epoll: &Epoll, token: u64) {
        // What is not a terminal (/dev/null, when a guest has no console) cannot be waited for.
        *self = match epoll.add(sys::console_input(), token, Interest::Level) {
            Ok(()) => Self::Waiting,
            Err(_) => Self::Off,
        };
    }

    /// A line came: starts the shell, which reads it.
    pub(crate) fn start(&mut self, epoll: &Epoll, environment: &[&CStr]) {
        // The line is the shell's now; the loop would be woken by it for ever.
        epoll.remove(sys::console_input());
        let shell = [CString::from(SHELL)];
        let console = sys::console_input();
        let environment = environment_of(environment, &[]).unwrap_or_default();
        let launch = Launch {
            paths: &shell,
            arguments: &[CString::from(c"-sh")],
            environment: &environment,
            directory: c"/",
            streams: [console; 3],
            terminal: true,
        };
        *self = match sys::spawn(&launch) {
            Ok(pid) => {
                sys::queue_group(pid);
                Self::Running { pid }
            }
            Err(error) => {
                let _ = writeln!(Console, "hearth-init: no shell for this console: errno {}", error.errno().number());
                Self::Off
            }
        };
    }

    /// A child ended: says whether it was the shell, so that the console is to be waited for again.
    pub(crate) fn reaped(&mut self, pid: i32) -> bool {
        if *self == (Self::Running { pid }) {
            *self = Self::Off;
            return true;
        }
        false
    }

    /// Ends the shell as a terminal that goes away does: an interactive one ignores SIGTERM.
    pub(crate) fn hang_up(self) {
        const SIGHUP: u8 = 1;
        if let Self::Running { pid } = self {
            let _: Result<(), Errno> = sys::send_signal_to_group(pid, SIGHUP);
        }
    }
}
