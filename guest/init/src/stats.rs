//! How the guest fares.

use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;

use hearth_guest_wire::Stats;

use crate::directory::Entries;
use crate::sys::{self, Errno};

/// Reads the guest's state. Some dozens of calls: not for asking many times a second.
pub(crate) fn read(execs_running: u32) -> Result<Stats, Errno> {
    let totals = sys::totals()?;
    Ok(Stats {
        uptime_ns: sys::uptime_ns(),
        unix_ns: sys::wall_ns(),
        memory_total_bytes: totals.memory_bytes,
        // What is free is the lower bound of what is available.
        memory_available_bytes: memory_available_bytes().unwrap_or(totals.memory_free_bytes),
        processes: processes()?,
        load1_hundredths: totals.load1_hundredths,
        execs_running,
    })
}

/// `MemAvailable` of /proc/meminfo, which is in KiB.
fn memory_available_bytes() -> Option<u64> {
    let list = read_whole(c"/proc/meminfo").ok()?;
    let line = list.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"MemAvailable:"))?;
    number(line.trim_ascii().strip_suffix(b" kB")?.trim_ascii())?.checked_mul(1024)
}

fn number(digits: &[u8]) -> Option<u64> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// Processes that are not kernel threads: the names of /proc that are numbers, one call for each.
fn processes() -> Result<u32, Errno> {
    let directory = sys::open_read(c"/proc")?;
    let mut entries = vec![0; 8192];
    let mut found = 0;
    loop {
        let count = directory.read_directory(&mut entries)?;
        if count == 0 {
            return Ok(found);
        }
        for entry in Entries(entries.get(..count).unwrap_or_default()) {
            if let Some(pid) = number(entry.name)
                && i32::try_from(pid).is_ok_and(sys::user_process)
            {
                found += 1;
            }
        }
    }
}

/// A small file.
pub(crate) fn read_whole(path: &CStr) -> Result<Vec<u8>, Errno> {
    /// More than any file read by this program.
    const BYTES_MAX: usize = 256 * 1024;
    let file = sys::open_read(path)?;
    let mut all = Vec::new();
    let mut part = vec![0; 8192];
    loop {
        match file.read(&mut part)? {
            0 => return Ok(all),
            count => all.extend_from_slice(part.get(..count).unwrap_or_default()),
        }
        if all.len() > BYTES_MAX {
            return Err(Errno::OVERFLOW);
        }
    }
}
