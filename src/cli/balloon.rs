//! Taking memory from guests for a while.

use clap::Args;

use super::value::ReferenceWord;

pub(super) const BALLOON_HELP: &str = "\
The guest gives this much of its memory back to the host, as far as it can spare it, and keeps 32 MiB at least. It is
told, and gets there within moments; `hearth vm stats` shows how far it is. A guest that runs out of memory takes some
of it again by itself.

Examples:
  hearth vm balloon web --target 64                     give 64 MiB back
  hearth vm balloon web --target 0                      have all of its memory again";

/// `hearth vm balloon`.
#[derive(Debug, Clone, Args)]
pub struct BalloonArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// How much of its memory the guest is to give back, in MiB
    #[arg(long, value_name = "MIB")]
    pub target: u64,
}
