//! `hearth bench launch`, `clone`, `snapshot`, `swap`, `hand-over` and `migrate`.

use std::path::PathBuf;

use clap::Args;

use super::swap::SwapModeWord;
use super::value::{ReferenceWord, duration_ms, name, number};
use crate::api::types::IMAGE_DEFAULT;

pub(super) const LAUNCH_HELP: &str = "\
Figures count from the call: resumed (the vCPUs run), answered (the guest's agent said its first word), registered (its
cluster knows it) and running (it has its identity and its network is open). network, spawn and restore are parts of
resumed. Without --bundle one is built for this and removed again.

Examples:
  hearth bench launch --count 50
  hearth bench launch --bundle web --cold --boot 3              also with a cold page cache, and beside a boot
  hearth bench launch --bundle web --pool 4                     also from machines that are kept ready
  hearth bench launch --firecracker /usr/bin/firecracker        its spawn, load and resume beside ours";

pub(super) const CLONE_HELP: &str = "\
Memory is PSS: pages that several VMs map are shared out among them.

Example:
  hearth bench clone --at-once 1 --at-once 10 --at-once 100 --memory 64
  hearth bench clone --at-once 100 --pool --memory 64           from a hundred that are kept ready";

pub(super) const SNAPSHOT_HELP: &str = "\
Pause is the time in which no vCPU runs. Each full snapshot is followed by some idle time and then by a difference, which
holds what the VM has changed since it was launched, and by a live one, of all memory again, most of it while the VM runs.
Each is removed before the next; in the end the VM goes as well, and the bundle if it was built for this.

Examples:
  hearth bench snapshot --count 10
  hearth bench snapshot --bundle web --idle 5s --json
  hearth bench snapshot --memory 1280 --probe target/x86_64-unknown-linux-gnu/guest/probe --populate 1024 --writes 20";

/// What to launch from.
#[derive(Debug, Clone, Args)]
pub struct BenchSource {
    /// Bundle to launch from [default: one is built for this]
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<ReferenceWord>,
    /// Image to build a bundle of
    #[arg(long, value_name = "NAME", default_value = IMAGE_DEFAULT, value_parser = name, conflicts_with = "bundle")]
    pub image: String,
    /// vCPUs of that bundle
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "bundle")]
    pub vcpus: u32,
    /// Memory of that bundle in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, conflicts_with = "bundle")]
    pub memory: u64,
    /// Session to launch them into: its id, name or network id
    #[arg(long, value_name = "SESSION")]
    pub session: Option<ReferenceWord>,
}

/// `hearth bench launch`.
#[derive(Debug, Clone, Args)]
pub struct BenchLaunchArgs {
    /// What to launch from
    #[command(flatten)]
    pub source: BenchSource,
    /// How many VMs to launch, each removed before the next
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Also with a page cache that is emptied before each launch (as root; at most 10 launches)
    #[arg(long)]
    pub cold: bool,
    /// Also from a pool of that many machines, which is full before each launch
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub pool: Option<u32>,
    /// Also that many boots of the bundle's image
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub boot: u32,
    /// Firecracker binary to measure beside: the same kernel and memory size, spawn + load + resume
    #[arg(long, value_name = "FILE")]
    pub firecracker: Option<PathBuf>,
    /// Where the bundle's image lies, for Firecracker [default: images/ of the agent's state directory]
    #[arg(long, value_name = "DIR", env = "HEARTH_IMAGES", hide_env_values = true)]
    pub images: Option<PathBuf>,
}

/// `hearth bench clone`.
#[derive(Debug, Clone, Args)]
pub struct BenchCloneArgs {
    /// What to launch from
    #[command(flatten)]
    pub source: BenchSource,
    /// How many VMs at once; may be given several times
    #[arg(long, value_name = "N", default_values_t = [1, 10], value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub at_once: Vec<u32>,
    /// From a pool of as many machines (256 at most), which is full before
    #[arg(long)]
    pub pool: bool,
    /// Longest time until all of them run, such as 10m [default: 5 minutes, and 10 seconds for each VM]
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub timeout: Option<u32>,
}

pub(super) const SWAP_HELP: &str = "\
Each round moves the VM's memory out and wakes it by a call. To swap, the host needs some (swapon).

Examples:
  hearth bench swap --count 20
  hearth bench swap --bundle web --mode hibernate --json";

/// `hearth bench swap`.
#[derive(Debug, Clone, Args)]
pub struct BenchSwapArgs {
    /// What to launch from
    #[command(flatten)]
    pub source: BenchSource,
    /// Only to there [default: both, one after the other]
    #[arg(long, value_enum)]
    pub mode: Option<SwapModeWord>,
    /// How many times each
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
}

pub(super) const HAND_OVER_HELP: &str = "\
One VM of a bundle, whose pages of its own are copied, and one that boots its image, whose memory is mapped by both
processes. Pause is the time in which no vCPU runs.

Examples:
  hearth bench hand-over --count 50
  hearth bench hand-over --bundle web --json";

/// `hearth bench hand-over`.
#[derive(Debug, Clone, Args)]
pub struct BenchHandOverArgs {
    /// What to launch from
    #[command(flatten)]
    pub source: BenchSource,
    /// How many times each
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
}

pub(super) const MIGRATE_HELP: &str = "\
The VM boots the image, so that all of its memory goes over. Pause is the time in which no vCPU runs: the target
says since when one does, and the way of that answer is counted as well. Both agents' sockets have to be on this
machine: forward the other one's, if it is elsewhere (ssh -L).

With --probe, the program that scripts/guest-probe builds runs in the guest and looks at its time stamp counter all the
time: \"seen in the guest\" is the longest time it did not get to, while the VM moved; \"beside that\" is the longest one
at other times, which the host or another program of the guest made. Whoever looks takes a processor of the host, so that
an idle guest is moved without that as well: how long all takes and how fast it goes is to be read there. Figures are sizes of 1,048,576 bytes, --writes of
1,000,000.

Examples:
  hearth bench migrate --to host-b --back-socket /run/b/api.sock --back-to host-a --count 20 --memory 128
  hearth bench migrate ... --probe target/x86_64-unknown-linux-gnu/guest/probe --writes 0 --writes 10 --writes 100
  hearth bench migrate ... --probe ... --memory 1024 --populate 800 --connections 1 --connections 2
  hearth bench migrate ... --probe ... --overhead 10M           what logging writes costs a guest that writes";

/// `hearth bench migrate`.
#[derive(Debug, Clone, Args)]
pub struct BenchMigrateArgs {
    /// Name of the other host, as [[peers]] of this agent's configuration has it
    #[arg(long, value_name = "PEER")]
    pub to: ReferenceWord,
    /// Unix socket of the other host's agent
    #[arg(long, value_name = "PATH")]
    pub back_socket: PathBuf,
    /// Name of this host there
    #[arg(long, value_name = "PEER")]
    pub back_to: ReferenceWord,
    /// How many times there and back
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Image to boot
    #[arg(long, value_name = "NAME", default_value = IMAGE_DEFAULT, value_parser = name)]
    pub image: String,
    /// Its vCPUs [default: 1; 2 with --writes or --overhead]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Its memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub memory: u64,
    /// Session to launch it into: its id, name or network id
    #[arg(long, value_name = "SESSION")]
    pub session: Option<ReferenceWord>,
    /// Number of connections; may be given several times
    #[arg(long, value_name = "N", default_values_t = [1], value_parser = clap::value_parser!(u8).range(1..=8))]
    pub connections: Vec<u8>,
    /// Program for the guest, as scripts/guest-probe builds it: also tell what the guest sees
    #[arg(long, value_name = "FILE")]
    pub probe: Option<PathBuf>,
    /// Millions of bytes that the guest writes every second, of a quarter of its memory, at most 32 MiB; may be given
    /// several times [default: 0]
    #[arg(long, value_name = "MB", requires = "probe", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub writes: Vec<u32>,
    /// Fill so much of its memory with random data before, in MiB
    #[arg(long, value_name = "MIB", requires = "probe")]
    pub populate: Option<u64>,
    /// Also compare how fast the guest writes while it is copied at this rate, and while it is not; may be given several
    /// times
    #[arg(long, value_name = "RATE", requires = "probe", value_parser = number)]
    pub overhead: Vec<u64>,
}

/// `hearth bench snapshot`.
#[derive(Debug, Clone, Args)]
pub struct BenchSnapshotArgs {
    /// What to launch from
    #[command(flatten)]
    pub source: BenchSource,
    /// How many snapshots of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// How long the VM does nothing before each difference
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration_ms)]
    pub idle: u32,
    /// Program for the guest, as scripts/guest-probe builds it: for --populate and --writes
    #[arg(long, value_name = "FILE")]
    pub probe: Option<PathBuf>,
    /// Fill so much of its memory with random data before, in MiB
    #[arg(long, value_name = "MIB", requires = "probe")]
    pub populate: Option<u64>,
    /// Millions of bytes that the guest writes every second, of 16 MiB
    #[arg(long, value_name = "MB", requires = "probe", default_value_t = 0)]
    pub writes: u32,
}
