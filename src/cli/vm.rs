//! `hearth vm`.

use clap::{Args, Subcommand, ValueEnum};

use super::balloon::{BALLOON_HELP, BalloonArgs};
use super::bundle::SnapshotArgs;
use super::migration::MigrateArgs;
use super::swap::{SWAP_OUT_HELP, SWAP_POLICY_HELP, SwapChoiceWord, SwapOutArgs, SwapPolicyArgs};
use super::value::{DiskWord, PortWord, RateWord, ReferenceWord, VolumeWord, duration_ms, key, name, variable};
use crate::api::types::{Addressing, DISKS_MAX, Wait};

const LAUNCH_HELP: &str = "\
Examples:
  hearth vm launch                                      the demo image, 1 vCPU, 128 MiB
  hearth vm launch --name db --vcpus 2 --memory 512 --disk data.img --disk base.img:ro
  hearth vm launch --tx-limit 10M/1M --tx-packets 5k    at most 10 MB and 5000 packets a second from the guest
  hearth vm launch --bundle web                         goes on where the bundle was frozen, in milliseconds
  hearth vm launch --volume root:/ --memory 256         with its root on a volume: kernel and agent are the image's
  hearth vm launch --session etl                        with addresses, and a way to the other VMs of the session
  hearth vm launch --cluster etl --executor-id e-1      is given calculations, by `hearth cluster run`
  hearth --json vm launch --wait none | jq -r .id       do not wait; `hearth vm show` tells how far it is

When a launch fails, what was made for it is undone; `hearth operation ls` keeps the reason.";

const HAND_OVER_HELP: &str = "\
After an upgrade of Hearth the agent is the new one and VMs still have the VMM processes they were started with. This
gives a VM a new one: memory is mapped by both and not copied, but for the pages a VM of a bundle has written; the guest
stands still for milliseconds, and its network connections go on. Programs run by `vm exec`, a cluster's calculations
among them, and consoles are cut off. When it does not work out, the VM goes on in the process it has.

Examples:
  hearth vm hand-over web
  for vm in $(hearth --json vm ls | jq -r '.vms[].id'); do hearth vm hand-over $vm; done";

const EXEC_HELP: &str = "\
Standard input, output and error are the command's own, and so is the exit code: 128+N when signal N ended it, 124 when
it ran past --timeout. Exit code 1 with a message that starts with `error:` means that Hearth could not run it.
Ctrl-C is passed on to the command; a second one leaves it. When this client goes away, the command is killed.
With --json, the output is collected (16 MiB each of standard output and error) and printed as one value.

Examples:
  hearth vm exec web -- uname -a
  hearth vm exec web --timeout 30s -- sh -c 'make test 2>&1'
  tar c . | hearth vm exec web --cwd /srv -- tar x
  hearth vm exec -t web -- sh                           a shell on a terminal";

const CONSOLE_HELP: &str = "\
Ctrl-] leaves the console; the VM goes on. Several clients may be attached at once: all see the output.

Examples:
  hearth vm console web
  hearth vm console web --history | tail -50            why did it not boot?
  hearth vm console web </dev/null                      only watch";

/// `hearth vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Launch a VM, from an image or a bundle, and wait until its guest answers
    #[command(after_help = LAUNCH_HELP)]
    Launch(Box<LaunchArgs>),
    /// List the VMs of this host
    Ls,
    /// Show one VM: state, timings of its launch, and why it failed
    Show {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Stop VMs and forget them; their names are free again
    Rm(RemoveArgs),
    /// Ask the guest to power off, kill it if it does not; the VM stays listed
    Stop(StopArgs),
    /// Stop a VM's vCPUs and devices where they are
    Pause {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Let a paused VM go on
    Resume {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Have another VMM process, of the agent's version, take a VM over while its guest goes on
    #[command(after_help = HAND_OVER_HELP)]
    HandOver {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Move a VM to another host while its guest goes on
    #[command(after_help = super::migration::MIGRATE_HELP)]
    Migrate(Box<MigrateArgs>),
    /// Move an idle VM's memory out, until something wakes it
    #[command(after_help = SWAP_OUT_HELP)]
    SwapOut(SwapOutArgs),
    /// Bring a VM's memory back
    Wake {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Say when a VM's memory is moved out without being asked for
    #[command(after_help = SWAP_POLICY_HELP)]
    SwapPolicy(SwapPolicyArgs),
    /// Have a guest give some of its memory back to the host, or take it again
    #[command(after_help = BALLOON_HELP)]
    Balloon(BalloonArgs),
    /// Make a bundle of a VM, which goes on as before
    Snapshot(SnapshotArgs),
    /// What a VM has of its memory, when it was launched while that was on its way
    Memory {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Memory and CPU of a VM, seen from the host and from the guest
    Stats {
        /// Id of the VM, a unique prefix of it, or its name
        vm: ReferenceWord,
    },
    /// Run a command in a VM
    #[command(after_help = EXEC_HELP)]
    Exec(ExecArgs),
    /// Attach to a VM's serial console
    #[command(after_help = CONSOLE_HELP)]
    Console(ConsoleArgs),
}

/// `hearth vm launch`.
#[derive(Debug, Clone, Args)]
pub struct LaunchArgs {
    /// Image to boot [default: demo]
    #[arg(long, value_name = "NAME", value_parser = name, conflicts_with = "bundle")]
    pub image: Option<String>,
    /// Bundle to launch from: its id, a unique prefix of it, or its name. vCPUs and memory are the bundle's
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<ReferenceWord>,
    /// Let the VM run while some of the bundle is still on its way here: `hearth bundle fetch`
    #[arg(long, requires = "bundle")]
    pub lazy: bool,
    /// Name: 1 to 63 of a-z, 0-9 and `-`, starting with a letter; also the guest's host name
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory in MiB [default: 128]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Raw file to attach as a block device; `:ro` refuses the guest's writes, `:shared` says that other hosts
    /// see the same file there, so that the VM can be moved to them. May be given up to 6 times
    #[arg(long = "disk", value_name = "FILE[:ro][:shared]")]
    pub disks: Vec<DiskWord>,
    /// Volume that it gets; `:ro` refuses the guest's writes, a directory has the guest mount it there, and `/` have its root
    /// there. May be repeated
    #[arg(long = "volume", value_name = "VOLUME[:ro][:/DIR]")]
    pub volumes: Vec<VolumeWord>,
    /// Disks that are empty until `hearth volume attach` gives the VM a volume, 0 to 6
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=6))]
    pub spare_disks: Option<u8>,
    /// Most bytes per second to the guest, with how many at once: 10M, 10M/1M. What is over it waits
    #[arg(long, value_name = "RATE[/BURST]", help_heading = "Network limits")]
    pub rx_limit: Option<RateWord>,
    /// Most bytes per second from the guest
    #[arg(long, value_name = "RATE[/BURST]", help_heading = "Network limits")]
    pub tx_limit: Option<RateWord>,
    /// Most packets per second to the guest
    #[arg(long, value_name = "RATE[/BURST]", help_heading = "Network limits")]
    pub rx_packets: Option<RateWord>,
    /// Most packets per second from the guest
    #[arg(long, value_name = "RATE[/BURST]", help_heading = "Network limits")]
    pub tx_packets: Option<RateWord>,
    /// Session to join: its id, a unique prefix of it, its name, or its network id
    #[arg(long, value_name = "SESSION")]
    pub session: Option<ReferenceWord>,
    /// Who puts the VM's session addresses to use [default: guest]
    #[arg(long, value_enum, requires = "session")]
    pub addressing: Option<AddressingWord>,
    /// What the VM is in its session, for those who look: up to 63 bytes
    #[arg(long, value_name = "ROLE")]
    pub role: Option<String>,
    /// Cluster to join: its id, a unique prefix of it, or its name
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<ReferenceWord>,
    /// Who the VM is in its cluster; without --cluster it joins one of its session, or of this host [default: its id]
    #[arg(long, value_name = "EXECUTOR")]
    pub executor_id: Option<ReferenceWord>,
    /// Port of this host that leads to one of the VM, for clients outside: 8080:80, 5353:53/udp. May be repeated
    #[arg(long = "publish", value_name = "HOST:GUEST[/udp]", requires = "session")]
    pub publish: Vec<PortWord>,
    /// Number of network interfaces, 1 to 8; the first is in the session
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub interfaces: Option<u8>,
    /// Where its memory goes when it is idle and the host is short of memory [default: never]
    #[arg(long = "swap", value_enum)]
    pub swap: Option<SwapChoiceWord>,
    /// What to wait for
    #[arg(long, value_enum, default_value_t = WaitWord::Running)]
    pub wait: WaitWord,
    /// A repeated launch with the same key answers with the first one's VM
    #[arg(long, value_name = "KEY", value_parser = key)]
    pub idempotency_key: Option<String>,
}

impl LaunchArgs {
    /// What clap cannot say: the number of disks.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.disks.len() > DISKS_MAX {
            return Err(format!("--disk was given {} times: a VM takes at most {DISKS_MAX}", self.disks.len()));
        }
        Ok(())
    }
}

/// Who puts a VM's session addresses to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AddressingWord {
    /// The guest's interface has them
    Guest,
    /// The guest has fixed inner addresses; its jail translates one to one (for clones of a saved guest)
    Invariant,
}

impl From<AddressingWord> for Addressing {
    fn from(word: AddressingWord) -> Self {
        match word {
            AddressingWord::Guest => Self::Guest,
            AddressingWord::Invariant => Self::Invariant,
        }
    }
}

/// What a launch waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitWord {
    /// Nothing: the launch is accepted
    None,
    /// Registered with its cluster (a VM in none: running)
    Registered,
    /// The guest's agent answers
    Running,
}

impl From<WaitWord> for Wait {
    fn from(word: WaitWord) -> Self {
        match word {
            WaitWord::None => Self::None,
            WaitWord::Registered => Self::Registered,
            WaitWord::Running => Self::Running,
        }
    }
}

/// `hearth vm rm`.
#[derive(Debug, Clone, Args)]
pub struct RemoveArgs {
    /// Ids, unique prefixes of ids, or names of the VMs
    #[arg(required_unless_present = "all", value_name = "VM")]
    pub vms: Vec<ReferenceWord>,
    /// All VMs of this host
    #[arg(long, conflicts_with = "vms")]
    pub all: bool,
    /// How long each guest has to power itself off before it is killed; 0 kills at once [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub timeout: Option<u32>,
}

/// `hearth vm stop`.
#[derive(Debug, Clone, Args)]
pub struct StopArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// How long the guest has to power itself off before it is killed; 0 kills at once [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub timeout: Option<u32>,
}

/// `hearth vm exec`.
#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// The command and its arguments, after `--`
    #[arg(required = true, last = true, value_name = "CMD")]
    pub command: Vec<String>,
    /// Give the command a terminal: for shells and editors
    #[arg(long, short)]
    pub tty: bool,
    /// Variable to add to the command's environment; may be repeated
    #[arg(long, short, value_name = "NAME=value", value_parser = variable)]
    pub env: Vec<String>,
    /// Directory to run the command in
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Kill the command after this long: seconds, or with ms, s, m or h behind the number
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub timeout: Option<u32>,
    /// Leave standard input alone: the command reads nothing (for loops that read standard input themselves)
    #[arg(long, short, conflicts_with = "tty")]
    pub no_stdin: bool,
}

/// `hearth vm console`.
#[derive(Debug, Clone, Args)]
pub struct ConsoleArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Print what the console kept of the past, and end
    #[arg(long)]
    pub history: bool,
}
