//! The guest's end, in bounded steps; each is entered by the loop when the one before is done or late.
//!
//! ```text
//!   Begin ──SIGTERM to all──▶ Terminating ──no child left, or late──▶ (SIGKILL to all) Killing
//!         ──no child left, or late──▶ (sync, unmount) Writing ──done, or late──▶ reboot(2)
//! ```
//!
//! Every process of the guest is a child of PID 1 once its parents are gone, so "no child left" is "nothing runs".

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::fmt::Write as _;

use hearth_guest_wire::Shutdown;

use crate::stats::read_whole;
use crate::sys::{self, Console, Errand, Errno, Running};

/// For programs to end by themselves.
const TERMINATING_NS: u64 = 3_000_000_000;
/// For programs that were killed to be gone.
const KILLING_NS: u64 = 1_000_000_000;
/// For disks to take what is not written.
const WRITING_NS: u64 = 10_000_000_000;

const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;
const SIGCONT: u8 = 18;

/// systemd's signals to PID 1: SIGRTMIN+4 powers off, SIGRTMIN+5 reboots.
const SYSTEMD_POWEROFF: u8 = 38;
const SYSTEMD_REBOOT: u8 = 39;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Begin,
    Terminating,
    Killing,
    Writing,
}

/// The guest's end under way.
pub(crate) struct Ending {
    how: Shutdown,
    step: Step,
    until_ns: u64,
}

impl Ending {
    /// An end not yet begun.
    pub(crate) const fn new(how: Shutdown) -> Self {
        Self { how, step: Step::Begin, until_ns: 0 }
    }

    /// When the step is late.
    pub(crate) const fn deadline_ns(&self) -> u64 {
        self.until_ns
    }

    /// Goes on if the step is done (`alone`: no process is left) or late, and says when to come back at the latest.
    /// Does not return from the last step.
    pub(crate) fn go_on(&mut self, alone: bool, now_ns: u64, errands: &mut Vec<Running>) -> u64 {
        let done = alone || (self.step != Step::Begin && now_ns >= self.until_ns);
        match (self.step, done) {
            (Step::Begin, false) => {
                // A stopped process takes its SIGTERM when it is let go on.
                let _ = sys::send_signal_to_all(SIGTERM);
                let _ = sys::send_signal_to_all(SIGCONT);
                self.enter(Step::Terminating, now_ns + TERMINATING_NS);
            }
            (Step::Terminating, true) if !alone => {
                let _ = sys::send_signal_to_all(SIGKILL);
                self.enter(Step::Killing, now_ns + KILLING_NS);
            }
            (Step::Begin | Step::Terminating | Step::Killing, true) => {
                match sys::start_errand(Errand::SyncAndUnmount(disk_mounts())) {
                    Ok(errand) => errands.push(errand),
                    Err(errno) => report("write disks", errno),
                }
                self.enter(Step::Writing, now_ns + WRITING_NS);
            }
            (Step::Writing, true) => {
                let ending = match self.how {
                    Shutdown::PowerOff => sys::Ending::PowerOff,
                    Shutdown::Reboot => sys::Ending::Restart,
                };
                report("end the guest", sys::end_guest(ending));
                // PID 1 that ends is a kernel panic: the last way to tell the host.
                sys::exit(1);
            }
            (Step::Terminating | Step::Killing | Step::Writing, false) => {}
        }
        self.until_ns
    }

    fn enter(&mut self, step: Step, until_ns: u64) {
        self.step = step;
        self.until_ns = until_ns;
    }
}

/// Asks a PID 1 that is not this program. The signals are systemd's.
pub(crate) fn ask_first_process(how: Shutdown) -> Result<(), Errno> {
    let signal = match how {
        Shutdown::PowerOff => SYSTEMD_POWEROFF,
        Shutdown::Reboot => SYSTEMD_REBOOT,
    };
    sys::send_signal(1, signal)
}

fn report(what: &str, errno: Errno) {
    let _ = writeln!(Console, "hearth-init: {what}: errno {}", errno.number());
}

/// Where disks are mounted, the last mounted first.
fn disk_mounts() -> Vec<CString> {
    let Ok(list) = read_whole(c"/proc/self/mounts") else { return Vec::new() };
    let mut targets: Vec<CString> = list
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut words = line.split(|byte| *byte == b' ');
            let source = words.next()?;
            let target = words.next()?;
            source.starts_with(b"/dev/").then(|| CString::new(unescape(target)).ok())?
        })
        .collect();
    targets.reverse();
    targets
}

/// A path as /proc/mounts writes it: blanks and backslashes are a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}
