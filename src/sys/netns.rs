//! Network namespaces. A namespace belongs to a thread, so work inside one is done on a thread that ends afterwards:
//! no worker thread ever changes its own.
//!
//! A *named* namespace is held by a mount on a file of [`DIR`], as ip-netns(8) does it: it lasts without a process in
//! it, survives the agent, and `ip netns exec NAME` enters it. The directory is a shared mount point, so that the
//! mounts are seen in other mount namespaces. Between the making of the file and the mount a crash leaves a plain
//! file: [`list_named`] shows it, [`open_named`] says it is not there, [`create_named`] and [`delete_named`] clear it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs, statfs};

/// Where named namespaces are, as ip-netns(8) has it.
pub const DIR: &str = "/run/netns";

/// Longest name of a namespace, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// The calling thread's network namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// Type of the file system that namespaces are files of (linux/magic.h NSFS_MAGIC).
const NSFS: FsType = FsType(0x6e73_6673);

/// Tries to lock the directory, a millisecond apart, before giving up. Whoever holds it needs some microseconds.
const LOCK_TRIES: u32 = 5000;

/// Mounts taken off one name; more than one means that somebody stacked them.
const STACKED_MOUNTS_MAX: u32 = 16;

const NO_DATA: Option<&str> = None;

fn on_new_thread<T: Send>(
    enter: impl FnOnce() -> nix::Result<()> + Send,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("netns".to_owned());
        let thread = builder.spawn_scoped(scope, || -> io::Result<T> {
            enter()?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` on a new thread in a new, empty network namespace. The namespace lasts as long as something in it does:
/// a process started by `work`, a socket or a tap opened there.
pub fn in_new<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_new_thread(|| unshare(CloneFlags::CLONE_NEWNET), work)
}

/// Runs `work` on a new thread in the network namespace of a process, which has to live.
pub fn in_that_of<T: Send>(process: &OwnedFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_new_thread(|| setns(process, CloneFlags::CLONE_NEWNET), work)
}

/// Runs `work` on a new thread in the network namespace `namespace` (from [`create_named`], [`open_named`]).
pub fn in_fd<T: Send>(namespace: &impl AsFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let namespace = namespace.as_fd();
    on_new_thread(move || setns(namespace, CloneFlags::CLONE_NEWNET), work)
}

/// The calling thread's network namespace.
pub fn own() -> io::Result<OwnedFd> {
    Ok(File::open(OWN)?.into())
}

/// Makes the network namespace `name`, with nothing but a loopback that is down. Fails with `AlreadyExists` if it is
/// there; a plain file a crash left in its place is used. About half a millisecond.
pub fn create_named(name: &str) -> io::Result<OwnedFd> {
    let path = path(name)?;
    // Outside the lock: making a namespace is what takes long.
    in_new(|| {
        let namespace = own()?;
        let _lock = lock_shared_dir()?;
        match OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !is_namespace(&path)? => {}
            other => drop(other?),
        }
        if let Err(error) = mount(Some(OWN), &path, NO_DATA, MsFlags::MS_BIND, NO_DATA) {
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
        Ok(namespace)
    })?
}

/// Opens the network namespace `name`. Fails with `NotFound` if there is none, also when a plain file is in its place.
pub fn open_named(name: &str) -> io::Result<OwnedFd> {
    let file = File::open(path(name)?)?;
    if fstatfs(&file)?.filesystem_type() != NSFS {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(file.into())
}

/// Takes the name off a namespace, or removes the plain file in its place. The namespace itself goes when nothing is
/// in it any more. Not an error if there is none.
pub fn delete_named(name: &str) -> io::Result<()> {
    let path = path(name)?;
    for _ in 0..STACKED_MOUNTS_MAX {
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // EINVAL: not a mount point.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Names that begin with `prefix`, in order: namespaces, and plain files a crash left in the place of one.
pub fn list_named(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with(prefix)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn path(name: &str) -> io::Result<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(plain) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of a network namespace"));
    }
    Ok(Path::new(DIR).join(name))
}

fn is_namespace(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == NSFS)
}

/// Makes the directory a shared mount point if it is not one, and returns it locked: iproute2 takes the same lock, so
/// that two programs that start together do not mount it twice and hide each other's names.
fn lock_shared_dir() -> io::Result<Flock<File>> {
    match DirBuilder::new().mode(0o755).create(DIR) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut dir = File::open(DIR)?;
    let mut tries = LOCK_TRIES;
    let lock = loop {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => break lock,
            Err((again, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) if tries > 0 => dir = again,
            Err((_, error)) => return Err(error.into()),
        }
        tries -= 1;
        thread::sleep(Duration::from_millis(1));
    };
    let shared = || mount(NO_DATA, DIR, NO_DATA, MsFlags::MS_SHARED, NO_DATA);
    match shared() {
        Ok(()) => {}
        // Not a mount point yet: put it on itself.
        Err(nix::Error::EINVAL) => {
            mount(Some(DIR), DIR, NO_DATA, MsFlags::MS_BIND | MsFlags::MS_REC, NO_DATA)?;
            shared()?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_sees_an_empty_network_and_the_caller_keeps_its_own() {
        let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = own();
        let (inside, links) = in_new(|| {
            let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            (own(), links.lines().skip(2).count())
        })
        .expect("a new network namespace needs root");
        assert_ne!(before, inside);
        assert_eq!(before, own());
        assert_eq!(links, 1, "only lo");
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", "a b", "a\0b", &"n".repeat(65)] {
            let kind = |result: io::Result<()>| result.map_err(|error| error.kind());
            assert_eq!(kind(create_named(name).map(drop)), Err(io::ErrorKind::InvalidInput), "{name:?}");
            assert_eq!(kind(open_named(name).map(drop)), Err(io::ErrorKind::InvalidInput), "{name:?}");
            assert_eq!(kind(delete_named(name)), Err(io::ErrorKind::InvalidInput), "{name:?}");
        }
    }
}
