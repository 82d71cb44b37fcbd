//! What `/proc` says of a process: its memory by mapping, and its processor time.
//! Parsing is pure and takes text; a process that is gone, or that may not be looked at, gives `None`.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

/// Clock ticks per second in `/proc/PID/stat`: USER_HZ, 100 on x86-64 (`include/uapi/asm-generic/param.h`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Fields of `/proc/PID/stat` behind the program's name (proc_pid_stat(5)): `utime` is field 14 and `stime` 15, and the
/// first one behind the name is field 3.
const UTIME_INDEX: usize = 14 - 3;
const MINFLT_INDEX: usize = 10 - 3;
const MAJFLT_INDEX: usize = 12 - 3;

/// Memory of a VMM that is not its guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Overhead {
    /// Proportional set size of all mappings.
    pub(super) pss_bytes: u64,
    /// The part of it that is guest memory.
    pub(super) guest_bytes: u64,
    /// The part of it that is unchanged pages of the program's file: they are shared by all VMMs.
    pub(super) text_bytes: u64,
}

impl Overhead {
    /// What is left.
    pub(super) const fn own_bytes(self) -> u64 {
        self.pss_bytes.saturating_sub(self.guest_bytes).saturating_sub(self.text_bytes)
    }
}

/// Memory of the VMM `pid` whose guest's memory lies at `guest`.
pub(super) fn overhead(pid: u32, guest: &Range<u64>) -> Option<Overhead> {
    let program = fs::metadata(format!("/proc/{pid}/exe")).ok()?.ino();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(parse_smaps(&smaps, guest, program))
}

/// Proportional set size of `pid`, guest memory included: what it takes of the host's memory when pages that several
/// processes map are shared out among them.
pub(super) fn pss_bytes(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    rollup.lines().find_map(|line| kib(line.strip_prefix("Pss:")?))
}

/// Page faults so far of a VMM's vCPUs, minor and major: of what the guest reached that was not mapped (proc_pid_stat(5),
/// `minflt` and `majflt`).
pub(super) fn vcpu_faults(pid: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    let faults: Vec<u64> = stats.filter_map(|stat| parse_vcpu_faults(&stat)).collect();
    (!faults.is_empty()).then(|| faults.iter().sum())
}

/// `None` for a thread that is no vCPU's.
fn parse_vcpu_faults(stat: &str) -> Option<u64> {
    let (name, rest) = stat.rsplit_once(')')?;
    if !name.contains("(vcpu") {
        return None;
    }
    let field = |index| rest.split_whitespace().nth(index)?.parse::<u64>().ok();
    field(MINFLT_INDEX)?.checked_add(field(MAJFLT_INDEX)?)
}

/// One mapping's line: `start-end perms offset dev inode path`.
struct Mapping<'a> {
    start: u64,
    inode: u64,
    path: &'a str,
}

fn parse_mapping(line: &str) -> Option<Mapping<'_>> {
    let (start, rest) = line.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let mut words = rest.splitn(5, ' ').skip(3);
    let _device = words.next();
    let (inode, path) = words.next().map(|rest| rest.split_once(' ').unwrap_or((rest, "")))?;
    Some(Mapping { start, inode: inode.parse().ok()?, path: path.trim_start() })
}

fn parse_smaps(smaps: &str, guest: &Range<u64>, program: u64) -> Overhead {
    let mut sum = Overhead::default();
    let (mut is_guest, mut is_program) = (false, false);
    for line in smaps.lines() {
        match line.split_once(':').map(|(name, value)| (name, kib(value))) {
            Some(("Pss", Some(bytes))) => {
                sum.pss_bytes += bytes;
                sum.guest_bytes += if is_guest { bytes } else { 0 };
                sum.text_bytes += if is_program { bytes } else { 0 };
            }
            // Pages of the program's file that this process changed are its own. ("Private_Dirty" would not tell them:
            // it counts clean pages as well while a file that was just written waits for its disk.)
            Some(("Anonymous", Some(bytes))) if is_program => {
                sum.text_bytes = sum.text_bytes.saturating_sub(bytes);
            }
            Some((_, Some(_))) => {}
            Some((_, None)) | None => {
                if let Some(mapping) = parse_mapping(line) {
                    is_guest = guest.contains(&mapping.start) || mapping.path.starts_with("/memfd:");
                    is_program = !is_guest && mapping.inode == program && program != 0;
                }
            }
        }
    }
    sum
}

/// `   12 kB` in bytes.
fn kib(value: &str) -> Option<u64> {
    let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Resident memory of `pid` in bytes.
pub(super) fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| kib(line.strip_prefix("VmRSS:")?))
}

/// Processor time `pid` used so far, user and system, in seconds.
pub(super) fn cpu_seconds(pid: u32) -> Option<f64> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(stat: &str) -> Option<f64> {
    // The name may contain anything, parentheses included: fields start behind the last one.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(UTIME_INDEX);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some((f64::from(user) + f64::from(system)) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
563ffc1f6000-563ffc1f8000 r--p 00000000 fe:00 247030                     /usr/bin/hearth
Size:                  8 kB
Pss:                   4 kB
Pss_Dirty:             0 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
563ffc1f8000-563ffc1fd000 rw-p 00002000 fe:00 247030                     /usr/bin/hearth (deleted)
Pss:                  20 kB
Anonymous:            12 kB
7f0000000000-7f0008000000 rw-s 00000000 00:01 1033                       /memfd:guest (deleted)
Pss:               65536 kB
Anonymous:         65536 kB
7f1000000000-7f1008000000 rw-p 00000000 00:00 0 
Pss:                1024 kB
7f2000000000-7f2008000000 rw-p 00000000 00:00 0                          [heap]
Pss:                 100 kB
";

    #[test]
    fn mappings_are_told_apart() {
        let sum = parse_smaps(SMAPS, &(0x7f10_0000_0000..0x7f10_0800_0000), 247_030);
        assert_eq!(sum.pss_bytes, (4 + 20 + 65536 + 1024 + 100) * 1024);
        assert_eq!(sum.guest_bytes, (65536 + 1024) * 1024);
        assert_eq!(sum.text_bytes, (4 + 8) * 1024);
        assert_eq!(sum.own_bytes(), (12 + 100) * 1024);
    }

    #[test]
    fn names_with_parentheses_do_not_shift_fields() {
        let stat = "7 (a) (b) S 1 7 7 0 -1 4194304 99 0 0 0 150 50 0 0 20 0 1 0 231505 3133440 390";
        assert_eq!(parse_stat(stat), Some(2.0));
        assert_eq!(parse_stat("7 (a"), None);
    }

    #[test]
    fn faults_are_those_of_vcpus() {
        let stat =
            |name: &str| format!("7 ({name}) S 1 7 7 0 -1 4194304 99 5 3 4 150 50 0 0 20 0 1 0 231505 3133440 390");
        assert_eq!(parse_vcpu_faults(&stat("vcpu0")), Some(102));
        assert_eq!(parse_vcpu_faults(&stat("devices")), None);
        assert_eq!(parse_vcpu_faults("7 (vcpu0"), None);
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let pid = std::process::id();
        let own = overhead(pid, &(0..1)).unwrap();
        assert!(own.own_bytes() > 0 && own.text_bytes > 0, "{own:?}");
        assert!(resident_bytes(pid).unwrap() > 0);
        assert!(cpu_seconds(pid).is_some());
        assert_eq!(overhead(u32::MAX, &(0..1)), None);
    }
}
