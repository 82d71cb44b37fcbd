//! Frames on their way to the host.

use alloc::vec::Vec;

use hearth_guest_wire::{FromGuest, STREAM_CHUNK_BYTES, frame};

use crate::sys::{self, Errno, Fd};

/// Bytes held at which nothing more is made for this connection until the host takes some. Below it one more read of
/// a program's output is accepted, so a connection never holds more than this and one such read.
const FULL_BYTES: usize = STREAM_CHUNK_BYTES;

/// What a connection has yet to send.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// The socket took less than it was given: wait until it says it has space.
    blocked: bool,
}

impl Outgoing {
    /// Adds a message.
    pub(crate) fn push(&mut self, message: &FromGuest) {
        // Every message this program makes is bounded far below a frame: streams by the chunk, texts by `TEXT_MAX`.
        let encoded = frame::encode_to(message, &mut self.bytes);
        debug_assert!(encoded.is_ok(), "a message of ours fits a frame");
    }

    /// Whether more may be made for this connection.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes.len() - self.sent < FULL_BYTES
    }

    /// Whether all is sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// The socket has space again.
    pub(crate) fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Sends what the socket takes; says whether it took anything.
    pub(crate) fn flush(&mut self, socket: &Fd) -> Result<bool, Errno> {
        if self.blocked || self.is_empty() {
            return Ok(false);
        }
        let rest = &self.bytes[self.sent..];
        match sys::send(socket, rest) {
            Ok(taken) => {
                self.blocked = taken < rest.len();
                self.sent += taken;
                if self.is_empty() {
                    self.bytes.clear();
                    self.sent = 0;
                }
                Ok(taken > 0)
            }
            Err(Errno::AGAIN) => {
                self.blocked = true;
                Ok(false)
            }
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
