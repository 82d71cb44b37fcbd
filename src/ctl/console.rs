//! `hearth vm console`: a guest's serial console on this terminal, or what it kept of the past.

use std::io::{self, IsTerminal};
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::call::{Agent, CallError, advice_of};
use super::link::{self, FeedEnd, Incoming, LinkError};
use super::output::{Output, OutputError, note};
use super::signal::Signals;
use super::terminal::Raw;
use crate::api::stream::Frame;
use crate::api::types::{Captured, ExecRequest, Vm, VmState};
use crate::cli::ConsoleArgs;

/// The key that leaves a console: Ctrl-].
const DETACH_KEY: u8 = 0x1d;

/// Bytes of the past shown when attaching: a screen or two.
const ATTACH_HISTORY_BYTES: u32 = 4096;

/// How often, and how many times, it is asked why a console ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const LOOKS: u32 = 20;

/// Why a console could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The connection broke.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// This process's terminal or signals.
    #[error("set up the terminal")]
    Terminal(#[source] io::Error),
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A live console is not one JSON value.
    #[error("a console that is attached to has no JSON form")]
    Json,
}

impl ConsoleError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Link(LinkError::Refused(error)) => advice_of(error),
            Self::Json => Some("use --history with --json".to_owned()),
            Self::Link(LinkError::HungUp | LinkError::Read(_) | LinkError::Frame(_) | LinkError::Direction)
            | Self::Terminal(_)
            | Self::Output(_) => None,
        }
    }
}

pub(super) async fn run(agent: &Agent, out: Output, args: &ConsoleArgs) -> Result<(), ConsoleError> {
    let path = format!("/v1/vms/{}/console", args.vm.as_str());
    if args.history {
        let bytes = agent.get_bytes(&path).await?;
        if out.is_json() {
            out.value(&Captured::new(bytes.to_vec(), false), |_| String::new())?;
        } else {
            out.bytes(&bytes)?;
        }
        return Ok(());
    }
    if out.is_json() {
        return Err(ConsoleError::Json);
    }
    attach(agent, &path, args.vm.as_str()).await
}

/// How an attachment ended.
enum Ended {
    /// By the key, or by a signal.
    Left,
    /// By the VM.
    Closed,
}

async fn attach(agent: &Agent, path: &str, vm: &str) -> Result<(), ConsoleError> {
    let mut signals = Signals::catch().map_err(ConsoleError::Terminal)?;
    let path = format!("{path}?history_bytes={ATTACH_HISTORY_BYTES}");
    let connection = agent.upgrade(&path, None::<&ExecRequest>).await?;
    let people = io::stderr().is_terminal();
    let mut pid = None;
    if people {
        pid = agent.get::<Vm>(&format!("/v1/vms/{vm}")).await.ok().and_then(|found| found.pid);
        note(&format!("attached to the console of {vm}; Ctrl-] leaves it"));
    }
    let (mut incoming, outgoing, writer) = link::split(connection);
    let raw = Raw::enter().map_err(ConsoleError::Terminal)?;
    let left = async {
        match link::feed(&outgoing, raw.as_ref().map(|_| DETACH_KEY)).await {
            FeedEnd::Detached => {}
            // An input that ended leaves the output running; a hang-up shows on the reading side.
            FeedEnd::Ended | FeedEnd::HungUp => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = pump(&mut incoming) => ended.map(|()| Ended::Closed),
        () = left => Ok(Ended::Left),
        _ = signals.end() => Ok(Ended::Left),
    };
    drop(outgoing);
    writer.finish().await;
    drop(raw);
    let ended = ended?;
    if people {
        let what = match ended {
            Ended::Left => "left the console",
            Ended::Closed => why_closed(agent, vm, pid).await,
        };
        note(&format!("\n{what}"));
    }
    Ok(())
}

/// Why the VM closed it, whose process was this one. A VM that goes to another process, or another host, leaves its consoles
/// behind; which of these it was, its agent knows a moment later.
async fn why_closed(agent: &Agent, vm: &str, pid: Option<u32>) -> &'static str {
    for _ in 0..LOOKS {
        match agent.get::<Vm>(&format!("/v1/vms/{vm}")).await {
            Ok(found) if found.handed_to.is_some() => return "the console was cut off: the VM is on another host now",
            Ok(Vm { state: VmState::Running | VmState::Paused, pid: now, .. }) if now != pid => {
                return "the console was cut off; the VM goes on in another process: attach again";
            }
            Ok(Vm { state: VmState::Stopping | VmState::Stopped | VmState::Failed | VmState::Gone, .. }) => {
                return "the console ended with its VM";
            }
            Ok(_) => {}
            Err(error) if error.code() == Some("not_found") => return "the console ended with its VM",
            Err(_) => return "the console was cut off: the agent does not answer, but VMs go on without it",
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    "the console was cut off"
}

async fn pump(incoming: &mut Incoming) -> Result<(), ConsoleError> {
    let mut stdout = tokio::io::stdout();
    while let Some(frame) = incoming.next().await? {
        match frame {
            Frame::Stdout(bytes) | Frame::Stderr(bytes) => {
                stdout.write_all(&bytes).await.map_err(OutputError::Write)?;
                stdout.flush().await.map_err(OutputError::Write)?;
            }
            Frame::Exit(_) => return Ok(()),
            Frame::Error(body) => return Err(LinkError::Refused(body.error).into()),
            Frame::Stdin(_) | Frame::StdinClosed | Frame::Resize(_) | Frame::Signal(_) => {
                return Err(LinkError::Direction.into());
            }
        }
    }
    Ok(())
}
