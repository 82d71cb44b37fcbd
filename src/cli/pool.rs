//! `hearth pool`.

use clap::{Args, Subcommand};

use super::value::ReferenceWord;

const SET_HELP: &str = "\
So many machines of the bundle are restored and paused ahead, each in a jail of its own that is closed. A launch from
the bundle takes one of them, gives it its identity and lets it run; the next one is made behind it. None is used twice.

They share the bundle's memory, and take what a VM takes that has not run yet. Where memory is short, VMs go first.
Launches with limits for their network make a machine of their own.

Examples:
  hearth pool set web 4
  hearth vm launch --bundle web             takes one that is ready
  hearth pool ls";

/// `hearth pool`.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Keep machines of a bundle ready, for launches that cannot wait
    #[command(after_help = SET_HELP)]
    Set(PoolSetArgs),
    /// List the pools: how many machines are wanted and ready, and how many launches took one
    Ls,
    /// Keep no machines of a bundle ready any more
    Rm {
        /// Id of the bundle, a unique prefix of it, or its name
        bundle: ReferenceWord,
    },
}

/// `hearth pool set`.
#[derive(Debug, Clone, Args)]
pub struct PoolSetArgs {
    /// Id of the bundle, a unique prefix of it, or its name
    pub bundle: ReferenceWord,
    /// How many
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub size: u32,
}
