//! Tap interfaces (`Documentation/networking/tuntap.rst`, linux/if_tun.h): a file whose reads and writes are Ethernet
//! frames, each behind a virtio network header of 12 bytes.
//!
//! [`open`] needs CAP_NET_ADMIN and acts in the calling thread's network namespace; what is done with an open tap needs
//! neither, so a jailed process can.
#![expect(unsafe_code, reason = "the tun driver is configured by ioctls on raw structures")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
use linux_raw_sys::ioctl::{TUNSETIFF, TUNSETOFFLOAD, TUNSETPERSIST, TUNSETVNETHDRSZ};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::process;

/// Bytes of the header before each frame: `struct virtio_net_hdr_mrg_rxbuf`, as virtio 1.2 section 5.1.6 has it.
const HEADER_BYTES: libc::c_int = 12;

/// Number of the ioctl that [`set_offloads`] makes, for filters of system calls.
pub const REQUEST_OFFLOADS: u32 = TUNSETOFFLOAD;

/// Number of the ioctl that [`prepare`] makes, for filters of system calls.
pub const REQUEST_HEADER_BYTES: u32 = TUNSETVNETHDRSZ;

/// Longest name of an interface: IFNAMSIZ less the final zero (linux/if.h).
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// What the reader of a tap takes beside whole, checksummed frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames with partial checksums.
    pub checksum: bool,
    /// TCP/IPv4 segments longer than a frame.
    pub tso4: bool,
    /// TCP/IPv6 segments longer than a frame.
    pub tso6: bool,
    /// UDP/IPv4 datagrams longer than a frame, to be cut into datagrams (Linux 6.2).
    pub uso4: bool,
    /// UDP/IPv6 datagrams longer than a frame, to be cut into datagrams (Linux 6.2).
    pub uso6: bool,
}

/// Attaches to the tap `name` of this network namespace, or makes it; it goes away with the last open file unless it is
/// made persistent. The file is non-blocking.
pub fn open(name: &str) -> io::Result<File> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(['/', '\0']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut options = OpenOptions::new();
    let tap = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data; all zeroes are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: TUNSETIFF takes a `struct ifreq` and writes the interface's name back into it; the file is open and
    // `request` is one, valid for the call. Its name ends in a zero: it is shorter than the field, checked above.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF.into(), &raw mut request) })?;
    prepare(&tap)?;
    Ok(tap)
}

/// The taps another process has open, by name: open files of ours that share its queues, so that what waits in them
/// waits for both. `pidfd` is the process's. Needs the right to trace it.
pub fn held_by(pid: i32, pidfd: &OwnedFd) -> io::Result<Vec<(String, File)>> {
    let mut taps = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // The driver tells the interface's name there; closed meanwhile is as good as another kind of file.
        let Ok(told) = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else { continue };
        let Some(name) = told.lines().find_map(|line| line.strip_prefix("iff:")) else { continue };
        taps.push((name.trim().to_owned(), File::from(process::copy_descriptor(pidfd, number)?)));
    }
    Ok(taps)
}

/// Makes an open tap what this crate expects: non-blocking, with headers of 12 bytes. Fails on anything but a tap.
pub fn prepare(tap: &File) -> io::Result<()> {
    let size = HEADER_BYTES;
    // SAFETY: TUNSETVNETHDRSZ reads an int; the file is open and `size` is one, valid for the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ.into(), &raw const size) })?;
    let flags = OFlag::from_bits_retain(fcntl(tap, FcntlArg::F_GETFL)?);
    fcntl(tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Whether this kernel cuts UDP datagrams behind a tap, in both directions. Leaves the tap's offloads off.
pub fn has_udp_segmentation(tap: &File) -> io::Result<bool> {
    let udp = Offloads { checksum: true, uso4: true, uso6: true, ..Offloads::default() };
    let told = set_offloads(tap, udp)?;
    set_offloads(tap, Offloads::default())?;
    Ok(told == udp)
}

/// Whether this error of a read or write means that the interface behind the open file was deleted (EBADFD). The file
/// is of no more use then. EIO is another thing: the interface is there and down.
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Whether the interface is still there. Reads nothing.
pub fn is_attached(tap: &File) -> bool {
    // A read of no bytes is refused like any other when there is no interface, and takes no frame when there is one.
    let mut tap = tap;
    io::Read::read(&mut tap, &mut []).err().is_none_or(|error| !is_gone(&error))
}

/// Says what the reader of the tap takes; the kernel does the rest itself. Answers what it was told in the end: the
/// kernel refuses segmentation without checksums, UDP segmentation for one of IPv4 and IPv6 alone, and, before Linux
/// 6.2, UDP segmentation at all, which then is left out.
pub fn set_offloads(tap: &File, wanted: Offloads) -> io::Result<Offloads> {
    let udp = wanted.checksum && wanted.uso4 && wanted.uso6;
    let told = Offloads {
        checksum: wanted.checksum,
        tso4: wanted.checksum && wanted.tso4,
        tso6: wanted.checksum && wanted.tso6,
        uso4: udp,
        uso6: udp,
    };
    match tell_offloads(tap, told) {
        Err(error) if udp && error.raw_os_error() == Some(libc::EINVAL) => {
            let without = Offloads { uso4: false, uso6: false, ..told };
            tell_offloads(tap, without).map(|()| without)
        }
        result => result.map(|()| told),
    }
}

fn tell_offloads(tap: &File, offloads: Offloads) -> io::Result<()> {
    let flag = |on, bit: u32| if on { bit } else { 0 };
    let bits = flag(offloads.checksum, TUN_F_CSUM)
        | flag(offloads.tso4, TUN_F_TSO4)
        | flag(offloads.tso6, TUN_F_TSO6)
        | flag(offloads.uso4, TUN_F_USO4)
        | flag(offloads.uso6, TUN_F_USO6);
    // SAFETY: TUNSETOFFLOAD takes its bits by value and touches no memory; the file is open.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD.into(), libc::c_ulong::from(bits)) })
}

/// Whether the interface stays when the last open file is closed.
pub fn set_persistent(tap: &File, on: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number by value and touches no memory; the file is open.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST.into(), libc::c_ulong::from(on)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    #[test]
    fn offloads_that_need_others_are_left_out_without_them() {
        let all = Offloads { checksum: true, tso4: true, tso6: true, uso4: true, uso6: true };
        netns::in_new(|| {
            let tap = open("tap0").unwrap();
            let told = set_offloads(&tap, all).unwrap();
            assert!(told.checksum && told.tso4 && told.tso6);
            assert_eq!(told.uso4, told.uso6);
            assert_eq!(set_offloads(&tap, Offloads { checksum: false, ..all }).unwrap(), Offloads::default());
            let one = set_offloads(&tap, Offloads { uso6: false, ..all }).unwrap();
            assert_eq!(one, Offloads { uso4: false, uso6: false, ..all });
        })
        .expect("a new network namespace needs root");
    }

    #[test]
    fn a_tap_of_another_process_is_shared_with_it() {
        netns::in_new(|| {
            let tap = open("tap7").unwrap();
            let pid = std::process::id().cast_signed();
            let pidfd = process::find(pid, process::start_ticks(pid).unwrap()).unwrap().unwrap();
            let mine = held_by(pid, &pidfd).unwrap().into_iter().find(|(name, _)| name == "tap7").unwrap().1;
            drop(tap);
            assert!(is_attached(&mine), "the interface is there as long as somebody holds it");
        })
        .expect("a new network namespace needs root");
    }

    #[test]
    fn a_persistent_tap_is_there_for_the_next_who_opens_it() {
        netns::in_new(|| {
            let index = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("tap0:");
            let tap = open("tap0").unwrap();
            set_persistent(&tap, true).unwrap();
            drop(tap);
            assert!(index());
            let tap = open("tap0").unwrap();
            assert_eq!(open("tap0").unwrap_err().raw_os_error(), Some(libc::EBUSY), "one opener at a time");
            set_persistent(&tap, false).unwrap();
            drop(tap);
            assert!(!index());
        })
        .expect("a new network namespace needs root");
    }
}
