//! Landlock (`Documentation/userspace-api/landlock.rst`): a process gives up what it could reach by name, for good.
#![expect(unsafe_code, reason = "asking the kernel for its version has no wrapper")]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// What is given up: everything that version 6 (Linux 6.12) knows. Later versions change no meaning of earlier ones.
const WANTED: ABI = ABI::V6;

/// `LANDLOCK_CREATE_RULESET_VERSION` (linux/landlock.h).
const CREATE_RULESET_VERSION: libc::c_uint = 1;

/// How much of it is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforced {
    /// All: files, TCP, abstract unix sockets, signals.
    Fully,
    /// What this kernel's version knows: files from 1, TCP from 4, sockets and signals from 6.
    Partly,
    /// The kernel has no Landlock.
    Not,
}

impl fmt::Display for Enforced {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Fully => "fully enforced",
            Self::Partly => "enforced as far as this kernel knows how",
            Self::Not => "not enforced, as this kernel has no Landlock",
        })
    }
}

/// Why a process is not confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// It could gain privileges by running something.
    #[error("forbid new privileges")]
    NewPrivileges(#[source] io::Error),
    /// A directory does not open.
    #[error("open {}", path.display())]
    Path {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: PathFdError,
    },
    /// The kernel refuses.
    #[error("give up what is not needed")]
    Ruleset(#[from] RulesetError),
}

/// The version of this kernel's Landlock; an error says why there is none.
pub fn version() -> io::Result<u32> {
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes a null pointer and a size of zero, and touches no memory.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, CREATE_RULESET_VERSION) };
    if version < 0 { Err(io::Error::last_os_error()) } else { u32::try_from(version).map_err(io::Error::other) }
}

/// Takes from the calling thread, and all it will start: every path, TCP sockets, abstract unix sockets and signals to
/// processes outside. What it has open stays open. Needs no_new_privs. Where the kernel has Landlock, as much as it
/// knows is in force when this returns.
pub fn give_up_everything() -> Result<Enforced, RulesetError> {
    let rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let rules = rules.handle_access(AccessFs::from_all(WANTED))?.handle_access(AccessNet::from_all(WANTED))?;
    let status = rules.scope(Scope::AbstractUnixSocket | Scope::Signal)?.create()?.restrict_self()?;
    Ok(enforced(status.ruleset))
}

/// Takes from the calling thread, and all it will start: to change anything outside of these directories, to run any
/// program, to use abstract unix sockets and signals of others. It may read what it could read, connect to sockets that
/// have a path, and use TCP. What it has open stays open.
pub fn write_below_only(directories: &[&Path]) -> Result<Enforced, ConfineError> {
    nix::sys::prctl::set_no_new_privs().map_err(|error| ConfineError::NewPrivileges(error.into()))?;
    let rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let rules = rules.handle_access(AccessFs::from_all(WANTED))?.scope(Scope::AbstractUnixSocket | Scope::Signal)?;
    let mut rules = rules.create()?;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let change = AccessFs::from_all(WANTED) & !BitFlags::from(AccessFs::Execute);
    let all = std::iter::once((Path::new("/"), read)).chain(directories.iter().map(|path| (*path, change)));
    for (path, access) in all {
        let directory = PathFd::new(path).map_err(|source| ConfineError::Path { path: path.to_owned(), source })?;
        rules = rules.add_rule(PathBeneath::new(directory, access))?;
    }
    Ok(enforced(rules.restrict_self()?.ruleset))
}

fn enforced(status: RulesetStatus) -> Enforced {
    match status {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::Not,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_reached_by_name_afterwards() {
        // A thread of its own: what it gives up does not come back.
        let thread = std::thread::spawn(|| {
            let mut open = std::fs::File::open("/proc/self/status").unwrap();
            nix::sys::prctl::set_no_new_privs().unwrap();
            let enforced = give_up_everything().unwrap();
            if enforced == Enforced::Not {
                assert!(version().is_err(), "the kernel has Landlock, and it is not in force");
                return;
            }
            let refused = std::fs::File::open("/proc/self/status").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            io::Read::read(&mut open, &mut [0; 16]).expect("what was open stays open");
            if enforced == Enforced::Fully {
                let refused = std::net::TcpListener::bind("127.0.0.1:0").unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn what_is_outside_is_read_and_not_changed() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (own, other) = (own.path().to_owned(), other.path().to_owned());
        let make = |path: &Path| crate::sys::file::create(path).map(drop);
        make(&other.join("image")).unwrap();
        let thread = std::thread::spawn(move || {
            if write_below_only(&[&own]).unwrap() == Enforced::Not {
                return;
            }
            make(&own.join("a")).unwrap();
            std::fs::create_dir(own.join("b")).unwrap();
            std::fs::rename(own.join("a"), own.join("b/a")).unwrap();
            std::fs::remove_dir_all(own.join("b")).unwrap();
            std::fs::File::open(other.join("image")).unwrap();
            let refused = make(&other.join("new")).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            let refused = std::process::Command::new("/bin/true").status().unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        });
        thread.join().unwrap();
    }
}
