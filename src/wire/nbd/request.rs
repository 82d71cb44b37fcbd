//! Requests of the transmission phase: the header, and what it asks for, compared with what the export is.

use super::{ErrorNumber, NbdError, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, Reader, command_flag, export_flag};

/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Bytes out.
    Read = 0,
    /// Bytes in; they follow the request.
    Write = 1,
    /// The end, in order; has no answer.
    Disconnect = 2,
    /// All that was acknowledged before, onto stable storage.
    Flush = 3,
    /// The content of this part is of no interest.
    Trim = 4,
    /// Bytes into memory, ahead of their use.
    Cache = 5,
    /// Zeroes in.
    WriteZeroes = 6,
    /// Which parts hold data.
    BlockStatus = 7,
}

impl Command {
    /// The command of a number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            _ => return None,
        })
    }
}

/// A request as it is on the wire, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Of [`command_flag`].
    pub flags: u16,
    /// Of [`Command`], or one that nobody knows.
    pub command: u16,
    /// The client's number for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl RequestHeader {
    /// Reads it. Errors end the connection.
    pub fn read(bytes: [u8; REQUEST_BYTES]) -> Result<Self, NbdError> {
        let mut rest = Reader(&bytes);
        let magic = rest.u32().unwrap_or(0);
        if magic != REQUEST_MAGIC {
            return Err(NbdError::Magic { what: "a request", found: magic.into() });
        }
        let header = Self {
            flags: rest.u16().unwrap_or(0),
            command: rest.u16().unwrap_or(0),
            cookie: rest.u64().unwrap_or(0),
            offset: rest.u64().unwrap_or(0),
            length: rest.u32().unwrap_or(0),
        };
        if header.payload_bytes() > PAYLOAD_BYTES_MAX {
            let found = header.length.into();
            return Err(NbdError::Length { what: "the payload of a write", found, most: PAYLOAD_BYTES_MAX.into() });
        }
        Ok(header)
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Bytes that follow it, whether the request makes sense or not.
    pub const fn payload_bytes(self) -> u32 {
        if self.command == Command::Write as u16 { self.length } else { 0 }
    }

    /// What is asked for, if this export can be asked for it.
    pub fn check(self, export: &Limits) -> Result<Request, ErrorNumber> {
        let command = Command::from_number(self.command).ok_or(ErrorNumber::Invalid)?;
        let known = match command {
            Command::Write | Command::Trim => command_flag::FUA,
            Command::WriteZeroes => command_flag::FUA | command_flag::NO_HOLE | command_flag::FAST_ZERO,
            Command::Read if export.structured => command_flag::DF | command_flag::FUA,
            Command::BlockStatus => command_flag::REQ_ONE | command_flag::FUA,
            // A client may set FUA on whatever it likes; where nothing is written it means nothing.
            Command::Read | Command::Flush | Command::Cache | Command::Disconnect => command_flag::FUA,
        };
        if self.flags & !known != 0 {
            return Err(ErrorNumber::Invalid);
        }
        match command {
            Command::Disconnect => return Ok(Request::Disconnect),
            Command::Flush => return Ok(Request::Flush),
            Command::Write | Command::Trim | Command::WriteZeroes if export.flags & export_flag::READ_ONLY != 0 => {
                return Err(ErrorNumber::Permission);
            }
            Command::Read if self.length > PAYLOAD_BYTES_MAX => return Err(ErrorNumber::Overflow),
            Command::BlockStatus if !export.allocation => return Err(ErrorNumber::Invalid),
            Command::Read
            | Command::Write
            | Command::Trim
            | Command::WriteZeroes
            | Command::Cache
            | Command::BlockStatus => {}
        }
        let part = self.part(command, export)?;
        let has = |flag| self.flags & flag != 0;
        let stable = has(command_flag::FUA);
        Ok(match command {
            Command::Read => Request::Read { part, whole: has(command_flag::DF) },
            Command::Write => Request::Write { part, stable },
            Command::Trim => Request::Trim { part, stable },
            Command::WriteZeroes => Request::WriteZeroes {
                part,
                stable,
                no_hole: has(command_flag::NO_HOLE),
                only_fast: has(command_flag::FAST_ZERO),
            },
            Command::Cache => Request::Cache { part },
            Command::BlockStatus => Request::BlockStatus { part, first_only: has(command_flag::REQ_ONE) },
            Command::Flush => Request::Flush,
            Command::Disconnect => Request::Disconnect,
        })
    }

    /// The part of the export it is about: not empty, within, and aligned.
    fn part(self, command: Command, export: &Limits) -> Result<Part, ErrorNumber> {
        let end = self.offset.checked_add(self.length.into());
        if end.is_none_or(|end| end > export.size) {
            let writes = matches!(command, Command::Write | Command::WriteZeroes);
            return Err(if writes { ErrorNumber::NoSpace } else { ErrorNumber::Invalid });
        }
        let least = u64::from(export.block_bytes.max(1));
        let aligned = self.offset.is_multiple_of(least) && u64::from(self.length).is_multiple_of(least);
        if self.length == 0 || !aligned {
            return Err(ErrorNumber::Invalid);
        }
        Ok(Part { offset: self.offset, length: self.length })
    }
}

/// What an export can be asked for on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub size: u64,
    /// Of [`export_flag`].
    pub flags: u16,
    /// Offsets and lengths are multiples of it.
    pub block_bytes: u32,
    /// Replies come in chunks.
    pub structured: bool,
    /// `base:allocation` was chosen.
    pub allocation: bool,
}

/// A part of an export; not empty, and within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Bytes out.
    Read {
        /// Which.
        part: Part,
        /// In one chunk.
        whole: bool,
    },
    /// Bytes in.
    Write {
        /// Where.
        part: Part,
        /// Onto stable storage.
        stable: bool,
    },
    /// Everything acknowledged, onto stable storage.
    Flush,
    /// Of no interest.
    Trim {
        /// Which part.
        part: Part,
        /// Onto stable storage.
        stable: bool,
    },
    /// Zeroes in.
    WriteZeroes {
        /// Where.
        part: Part,
        /// Onto stable storage.
        stable: bool,
        /// Room for later writes stays taken.
        no_hole: bool,
        /// Not at all, if it is no faster than a write.
        only_fast: bool,
    },
    /// Into memory.
    Cache {
        /// Which part.
        part: Part,
    },
    /// What holds data.
    BlockStatus {
        /// Which part.
        part: Part,
        /// One extent is enough.
        first_only: bool,
    },
    /// The end.
    Disconnect,
}

impl Request {
    /// Whether the export is another one afterwards.
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits =
        Limits { size: 1 << 20, flags: export_flag::HAS_FLAGS, block_bytes: 512, structured: true, allocation: true };

    fn ask(command: u16, flags: u16, offset: u64, length: u32) -> Result<Request, ErrorNumber> {
        RequestHeader { flags, command, cookie: 1, offset, length }.check(&LIMITS)
    }

    #[test]
    fn a_request_is_what_the_protocol_says() {
        let header = RequestHeader { flags: 1, command: 1, cookie: 7, offset: 512, length: 1024 };
        let bytes = *b"\x25\x60\x95\x13\0\x01\0\x01\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\x04\0";
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(RequestHeader::read(bytes), Ok(header));
        assert_eq!(header.payload_bytes(), 1024);
    }

    #[test]
    fn what_makes_no_sense_has_its_number() {
        use ErrorNumber::{Invalid, NoSpace, Overflow, Permission};
        let part = Part { offset: 512, length: 512 };
        assert_eq!(ask(0, 0, 512, 512), Ok(Request::Read { part, whole: false }));
        assert_eq!(ask(0, command_flag::DF, 512, 512), Ok(Request::Read { part, whole: true }));
        assert_eq!(ask(0, 0, 1, 512), Err(Invalid), "unaligned");
        assert_eq!(ask(0, 0, 0, 513), Err(Invalid), "unaligned");
        assert_eq!(ask(0, 0, 0, 0), Err(Invalid), "empty");
        assert_eq!(ask(0, 0, 1 << 20, 512), Err(Invalid), "a read behind the end");
        assert_eq!(ask(1, 0, 1 << 20, 512), Err(NoSpace), "a write behind the end");
        assert_eq!(ask(6, 0, u64::MAX - 511, 512), Err(NoSpace), "around the end of numbers");
        assert_eq!(ask(0, 0, 0, PAYLOAD_BYTES_MAX + 512), Err(Overflow));
        assert_eq!(ask(8, 0, 0, 512), Err(Invalid), "an unknown command");
        assert_eq!(ask(1, command_flag::NO_HOLE, 0, 512), Err(Invalid), "a flag of another command");
        assert_eq!(ask(3, 0, 77, 0), Ok(Request::Flush));
        assert_eq!(ask(2, 0, 0, 0), Ok(Request::Disconnect));
        let read_only = Limits { flags: export_flag::READ_ONLY, allocation: false, structured: false, ..LIMITS };
        let ask =
            |command, flags| RequestHeader { flags, command, cookie: 1, offset: 0, length: 512 }.check(&read_only);
        for command in [1, 4, 6] {
            assert_eq!(ask(command, 0), Err(Permission));
        }
        assert_eq!(ask(7, 0), Err(Invalid), "no context was chosen");
        assert_eq!(ask(0, command_flag::DF), Err(Invalid), "no chunks were chosen");
    }

    #[test]
    fn a_payload_beyond_the_bound_ends_the_connection() {
        let header = |command, length| {
            RequestHeader::read(RequestHeader { flags: 0, command, cookie: 1, offset: 0, length }.to_bytes())
        };
        assert!(header(1, PAYLOAD_BYTES_MAX).is_ok() && header(4, u32::MAX).is_ok());
        assert!(matches!(header(1, PAYLOAD_BYTES_MAX + 1), Err(NbdError::Length { .. })));
        assert!(matches!(RequestHeader::read([0; REQUEST_BYTES]), Err(NbdError::Magic { found: 0, .. })));
    }

    proptest! {
        #[test]
        fn a_request_is_read_back(flags: u16, command: u16, cookie: u64, offset: u64, length in 0..PAYLOAD_BYTES_MAX) {
            let header = RequestHeader { flags, command, cookie, offset, length };
            prop_assert_eq!(RequestHeader::read(header.to_bytes()), Ok(header));
        }

        #[test]
        fn what_is_let_through_is_within(command in 0_u16..10, flags in 0_u16..32, offset in 0_u64..(1 << 21), length: u32) {
            let length = length % (1 << 21);
            if let Ok(Request::Read { part, .. } | Request::Write { part, .. } | Request::Trim { part, .. }
                | Request::WriteZeroes { part, .. } | Request::Cache { part } | Request::BlockStatus { part, .. })
                = ask(command, flags, offset, length)
            {
                prop_assert!(part.length > 0 && part.offset + u64::from(part.length) <= LIMITS.size);
            }
        }
    }
}
