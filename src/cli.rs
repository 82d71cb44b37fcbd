//! Words on the command line → checked values. Pure: what a command does is in `agent`, `vmm` and `ctl`.
//! A word that cannot be right is refused here, with exit code 2 and before anything is touched.
#![forbid(unsafe_code)]

mod balloon;
mod bench;
mod bundle;
mod bundle_file;
mod cluster;
mod fetch;
mod image;
mod layout;
mod ledger;
mod manual;
mod migration;
mod pool;
mod session;
mod swap;
mod top;
mod value;
mod vm;
mod volume;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub use balloon::BalloonArgs;
pub use bench::{
    BenchCloneArgs, BenchHandOverArgs, BenchLaunchArgs, BenchMigrateArgs, BenchSnapshotArgs, BenchSource, BenchSwapArgs,
};
pub use bundle::{BundleBuildArgs, BundleCommand, BundleCompactArgs, SnapshotArgs};
pub use bundle_file::{BundleExportArgs, BundleImportArgs, BundleKeyArgs, BundleSignArgs};
pub use cluster::{ClusterCommand, ClusterCreateArgs, ClusterRemoveArgs, ClusterRunArgs};
pub use fetch::{BundleFetchArgs, BundlePinArgs};
pub use image::{ImageCommand, ImportArgs};
pub use ledger::{LedgerBackupArgs, LedgerCommand, LedgerRestoreArgs, SupportBundleArgs};
pub use manual::{CompletionsArgs, ManArgs, Page, ShellWord, completions, first_page, pages};
pub use migration::{CompressWord, EvacuateArgs, MigrateArgs, MigrationCommand, NonconvergeWord, PolicyWords};
pub use pool::{PoolCommand, PoolSetArgs};
pub use session::{SessionCommand, SessionCreateArgs, SessionRemoveArgs};
pub(crate) use swap::whole_seconds;
pub use swap::{SwapChoiceWord, SwapModeWord, SwapOutArgs, SwapPolicyArgs, SwapPolicyWords};
pub use top::{SortWord, TopArgs};
pub use value::{DiskWord, EgressWord, LayoutWord, PortWord, RateWord, ReferenceWord, VolumeWord};
pub use vm::{AddressingWord, ConsoleArgs, ExecArgs, LaunchArgs, RemoveArgs, StopArgs, VmCommand, WaitWord};
pub use volume::{
    LeaseArgs, LeaseConvertArgs, LeaseModeWord, VolumeAttachArgs, VolumeCommand, VolumeCreateArgs, VolumeDetachArgs,
    VolumeSnapshotArgs,
};

/// Where the agent's API answers when nothing else is said.
pub const SOCKET_DEFAULT: &str = "/run/hearth/api.sock";

const TOP_EXAMPLES: &str = "\
Examples:
  hearth host probe                         can this host run VMs? (needs no agent)
  hearth agent                              start the agent (as root; logs go to stderr)
  hearth vm launch --name web               boot the demo image and wait until it runs
  hearth vm exec web -- uname -a            run a command in it
  hearth vm ls                              what is there
  hearth vm console web                     its serial console (Ctrl-] leaves)
  hearth vm rm web                          stop and forget it
  hearth bundle build --name base           freeze a booted guest; `hearth vm launch --bundle base` continues it

IDs may be shortened to a unique prefix, and names work wherever ids do.

Exit codes: 0 done; 1 refused or failed (standard error says what, why and what to do); 2 usage.";

/// Run small Linux VMs on this host.
#[derive(Debug, Parser)]
#[command(name = "hearth", version, about, long_about = None, after_help = TOP_EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Words that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// Reads words (the first is the program's name); the error carries its own text and exit code, help included.
    pub fn parse_checked<W: Into<OsString> + Clone>(words: impl IntoIterator<Item = W>) -> Result<Self, clap::Error> {
        let mut found = layout::laid_out(Self::command()).try_get_matches_from(words)?;
        let cli = Self::from_arg_matches_mut(&mut found).map_err(|error| error.format(&mut Self::command()))?;
        if let Command::Client(ClientCommand::Vm(VmCommand::Launch(args))) = &cli.command {
            let wrong = |text| Self::command().error(ErrorKind::TooManyValues, text);
            args.check().map_err(wrong)?;
        }
        Ok(cli)
    }
}

/// Words that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Unix socket of the agent's API [default: /run/hearth/api.sock]
    #[arg(long, global = true, value_name = "PATH", env = "HEARTH_SOCKET", hide_env_values = true)]
    pub socket: Option<PathBuf>,
    /// Print exactly one JSON value on standard output
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// The socket a client connects to.
    pub fn socket_or_default(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| PathBuf::from(SOCKET_DEFAULT))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this host's agent in the foreground
    #[command(after_help = AGENT_HELP)]
    Agent(AgentArgs),
    /// The process of one VM; the agent starts it
    #[command(hide = true)]
    Vmm(VmmArgs),
    /// The process that has this host's volumes; the agent starts it, and hands it a start message on standard input
    #[command(hide = true)]
    Volumed,
    /// The agent's records: back them up, put a backup back
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Collect what helps to find out what went wrong on this host, without secrets
    #[command(after_help = ledger::SUPPORT_HELP)]
    SupportBundle(SupportBundleArgs),
    /// Print a script that has a shell complete the words of this command line
    #[command(after_help = manual::COMPLETIONS_HELP)]
    Completions(CompletionsArgs),
    /// Print the manual page hearth(1), or write the pages of all commands
    #[command(after_help = manual::MAN_HELP)]
    Man(ManArgs),
    /// What a client asks of the agent.
    #[command(flatten)]
    Client(ClientCommand),
}

/// What a client asks of the agent.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Virtual machines: launch, look at, run commands in, stop
    #[command(subcommand)]
    Vm(VmCommand),
    /// Sessions: VMs that may talk to each other, and what they may reach
    #[command(subcommand)]
    Session(SessionCommand),
    /// Clusters: VMs that register, and run what they are given
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Bundles: guests frozen once, launched any number of times in milliseconds
    #[command(subcommand)]
    Bundle(BundleCommand),
    /// Machines of bundles that are kept ready, for launches in a few milliseconds
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Volumes: block devices that outlive guests
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Images that VMs boot
    #[command(subcommand)]
    Image(ImageCommand),
    /// Long work: what runs, what failed and why
    #[command(subcommand)]
    Operation(OperationCommand),
    /// Migrations from and to this host: how far they are, what they took
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// What the VMs of this host use, again and again
    #[command(after_help = top::TOP_HELP)]
    Top(TopArgs),
    /// What happened on this host, in order
    #[command(after_help = EVENTS_HELP)]
    Events(EventsArgs),
    /// This host: what it can do, and its agent
    #[command(subcommand)]
    Host(HostCommand),
    /// Measure on this host
    #[command(subcommand)]
    Bench(BenchCommand),
}

const AGENT_HELP: &str = "\
It says `ready` on standard error (and to systemd) once the socket answers. SIGTERM stops the agent and \
leaves its VMs running; the next agent on the same state directory finds them.

With --drain, when an agent answers at the socket already: that agent takes no new work, stops its VMs and ends; exit \
code 0 once all have stopped, 1 with the names of those that did not. When none answers, an agent is started whose \
SIGTERM stops the VMs as well.

Examples:
  hearth agent                                                    defaults, as root
  hearth agent --config /etc/h2.toml --state-dir /tmp/h --socket /tmp/h/api.sock
                                                                  a second agent: its [uids] host_number is its own
  hearth agent --drain                                            before maintenance: VMs stopped, agent ended";

/// `hearth agent`.
#[derive(Debug, Clone, Args)]
pub struct AgentArgs {
    /// Configuration file [default: /etc/hearth/hearth.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Records, images and VMs are kept here [default: /var/lib/hearth]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Have the running agent stop its VMs and end; or start one that stops them when it is told to end
    #[arg(long)]
    pub drain: bool,
    /// How log lines look
    #[arg(long, value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Human,
    /// One JSON object per line
    Json,
}

/// `hearth vmm`. Everything a VMM needs beside its id arrives as descriptors.
#[derive(Debug, Clone, Args)]
pub struct VmmArgs {
    /// Find out what this host can do, print it as JSON and exit
    #[arg(long, conflicts_with = "id")]
    pub probe: bool,
    /// Id of the VM, to be seen in lists of processes
    #[arg(required_unless_present = "probe")]
    pub id: Option<String>,
    /// Tag of its host, likewise
    pub host: Option<String>,
}

/// `hearth operation`.
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List operations, newest first
    Ls,
    /// Show one operation with its steps
    Show {
        /// Id of the operation
        operation: ReferenceWord,
    },
}

const EVENTS_HELP: &str = "\
With --json alone the value is one object with a list; with --follow as well, each event is one line.

Examples:
  hearth events --since 120          what happened after event 120
  hearth events --follow             go on until Ctrl-C";

/// `hearth events`.
#[derive(Debug, Clone, Copy, Args)]
pub struct EventsArgs {
    /// Only events after this one
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    pub since: u64,
    /// Wait for more events until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
}

/// `hearth host`.
#[derive(Debug, Clone, Subcommand)]
pub enum HostCommand {
    /// Find out what this host's KVM, CPU, cgroups and network can do; needs no agent
    #[command(after_help = "Exit code 1 means that this host cannot run VMs; standard error says what to do.")]
    Probe,
    /// Show how this host is: what is wrong, what there is, what is left
    Show,
    /// Show what was decided about idle VMs, and by what
    SwapDecisions,
    /// Move all VMs that can be moved to other hosts, before maintenance
    #[command(after_help = migration::EVACUATE_HELP)]
    Evacuate(EvacuateArgs),
}

/// `hearth bench`.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Boot VMs and print where the time and memory go
    #[command(after_help = BENCH_BOOT_HELP)]
    Boot(BenchBootArgs),
    /// Launch VMs from a bundle, one after the other, and print where the time goes
    #[command(after_help = bench::LAUNCH_HELP)]
    Launch(BenchLaunchArgs),
    /// Launch many VMs from a bundle at once, and print what each takes of time and memory
    #[command(after_help = bench::CLONE_HELP)]
    Clone(BenchCloneArgs),
    /// Take snapshots of a VM, full ones and differences, and print how long it stands still for each
    #[command(after_help = bench::SNAPSHOT_HELP)]
    Snapshot(BenchSnapshotArgs),
    /// Move a VM's memory out and back, and print how long that takes
    #[command(after_help = bench::SWAP_HELP)]
    Swap(BenchSwapArgs),
    /// Hand VMs over to new VMM processes, and print how long their guests stand still
    #[command(after_help = bench::HAND_OVER_HELP)]
    HandOver(BenchHandOverArgs),
    /// Move a VM to another host and back, and print how long it stands still
    #[command(after_help = bench::MIGRATE_HELP)]
    Migrate(BenchMigrateArgs),
}

const BENCH_BOOT_HELP: &str = "\
Phases: network (jail made and opened), spawn (request → VMM answers), load (→ machine built), entry (resume → first vCPU in the guest), \
kernel (→ guest agent started), init (→ it answers and knows who it is), exec (→ first answer of `true`). \
The clock of the total stops at that first answer. VMM overhead is PSS without guest memory and without \
unchanged pages of the program's file.

Example:
  hearth bench boot --count 10 --memory 128 --json";

/// `hearth bench boot`.
#[derive(Debug, Clone, Args)]
pub struct BenchBootArgs {
    /// How many VMs to launch, one after the other
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Image to boot
    #[arg(long, value_name = "NAME", default_value = crate::api::types::IMAGE_DEFAULT, value_parser = value::name)]
    pub image: String,
    /// vCPUs of each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u32,
    /// Memory of each in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub memory: u64,
    /// Session to launch them into: its id, name or network id
    #[arg(long, value_name = "SESSION")]
    pub session: Option<ReferenceWord>,
    /// Keep all VMs until the last is measured, instead of removing each before the next
    #[arg(long)]
    pub together: bool,
    /// Seconds to watch each idle VM for its CPU use; 0 skips it
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=600))]
    pub idle_seconds: u32,
}

#[cfg(test)]
mod tests;
