//! Frames: a little-endian `u32` length, then that many bytes of postcard.
//!
//! No I/O here: [`encode`] makes the bytes of one frame, [`Decoder`] takes bytes as they come and gives frames.

use alloc::vec::Vec;
use core::fmt;
use serde::{Serialize, de::DeserializeOwned};

use crate::FRAME_BYTES_MAX;

/// Bytes of a frame's length field.
pub const HEADER_BYTES: usize = 4;

/// Why bytes are not a frame, or a message cannot be one. The connection is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// The length is zero.
    Empty,
    /// The length is above [`FRAME_BYTES_MAX`].
    TooLong {
        /// The length that was found, in bytes.
        length: u64,
    },
    /// The body is not a message of this protocol.
    Malformed,
    /// The body is a message and something more.
    TrailingBytes,
}

impl fmt::Display for FrameError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => out.write_str("frame of length zero"),
            Self::TooLong { length } => {
                write!(out, "frame of {length} bytes, at most {FRAME_BYTES_MAX} are allowed")
            }
            Self::Malformed => out.write_str("frame body is not a message of this protocol"),
            Self::TrailingBytes => out.write_str("frame body has bytes after its message"),
        }
    }
}

impl core::error::Error for FrameError {}

/// The bytes of one frame that carries `message`.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut bytes = Vec::new();
    encode_to(message, &mut bytes)?;
    Ok(bytes)
}

/// Appends one frame that carries `message` to `bytes`, or leaves them as they are.
pub fn encode_to<M: Serialize>(message: &M, bytes: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = bytes.len();
    bytes.extend_from_slice(&[0; HEADER_BYTES]);
    let written = postcard::serialize_with_flavor(message, Appended(&mut *bytes)).map_err(|_| FrameError::Malformed);
    let framed = written.and_then(|()| {
        let body = (bytes.len() - start - HEADER_BYTES) as u64;
        let length = u32::try_from(body).ok().filter(|length| *length <= FRAME_BYTES_MAX);
        let length = length.ok_or(FrameError::TooLong { length: body })?;
        bytes[start..start + HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
        Ok(())
    });
    if framed.is_err() {
        bytes.truncate(start);
    }
    framed
}

/// postcard's output, appended to bytes that are there.
struct Appended<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Appended<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Decodes the body of one frame.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, FrameError> {
    match postcard::take_from_bytes::<M>(body) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(FrameError::TrailingBytes),
        Err(_) => Err(FrameError::Malformed),
    }
}

/// Length of the body that follows a header.
pub fn body_length(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    match u32::from_le_bytes(header) {
        0 => Err(FrameError::Empty),
        length if length > FRAME_BYTES_MAX => Err(FrameError::TooLong { length: u64::from(length) }),
        length => Ok(length as usize),
    }
}

/// Collects bytes until they are frames. Holds at most one frame and what the last read brought.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes read from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes are pushed.
    #[expect(clippy::should_implement_trait, reason = "the kind of message is the caller's, so this is no iterator")]
    pub fn next<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.bytes[self.taken..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = body_length(*header)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = decode(body)?;
        self.taken += HEADER_BYTES + length;
        Ok(Some(message))
    }

    /// Whether bytes of an unfinished frame are held.
    pub fn is_mid_frame(&self) -> bool {
        self.taken < self.bytes.len()
    }
}
