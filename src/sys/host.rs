//! What this process may still take of its host: descriptors and space on file systems, and how pressed the host is.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::statvfs::statvfs;

use crate::clock::Uptime;

/// Descriptors of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptors {
    /// How many are open.
    pub open: u64,
    /// How many may be.
    pub max: u64,
}

/// Space on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// All of it.
    pub total_bytes: u64,
    /// What is free for those who are not root: the rest keeps the file system itself going.
    pub free_bytes: u64,
}

/// Lets this process open as many descriptors as it may at all; gives that number.
pub fn raise_descriptors() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// The descriptors of this process. Counting them takes time that grows with their number: a millisecond for thousands.
pub fn descriptors() -> io::Result<Descriptors> {
    let (max, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // One of them is the directory that is read.
    let open = std::fs::read_dir("/proc/self/fd")?.count().saturating_sub(1) as u64;
    Ok(Descriptors { open, max })
}

/// How long this host has been up (proc(5): `/proc/uptime`), and its boot's number: the start of its random id.
pub fn uptime() -> io::Result<Uptime> {
    let odd = |file: &str, text: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{file} says {text:?}"));
    let read = |file: &'static str| Ok::<_, io::Error>((file, std::fs::read_to_string(file)?));
    let (file, text) = read("/proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|seconds| seconds.parse().ok());
    let since_boot = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let since_boot = since_boot.ok_or_else(|| odd(file, &text))?;
    let (file, text) = read("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let boot = u64::from_str_radix(&digits, 16).map_err(|_| odd(file, &text))?;
    Ok(Uptime { boot, since_boot })
}

/// The space of the file system that `path` lies on.
pub fn space(path: &Path) -> io::Result<Space> {
    let found = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
    Ok(Space { total_bytes: bytes(found.blocks()), free_bytes: bytes(found.blocks_available()) })
}

/// Share of the last ten seconds in which something waited for `what` (`cpu`, `memory`, `io`), in percent; `None` where
/// the kernel does not tell (`Documentation/accounting/psi.rst`).
pub fn pressure(what: &str) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
    parse_pressure(&text)
}

fn parse_pressure(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split(' ').find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_counted() {
        let before = descriptors().unwrap();
        let held: Vec<_> = (0..50).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let after = descriptors().unwrap();
        // Other tests of this process open and close some meanwhile.
        assert!(after.open + 25 >= before.open + held.len() as u64, "{before:?} {after:?}");
        assert_eq!(raise_descriptors().unwrap(), descriptors().unwrap().max);
    }

    #[test]
    fn space_is_that_of_the_file_system() {
        let space = space(Path::new("/")).unwrap();
        assert!(space.free_bytes > 0 && space.free_bytes <= space.total_bytes, "{space:?}");
        assert!(super::space(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn pressure_is_the_first_average() {
        let text = "some avg10=1.53 avg60=0.87 avg300=0.10 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(parse_pressure(text), Some(1.53));
        assert_eq!(parse_pressure("full avg10=0.00"), None);
    }
}
