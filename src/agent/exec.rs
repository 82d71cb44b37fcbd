//! Programs run inside guests. A session is one stream to the guest agent; dropping it closes the stream, and the
//! guest then kills the program. Nothing is buffered here beyond one frame: a reader that stops reading stops the
//! program through the stream's own credit.

use std::pin::Pin;
use std::task::{Context, Poll};

use hearth_guest_wire::{
    EXEC_WORDS_MAX, Exec, Exit, FRAME_BYTES_MAX, FromGuest, STREAM_CHUNK_BYTES, TerminalSize, ToGuest,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::guest::{ANSWER_LIMIT, GuestError, GuestLink, GuestReader, GuestWriter};
use super::streams::Counted;
use super::world::ByteStream;
use crate::report::Retry;

/// Most bytes of words in one exec, with room for the frame around them.
const WORDS_BYTES_MAX: usize = FRAME_BYTES_MAX as usize - 64 * 1024;

/// A stream whose type is forgotten, so that what is above the agent does not depend on its world.
pub struct AnyStream {
    stream: Box<dyn ByteStream>,
    _counted: Option<Counted>,
}

impl AnyStream {
    /// Forgets the type.
    pub fn new(stream: impl ByteStream) -> Self {
        Self { stream: Box::new(stream), _counted: None }
    }

    /// Forgets the type, and is counted among the streams into its VM.
    pub(super) fn counted(stream: impl ByteStream, counted: Counted) -> Self {
        Self { stream: Box::new(stream), _counted: Some(counted) }
    }
}

impl std::fmt::Debug for AnyStream {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("AnyStream(..)")
    }
}

impl AsyncRead for AnyStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for AnyStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

/// A program to run in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecSpec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `NAME=value` words.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub cwd: String,
    /// Milliseconds until it is killed; 0 means never.
    pub timeout_ms: u32,
    /// Rows and columns of its terminal, if it gets one.
    pub terminal: Option<(u16, u16)>,
}

/// Why a program did not start, or its session broke.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The request contradicts itself or a limit.
    #[error("{reason}")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
    /// The guest could not start it.
    #[error("start {program:?} in the guest: {what}{}", reason(*errno))]
    NotStarted {
        /// The program.
        program: String,
        /// Linux errno in the guest, 0 when there is none.
        errno: i32,
        /// The guest's words.
        what: String,
    },
    /// The guest agent does not answer, or broke off.
    #[error("run {program:?} in the guest")]
    Guest {
        /// The program.
        program: String,
        /// What failed.
        #[source]
        source: GuestError,
    },
}

impl ExecError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Invalid { .. } | Self::NotStarted { .. } => Retry::WithChange,
            Self::Guest { .. } => Retry::Later,
        }
    }
}

/// The guest's error number as words behind what failed; nothing for none.
fn reason(errno: i32) -> String {
    if errno == 0 { String::new() } else { format!(": {}", nix::errno::Errno::from_raw(errno).desc()) }
}

/// What goes to a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecInput {
    /// Bytes for its standard input.
    Stdin(Vec<u8>),
    /// End of its standard input.
    StdinClosed,
    /// A signal to its process group.
    Signal(u8),
    /// New size of its terminal.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        columns: u16,
    },
}

/// What comes from a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It ended.
    Exited(ExecExit),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecExit {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// By its time-out.
    TimedOut,
}

/// A running program.
#[derive(Debug)]
pub struct ExecSession {
    /// What comes from it.
    pub output: ExecReceiver,
    /// What goes to it.
    pub input: ExecSender,
}

/// The half of a session that reads.
#[derive(Debug)]
pub struct ExecReceiver {
    reader: GuestReader<AnyStream>,
    program: String,
}

/// The half of a session that writes.
#[derive(Debug)]
pub struct ExecSender {
    writer: GuestWriter<AnyStream>,
    program: String,
}

/// Refuses what no guest could run.
pub(super) fn check(spec: &ExecSpec) -> Result<(), ExecError> {
    let invalid = |reason: &str| Err(ExecError::Invalid { reason: reason.to_owned() });
    let words = || spec.argv.iter().chain(&spec.env);
    if spec.argv.first().is_none_or(String::is_empty) {
        return invalid("argv has to name a program");
    }
    if words().count() > EXEC_WORDS_MAX {
        return invalid("too many words in argv and env: at most 4096");
    }
    // Each word costs up to five bytes of length besides its own.
    if words().map(|word| word.len() + 5).sum::<usize>() + spec.cwd.len() > WORDS_BYTES_MAX {
        return invalid("argv and env are too long: at most 960 KiB together");
    }
    if words().chain([&spec.cwd]).any(|word| word.contains('\0')) {
        return invalid("a word with a NUL byte cannot be passed to a program");
    }
    if spec.env.iter().any(|word| !word.contains('=') || word.starts_with('=')) {
        return invalid("env is made of NAME=value words");
    }
    Ok(())
}

/// Starts a program over a fresh connection.
pub(super) async fn start(mut link: GuestLink<AnyStream>, spec: ExecSpec) -> Result<ExecSession, ExecError> {
    let program = spec.argv.first().cloned().unwrap_or_default();
    let terminal = spec.terminal.map(|(rows, columns)| TerminalSize { rows, columns });
    let ExecSpec { argv, env, cwd, timeout_ms, .. } = spec;
    let exec = ToGuest::Exec(Exec { argv, env, cwd, timeout_ms, terminal });
    match link.request(&exec, ANSWER_LIMIT).await {
        Ok(FromGuest::Started { .. }) => Ok(ExecSession {
            output: ExecReceiver { reader: link.reader, program: program.clone() },
            input: ExecSender { writer: link.writer, program },
        }),
        Ok(_) => Err(ExecError::Guest { program, source: GuestError::Unexpected }),
        Err(GuestError::Failed { errno, what }) => Err(ExecError::NotStarted { program, errno, what }),
        Err(source) => Err(ExecError::Guest { program, source }),
    }
}

impl ExecReceiver {
    /// What comes next. After [`ExecOutput::Exited`] nothing does. May be dropped and called again.
    pub async fn next(&mut self) -> Result<ExecOutput, ExecError> {
        let broken = |source| ExecError::Guest { program: self.program.clone(), source };
        match self.reader.next().await {
            Ok(Some(FromGuest::Stdout(bytes))) => Ok(ExecOutput::Stdout(bytes)),
            Ok(Some(FromGuest::Stderr(bytes))) => Ok(ExecOutput::Stderr(bytes)),
            Ok(Some(FromGuest::Exited(Exit::Code(code)))) => Ok(ExecOutput::Exited(ExecExit::Code(code))),
            Ok(Some(FromGuest::Exited(Exit::Signal(number)))) => Ok(ExecOutput::Exited(ExecExit::Signal(number))),
            Ok(Some(FromGuest::Exited(Exit::TimedOut))) => Ok(ExecOutput::Exited(ExecExit::TimedOut)),
            Ok(Some(FromGuest::Failed { errno, what })) => {
                Err(broken(GuestError::Failed { errno, what: super::guest::printable(&what) }))
            }
            Ok(Some(_)) => Err(broken(GuestError::Unexpected)),
            Ok(None) => Err(broken(GuestError::HungUp)),
            Err(error) => Err(broken(error)),
        }
    }
}

impl ExecSender {
    /// Sends to the program. Waits while it does not read.
    pub async fn send(&mut self, input: ExecInput) -> Result<(), ExecError> {
        match input {
            ExecInput::Stdin(bytes) => {
                for chunk in bytes.chunks(STREAM_CHUNK_BYTES) {
                    self.message(&ToGuest::Stdin(chunk.to_vec())).await?;
                }
                Ok(())
            }
            ExecInput::StdinClosed => self.message(&ToGuest::StdinClosed).await,
            ExecInput::Signal(number) => self.message(&ToGuest::Signal { number }).await,
            ExecInput::Resize { rows, columns } => self.message(&ToGuest::Resize { rows, columns }).await,
        }
    }

    async fn message(&mut self, message: &ToGuest) -> Result<(), ExecError> {
        let sent = self.writer.send(message).await;
        sent.map_err(|source| ExecError::Guest { program: self.program.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_checked_before_they_are_sent() {
        let with = |argv: &[&str], env: &[&str]| ExecSpec {
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            env: env.iter().map(|&word| word.to_owned()).collect(),
            ..ExecSpec::default()
        };
        assert!(check(&with(&["true"], &["A=b"])).is_ok());
        assert!(check(&with(&[], &[])).is_err());
        assert!(check(&with(&[""], &[])).is_err());
        assert!(check(&with(&["a\0b"], &[])).is_err());
        assert!(check(&with(&["a"], &["A"])).is_err());
        assert!(check(&with(&vec!["a"; EXEC_WORDS_MAX], &[])).is_ok());
        assert!(check(&with(&vec!["a"; EXEC_WORDS_MAX + 1], &[])).is_err());
        let long = "x".repeat(WORDS_BYTES_MAX);
        assert!(check(&with(&[&long], &[])).is_err());
    }
}
