//! Control groups, version 2 (`Documentation/admin-guide/cgroup-v2.rst`): directories and small files below one mount.
//! A group holds processes and limits; a process is put into one as it is cloned (`process::spawn_vmm`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Times a group is looked at again while its last process ends: each is a change that the kernel told of.
const LOOKS_MAX: u32 = 64;

/// Where this host's groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The group of this process, from the mount: `/` or `/a/b`.
    pub own: String,
    /// Controllers that version 1 has, and where: version 2 cannot have them as well.
    pub version1: BTreeMap<String, PathBuf>,
}

impl Hierarchy {
    /// The hierarchy that this process sees; `None` if none is mounted.
    pub fn find() -> io::Result<Option<Self>> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let groups = std::fs::read_to_string("/proc/self/cgroup")?;
        Ok(Self::parse(&mounts, &groups))
    }

    /// From `/proc/PID/mountinfo` and `/proc/PID/cgroup` (proc(5), cgroups(7)).
    fn parse(mounts: &str, groups: &str) -> Option<Self> {
        let own = own_group(groups)?;
        let (mut mount, mut version1) = (None, BTreeMap::new());
        for line in mounts.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let mut before = before.split(' ').skip(3);
            let (Some(root), Some(at)) = (before.next(), before.next()) else { continue };
            let mut after = after.split(' ');
            match after.next() {
                // A mount of a part of the hierarchy does not hold our own group by its path.
                Some("cgroup2") if root == "/" && mount.is_none() => mount = Some(PathBuf::from(unescaped(at))),
                Some("cgroup") => {
                    for option in after.nth(1).unwrap_or("").split(',') {
                        version1.insert(option.to_owned(), PathBuf::from(unescaped(at)));
                    }
                }
                Some(_) | None => {}
            }
        }
        Some(Self { mount: mount?, own, version1 })
    }

    /// The group at a path from the mount.
    pub fn group(&self, path: &str) -> Group {
        Group { path: self.mount.join(path.trim_start_matches('/')) }
    }
}

/// The group of version 2 in `/proc/PID/cgroup`: the line with number 0 and no controllers.
fn own_group(groups: &str) -> Option<String> {
    groups.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// A path as mountinfo writes it: white space and backslashes are three octal digits.
fn unescaped(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut plain = parts.next().unwrap_or("").to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => plain.push(char::from(byte)),
            None => plain.push('\\'),
        }
        plain.push_str(part.get(3..).unwrap_or(""));
    }
    plain
}

/// The group that a process is in, from the mount; `None` if it is gone or there is no version 2.
pub fn of_process(pid: i32) -> Option<String> {
    own_group(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// Longest `cgroup.events` in bytes: it has two lines of a word and a digit.
const EVENTS_BYTES_MAX: usize = 256;

/// One group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// The group of this directory.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A group below it.
    pub fn child(&self, name: &str) -> Self {
        Self { path: self.path.join(name) }
    }

    /// The group above it.
    pub fn parent(&self) -> Option<Self> {
        self.path.parent().map(|path| Self { path: path.to_owned() })
    }

    /// Has it, and what is above it. Not an error if it is there.
    pub fn make(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.path)
    }

    /// Its directory, opened: a clone names its group by it.
    pub fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Writes one of its files.
    pub fn set(&self, file: &str, text: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.path.join(file))?.write_all(text.as_bytes())
    }

    /// Reads one of its files.
    pub fn get(&self, file: &str) -> io::Result<String> {
        std::fs::read_to_string(self.path.join(file))
    }

    /// The controllers it can hand on to those below.
    pub fn controllers(&self) -> io::Result<BTreeSet<String>> {
        Ok(self.get("cgroup.controllers")?.split_whitespace().map(str::to_owned).collect())
    }

    /// Hands a controller on to those below. Refused (EBUSY) while it has processes of its own and is not the root.
    pub fn hand_on(&self, controller: &str) -> io::Result<()> {
        if self.get("cgroup.subtree_control")?.split_whitespace().any(|has| has == controller) {
            return Ok(());
        }
        self.set("cgroup.subtree_control", &format!("+{controller}"))
    }

    /// Names of the groups below it; none if it is not there.
    pub fn children(&self) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string().ok());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Removes it if nothing is in it; `false` if something is. Not an error if it is gone.
    pub fn remove_if_empty(&self) -> io::Result<bool> {
        match std::fs::remove_dir(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ends what is in it (`cgroup.kill`, Linux 5.14), waits for that for `limit` at each of its steps, and removes it.
    pub fn end(&self, limit: Duration) -> io::Result<()> {
        if self.remove_if_empty()? {
            return Ok(());
        }
        match self.set("cgroup.kill", "1") {
            // An older kernel: whoever started the processes ends them.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let events = File::open(self.path.join("cgroup.events"))?;
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        for _ in 0..LOOKS_MAX {
            if !is_populated(&events)? {
                break;
            }
            // The kernel tells of a change of this file as an exceptional condition, until this descriptor reads it.
            if poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        if self.remove_if_empty()? { Ok(()) } else { Err(io::ErrorKind::ResourceBusy.into()) }
    }
}

/// Whether something is in the group of this `cgroup.events`.
fn is_populated(events: &File) -> io::Result<bool> {
    let mut text = [0; EVENTS_BYTES_MAX];
    let count = events.read_at(&mut text, 0)?;
    Ok(text[..count].split(|byte| *byte == b'\n').any(|line| line == b"populated 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_beside_version_1() {
        let mounts = "\
            30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 /part /mnt/part rw - cgroup2 cgroup2 rw\n\
            33 30 0:28 / /sys/fs/cg\\040two rw - cgroup2 cgroup2 rw\n";
        let groups = "3:cpu,cpuacct:/\n0::/system.slice/hearth.service/agent\n";
        let found = Hierarchy::parse(mounts, groups).unwrap();
        assert_eq!(found.mount, Path::new("/sys/fs/cg two"));
        assert_eq!(found.own, "/system.slice/hearth.service/agent");
        assert_eq!(found.version1["cpu"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(!found.version1.contains_key("memory"));
        assert_eq!(found.group("/a/b").path(), Path::new("/sys/fs/cg two/a/b"));
        assert_eq!(Hierarchy::parse(mounts, "3:cpu:/\n"), None, "no version 2");
        assert_eq!(Hierarchy::parse("", groups), None, "not mounted");
    }
}
