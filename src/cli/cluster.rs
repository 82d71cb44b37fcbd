//! `hearth cluster`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::value::{ReferenceWord, duration_ms, key, name, seconds, variable};

const CREATE_HELP: &str = "\
A VM of a cluster registers under its executor id when it is launched, and is given calculations from then on. It
registers with this host's agent or, with --endpoint, with a registrar elsewhere. One that does not register in time is
destroyed and launched anew once.

The cluster's token is what guests register with. It is printed once, by --json; the agent gives it to the guests.

Examples:
  hearth cluster create --name etl
  hearth --json cluster create --name etl | jq -r .token
  hearth cluster create --name etl --endpoint '[2001:db8::7]:7070' --token-file token --deadline 1m
  hearth vm launch --cluster etl --executor-id e-1 --bundle worker";

const RM_HELP: &str = "\
Its calculations are forgotten with it.

Examples:
  hearth cluster rm etl                                 refused while it has VMs that live
  hearth cluster rm etl --drain                         stop and remove its VMs first
  hearth cluster rm etl --drain --timeout 0             kill them";

const RUN_HELP: &str = "\
Some member that has registered runs it: the one that has least to do, or the one named by --executor. Until one has
registered, it waits. What it writes is printed when it is over, 64 KiB each of standard output and error; the exit code
is its own: 128+N when signal N ended it, 124 when its time was up. One whose member or agent ends while it runs is lost,
and not run again.

Examples:
  hearth cluster run etl -- uname -n
  hearth cluster run etl --executor e-1 --timeout 30s -- sh -c 'wc -l < /srv/data'
  hearth cluster run etl --stdin -- sort < words
  hearth cluster run etl --no-wait -- /srv/long         print its id; `hearth cluster calculations` tells how it is";

/// `hearth cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a cluster: VMs that register, and are given calculations
    #[command(after_help = CREATE_HELP)]
    Create(ClusterCreateArgs),
    /// List the clusters of this host
    Ls,
    /// Show one cluster
    Show {
        /// Id of the cluster, a unique prefix of it, or its name
        cluster: ReferenceWord,
    },
    /// Remove clusters
    #[command(after_help = RM_HELP)]
    Rm(ClusterRemoveArgs),
    /// List the members of a cluster: who has registered, and what they do
    Members {
        /// Id of the cluster, a unique prefix of it, or its name
        cluster: ReferenceWord,
    },
    /// Run a command in a member of a cluster, and wait for its end
    #[command(after_help = RUN_HELP)]
    Run(ClusterRunArgs),
    /// List the calculations of a cluster, newest first, or show one
    Calculations {
        /// Id of the cluster, a unique prefix of it, or its name
        cluster: ReferenceWord,
        /// Id of the calculation, or a unique prefix of it
        calculation: Option<ReferenceWord>,
    },
}

/// `hearth cluster create`.
#[derive(Debug, Clone, Args)]
pub struct ClusterCreateArgs {
    /// Name: 1 to 63 of a-z, 0-9 and `-`, starting with a letter
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
    /// Registrar elsewhere: 192.0.2.7:7070, [2001:db8::7]:7070 [default: this host's agent]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub endpoint: Option<SocketAddr>,
    /// File with the token: 8 to 256 visible ASCII characters [default: one is made]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// How long a VM has for its registration: seconds, or with s, m or h behind the number [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub deadline: Option<u32>,
    /// A repeated create with the same key answers with the first one's cluster
    #[arg(long, value_name = "KEY", value_parser = key)]
    pub idempotency_key: Option<String>,
}

/// `hearth cluster rm`.
#[derive(Debug, Clone, Args)]
pub struct ClusterRemoveArgs {
    /// Ids, unique prefixes of ids, or names of the clusters
    #[arg(required = true, value_name = "CLUSTER")]
    pub clusters: Vec<ReferenceWord>,
    /// Stop and remove their VMs first
    #[arg(long)]
    pub drain: bool,
    /// How long each guest has to power itself off before it is killed; 0 kills at once [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = duration_ms, requires = "drain")]
    pub timeout: Option<u32>,
}

/// `hearth cluster run`.
#[derive(Debug, Clone, Args)]
pub struct ClusterRunArgs {
    /// Id of the cluster, a unique prefix of it, or its name
    pub cluster: ReferenceWord,
    /// The command and its arguments, after `--`
    #[arg(required = true, last = true, value_name = "CMD")]
    pub command: Vec<String>,
    /// Executor id of the member that is to run it
    #[arg(long, value_name = "EXECUTOR")]
    pub executor: Option<ReferenceWord>,
    /// Variable to add to the command's environment; may be repeated
    #[arg(long, short, value_name = "NAME=value", value_parser = variable)]
    pub env: Vec<String>,
    /// Give it this command's standard input, at most 64 KiB
    #[arg(long)]
    pub stdin: bool,
    /// How long it has from now to its end, the wait for a member included [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub timeout: Option<u32>,
    /// Do not wait: print the calculation's id
    #[arg(long)]
    pub no_wait: bool,
    /// A repeated run with the same key answers with the first one's calculation
    #[arg(long, value_name = "KEY", value_parser = key)]
    pub idempotency_key: Option<String>,
}
