//! `hearth bench`: measures on this host, through the same API everyone uses, and removes what it made, also after
//! Ctrl-C or a failure.

mod boot;
mod clone;
mod firecracker;
mod hand_over;
mod in_guest;
mod launched;
mod logging;
mod migrate;
mod pooled;
mod process;
mod seen;
mod snapshot;
mod summary;
mod swap;

use std::path::PathBuf;

use super::call::{Agent, CallError};
use super::exec::ExecError;
use super::output::{Output, OutputError};
use crate::api::stream::Exit;
use crate::cli::BenchCommand;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The guest does not run commands.
    #[error("run `true` in {vm}")]
    Exec {
        /// The VM.
        vm: String,
        /// Why not.
        source: ExecError,
    },
    /// `true` did not end with success.
    #[error("`true` in {vm} ended with {exit:?}")]
    NotTrue {
        /// The VM.
        vm: String,
        /// How it ended.
        exit: Exit,
    },
    /// The guest does not run the traffic tool.
    #[error("{what} in {vm}")]
    InGuest {
        /// What was to be done.
        what: &'static str,
        /// The VM.
        vm: String,
        /// Why not.
        source: Box<ExecError>,
    },
    /// The traffic tool does not do in the guest what it is for.
    #[error("{what} in {vm}: {reason}")]
    Probe {
        /// What was to be done.
        what: &'static str,
        /// The VM.
        vm: String,
        /// How it ended, and what it said.
        reason: String,
    },
    /// A migration ended before it was to.
    #[error("{vm} was not copied for long enough: {reason}")]
    NotCopied {
        /// The VM.
        vm: String,
        /// What became of it.
        reason: String,
    },
    /// Machines that were to be ready are not.
    #[error("have machines ready: {why}")]
    Pool {
        /// Why not.
        why: String,
    },
    /// There is no bundle to launch from.
    #[error("build a bundle: {message}")]
    Build {
        /// Why not.
        message: String,
    },
    /// A file of the host could not be used.
    #[error("use {path:?}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Firecracker did not do what was asked.
    #[error("firecracker: {what}: {reason}")]
    Firecracker {
        /// What.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A snapshot did not become a bundle.
    #[error("take a snapshot of {vm}: {message}")]
    Snapshot {
        /// The VM.
        vm: String,
        /// Why not.
        message: String,
    },
    /// Signals could not be caught: what the bench makes would stay after Ctrl-C.
    #[error("catch signals")]
    Signals(#[source] std::io::Error),
    /// Ctrl-C, or another signal that asks this process to end.
    #[error("interrupted; the VMs and bundles of the bench were removed")]
    Interrupted,
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl BenchError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Exec { source, .. } => source.advice(),
            Self::InGuest { source, .. } => source.advice(),
            Self::Probe { .. } => Some("is --probe the program that scripts/guest-probe builds?".to_owned()),
            Self::NotCopied { .. } => Some("a lower --overhead makes a migration take longer".to_owned()),
            Self::File { path, .. } if path.starts_with("/proc/sys") => {
                Some("run it as root, or without --cold".to_owned())
            }
            Self::NotTrue { .. }
            | Self::Build { .. }
            | Self::Pool { .. }
            | Self::Snapshot { .. }
            | Self::Signals(_)
            | Self::File { .. }
            | Self::Firecracker { .. }
            | Self::Interrupted
            | Self::Output(_) => None,
        }
    }
}

pub(super) async fn run(agent: &Agent, out: Output, command: BenchCommand) -> Result<(), BenchError> {
    match command {
        BenchCommand::Boot(args) => {
            let report = boot::measure(agent, &args).await?;
            out.value(&report, boot::table)?;
            Ok(())
        }
        BenchCommand::Launch(args) => {
            let report = clone::launches(agent, &args).await?;
            out.value(&report, clone::table)?;
            Ok(())
        }
        BenchCommand::Clone(args) => {
            let report = clone::clones(agent, &args).await?;
            out.value(&report, clone::table)?;
            Ok(())
        }
        BenchCommand::Swap(args) => {
            let report = swap::measure(agent, &args).await?;
            out.value(&report, swap::table)?;
            Ok(())
        }
        BenchCommand::Migrate(args) => {
            let report = migrate::measure(agent, &args).await?;
            out.value(&report, migrate::table)?;
            Ok(())
        }
        BenchCommand::HandOver(args) => {
            let report = hand_over::measure(agent, &args).await?;
            out.value(&report, hand_over::table)?;
            Ok(())
        }
        BenchCommand::Snapshot(args) => {
            let report = snapshot::measure(agent, &args).await?;
            out.value(&report, snapshot::table)?;
            Ok(())
        }
    }
}
