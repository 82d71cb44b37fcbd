//! hearth-stream/1: the framing of a connection that was upgraded for exec or console.
//!
//! A frame is four bytes of header, its kind and the length of its payload (24 bits, little-endian, at most
//! [`PAYLOAD_BYTES_MAX`]), then the payload. Directions do not wait for each other; a reader that stops reading stops
//! the writer through the socket's own buffers.
//!
//! ```text
//! client → agent   stdin* stdin_closed?   resize* signal*    anywhere between
//! agent → client   (stdout | stderr)*     then exit or error, which is the last frame of an exec
//! ```
//!
//! A console has only `stdin` and `stdout`, and ends with the connection, or with `error`.
//!
//! | kind | name | payload |
//! |---|---|---|
//! | 1 | stdin | bytes |
//! | 2 | stdout | bytes |
//! | 3 | stderr | bytes |
//! | 4 | resize | rows, columns: two u16, little-endian |
//! | 5 | exit | how (0 exit code, 1 signal, 2 timed out), then the code or signal, 0 when timed out: two bytes |
//! | 6 | stdin_closed | empty |
//! | 7 | error | JSON, the same body as an HTTP error |
//! | 8 | signal | Linux signal number, one byte, 1 to 64 |

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::types::{ErrorBody, TerminalSize};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 4;

/// Longest payload in bytes: bounds what a reader has to hold of a frame that has not fully arrived.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// Longest error code in bytes that is kept when an error's texts do not fit a frame.
const CODE_BYTES_MAX: usize = 256;

/// Highest Linux signal number (SIGRTMAX).
pub const SIGNAL_MAX: u8 = 64;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Bytes for the command's standard input, or a console's.
    Stdin(Bytes),
    /// Bytes from standard output, a terminal or a console.
    Stdout(Bytes),
    /// Bytes from standard error.
    Stderr(Bytes),
    /// The client's terminal has this size now.
    Resize(TerminalSize),
    /// The command ended; the last frame.
    Exit(Exit),
    /// Standard input ends.
    StdinClosed,
    /// The agent cannot go on; the last frame.
    Error(Box<ErrorBody>),
    /// Send this signal to the command and its children.
    Signal(u8),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// It ran past its time-out and was killed.
    TimedOut,
}

/// Bytes that are not a frame. The connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A kind this version does not have.
    #[error("frame of unknown kind {kind}")]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// A payload above the limit.
    #[error("frame of {length} bytes: at most {PAYLOAD_BYTES_MAX} are allowed")]
    Length {
        /// The length.
        length: usize,
    },
    /// A payload that does not fit its kind.
    #[error("malformed payload in a frame of kind {kind}")]
    Payload {
        /// The kind.
        kind: u8,
    },
    /// An error frame that is not an error body.
    #[error("malformed payload in an error frame")]
    ErrorPayload {
        /// What JSON says.
        #[source]
        source: serde_json::Error,
    },
}

mod kind {
    pub(super) const STDIN: u8 = 1;
    pub(super) const STDOUT: u8 = 2;
    pub(super) const STDERR: u8 = 3;
    pub(super) const RESIZE: u8 = 4;
    pub(super) const EXIT: u8 = 5;
    pub(super) const STDIN_CLOSED: u8 = 6;
    pub(super) const ERROR: u8 = 7;
    pub(super) const SIGNAL: u8 = 8;
}

mod exit_how {
    pub(super) const CODE: u8 = 0;
    pub(super) const SIGNAL: u8 = 1;
    pub(super) const TIMED_OUT: u8 = 2;
}

impl Frame {
    /// Appends the frame to `out`. Byte frames longer than [`PAYLOAD_BYTES_MAX`] become several frames, empty ones none.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Stdin(bytes) => put_bytes(out, kind::STDIN, bytes),
            Self::Stdout(bytes) => put_bytes(out, kind::STDOUT, bytes),
            Self::Stderr(bytes) => put_bytes(out, kind::STDERR, bytes),
            Self::Resize(size) => {
                put_header(out, kind::RESIZE, 4);
                out.put_u16_le(size.rows);
                out.put_u16_le(size.columns);
            }
            Self::Exit(exit) => {
                put_header(out, kind::EXIT, 2);
                out.put_slice(&match *exit {
                    Exit::Code(code) => [exit_how::CODE, code],
                    Exit::Signal(number) => [exit_how::SIGNAL, number],
                    Exit::TimedOut => [exit_how::TIMED_OUT, 0],
                });
            }
            Self::StdinClosed => put_header(out, kind::STDIN_CLOSED, 0),
            Self::Error(body) => put_error(out, body),
            Self::Signal(number) => {
                put_header(out, kind::SIGNAL, 1);
                out.put_u8(*number);
            }
        }
    }

    /// Takes the first frame off `buffer`; `None` while it is not all there. Never asks for more than a header and
    /// [`PAYLOAD_BYTES_MAX`].
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, StreamError> {
        let Some(&[kind, l0, l1, l2]) = buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = usize::from(l0) | (usize::from(l1) << 8) | (usize::from(l2) << 16);
        if !(kind::STDIN..=kind::SIGNAL).contains(&kind) {
            return Err(StreamError::Kind { kind });
        }
        if length > PAYLOAD_BYTES_MAX {
            return Err(StreamError::Length { length });
        }
        if buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        buffer.advance(HEADER_BYTES);
        parse(kind, buffer.split_to(length).freeze()).map(Some)
    }
}

fn parse(kind: u8, payload: Bytes) -> Result<Frame, StreamError> {
    let malformed = StreamError::Payload { kind };
    match (kind, payload.as_ref()) {
        (kind::STDIN, _) => Ok(Frame::Stdin(payload)),
        (kind::STDOUT, _) => Ok(Frame::Stdout(payload)),
        (kind::STDERR, _) => Ok(Frame::Stderr(payload)),
        (kind::RESIZE, &[r0, r1, c0, c1]) => Ok(Frame::Resize(TerminalSize {
            rows: u16::from_le_bytes([r0, r1]),
            columns: u16::from_le_bytes([c0, c1]),
        })),
        (kind::EXIT, &[exit_how::CODE, code]) => Ok(Frame::Exit(Exit::Code(code))),
        (kind::EXIT, &[exit_how::SIGNAL, number]) => Ok(Frame::Exit(Exit::Signal(number))),
        (kind::EXIT, &[exit_how::TIMED_OUT, 0]) => Ok(Frame::Exit(Exit::TimedOut)),
        (kind::STDIN_CLOSED, &[]) => Ok(Frame::StdinClosed),
        (kind::ERROR, json) => match serde_json::from_slice(json) {
            Ok(body) => Ok(Frame::Error(Box::new(body))),
            Err(source) => Err(StreamError::ErrorPayload { source }),
        },
        (kind::SIGNAL, &[number @ 1..=SIGNAL_MAX]) => Ok(Frame::Signal(number)),
        (_, _) => Err(malformed),
    }
}

fn put_header(out: &mut BytesMut, kind: u8, length: usize) {
    assert!(length <= PAYLOAD_BYTES_MAX, "callers bound payloads");
    out.put_u8(kind);
    out.put_uint_le(length as u64, 3);
}

fn put_bytes(out: &mut BytesMut, kind: u8, bytes: &[u8]) {
    for chunk in bytes.chunks(PAYLOAD_BYTES_MAX) {
        put_header(out, kind, chunk.len());
        out.put_slice(chunk);
    }
}

/// An error whose texts are too long for a frame is sent without them: its code still tells what to do.
fn put_error(out: &mut BytesMut, body: &ErrorBody) {
    let mut json = serde_json::to_vec(body).unwrap_or_default();
    if json.len() > PAYLOAD_BYTES_MAX {
        let mut short = body.clone();
        short.error.message = "the message is too long for a frame".to_owned();
        short.error.detail = None;
        if short.error.code.len() > CODE_BYTES_MAX {
            short.error.code = "error".to_owned();
        }
        json = serde_json::to_vec(&short).unwrap_or_default();
    }
    put_header(out, kind::ERROR, json.len());
    out.put_slice(&json);
}

#[cfg(test)]
mod tests;
