//! Programs with which the image's software takes note of a new identity: it reseeds generators of its own, renews
//! names it has kept, opens connections again.
//!
//! They run one after the other, in the order of their names, all within one time. A guest without any pays for two
//! look-ups. What they print goes where this program's words go.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::slice::from_ref;

use hearth_guest_wire::{Exit, HOOKS_MAX, HookFailure, HooksRan};

use crate::directory::Entries;
use crate::identity::{CurrentIdentity, failed};
use crate::link::Refusal;
use crate::program::environment as environment_of;
use crate::sys::{self, Errno, Fd, Launch};

/// Where they are: what the image brings, and what was put there by those whose image cannot be written to.
const DIRECTORIES: [&CStr; 2] = [c"/etc/hearth/identity.d", c"/run/hearth/identity.d"];

/// The hooks of one request.
pub(crate) struct Hooks {
    /// Paths of those not started, the next one last.
    left: Vec<CString>,
    environment: [CString; 3],
    /// Their standard input.
    nothing: Fd,
    /// The process id, which numbers its group too, and path of the one that runs.
    running: Option<(i32, CString)>,
    outcome: HooksRan,
}

impl Hooks {
    /// The hooks there are; `None` when there are none.
    pub(crate) fn find(identity: &CurrentIdentity, scratch: &mut [u8]) -> Result<Option<Self>, Refusal> {
        let mut left = Vec::new();
        for directory in DIRECTORIES {
            list(directory, &mut left, scratch)?;
        }
        if left.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            left,
            environment: identity.environment().map_err(failed("name the identity to the hooks"))?,
            nothing: sys::open_read(c"/dev/null").map_err(failed("open /dev/null"))?,
            running: None,
            outcome: HooksRan::default(),
        }))
    }

    /// Path of the next one.
    pub(crate) fn next(&self) -> Option<&CStr> {
        self.left.last().map(CString::as_c_str)
    }

    /// Starts the next one that can be started, if none runs; says which one runs now. `None`: all are over.
    pub(crate) fn start_next(&mut self, own_environment: &[&CStr]) -> Option<i32> {
        if let Some((pid, _)) = self.running {
            return Some(pid);
        }
        while let Some(path) = self.left.pop() {
            let environment = environment_of(own_environment, &self.environment).unwrap_or_default();
            let launch = Launch {
                paths: from_ref(&path),
                arguments: from_ref(&path),
                environment: &environment,
                directory: c"/",
                streams: [&self.nothing, sys::console_output(), sys::console_output()],
                terminal: false,
            };
            match sys::spawn(&launch) {
                Ok(pid) => {
                    self.outcome.ran += 1;
                    self.running = Some((pid, path));
                    return Some(pid);
                }
                Err(error) => self.fail(&path, format!("could not be started: errno {}", error.errno().number())),
            }
        }
        None
    }

    /// A child ended: says whether it was the hook that runs.
    pub(crate) fn reaped(&mut self, pid: i32, exit: Exit) -> bool {
        let Some((_, path)) = self.running.take_if(|(running, _)| *running == pid) else { return false };
        match exit {
            Exit::Code(0) => {}
            Exit::Code(code) => self.fail(&path, format!("exit code {code}")),
            Exit::Signal(signal) => self.fail(&path, format!("ended by signal {signal}")),
            Exit::TimedOut => self.fail(&path, String::from("timed out")),
        }
        true
    }

    /// Their time is over: kills the one that runs and starts no more.
    pub(crate) fn expire(&mut self) {
        if let Some((pid, path)) = self.running.take() {
            sys::kill_group(pid);
            self.fail(&path, String::from("timed out"));
        }
        while let Some(path) = self.left.pop() {
            self.fail(&path, String::from("not started: the time was over"));
        }
    }

    /// What became of them.
    pub(crate) fn take_outcome(&mut self) -> HooksRan {
        core::mem::take(&mut self.outcome)
    }

    fn fail(&mut self, path: &CStr, reason: String) {
        let name = format!("{}", file_name(path).escape_ascii());
        self.outcome.failed.push(HookFailure { name, reason });
    }
}

/// Ends the one that runs when the host no longer wants to know. It is reaped as any child.
impl Drop for Hooks {
    fn drop(&mut self) {
        if let Some((pid, _)) = self.running {
            sys::kill_group(pid);
        }
    }
}

/// Adds the executables of a directory, those that are to run first at the end: in the order of their names, and of two
/// that have the same the one that was found first.
fn list(directory: &CStr, hooks: &mut Vec<CString>, scratch: &mut [u8]) -> Result<(), Refusal> {
    let opened = match sys::open_read(directory) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.map_err(failed("open the hooks' directory"))?,
    };
    loop {
        let count = opened.read_directory(scratch).map_err(failed("list the hooks"))?;
        if count == 0 {
            return Ok(());
        }
        for entry in Entries(scratch.get(..count).unwrap_or_default()) {
            // Hidden ones are being written or edited.
            if entry.is_directory || entry.name.starts_with(b".") {
                continue;
            }
            let path = [directory.to_bytes(), b"/", entry.name].concat();
            let Ok(path) = CString::new(path) else { continue };
            if !sys::may_execute(&path) {
                continue;
            }
            if hooks.len() == HOOKS_MAX {
                let what = Some(format!("more than {HOOKS_MAX} hooks"));
                return Err(Refusal { errno: Errno::TOO_BIG, what });
            }
            let place = hooks.partition_point(|other| file_name(other) > entry.name);
            hooks.insert(place, path);
        }
    }
}

fn file_name(path: &CStr) -> &[u8] {
    path.to_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}
