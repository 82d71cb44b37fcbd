//! Floor 4: the client side of `/v1`. Knows HTTP, terminals and tables; knows of the agent only what goes over its
//! socket (`api::types`, `api::stream`).
//!
//! One process runs one command on one thread. Results go to standard output, as a table or as one JSON value; progress,
//! notes and errors go to standard error. A command whose output nobody reads any more ends without complaint.
#![forbid(unsafe_code)]

mod balloon;
mod bench;
mod bundle;
mod bundle_file;
mod calculation;
mod call;
mod cluster;
mod console;
mod drain;
mod event;
mod exec;
mod fetch;
mod host;
mod image;
mod isolation;
mod launch;
mod link;
mod manual;
mod migration;
mod operation;
mod output;
mod pool;
mod progress;
mod session;
mod signal;
mod swap;
mod table;
mod terminal;
mod top;
mod vm;
mod volume;

use std::future::Future;
use std::io;
use std::path::Path;

use crate::api::types::{LedgerBackup, LedgerBackupRequest};
use crate::cli::{ClientCommand, Global, HostCommand, ShellWord, VmCommand};

pub use bench::BenchError;
pub use bundle::BundleError;
pub use call::CallError;
pub use cluster::ClusterError;
pub use console::ConsoleError;
pub use drain::DrainError;
pub use event::EventsError;
pub use exec::ExecError;
pub use host::ProbeError;
pub use image::ImportError;
pub use launch::LaunchError;
pub use link::LinkError;
pub use manual::ManualError;
pub use output::OutputError;
pub use session::SessionError;
pub use top::TopError;

use call::Agent;
use output::Output;

/// Exit code of a command that did what it was asked.
pub const EXIT_DONE: u8 = 0;

/// Exit code of a command that did a part of what it was asked, and said what it left.
pub const EXIT_LEFT: u8 = 1;

/// Added to a signal's number for the exit code of what that signal ended, as shells do.
pub const EXIT_SIGNAL_BASE: u8 = 128;

/// Exit code of a command that ran past its time-out, as timeout(1) does.
pub const EXIT_TIMED_OUT: u8 = 124;

/// Exit code after Ctrl-C: SIGINT is 2.
pub const EXIT_INTERRUPTED: u8 = EXIT_SIGNAL_BASE + 2;

/// Exit code of an exec whose output nobody reads any more: SIGPIPE is 13.
pub const EXIT_NOT_READ: u8 = EXIT_SIGNAL_BASE + 13;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum Error {
    /// A plain call.
    Call(#[from] CallError),
    /// Writing the result.
    Output(#[from] OutputError),
    /// `vm launch`.
    Launch(#[from] LaunchError),
    /// `vm exec`.
    Exec(#[from] ExecError),
    /// `vm console`.
    Console(#[from] ConsoleError),
    /// `bundle`, `vm snapshot`.
    Bundle(#[from] BundleError),
    /// `image import`.
    Import(#[from] ImportError),
    /// `cluster`.
    Cluster(#[from] ClusterError),
    /// `session`.
    Session(#[from] SessionError),
    /// `events`.
    Events(#[from] EventsError),
    /// `top`.
    Top(#[from] TopError),
    /// `man`.
    Manual(#[from] ManualError),
    /// `agent --drain`.
    Drain(#[from] DrainError),
    /// `host probe`.
    Probe(#[from] ProbeError),
    /// `bench boot`.
    Bench(#[from] BenchError),
    /// The working directory is gone.
    #[error("find the working directory")]
    Directory(#[source] io::Error),
    /// The event loop could not be made.
    #[error("set up the event loop")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// What to do about it, for people.
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Launch(error) => error.advice(),
            Self::Exec(error) => error.advice(),
            Self::Console(error) => error.advice(),
            Self::Bundle(error) => error.advice(),
            Self::Import(error) => error.advice(),
            Self::Cluster(error) => error.advice(),
            Self::Session(error) => error.advice(),
            Self::Events(error) => error.advice(),
            Self::Top(error) => error.advice(),
            Self::Manual(error) => error.advice(),
            Self::Drain(error) => error.advice(),
            Self::Probe(error) => error.advice(),
            Self::Bench(error) => error.advice(),
            Self::Output(_) | Self::Directory(_) | Self::Runtime(_) => None,
        }
    }

    /// The exit code: 1, or what a shell expects after Ctrl-C.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Launch(LaunchError::Interrupted { .. })
            | Self::Bundle(BundleError::Interrupted { .. })
            | Self::Cluster(ClusterError::Interrupted { .. })
            | Self::Drain(DrainError::Interrupted)
            | Self::Bench(BenchError::Interrupted) => EXIT_INTERRUPTED,
            Self::Call(_)
            | Self::Output(_)
            | Self::Launch(_)
            | Self::Exec(_)
            | Self::Console(_)
            | Self::Bundle(_)
            | Self::Import(_)
            | Self::Cluster(_)
            | Self::Session(_)
            | Self::Events(_)
            | Self::Top(_)
            | Self::Manual(_)
            | Self::Drain(_)
            | Self::Probe(_)
            | Self::Bench(_)
            | Self::Directory(_)
            | Self::Runtime(_) => 1,
        }
    }

    /// Whether it only says that nobody reads the output any more.
    fn is_unread(&self) -> bool {
        match self {
            Self::Output(error) | Self::Events(EventsError::Output(error)) => error.is_unread(),
            Self::Launch(LaunchError::Output(error)) | Self::Console(ConsoleError::Output(error)) => error.is_unread(),
            Self::Import(ImportError::Output(error)) | Self::Probe(ProbeError::Output(error)) => error.is_unread(),
            Self::Bench(BenchError::Output(error)) | Self::Exec(ExecError::Output(error)) => error.is_unread(),
            Self::Session(SessionError::Output(error)) | Self::Bundle(BundleError::Output(error)) => error.is_unread(),
            Self::Cluster(ClusterError::Output(error)) | Self::Top(TopError::Output(error)) => error.is_unread(),
            Self::Call(_)
            | Self::Launch(_)
            | Self::Exec(_)
            | Self::Console(_)
            | Self::Bundle(_)
            | Self::Import(_)
            | Self::Cluster(_)
            | Self::Session(_)
            | Self::Events(_)
            | Self::Top(_)
            | Self::Manual(_)
            | Self::Drain(_)
            | Self::Probe(_)
            | Self::Bench(_)
            | Self::Directory(_)
            | Self::Runtime(_) => false,
        }
    }
}

/// Carries out one command and says the exit code.
pub fn run(global: &Global, command: ClientCommand) -> Result<u8, Error> {
    let agent = Agent::at(global.socket_or_default());
    let out = Output::new(global.json);
    match block_on(dispatch(&agent, out, command))? {
        Err(error) if error.is_unread() => Ok(EXIT_DONE),
        outcome => outcome,
    }
}

/// Has the agent at a socket stop its VMs and end; `None` when there is none.
pub fn drain(socket: &Path, json: bool) -> Option<Result<(), Error>> {
    let agent = Agent::at(socket.to_owned());
    match block_on(drain::run(&agent, Output::new(json))) {
        Ok(Err(DrainError::Call(CallError::NoAgent { .. }))) => None,
        Ok(drained) => Some(drained.map_err(Error::from)),
        Err(error) => Some(Err(error)),
    }
}

/// Has the agent copy its ledger.
pub fn back_up_ledger(global: &Global, to: Option<&Path>) -> Result<(), Error> {
    let agent = Agent::at(global.socket_or_default());
    // The agent's working directory is not this one's.
    let to = to.map(std::path::absolute).transpose().map_err(Error::Directory)?;
    let request = LedgerBackupRequest { path: to.map(|path| path.display().to_string()) };
    let call = agent.post::<LedgerBackup>("/v1/ledger/backup", &request, call::PROMPT);
    let made = block_on(progress::shown("copy the ledger", call))??;
    Output::new(global.json).value(&made, |made| made.path.clone())?;
    Ok(())
}

/// Prints one value, as JSON or as a line for people.
pub fn print<T: serde::Serialize>(global: &Global, value: &T, people: impl FnOnce(&T) -> String) -> Result<(), Error> {
    match Output::new(global.json).value(value, people) {
        Err(error) if error.is_unread() => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// Prints a shell's completions.
pub fn print_completions(global: &Global, shell: ShellWord) -> Result<(), Error> {
    let script = manual::Completions::of(shell);
    print(global, &script, |script| script.script.clone())
}

/// Prints the manual page of the whole, or writes those of all commands into a directory.
pub fn write_manual(global: &Global, dir: Option<&Path>) -> Result<(), Error> {
    match dir {
        None => print(global, &manual::first(), |page| page.text.clone()),
        Some(dir) => print(global, &manual::write(dir)?, |written| {
            format!("{}: {} manual pages", dir.display(), written.pages.len())
        }),
    }
}

/// What a running agent says of itself: each by a name, as text. What it does not answer is told in its place.
pub fn collect(socket: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let agent = Agent::at(socket.to_owned());
    let asking = async {
        let mut found = Vec::new();
        for (name, path) in [("host.json", "/v1/host"), ("metrics.txt", "/metrics")] {
            let text = match agent.get_bytes(path).await {
                Ok(bytes) => bytes.to_vec(),
                Err(error) => format!("{path}: {}\n", crate::report::chain(&error)).into_bytes(),
            };
            found.push((name, text));
        }
        found
    };
    block_on(asking).unwrap_or_default()
}

/// Runs to the end of `work`. Reads of standard input that are still waiting are left behind: they cannot be cancelled.
fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    Ok(outcome)
}

async fn dispatch(agent: &Agent, out: Output, command: ClientCommand) -> Result<u8, Error> {
    match command {
        ClientCommand::Vm(VmCommand::Launch(args)) => launch::run(agent, out, *args).await?,
        ClientCommand::Vm(VmCommand::Exec(args)) => return Ok(exec::run(agent, out, args).await?),
        ClientCommand::Vm(VmCommand::Console(args)) => console::run(agent, out, &args).await?,
        ClientCommand::Vm(VmCommand::Ls) => vm::list(agent, out).await?,
        ClientCommand::Vm(VmCommand::Memory { vm }) => fetch::memory(agent, out, vm.as_str()).await?,
        ClientCommand::Vm(VmCommand::Show { vm }) => vm::show(agent, out, &vm).await?,
        ClientCommand::Vm(VmCommand::Rm(args)) => vm::remove(agent, out, &args).await?,
        ClientCommand::Vm(VmCommand::Stop(args)) => vm::stop(agent, out, &args).await?,
        ClientCommand::Vm(VmCommand::Pause { vm }) => vm::pause(agent, out, &vm).await?,
        ClientCommand::Vm(VmCommand::Resume { vm }) => vm::resume(agent, out, &vm).await?,
        ClientCommand::Vm(VmCommand::Migrate(args)) => migration::migrate(agent, out, &args).await?,
        ClientCommand::Vm(VmCommand::HandOver { vm }) => vm::hand_over(agent, out, &vm).await?,
        ClientCommand::Vm(VmCommand::Balloon(args)) => balloon::set(agent, out, args).await?,
        ClientCommand::Vm(VmCommand::SwapOut(args)) => swap::out(agent, out, args).await?,
        ClientCommand::Vm(VmCommand::Wake { vm }) => swap::wake(agent, out, &vm).await?,
        ClientCommand::Vm(VmCommand::SwapPolicy(args)) => swap::set_policy(agent, out, args).await?,
        ClientCommand::Vm(VmCommand::Snapshot(args)) => bundle::snapshot(agent, out, args).await?,
        ClientCommand::Pool(command) => pool::run(agent, out, command).await?,
        ClientCommand::Volume(command) => volume::run(agent, out, command).await?,
        ClientCommand::Bundle(command) => bundle::run(agent, out, command).await?,
        ClientCommand::Vm(VmCommand::Stats { vm }) => vm::stats(agent, out, &vm).await?,
        ClientCommand::Session(command) => session::run(agent, out, command).await?,
        ClientCommand::Cluster(command) => return Ok(cluster::run(agent, out, command).await?),
        ClientCommand::Image(command) => image::run(agent, out, command).await?,
        ClientCommand::Operation(command) => operation::run(agent, out, command).await?,
        ClientCommand::Migration(command) => migration::run(agent, out, command).await?,
        ClientCommand::Top(args) => top::run(agent, out, args).await?,
        ClientCommand::Events(args) => event::run(agent, out, args).await?,
        ClientCommand::Host(HostCommand::Probe) => host::probe(out).await?,
        ClientCommand::Host(HostCommand::Show) => host::show(agent, out).await?,
        ClientCommand::Host(HostCommand::SwapDecisions) => swap::decisions(agent, out).await?,
        ClientCommand::Host(HostCommand::Evacuate(args)) => {
            return Ok(if migration::evacuate(agent, out, &args).await? { EXIT_DONE } else { EXIT_LEFT });
        }
        ClientCommand::Bench(command) => bench::run(agent, out, command).await?,
    }
    Ok(EXIT_DONE)
}
