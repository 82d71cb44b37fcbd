//! `hearth vm migrate`, `hearth migration` and `hearth host evacuate`.

use clap::{Args, Subcommand, ValueEnum};

use super::value::{ReferenceWord, duration_ms, number, seconds};

pub(super) const MIGRATE_HELP: &str = "\
Memory is copied while the guest runs, encrypted; then it stands still for milliseconds and goes on at the other host, with
its addresses and its network connections. Until that host has it whole, every failure leaves it running here. Programs run
by `vm exec`, and consoles, are cut off. What ties a VM to its host is refused: disks that only it sees, published ports, a
cluster.

Ctrl-C leaves it on its way; `hearth migration cancel` gives it up. A guest that writes faster than its memory is copied is
slowed down, then moved with a longer pause, or left where it is: see --no-throttle and --on-nonconverge.

Examples:
  hearth vm migrate web --to host-b
  hearth vm migrate web --to auto                             the host with the most free memory that takes it
  hearth vm migrate web --to host-b --estimate                would it be taken, and what would it be like?
  hearth vm migrate db --to host-b --connections 4 --rate 200M --on-nonconverge abort
  hearth vm migrate db --to host-b --compress lz4             over a link that is slower than the hosts
  hearth vm migrate web --to host-b --no-wait; hearth migration ls";

pub(super) const EVACUATE_HELP: &str = "\
VMs that cannot be moved are named with the reason, and stay; exit code 1 then. New VMs may still be launched here.

Examples:
  hearth host evacuate                                        each VM to whichever host takes it
  hearth host evacuate --to host-b --at-once 4";

/// `hearth vm migrate`.
#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Name of the host, as [[peers]] in the agent's configuration has it; `auto` for whichever takes it
    #[arg(long, value_name = "PEER")]
    pub to: ReferenceWord,
    /// How it is moved
    #[command(flatten)]
    pub policy: PolicyWords,
    /// Wait until it runs there, which is what is done in any case
    #[arg(long, conflicts_with = "no_wait")]
    pub wait: bool,
    /// Do not wait: `hearth migration ls` tells how far it is
    #[arg(long)]
    pub no_wait: bool,
    /// Only tell what it would be like, and whether the other host would take it
    #[arg(long, conflicts_with_all = ["wait", "no_wait"])]
    pub estimate: bool,
}

/// How VMs are moved.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct PolicyWords {
    /// Number of connections [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub connections: Option<u8>,
    /// Longest pause that is aimed at, such as 20ms [default: 5ms]
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub pause: Option<u32>,
    /// Most bytes of its memory a second while it runs, such as 100M [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = number)]
    pub rate: Option<u64>,
    /// Rounds after which no other begins [default: 30]
    #[arg(long, value_name = "N")]
    pub rounds: Option<u32>,
    /// Time after which no other round begins, such as 5m [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub deadline: Option<u32>,
    /// Do not slow the guest down when it writes faster than its memory is copied
    #[arg(long)]
    pub no_throttle: bool,
    /// What is done with it when that does not help [default: force]
    #[arg(long, value_name = "WHAT", value_enum)]
    pub on_nonconverge: Option<NonconvergeWord>,
    /// Compress its memory on its way, if both hosts can [default: none]
    #[arg(long, value_name = "HOW", value_enum)]
    pub compress: Option<CompressWord>,
}

/// Whether a VM's memory is compressed on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompressWord {
    /// It goes as it is
    None,
    /// By lz4: for links of up to 2.5 Gbit/s or so
    Lz4,
}

/// What is done with a guest that writes faster than its memory is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NonconvergeWord {
    /// Move it all the same, with a pause as long as it takes
    Force,
    /// Leave it where it is
    Abort,
}

/// `hearth migration`.
#[derive(Debug, Clone, Subcommand)]
pub enum MigrationCommand {
    /// List migrations, newest first
    Ls,
    /// Show one: how far it is, what it took
    Show {
        /// Id of the migration, or a unique prefix of it
        migration: ReferenceWord,
    },
    /// Give one up: the VM goes on here
    Cancel {
        /// Id of the migration, or a unique prefix of it
        migration: ReferenceWord,
    },
}

/// `hearth host evacuate`.
#[derive(Debug, Clone, Args)]
pub struct EvacuateArgs {
    /// Name of the host they move to; `auto` for whichever takes each
    #[arg(long, value_name = "PEER", default_value = "auto")]
    pub to: ReferenceWord,
    /// How many are moved at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub at_once: u8,
    /// How they are moved
    #[command(flatten)]
    pub policy: PolicyWords,
}
