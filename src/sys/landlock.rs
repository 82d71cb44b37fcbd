//! Landlock (`Documentation/userspace-api/landlock.rst`): a process gives up what it could reach by name, for good.
#![expect(unsafe_code, reason = "asking the kernel for its version has no wrapper")]

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
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
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::Not,
    })
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
}
