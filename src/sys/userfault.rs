//! Parts of guest memory that are not here yet: who reaches one waits, and this process is told (userfaultfd(2),
//! `Documentation/admin-guide/mm/userfaultfd.rst`).
//!
//! ```text
//! private mapping of a file ─ withhold ─▶ anonymous, registered: no page in it, whoever reaches it waits
//!                           ◀─ provide ──  the file is mapped there again, and those that wait go on
//! ```
//! Nothing is ever copied into a withheld part: it has no page until the file takes its place, so what is mapped
//! afterwards is the file's, in the page cache, shared with all who map it.
//!
//! A withheld part that is not provided when its [`Userfault`] is dropped reads as zeroes from there on: keep it as long
//! as somebody may look.
#![expect(unsafe_code, reason = "userfaultfd is driven by ioctls, and mapping over a mapping has no safe wrapper")]

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFDIO_REGISTER_MODE_MISSING, USERFAULTFD_IOC, uffdio_api, uffdio_range,
    uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WAKE};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::ram::GuestRam;
use crate::units::PAGE_BYTES;

/// `USERFAULTFD_IOC_NEW`, `_IO(USERFAULTFD_IOC, 0)`: of the device, for filters of system calls as the others.
pub const REQUEST_NEW: u32 = USERFAULTFD_IOC << 8;

/// Number of the ioctl that says which version is spoken.
pub const REQUEST_API: u32 = UFFDIO_API;

/// Number of the ioctl that [`Userfault::withhold`] makes.
pub const REQUEST_REGISTER: u32 = UFFDIO_REGISTER;

/// Number of the ioctl that [`Userfault::provide`] and [`Userfault::wake`] make.
pub const REQUEST_WAKE: u32 = UFFDIO_WAKE;

/// Bytes of `struct uffd_msg`, and where in one the address of a page fault lies.
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// Messages that are read at once.
const MESSAGES: usize = 64;

/// Tells of threads that wait for a part of guest memory. Readable when there are such, by poll(2).
#[derive(Debug)]
pub struct Userfault {
    file: File,
}

/// A part of one region of guest memory: whole pages of a private mapping of a file.
struct Part<'a> {
    host: NonNull<libc::c_void>,
    bytes: NonZeroUsize,
    backing: &'a FileOffset,
    /// Where it begins in the file.
    offset: u64,
}

/// What is mapped at a part.
#[derive(Clone, Copy)]
enum Content {
    Nothing,
    File,
}

impl Userfault {
    /// Makes one by `device`, an open `/dev/userfaultfd`; also faults of the kernel (of KVM) are told then. Needs no
    /// privilege, and Linux 6.1.
    pub fn new(device: &File) -> io::Result<Self> {
        let flags = libc::c_ulong::from((libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned());
        // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and touches no memory; the file is open.
        let number: RawFd = unsafe { libc::ioctl(device.as_raw_fd(), REQUEST_NEW.into(), flags) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut api = uffdio_api { api: UFFD_API.into(), features: 0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes a `struct uffdio_api`, which `api` is for the call.
        check(unsafe { libc::ioctl(number, REQUEST_API.into(), &raw mut api) })?;
        // SAFETY: the kernel takes UFFDIO_API once for each userfaultfd, and this was that: so the number is one, made
        // by the call above and owned by nobody yet. Another device would have refused one of the two.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
        Ok(Self { file })
    }

    /// From here on whoever reaches these bytes waits until they are provided. What this process wrote there is lost.
    /// They have to lie in one region, which is a private mapping of a file, and be whole pages.
    pub fn withhold(&self, ram: &GuestRam, at: GuestAddress, bytes: u64) -> io::Result<()> {
        let part = part(ram, at, bytes)?;
        map_over(&part, Content::Nothing)?;
        let mut register =
            uffdio_register { range: range(&part), mode: UFFDIO_REGISTER_MODE_MISSING.into(), ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes a `struct uffdio_register`, which `register` is for the call. It
        // changes only what happens at a page that is not there.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), REQUEST_REGISTER.into(), &raw mut register) })
    }

    /// The file takes its place at these bytes again, and who waits for them goes on. For withheld bytes only: what this
    /// process wrote there is lost.
    pub fn provide(&self, ram: &GuestRam, at: GuestAddress, bytes: u64) -> io::Result<()> {
        let part = part(ram, at, bytes)?;
        map_over(&part, Content::File)?;
        self.wake_part(&part)
    }

    /// Who waits for these bytes looks again.
    pub fn wake(&self, ram: &GuestRam, at: GuestAddress, bytes: u64) -> io::Result<()> {
        self.wake_part(&part(ram, at, bytes)?)
    }

    fn wake_part(&self, part: &Part<'_>) -> io::Result<()> {
        let range = range(part);
        // SAFETY: UFFDIO_WAKE reads a `struct uffdio_range`, which `range` is for the call, and changes no memory.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), REQUEST_WAKE.into(), &raw const range) })
    }

    /// Appends the addresses in this process that threads wait for, some at a time, each once; none if nobody waits. Does
    /// not block.
    pub fn faults(&self, addresses: &mut Vec<u64>) -> io::Result<()> {
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        let count = match (&self.file).read(&mut messages) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let (whole, _) = messages[..count].as_chunks::<MESSAGE_BYTES>();
        addresses.extend(whole.iter().filter_map(address));
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The address that a message is about, if it is one of a page that is not there. No others were asked for.
fn address(message: &[u8; MESSAGE_BYTES]) -> Option<u64> {
    let address = message[MESSAGE_ADDRESS..].first_chunk()?;
    (u32::from(message[0]) == UFFD_EVENT_PAGEFAULT).then(|| u64::from_ne_bytes(*address))
}

/// Checks that these bytes are whole pages of one region that is a private mapping of a file.
fn part(ram: &GuestRam, at: GuestAddress, bytes: u64) -> io::Result<Part<'_>> {
    let no_such_part = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = ram.find_region(at).ok_or_else(no_such_part)?;
    let offset = at.unchecked_offset_from(region.start_addr());
    let is_private = region.get_mmap().flags() & libc::MAP_PRIVATE != 0;
    let backing = region.file_offset().filter(|_| is_private).ok_or_else(no_such_part)?;
    if bytes > region.len() - offset || !offset.is_multiple_of(PAGE_BYTES) || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(no_such_part());
    }
    let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
    let bytes = usize::try_from(bytes).ok().and_then(NonZeroUsize::new).ok_or_else(no_such_part)?;
    let host = NonNull::new(host.cast()).ok_or_else(no_such_part)?;
    Ok(Part { host, bytes, backing, offset: backing.start() + offset })
}

fn range(part: &Part<'_>) -> uffdio_range {
    uffdio_range { start: part.host.as_ptr().addr() as u64, len: part.bytes.get() as u64 }
}

fn map_over(part: &Part<'_>, content: Content) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let (flags, file, offset) = match content {
        Content::Nothing => (flags | libc::MAP_ANONYMOUS, -1, 0),
        Content::File => {
            let offset = libc::off_t::try_from(part.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            (flags, part.backing.file().as_raw_fd(), offset)
        }
    };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range lies in guest memory that its region owns whole, in however many mappings, and takes down whole
    // at its end; it is borrowed until then. Guest memory is read and written through volatile access only, by a guest
    // at any time: nothing in this process counts on what it holds, and no reference to it exists. The file was long
    // enough for the region when it was mapped, and whoever owns it keeps it so.
    let mapped = unsafe { libc::mmap(part.host.as_ptr(), part.bytes.get(), access, flags, file, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::discard::discard;
    use crate::sys::ram::{self, RegionPlan, Sharing};
    use crate::units::{self, GuestPhys, MIB};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use vm_memory::Bytes as _;

    /// Two regions with a hole between them, from one file that says at each page which one it is.
    fn memory(sharing: Sharing) -> GuestRam {
        let file = ram::memfd(units::Bytes(2 * MIB)).unwrap();
        for page in 0..2 * MIB / PAGE_BYTES {
            std::os::unix::fs::FileExt::write_all_at(&file, &page.to_le_bytes(), page * PAGE_BYTES).unwrap();
        }
        let plan = |start, file_offset| RegionPlan {
            start: GuestPhys(start),
            bytes: units::Bytes(MIB),
            file_offset: units::Bytes(file_offset),
        };
        ram::map(&file, sharing, &[plan(0, 0), plan(4 * MIB, MIB)]).unwrap()
    }

    fn userfault() -> Userfault {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd");
        Userfault::new(&device.expect("needs root and Linux 6.1")).unwrap()
    }

    /// Waits for somebody who waits; gives where, in the guest.
    fn fault(userfault: &Userfault, ram: &GuestRam) -> u64 {
        let mut source = [PollFd::new(userfault.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut source, PollTimeout::from(10_000_u16)), Ok(1), "nobody waits");
        let mut addresses = Vec::new();
        userfault.faults(&mut addresses).unwrap();
        assert_eq!(addresses.len(), 1);
        let found = ram.iter().find_map(|region| {
            let host = region.get_host_address(MemoryRegionAddress(0)).unwrap().addr() as u64;
            let offset = addresses[0].checked_sub(host).filter(|offset| *offset < region.len())?;
            Some(region.start_addr().0 + offset)
        });
        found.expect("an address of the guest")
    }

    #[test]
    fn who_reaches_what_is_withheld_waits_for_it_and_gets_the_file() {
        let (ram, userfault) = (memory(Sharing::Private), userfault());
        for start in [0, 4 * MIB] {
            userfault.withhold(&ram, GuestAddress(start), MIB).unwrap();
        }
        let at = GuestAddress(4 * MIB + 9 * PAGE_BYTES);
        let read = std::thread::spawn({
            let ram = ram.clone();
            move || ram.read_obj::<u64>(at).unwrap()
        });
        assert_eq!(fault(&userfault, &ram) / PAGE_BYTES * PAGE_BYTES, at.0);
        // It is told once, and looks in vain as long as nothing is there.
        userfault.wake(&ram, GuestAddress(at.0), PAGE_BYTES).unwrap();
        assert_eq!(fault(&userfault, &ram) / PAGE_BYTES * PAGE_BYTES, at.0);
        assert!(!read.is_finished());
        userfault.provide(&ram, GuestAddress(4 * MIB + 8 * PAGE_BYTES), 8 * PAGE_BYTES).unwrap();
        assert_eq!(read.join().unwrap(), (MIB / PAGE_BYTES) + 9);
        // It is the machine's own as ever: written, and given back.
        ram.write_obj(1_u64, at).unwrap();
        assert_eq!(ram.read_obj::<u64>(at).unwrap(), 1);
        discard(&ram, GuestPhys(at.0), units::Bytes(PAGE_BYTES)).unwrap();
        assert_eq!(ram.read_obj::<u64>(at).unwrap(), (MIB / PAGE_BYTES) + 9);
        // What is given back before it was here is waited for as before.
        discard(&ram, GuestPhys(0), units::Bytes(MIB)).unwrap();
        let write = std::thread::spawn({
            let ram = ram.clone();
            move || ram.write_obj(7_u64, GuestAddress(3 * PAGE_BYTES)).unwrap()
        });
        assert_eq!(fault(&userfault, &ram) / PAGE_BYTES, 3);
        userfault.provide(&ram, GuestAddress(0), MIB).unwrap();
        write.join().unwrap();
        let words = [2, 3, 4].map(|page| ram.read_obj::<u64>(GuestAddress(page * PAGE_BYTES)).unwrap());
        assert_eq!(words, [2, 7, 4]);
        userfault.faults(&mut Vec::new()).unwrap();
    }

    #[test]
    fn only_whole_pages_of_a_private_region_can_be_withheld() {
        let (ram, userfault) = (memory(Sharing::Private), userfault());
        for (at, bytes) in [
            (0, 0),
            (0, 100),
            (100, PAGE_BYTES),
            (MIB, PAGE_BYTES),
            (MIB - PAGE_BYTES, 2 * PAGE_BYTES),
            (0, u64::MAX / PAGE_BYTES * PAGE_BYTES),
            (u64::MAX / PAGE_BYTES * PAGE_BYTES, PAGE_BYTES),
        ] {
            let error = userfault.withhold(&ram, GuestAddress(at), bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at:#x} {bytes:#x}");
        }
        assert!(userfault.withhold(&memory(Sharing::Shared), GuestAddress(0), MIB).is_err());
        assert_eq!(ram.read_obj::<u64>(GuestAddress(5 * PAGE_BYTES)).unwrap(), 5);
    }

    #[test]
    fn what_is_no_such_device_makes_none() {
        for file in [tempfile::tempfile().unwrap(), File::open("/dev/null").unwrap()] {
            assert!(Userfault::new(&file).is_err());
        }
    }

    #[test]
    fn messages_of_other_kinds_are_passed_over() {
        let mut message = [0; MESSAGE_BYTES];
        message[16..24].copy_from_slice(&0x1234_5000_u64.to_ne_bytes());
        assert_eq!(address(&message), None);
        message[0] = 0x12;
        assert_eq!(address(&message), Some(0x1234_5000));
    }
}
