//! VMM processes of this host: found, held by pidfd, watched, ended, and their memory moved to swap.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;

use super::cgroup::HostCgroups;
use super::host_disk::kib_field;
use super::isolation::{self, VmJail};
use super::record::ProcessRecord;
use super::world::{ProcessEnd, ProcessUsage, VmmProcess};
use crate::ids::VmId;
use crate::net::rules::host_tag;
use crate::sys::cgroup::Group;
use crate::sys::pageout::{self, Advice};
use crate::sys::process;
use crate::units::MIB;

/// A held VMM process.
#[derive(Debug, Clone)]
pub struct HostProcess(Arc<Held>);

#[derive(Debug)]
struct Held {
    record: ProcessRecord,
    pidfd: AsyncFd<OwnedFd>,
    end: Mutex<Option<ProcessEnd>>,
    cgroups: HostCgroups,
    /// Its control group, which ends with it.
    group: Option<Group>,
}

impl HostProcess {
    /// Its pidfd.
    pub(super) fn pidfd(&self) -> &OwnedFd {
        self.0.pidfd.get_ref()
    }

    /// Holds the process behind `pidfd`. Call inside the runtime.
    pub(super) fn hold(started: Started, cgroups: HostCgroups) -> io::Result<Self> {
        let Started { record, pidfd, group } = started;
        #[expect(deprecated, reason = "what replaces it is unsafe; an OwnedFd is never replaced while it is held")]
        let pidfd = AsyncFd::new(pidfd)?;
        Ok(Self(Arc::new(Held { record, pidfd, end: Mutex::new(None), cgroups, group })))
    }

    fn proc_file(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.0.record.pid)).ok()
    }

    /// Reaps the process, once, and remembers how it ended.
    fn look(&self) -> io::Result<Option<ProcessEnd>> {
        let mut end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.is_none() {
            let (pidfd, record) = (self.0.pidfd.get_ref(), self.0.record);
            *end = match process::reap(pidfd)? {
                Some(status) => Some(end_of(status)),
                // Adopted: whoever is its parent now may have reaped it, and the kernel may still tell.
                None if process::has_ended(pidfd)? => {
                    let told = process::exit_of_stranger(pidfd, record.pid, record.start_ticks);
                    Some(told.map_or(ProcessEnd::Unknown, end_of))
                }
                None => None,
            };
            if let (Some(_), Some(group)) = (*end, &self.0.group) {
                self.0.cgroups.end(group);
            }
        }
        Ok(*end)
    }
}

/// A VMM that is there, and what is held of it.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) record: ProcessRecord,
    pub(super) pidfd: OwnedFd,
    pub(super) group: Option<Group>,
}

fn end_of(status: ExitStatus) -> ProcessEnd {
    match (status.code(), status.signal()) {
        (Some(code), _) => ProcessEnd::Exited(code),
        (None, Some(signal)) => ProcessEnd::Signalled(signal),
        (None, None) => ProcessEnd::Unknown,
    }
}

impl VmmProcess for HostProcess {
    fn record(&self) -> ProcessRecord {
        self.0.record
    }

    fn kill(&self) -> io::Result<()> {
        process::kill(self.0.pidfd.get_ref())
    }

    async fn ended(&self) -> ProcessEnd {
        loop {
            match self.look() {
                Ok(Some(end)) => return end,
                Ok(None) => {}
                Err(error) => tracing::warn!(pid = self.0.record.pid, %error, "cannot look at the VMM process"),
            }
            match self.0.pidfd.readable().await {
                // Readable means ended, for good: the next look sees it.
                Ok(mut ready) => {
                    if !matches!(self.look(), Ok(Some(_))) {
                        ready.clear_ready();
                    }
                }
                // Only when the runtime shuts down.
                Err(_) => std::future::pending().await,
            }
        }
    }

    fn usage(&self) -> ProcessUsage {
        let residence = pageout::residence(self.0.record.pid).ok();
        let stat = self.proc_file("stat").and_then(|text| Stat::read(&text));
        ProcessUsage {
            resident_bytes: residence.map(|residence| residence.resident),
            swapped_bytes: residence.map(|residence| residence.swapped),
            cpu: stat.map(|stat| stat.cpu),
            faults: stat.map(|stat| stat.faults),
        }
    }

    async fn page_out(&self) -> io::Result<()> {
        let held = Arc::clone(&self.0);
        joined(spawn_blocking(move || page_out(&held)).await)
    }

    fn jail(&self) -> Option<VmJail> {
        isolation::vm(self.0.record.pid, &self.0.cgroups, self.0.group.as_ref())
    }

    fn page_in(&self) {
        let held = Arc::clone(&self.0);
        // Only a hint: what is not back yet is read when it is touched.
        spawn_blocking(move || pageout::advise(held.record.pid, held.pidfd.get_ref(), Advice::WillNeed));
    }
}

/// What `/proc/PID/stat` tells of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    /// Processor time, user and system.
    cpu: Duration,
    /// Page faults; and those of them that waited for a disk.
    faults: (u64, u64),
}

impl Stat {
    /// Fields 10, 12, 14 and 15: minor and major faults; ticks of 10 ms (USER_HZ is 100 on every Linux for x86).
    fn read(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(") ")?;
        // The first of the rest is field 3.
        let fields: Vec<&str> = rest.split(' ').collect();
        let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
        let (minor, major, user, system) = (field(10)?, field(12)?, field(14)?, field(15)?);
        let cpu = Duration::from_millis(user.saturating_add(system).saturating_mul(10));
        Some(Self { cpu, faults: (minor.saturating_add(major), major) })
    }
}

/// A paused VMM's memory to swap, if that has room for all of it.
fn page_out(held: &Held) -> io::Result<()> {
    let pid = held.record.pid;
    let free = kib_field(&std::fs::read_to_string("/proc/meminfo")?, "SwapFree:") * 1024;
    let resident = pageout::residence(pid)?.resident;
    if free < resident {
        let text = format!(
            "the host's swap has {} MiB free, the VM has {} MiB in memory: add swap, or hibernate it",
            free / MIB,
            resident / MIB
        );
        return Err(io::Error::new(io::ErrorKind::StorageFull, text));
    }
    pageout::advise(pid, held.pidfd.get_ref(), Advice::PageOut).map(drop)
}

/// The result of blocking work.
pub(super) fn joined<T>(result: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("the agent is ending")))
}

/// No such process (errno-base.h).
const ESRCH: i32 = 3;

/// A VMM whose arguments name this VM. Reads the arguments of every process: for recovery only.
pub(super) fn search(id: &VmId, host: u16) -> io::Result<Option<(ProcessRecord, OwnedFd)>> {
    Ok(search_all(id, host)?.into_iter().next())
}

/// All VMMs whose arguments name this VM: two, when it is being handed over.
pub(super) fn search_all(id: &VmId, host: u16) -> io::Result<Vec<(ProcessRecord, OwnedFd)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let Ok(pid) = name.parse::<i32>() else { continue };
        let words = match std::fs::read(format!("/proc/{pid}/cmdline")) {
            Ok(words) => words,
            // It has ended since it was listed (ESRCH while it is read).
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH) => continue,
            Err(error) => return Err(error),
        };
        let mut words = words.split(|byte| *byte == 0).skip(1);
        if words.next() != Some(b"vmm") || words.next() != Some(id.as_str().as_bytes()) {
            continue;
        }
        // Agents before this one did not say.
        let tag = host_tag(host);
        if words.next().is_some_and(|word| !word.is_empty() && word != tag.as_bytes()) {
            continue;
        }
        let Ok(start_ticks) = process::start_ticks(pid) else { continue };
        if let Some(pidfd) = process::find(pid, start_ticks)? {
            found.push((ProcessRecord { pid, start_ticks }, pidfd));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_is_read_whatever_the_program_is_called() {
        let fields: Vec<String> = (4..=52).map(|field: u64| field.to_string()).collect();
        let text = format!("7 (a) (b) S {}\n", fields.join(" "));
        let wanted = Stat { cpu: Duration::from_millis((14 + 15) * 10), faults: (10 + 12, 12) };
        assert_eq!(Stat::read(&text), Some(wanted));
        for wrong in ["", "7 (a) S 1 2", "7 (a) S 4 5 6 7 8 9 x 11 12 13 14 15 16"] {
            assert_eq!(Stat::read(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn an_end_is_told_to_all_who_wait() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id().cast_signed();
        let record = ProcessRecord { pid, start_ticks: process::start_ticks(pid).unwrap() };
        let pidfd = process::find(pid, record.start_ticks).unwrap().unwrap();
        let started = Started { record, pidfd, group: None };
        let held = HostProcess::hold(started, HostCgroups::open(Some("/nowhere\0"), 0)).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), held.ended()).await.is_err());
        assert!(held.usage().resident_bytes.is_some());
        let other = held.clone();
        let waiting = tokio::spawn(async move { other.ended().await });
        held.kill().unwrap();
        assert_eq!(held.ended().await, ProcessEnd::Signalled(9));
        assert_eq!(waiting.await.unwrap(), ProcessEnd::Signalled(9));
        let _ = child.wait();
    }
}
