//! What this process is to the guest, from how it was started.

use alloc::vec::Vec;
use core::ffi::CStr;
use core::fmt;

use hearth_guest_wire::PORT;

use crate::sys;

/// What this process is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// PID 1: mounts, reaps, and ends the guest itself.
    FirstProcess,
    /// A service with the guest to itself: takes identities and asks PID 1 to end the guest.
    GuestService,
    /// A service that may be anywhere (a test runs it on the host): runs programs and changes nothing else.
    Service,
}

impl Role {
    /// Whether it may change what belongs to the whole guest: name, clock, randomness, interfaces, priority, power.
    pub(crate) const fn owns_guest(self) -> bool {
        match self {
            Self::FirstProcess | Self::GuestService => true,
            Self::Service => false,
        }
    }
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ListenAddress {
    /// A vsock port.
    Vsock(u32),
    /// A unix socket's path.
    Unix(Vec<u8>),
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(out, "vsock:{port}"),
            Self::Unix(path) => write!(out, "unix:{}", path.escape_ascii()),
        }
    }
}

const USAGE: &str = "usage: init vsock:PORT|unix:PATH [--guest]   (as PID 1: no arguments are looked at)";

/// Role and address from the arguments. PID 1 gets words of the kernel command line there and looks at none of them.
pub(crate) fn choose(arguments: &[&CStr]) -> Result<(Role, ListenAddress), &'static str> {
    if sys::is_first_process() && arguments.len() < 2 {
        return Ok((Role::FirstProcess, ListenAddress::Vsock(PORT)));
    }
    let words: Vec<&[u8]> = arguments.iter().skip(1).map(|word| word.to_bytes()).collect();
    let (address, role) = match words.as_slice() {
        [address] => (address, Role::Service),
        [address, b"--guest"] => (address, Role::GuestService),
        _ if sys::is_first_process() => return Ok((Role::FirstProcess, ListenAddress::Vsock(PORT))),
        _ => return Err(USAGE),
    };
    match parse(address) {
        Some(address) => Ok((role, address)),
        None if sys::is_first_process() => Ok((Role::FirstProcess, ListenAddress::Vsock(PORT))),
        None => Err(USAGE),
    }
}

fn parse(word: &[u8]) -> Option<ListenAddress> {
    if let Some(path) = word.strip_prefix(b"unix:") {
        return Some(ListenAddress::Unix(path.to_vec()));
    }
    let port = core::str::from_utf8(word.strip_prefix(b"vsock:")?).ok()?;
    port.parse().ok().map(ListenAddress::Vsock)
}

/// What a service needs that PID 1 has by nature.
pub(crate) fn become_service() {
    // A standard stream that was closed would be given to the first thing opened. Without /dev/null there is no help.
    let _ = sys::hold_standard_streams(c"/dev/null");
    // Without it orphans go to PID 1, which reaps them as well.
    let _ = sys::adopt_orphans();
}
