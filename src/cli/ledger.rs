//! `hearth ledger` and `hearth support-bundle`: commands that work beside an agent, and where none runs.

use std::path::PathBuf;

use clap::{Args, Subcommand};

const BACKUP_HELP: &str = "\
The agent copies its records as they are at this moment, while it goes on. It also does so by itself at its start and once a
day, into backups/ of its state directory, and keeps the newest few (limits.ledger_backups_kept).

Example:
  hearth ledger backup --output /root/before-upgrade.db";

const RESTORE_HELP: &str = "\
No agent may run on the state directory; VMs may. The backup is read whole before anything is touched, and the ledger that
it replaces is kept beside it. What has come since the backup is not known to the next agent: it ends VMs that no record
knows and removes their directories, and it looks for the VMs that are recorded.

Example:
  hearth ledger restore /var/lib/hearth/backups/ledger-1764000000000000000.db";

pub(super) const SUPPORT_HELP: &str = "\
The archive (tar) holds: host.json and metrics.txt of a running agent, the end of its log, the ledger's tables without what
may be secret, the configuration without values that may be, our nftables rules, links and namespaces, and versions. Works
without an agent as well. Guests' consoles are left out, as they are not the host's to show; --consoles adds their ends.

Example:
  hearth support-bundle --output /tmp/host-a.tar";

/// `hearth ledger`.
#[derive(Debug, Clone, Subcommand)]
pub enum LedgerCommand {
    /// Copy the records of a running agent into a file
    #[command(after_help = BACKUP_HELP)]
    Backup(LedgerBackupArgs),
    /// Put a backup in the place of the records, while no agent runs
    #[command(after_help = RESTORE_HELP)]
    Restore(LedgerRestoreArgs),
}

/// `hearth ledger backup`.
#[derive(Debug, Clone, Args)]
pub struct LedgerBackupArgs {
    /// File to make [default: one more automatic backup]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `hearth ledger restore`.
#[derive(Debug, Clone, Args)]
pub struct LedgerRestoreArgs {
    /// The backup
    pub backup: PathBuf,
    /// Configuration file that names the state directory [default: /etc/hearth/hearth.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// State directory [default: /var/lib/hearth]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `hearth support-bundle`.
#[derive(Debug, Clone, Args)]
pub struct SupportBundleArgs {
    /// File to make [default: hearth-support-<seconds>.tar here]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Configuration file of the agent [default: /etc/hearth/hearth.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// State directory of the agent [default: /var/lib/hearth]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Also the ends of guests' consoles and VMMs' logs
    #[arg(long)]
    pub consoles: bool,
}
