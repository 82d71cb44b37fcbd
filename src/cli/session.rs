//! `hearth session`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::value::{EgressWord, ReferenceWord, duration_ms, key, name, seconds, session_number};

const CREATE_HELP: &str = "\
VMs of a session reach each other by their addresses, on all hosts of the fabric, and nothing else reaches them. They
reach outside only what --egress allows: NETWORK[:PORT[-PORT]][/tcp|udp|icmp]. A port without a protocol is TCP's.

Examples:
  hearth session create --name etl                      VMs that may talk to each other
  hearth session create --name etl --ttl 1h             and are gone an hour from now
  hearth session create --id 517 --name etl             the same network id on every host makes it one session
  hearth session create --nat --egress 0.0.0.0/0:443 --egress ::/0:443 --egress 192.0.2.53/32:53/udp
  hearth vm launch --session etl                        a VM in it";

const RM_HELP: &str = "\
The session's network id and its VMs' addresses rest a while (fabric.quarantine_s) before they are used again.

Examples:
  hearth session rm etl                                 refused while it has VMs
  hearth session rm etl --drain                         stop and remove its VMs first
  hearth session rm etl --drain --timeout 0             kill them";

/// `hearth session`.
#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// Make a session: VMs that may talk to each other
    #[command(after_help = CREATE_HELP)]
    Create(SessionCreateArgs),
    /// List the sessions of this host
    Ls,
    /// Show one session: members with addresses, what it may reach, what was dropped
    Show {
        /// Id of the session, a unique prefix of it, its name, or its network id
        session: ReferenceWord,
    },
    /// Remove sessions
    #[command(after_help = RM_HELP)]
    Rm(SessionRemoveArgs),
}

/// `hearth session create`.
#[derive(Debug, Clone, Args)]
pub struct SessionCreateArgs {
    /// Network id: the session's number in the fabric, decimal or 0x... [default: one that is free]
    #[arg(long, value_name = "N", value_parser = session_number)]
    pub id: Option<u32>,
    /// Name: 1 to 63 of a-z, 0-9 and `-`, starting with a letter
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
    /// IPv4 addresses as well: refused if the network id has none [default: if it has]
    #[arg(long, conflicts_with = "no_ipv4")]
    pub ipv4: bool,
    /// IPv6 addresses only
    #[arg(long)]
    pub no_ipv4: bool,
    /// What VMs may reach outside the fabric; may be given up to 64 times
    #[arg(long, value_name = "NETWORK[:PORT[-PORT]][/PROTOCOL]")]
    pub egress: Vec<EgressWord>,
    /// Give what leaves the host's address
    #[arg(long, requires = "egress")]
    pub nat: bool,
    /// Drain and remove it after this long: seconds, or with s, m or h behind the number
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub ttl: Option<u32>,
    /// File of up to 16 KiB of text that its VMs can read from the metadata service
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// A repeated create with the same key answers with the first one's session
    #[arg(long, value_name = "KEY", value_parser = key)]
    pub idempotency_key: Option<String>,
}

impl SessionCreateArgs {
    /// Whether IPv4 was asked for, refused, or left open.
    pub const fn wants_ipv4(&self) -> Option<bool> {
        match (self.ipv4, self.no_ipv4) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        }
    }
}

/// `hearth session rm`.
#[derive(Debug, Clone, Args)]
pub struct SessionRemoveArgs {
    /// Ids, unique prefixes of ids, names, or network ids of the sessions
    #[arg(required = true, value_name = "SESSION")]
    pub sessions: Vec<ReferenceWord>,
    /// Stop and remove their VMs first
    #[arg(long)]
    pub drain: bool,
    /// How long each guest has to power itself off before it is killed; 0 kills at once [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = duration_ms, requires = "drain")]
    pub timeout: Option<u32>,
}
