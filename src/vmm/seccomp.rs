//! Which system calls each thread of a VMM may make: one filter per class of threads, and whatever no line of it
//! names ends the whole VMM at once (SIGSYS). `Documentation/userspace-api/seccomp_filter.rst`.
//!
//! ```text
//! jail closed ─▶ Building (the one thread, and what new threads begin with)      before the first byte of an agent
//!                  ├─▶ Devices, Disk, Volume, Vcpu, Stream, Fill: first on each     before it gets anything to do
//!                  │   new thread
//!                  └─▶ Control: the first thread, once its machine is built      before Launched is answered
//! ```
//! Filters are stacked and the strictest wins, so a class can only lose calls: Building holds the lines of every class.
//! Kernels and saved state, which others wrote, are therefore parsed under Building; nothing of a guest runs before
//! every thread has its own class.
//!
//! The lines with their reasons are in [`calls`] and [`requests`]. A pointer's target cannot be looked at by a filter:
//! clone3(2), whose flags lie in memory, therefore fails with ENOSYS, and the C library goes on with clone(2), whose
//! flags are compared. Paths cannot be looked at either: no call that takes one is on any line but statx(2), which the
//! standard library uses on descriptors; the root directory is empty, whatever the path.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::report;
use crate::sys::thread::{self, ThreadClass};

mod calls;
mod requests;

/// A class of threads: what its threads do, as a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Class(u8);

/// The first thread until its machine is built; every new thread until it has its own.
const BUILDING: Class = Class(1);
/// The first thread of a VMM with a machine: control socket, console, saving.
const CONTROL: Class = Class(2);
/// The thread of all devices.
const DEVICES: Class = Class(4);
/// The thread of one disk.
const DISK: Class = Class(8);
/// The thread of one vCPU.
const VCPU: Class = Class(16);
/// A thread that sends or takes a migration's stream.
const STREAM: Class = Class(32);
/// The thread that fills guest memory.
const FILL: Class = Class(64);
/// The thread of one volume slot.
const VOLUME: Class = Class(128);

impl Class {
    /// Both.
    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn shares(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// For which arguments a call is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Any.
    Always,
    /// The argument (from 0) is this in its low 32 bits, which are all that the kernel looks at in these calls.
    Is(u8, u32),
    /// The argument has none of these bits.
    Lacks(u8, u32),
    /// The first argument is this, and the other one has all and only these bits.
    Both((u8, u32), (u8, u32)),
}

/// One line of the filters.
#[derive(Debug, Clone, Copy)]
struct Line {
    /// The system call's number.
    call: i64,
    /// With these arguments.
    when: When,
    /// Threads that may make it.
    classes: Class,
    /// Why they have to.
    #[cfg_attr(not(test), expect(dead_code, reason = "for readers; a test sees that none is missing"))]
    reason: &'static str,
}

const fn line(call: i64, when: When, classes: Class, reason: &'static str) -> Line {
    Line { call, when, classes, reason }
}

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The lines make no filter.
    #[error("compile the system call filter of {class} threads")]
    Compile {
        /// Whose.
        class: &'static str,
        /// What is wrong with them.
        #[source]
        source: seccompiler::BackendError,
    },
    /// The allocator would make calls that no filter allows.
    #[error("have all threads share the allocator's arena")]
    Allocator(#[source] std::io::Error),
    /// The kernel did not take it.
    #[error("load the system call filter of {class} threads")]
    Load {
        /// Whose.
        class: &'static str,
        /// The kernel's answer.
        #[source]
        source: seccompiler::Error,
    },
}

/// Puts the calling thread, and every thread it will start, under the widest filter; new threads narrow it to their
/// class by themselves. Call once, while the process has one thread.
pub(super) fn begin() -> Result<(), FilterError> {
    thread::share_arena().map_err(FilterError::Allocator)?;
    thread::on_start(confine);
    load("new", &without_clone3()?)?;
    load("building", &compile("building", BUILDING)?)
}

/// Narrows the first thread to what it needs with a machine.
pub(super) fn narrow_control() -> Result<(), FilterError> {
    load("control", &compile("control", CONTROL)?)
}

/// Narrows a new thread to its class. One that cannot be narrowed ends the process, which says so.
fn confine(class: ThreadClass) {
    let (name, class) = match class {
        ThreadClass::Devices => ("devices", DEVICES),
        ThreadClass::Disk => ("disk", DISK),
        ThreadClass::Volume => ("volume", VOLUME),
        ThreadClass::Vcpu => ("vcpu", VCPU),
        ThreadClass::Stream => ("stream", STREAM),
        ThreadClass::Fill => ("fill", FILL),
    };
    if let Err(error) = compile(name, class).and_then(|program| load(name, &program)) {
        panic!("{}", report::chain(&error));
    }
}

fn load(class: &'static str, program: &BpfProgram) -> Result<(), FilterError> {
    seccompiler::apply_filter(program).map_err(|source| FilterError::Load { class, source })
}

/// The filter of a class: its lines are allowed, anything else ends the process.
fn compile(class: &'static str, wanted: Class) -> Result<BpfProgram, FilterError> {
    let failed = |source| FilterError::Compile { class, source };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for line in lines().filter(|line| wanted == BUILDING || line.classes.shares(wanted)) {
        let allowed = rules.entry(line.call).or_default();
        // No rule at all means always; a call has either one such line or lines with conditions (tested).
        if let Some(rule) = line.when.rule().map_err(failed)? {
            allowed.push(rule);
        }
    }
    program(rules, SeccompAction::KillProcess, SeccompAction::Allow).map_err(failed)
}

/// The C library starts threads by clone(2) when clone3(2) is not there.
fn without_clone3() -> Result<BpfProgram, FilterError> {
    let no_such_call = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(rules, SeccompAction::Allow, no_such_call).map_err(|source| FilterError::Compile { class: "new", source })
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)?.try_into()
}

/// All lines.
fn lines() -> impl Iterator<Item = &'static Line> {
    calls::LINES.iter().chain(requests::LINES)
}

impl When {
    fn rule(self) -> Result<Option<SeccompRule>, seccompiler::BackendError> {
        let is = |argument, value: u32| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into())
        };
        let conditions = match self {
            Self::Always => return Ok(None),
            Self::Is(argument, value) => vec![is(argument, value)?],
            Self::Lacks(argument, bits) => {
                let lacks = SeccompCmpOp::MaskedEq(bits.into());
                vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, lacks, 0)?]
            }
            Self::Both(first, second) => vec![is(first.0, first.1)?, is(second.0, second.1)?],
        };
        SeccompRule::new(conditions).map(Some)
    }
}

#[cfg(test)]
mod tests;
