//! The NBD protocol (`doc/proto.md` of the NetworkBlockDevice project), both ends: bytes to messages and back. Fixed
//! newstyle only; what it is carried by, and what is done about a request, is not known here.
//!
//! A connection has two phases. In the handshake ([`option`], [`negotiate`]) the client asks for options and at last
//! names an export. In the transmission ([`request`], [`reply`]) it sends requests, each with a number of its choice,
//! and the server answers in any order, with a simple reply or with chunks. All numbers are big-endian.
//!
//! ```text
//! server: "NBDMAGIC" "IHAVEOPT" flags u16                     client: flags u32
//! client: "IHAVEOPT" option u32 length u32 data               server: magic option u32 kind u32 length u32 data
//! client: magic u32 flags u16 command u16 cookie u64 offset u64 length u32 (data of a write)
//! server: magic u32 error u32 cookie u64 (data of a read)                                     simple
//! server: magic u32 flags u16 kind u16 cookie u64 length u32 data                             a chunk
//! ```
//!
//! Nothing here takes memory for a length that somebody says: lengths are compared with the bounds below first.

pub mod negotiate;
pub mod option;
pub mod reply;
pub mod request;

/// The first bytes a server says.
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");

/// What follows in the greeting, and the first bytes of each option.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");

/// The first bytes of each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// The first bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;

/// The first bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// The first bytes of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest data of an option in bytes, and of a reply to one.
pub const OPTION_BYTES_MAX: u32 = 64 * 1024;

/// Longest payload of a read or write in bytes: what the protocol says clients may count on.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Longest name of an export, and longest text, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;

/// Most options that a client asks for in one handshake. Real ones ask for about ten.
pub const OPTIONS_MAX: u32 = 64;

/// The name of the one metadata context there is: which parts hold data.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Its number in replies.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// What a server says of itself in its greeting; a client repeats what it understood.
pub mod handshake_flag {
    /// Options are answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeroes after EXPORT_NAME may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// What an export can do: 16 bits in the answer to EXPORT_NAME, and in INFO_EXPORT.
pub mod export_flag {
    /// Set always.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// [`super::command_flag::FUA`] is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// [`super::command_flag::DF`] is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush covers what was acknowledged on every connection; there is no cache that differs between them.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// [`super::command_flag::FAST_ZERO`] is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod command_flag {
    /// Answered when it is on stable storage.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: leaves no hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: the first extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fails at once if it is no faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// What was asked for was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorNumber {
    /// EPERM: not this client's to do (a stale or waiting lease, a read-only export).
    Permission = 1,
    /// EIO: the storage failed.
    Io = 5,
    /// ENOMEM: no memory for it now.
    Memory = 12,
    /// EINVAL: the request makes no sense.
    Invalid = 22,
    /// ENOSPC: no room, or a write beyond the end.
    NoSpace = 28,
    /// EOVERFLOW: an answer would be too long.
    Overflow = 75,
    /// ENOTSUP: not in the way it was asked for.
    NotSupported = 95,
    /// ESHUTDOWN: the server ends.
    Shutdown = 108,
}

impl ErrorNumber {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// What a number on the wire means; a number that is none of the protocol's is EINVAL, as the protocol says.
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Permission,
            5 => Self::Io,
            12 => Self::Memory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        }
    }
}

/// Why bytes are not this protocol, or beyond its bounds. The connection is of no further use: there is no telling where
/// the next message begins.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NbdError {
    /// Other first bytes than belong there.
    #[error("{what} begins with {found:#x}")]
    Magic {
        /// What was to come.
        what: &'static str,
        /// What is there.
        found: u64,
    },
    /// Flags that the other end made up.
    #[error("handshake flags {found:#x}, known are {known:#x}")]
    Flags {
        /// What it said.
        found: u32,
        /// What there are.
        known: u32,
    },
    /// A server that answers no options.
    #[error("the server does not speak fixed newstyle")]
    OldServer,
    /// A length beyond its bound.
    #[error("{what} of {found} bytes, at most {most} are possible")]
    Length {
        /// What is so long.
        what: &'static str,
        /// What was said.
        found: u64,
        /// The bound.
        most: u64,
    },
    /// Too many options.
    #[error("more than {OPTIONS_MAX} options in one handshake")]
    Options,
    /// A body that is not what its kind says.
    #[error("{what} is not one")]
    Malformed {
        /// What it was to be.
        what: &'static str,
    },
}

/// The server's first message.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
    bytes
}

/// Bytes of the server's first message.
pub const GREETING_BYTES: usize = 18;

/// Bytes of the client's answer to it.
pub const CLIENT_FLAGS_BYTES: usize = 4;

/// Reads a server's first message: the flags that a client repeats.
pub fn read_greeting(bytes: [u8; GREETING_BYTES]) -> Result<u16, NbdError> {
    let mut rest = Reader(&bytes);
    for (what, magic) in [("the greeting", GREETING_MAGIC), ("the greeting's second word", OPTION_MAGIC)] {
        match rest.u64() {
            Some(found) if found == magic => {}
            found => return Err(NbdError::Magic { what, found: found.unwrap_or(0) }),
        }
    }
    let flags = rest.u16().unwrap_or(0);
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(NbdError::OldServer);
    }
    Ok(flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES))
}

/// What a client answers to the greeting.
pub const fn client_flags(flags: u16) -> [u8; CLIENT_FLAGS_BYTES] {
    (flags as u32).to_be_bytes()
}

/// Reads a client's answer to the greeting: whether it goes without the zeroes. One that does not know about replies
/// to options can only say EXPORT_NAME, which is fine.
pub fn read_client_flags(bytes: [u8; CLIENT_FLAGS_BYTES]) -> Result<bool, NbdError> {
    let found = u32::from_be_bytes(bytes);
    let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    if found & !known != 0 {
        return Err(NbdError::Flags { found, known });
    }
    Ok(found & u32::from(handshake_flag::NO_ZEROES) != 0)
}

/// Takes numbers and texts from the front of a body.
#[derive(Debug)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text with its length before it. What is too long or not UTF-8 is none.
    fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        read_text(text)
    }

    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A text of the protocol: UTF-8 without NUL, within the bound.
fn read_text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > TEXT_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// A text cut to what the protocol lets be said.
fn bounded(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A length for the wire. Everything that is written here is far below 4 GiB; what is not says so by a length that no
/// reader takes.
fn length_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn greetings_are_what_the_protocol_says() {
        assert_eq!(greeting(), *b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(read_greeting(greeting()), Ok(3));
        assert_eq!(read_greeting(*b"NBDMAGICIHAVEOPT\x00\x02"), Err(NbdError::OldServer));
        // Flags of a later version are not repeated.
        assert_eq!(read_greeting(*b"NBDMAGICIHAVEOPT\x80\x01"), Ok(1));
        assert!(matches!(read_greeting(*b"NBDMAGICihaveopt\x00\x01"), Err(NbdError::Magic { .. })));
        assert_eq!(read_client_flags(client_flags(3)), Ok(true));
        assert_eq!(read_client_flags(client_flags(0)), Ok(false));
        assert_eq!(read_client_flags([0, 0, 0, 4]), Err(NbdError::Flags { found: 4, known: 3 }));
    }

    #[test]
    fn error_numbers_are_read_back() {
        for number in 0..200 {
            let error = ErrorNumber::from_number(number);
            assert!(error.number() == number || error == ErrorNumber::Invalid);
        }
    }

    proptest! {
        #[test]
        fn texts_are_cut_at_characters(text in ".{0,3000}") {
            let cut = bounded(&text);
            prop_assert!(text.starts_with(cut) && cut.len() <= TEXT_BYTES_MAX);
        }
    }
}
