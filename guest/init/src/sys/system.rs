//! The whole guest: clocks, name, randomness, totals, and its end.
#![expect(unsafe_code, reason = "system calls with pointers")]

use super::file::open_controlling;
use super::raw::{Errno, syscall};

const IOCTL: u64 = 16;
const SYSINFO: u64 = 99;
const REBOOT: u64 = 169;
const SETHOSTNAME: u64 = 170;
const CLOCK_SETTIME: u64 = 227;
const CLOCK_GETTIME: u64 = 228;

const CLOCK_REALTIME: u32 = 0;
const CLOCK_MONOTONIC: u32 = 1;
const CLOCK_BOOTTIME: u32 = 7;

fn read_clock(clock: u32) -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes one struct timespec, which is these two words.
    let read = unsafe { syscall!(CLOCK_GETTIME, clock, time.as_mut_ptr()) };
    debug_assert!(read.is_ok(), "these clocks exist in every kernel");
    let [seconds, nanoseconds] = time;
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// Nanoseconds of running time.
pub(crate) fn monotonic_ns() -> u64 {
    read_clock(CLOCK_MONOTONIC)
}

/// Nanoseconds since the kernel started.
pub(crate) fn uptime_ns() -> u64 {
    read_clock(CLOCK_BOOTTIME)
}

/// Wall clock: nanoseconds since the Unix epoch.
pub(crate) fn wall_ns() -> u64 {
    read_clock(CLOCK_REALTIME)
}

/// Sets the wall clock.
pub(crate) fn set_wall_ns(unix_ns: u64) -> Result<(), Errno> {
    let time = [unix_ns / 1_000_000_000, unix_ns % 1_000_000_000];
    // SAFETY: the kernel reads one struct timespec, which is these two words.
    unsafe { syscall!(CLOCK_SETTIME, CLOCK_REALTIME, time.as_ptr()) }.map(drop)
}

/// Sets the host name.
pub(crate) fn set_hostname(name: &str) -> Result<(), Errno> {
    // SAFETY: the kernel reads `name.len()` bytes of `name`.
    unsafe { syscall!(SETHOSTNAME, name.as_ptr(), name.len()) }.map(drop)
}

/// Credits `entropy` to the kernel's pool and makes its generator use it from now on.
pub(crate) fn add_entropy(entropy: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: u32 = 0x4008_5203;
    const RNDRESEEDCRNG: u32 = 0x5207;
    const ENTROPY_BYTES: usize = 64;
    /// The kernel's `struct rand_pool_info` with this many bytes.
    #[repr(C)]
    struct Pool {
        entropy_bits: u32,
        bytes: u32,
        content: [u8; ENTROPY_BYTES],
    }
    let content = entropy.try_into().map_err(|_| Errno::INVAL)?;
    let pool = Pool { entropy_bits: 64 * 8, bytes: 64, content };
    let device = open_controlling(c"/dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads the two ints and as many bytes as the second says, all of them in `pool`.
    unsafe { syscall!(IOCTL, device.number(), RNDADDENTROPY, &raw const pool) }?;
    // SAFETY: takes no argument.
    unsafe { syscall!(IOCTL, device.number(), RNDRESEEDCRNG) }.map(drop)
}

/// The kernel's `struct sysinfo`.
#[repr(C)]
#[derive(Default)]
struct SysInfo {
    uptime: u64,
    /// Load averages over 1, 5 and 15 minutes, in 1/65536.
    loads: [u64; 3],
    totalram: u64,
    freeram: u64,
    sharedram: u64,
    bufferram: u64,
    totalswap: u64,
    freeswap: u64,
    procs: u16,
    pad: u16,
    totalhigh: u64,
    freehigh: u64,
    /// Bytes that the sizes above count in.
    mem_unit: u32,
}

/// Totals of the guest.
pub(crate) struct Totals {
    /// Memory the kernel manages.
    pub(crate) memory_bytes: u64,
    /// Memory that nothing uses at all.
    pub(crate) memory_free_bytes: u64,
    /// One-minute load average, in hundredths.
    pub(crate) load1_hundredths: u32,
}

/// Reads the totals.
pub(crate) fn totals() -> Result<Totals, Errno> {
    let mut info = SysInfo::default();
    // SAFETY: the kernel writes one struct sysinfo.
    unsafe { syscall!(SYSINFO, &raw mut info) }?;
    let unit = u64::from(info.mem_unit.max(1));
    let [load1, ..] = info.loads;
    Ok(Totals {
        memory_bytes: info.totalram.saturating_mul(unit),
        memory_free_bytes: info.freeram.saturating_mul(unit),
        load1_hundredths: u32::try_from(load1.saturating_mul(100) >> 16).unwrap_or(u32::MAX),
    })
}

/// How the guest's kernel is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Power off.
    PowerOff,
    /// Reset.
    Restart,
}

/// Ends the guest at once. Comes back only when the kernel refuses.
pub(crate) fn end_guest(ending: Ending) -> Errno {
    const MAGIC1: u32 = 0xfee1_dead;
    const MAGIC2: u32 = 672_274_793;
    let command: u32 = match ending {
        Ending::PowerOff => 0x4321_fedc,
        Ending::Restart => 0x0123_4567,
    };
    // SAFETY: these commands take no argument.
    match unsafe { syscall!(REBOOT, MAGIC1, MAGIC2, command, 0_u64) } {
        Ok(_) => Errno::NOSYS,
        Err(error) => error,
    }
}
