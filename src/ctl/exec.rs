//! `hearth vm exec`: joins this process's streams, signals and exit code to those of a command in a guest.
//!
//! Three things run side by side: standard input goes out (`link::feed`), output comes in ([`pump`]), and signals are
//! passed on. None waits for another, so that Ctrl-C works while the guest reads nothing or nobody reads our output.

use std::io;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;

use super::call::{Agent, CallError, advice_of};
use super::link::{self, FeedEnd, Incoming, LinkError, Outgoing};
use super::output::{Output, OutputError};
use super::signal::{Asked, Signals};
use super::terminal;
use super::{EXIT_NOT_READ, EXIT_SIGNAL_BASE, EXIT_TIMED_OUT};
use crate::api::stream::{Exit, Frame};
use crate::api::types::{Captured, ExecRequest, ExecResult};
use crate::cli::ExecArgs;

/// Most bytes kept of each of standard output and error when they are collected for JSON.
const COLLECTED_BYTES_MAX: usize = 16 << 20;

/// Why a command could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The connection broke while the command ran.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// This process's terminal or signals.
    #[error("set up the terminal")]
    Terminal(#[source] io::Error),
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl ExecError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Link(LinkError::Refused(error)) => advice_of(error),
            Self::Link(LinkError::HungUp) => Some("`hearth vm show` tells whether the VM still runs".to_owned()),
            Self::Link(LinkError::Read(_) | LinkError::Frame(_) | LinkError::Direction)
            | Self::Terminal(_)
            | Self::Output(_) => None,
        }
    }
}

/// Where the command's output goes.
enum Sink {
    /// To this process's own streams, as it comes.
    Live { stdout: tokio::io::Stdout, stderr: tokio::io::Stderr },
    /// Into memory, up to a bound.
    Collected { stdout: Kept, stderr: Kept },
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    fn take(&mut self, bytes: &[u8]) {
        let room = COLLECTED_BYTES_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
    }

    fn captured(self) -> Captured {
        Captured::new(self.bytes, self.truncated)
    }
}

impl Sink {
    fn new(out: Output) -> Self {
        if out.is_json() {
            Self::Collected { stdout: Kept::default(), stderr: Kept::default() }
        } else {
            Self::Live { stdout: tokio::io::stdout(), stderr: tokio::io::stderr() }
        }
    }

    async fn stdout(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        match self {
            Self::Live { stdout, .. } => {
                // Standard output is buffered by line: a prompt without one has to be seen as well.
                stdout.write_all(bytes).await.map_err(OutputError::Write)?;
                stdout.flush().await.map_err(OutputError::Write)
            }
            Self::Collected { stdout, .. } => {
                stdout.take(bytes);
                Ok(())
            }
        }
    }

    async fn stderr(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        match self {
            Self::Live { stderr, .. } => {
                stderr.write_all(bytes).await.map_err(OutputError::Write)?;
                stderr.flush().await.map_err(OutputError::Write)
            }
            Self::Collected { stderr, .. } => {
                stderr.take(bytes);
                Ok(())
            }
        }
    }
}

/// Runs the command and says the exit code.
pub(super) async fn run(agent: &Agent, out: Output, args: ExecArgs) -> Result<u8, ExecError> {
    let path = format!("/v1/vms/{}/exec", args.vm.as_str());
    let request = ExecRequest {
        argv: args.command,
        env: args.env,
        cwd: args.cwd,
        timeout_ms: args.timeout,
        terminal: args.tty.then(terminal::size),
    };
    let mut signals = Signals::catch().map_err(ExecError::Terminal)?;
    let connection = tokio::select! {
        connection = agent.upgrade(&path, Some(&request)) => connection?,
        asked = signals.end() => return Ok(EXIT_SIGNAL_BASE + asked.number()),
    };
    let (mut incoming, outgoing, _writer) = link::split(connection);
    let raw = if args.tty { terminal::Raw::enter().map_err(ExecError::Terminal)? } else { None };
    let feeder = tokio::spawn(feed(outgoing.clone(), !args.no_stdin));
    let mut sink = Sink::new(out);
    let ended = tokio::select! {
        ended = pump(&mut incoming, &mut sink) => Ok(ended),
        asked = pass_on(&mut signals, &outgoing, args.tty) => Err(asked),
    };
    feeder.abort();
    drop(raw);
    match ended {
        Ok(Ok(exit)) => finish(out, sink, exit),
        Ok(Err(ExecError::Output(error))) if error.is_unread() => Ok(EXIT_NOT_READ),
        Ok(Err(error)) => Err(error),
        Err(asked) => Ok(EXIT_SIGNAL_BASE + asked.number()),
    }
}

/// Runs a command without input, in silence, to its end: how the bench asks whether a guest answers.
pub(super) async fn quietly(agent: &Agent, vm: &str, argv: &[&str]) -> Result<Exit, ExecError> {
    let request = ExecRequest { argv: argv.iter().map(|&word| word.to_owned()).collect(), ..ExecRequest::default() };
    let connection = agent.upgrade(&format!("/v1/vms/{vm}/exec"), Some(&request)).await?;
    let (mut incoming, outgoing, _writer) = link::split(connection);
    let _ = outgoing.send(Frame::StdinClosed).await;
    pump(&mut incoming, &mut Sink::Collected { stdout: Kept::default(), stderr: Kept::default() }).await
}

/// Runs a command with this input to its end; gives what it wrote to standard output and error.
pub(super) async fn collected(
    agent: &Agent,
    vm: &str,
    argv: &[&str],
    input: Bytes,
) -> Result<(Exit, String, String), ExecError> {
    let request = ExecRequest { argv: argv.iter().map(|&word| word.to_owned()).collect(), ..ExecRequest::default() };
    let connection = agent.upgrade(&format!("/v1/vms/{vm}/exec"), Some(&request)).await?;
    let (mut incoming, outgoing, _writer) = link::split(connection);
    let feeder = tokio::spawn(feed_all(outgoing, input));
    let mut sink = Sink::Collected { stdout: Kept::default(), stderr: Kept::default() };
    let exit = pump(&mut incoming, &mut sink).await;
    // A command may end without having read all of it.
    feeder.abort();
    let text = |kept: Kept| String::from_utf8_lossy(&kept.bytes).into_owned();
    match sink {
        Sink::Collected { stdout, stderr } => Ok((exit?, text(stdout), text(stderr))),
        Sink::Live { .. } => Ok((exit?, String::new(), String::new())),
    }
}

/// Sends this as standard input, and its end.
async fn feed_all(outgoing: Outgoing, mut input: Bytes) {
    while !input.is_empty() {
        let part = input.split_to(input.len().min(link::CHUNK_BYTES));
        if outgoing.send(Frame::Stdin(part)).await.is_err() {
            return;
        }
    }
    let _ = outgoing.send(Frame::StdinClosed).await;
}

/// Sends standard input, if it is wanted, and its end.
async fn feed(outgoing: Outgoing, wanted: bool) {
    if wanted && link::feed(&outgoing, None).await != FeedEnd::Ended {
        return;
    }
    let _ = outgoing.send(Frame::StdinClosed).await;
}

/// Moves output until the command ends, and everything it wrote is out.
async fn pump(incoming: &mut Incoming, sink: &mut Sink) -> Result<Exit, ExecError> {
    loop {
        match incoming.next().await? {
            Some(Frame::Stdout(bytes)) => sink.stdout(&bytes).await?,
            Some(Frame::Stderr(bytes)) => sink.stderr(&bytes).await?,
            Some(Frame::Exit(exit)) => return Ok(exit),
            Some(Frame::Error(body)) => return Err(LinkError::Refused(body.error).into()),
            Some(Frame::Stdin(_) | Frame::StdinClosed | Frame::Resize(_) | Frame::Signal(_)) => {
                return Err(LinkError::Direction.into());
            }
            None => return Err(LinkError::HungUp.into()),
        }
    }
}

/// Passes signals on until one asks this process itself to go: a second one, one that cannot be passed on because the
/// command does not read, or a hang-up.
async fn pass_on(signals: &mut Signals, outgoing: &Outgoing, tty: bool) -> Asked {
    let mut asked_before = false;
    loop {
        match signals.next().await {
            Asked::Resize => {
                if tty {
                    let _ = outgoing.try_send(Frame::Resize(terminal::size()));
                }
            }
            Asked::HangUp => return Asked::HangUp,
            asked @ (Asked::Interrupt | Asked::Terminate) => {
                if asked_before || outgoing.try_send(Frame::Signal(asked.number())).is_err() {
                    return asked;
                }
                asked_before = true;
            }
        }
    }
}

fn finish(out: Output, sink: Sink, exit: Exit) -> Result<u8, ExecError> {
    if let Sink::Collected { stdout, stderr } = sink {
        let mut result = ExecResult {
            exit_code: None,
            signal: None,
            timed_out: false,
            stdout: stdout.captured(),
            stderr: stderr.captured(),
        };
        match exit {
            Exit::Code(code) => result.exit_code = Some(code),
            Exit::Signal(number) => result.signal = Some(number),
            Exit::TimedOut => result.timed_out = true,
        }
        out.value(&result, |_| String::new())?;
    }
    Ok(exit_code(exit))
}

/// The exit code that stands for how the command ended.
const fn exit_code(exit: Exit) -> u8 {
    match exit {
        Exit::Code(code) => code,
        Exit::Signal(number) => EXIT_SIGNAL_BASE.saturating_add(number),
        Exit::TimedOut => EXIT_TIMED_OUT,
    }
}
