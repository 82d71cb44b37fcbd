//! Which processor a program runs on.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::{ProbeError, failed};

/// Has this thread run on that processor and no other.
pub(crate) fn take(cpu: usize) -> Result<(), ProbeError> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus)).map_err(failed("take a CPU"))
}
