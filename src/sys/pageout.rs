//! Another process's memory moved to swap and back: process_madvise(2) with MADV_PAGEOUT and MADV_WILLNEED on its
//! mappings. Needs CAP_SYS_NICE and the right to look into the process; nothing is asked of the process itself.
#![expect(unsafe_code, reason = "process_madvise has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// What is done with a process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Write it to swap, and drop pages of files.
    PageOut,
    /// Read it back from swap, in the background.
    WillNeed,
}

/// Bytes of memory a process has, by `/proc/PID/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residence {
    /// Resident, of files and shared memory included.
    pub resident: u64,
    /// Swapped out; pages of shared memory are not counted.
    pub swapped: u64,
}

/// Applies `advice` to all memory of the process. Mappings it does not fit (of the kernel, locked) are passed over.
/// Gives the bytes it was applied to.
pub fn advise(pid: i32, pidfd: &OwnedFd, advice: Advice) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut bytes = 0;
    let (mut last, mut advised) = (None, false);
    for (start, end) in maps.lines().filter_map(range) {
        match advise_range(pidfd, start, end - start, advice) {
            Ok(count) => {
                bytes += count;
                advised = true;
            }
            // Not for this mapping, or it is gone by now.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM | libc::EBADF)) => {
                last = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    match last {
        Some(error) if !advised => Err(error),
        Some(_) | None => Ok(bytes),
    }
}

/// The range of a line of `/proc/PID/maps`, if it is memory of the process.
fn range(line: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    // [vvar], [vdso] and [vsyscall] are the kernel's.
    if rest.ends_with("[vsyscall]") || rest.ends_with("[vdso]") || rest.contains("[vvar") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    (start < end).then_some((start, end))
}

fn advise_range(pidfd: &OwnedFd, start: usize, bytes: usize, advice: Advice) -> io::Result<u64> {
    let advice = match advice {
        Advice::PageOut => libc::MADV_PAGEOUT,
        Advice::WillNeed => libc::MADV_WILLNEED,
    };
    // The address is the other process's: it is a number here.
    let range = libc::iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: bytes };
    // SAFETY: process_madvise reads one iovec, which lives through the call, and changes memory of the process behind
    // pidfd only in where its pages are, not in what they hold.
    let done = unsafe {
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const range, 1_usize, advice, 0_u32)
    };
    u64::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// What a process has in memory and in swap.
pub fn residence(pid: i32) -> io::Result<Residence> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    Ok(Residence { resident: kib("VmRSS:").unwrap_or(0) * 1024, swapped: kib("VmSwap:").unwrap_or(0) * 1024 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_the_kernel_are_left_alone() {
        assert_eq!(range("1000-3000 rw-p 00000000 00:00 0 "), Some((0x1000, 0x3000)));
        assert_eq!(range("7ffd9a3f2000-7ffd9a3f6000 r--p 00000000 00:00 0 [vvar]"), None);
        assert_eq!(range("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]"), None);
        assert_eq!(range("nonsense"), None);
    }

    #[test]
    fn a_process_can_be_advised_whether_there_is_swap_or_not() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id().cast_signed();
        let pidfd = crate::sys::process::find(pid, crate::sys::process::start_ticks(pid).unwrap()).unwrap().unwrap();
        // It may not have begun to run its program yet; it has memory either way.
        assert!(advise(pid, &pidfd, Advice::PageOut).unwrap() > 0);
        assert!(residence(pid).is_ok());
        crate::sys::process::kill(&pidfd).unwrap();
        child.wait().unwrap();
        assert!(advise(pid, &pidfd, Advice::PageOut).is_err());
    }
}
