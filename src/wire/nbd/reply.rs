//! Replies of the transmission phase, simple and in chunks, both directions. The bytes of a read are not copied here: what
//! comes before them is made or read, the bytes follow.

use super::{
    BASE_ALLOCATION_ID, CHUNK_MAGIC, ErrorNumber, NbdError, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, Reader,
    SIMPLE_REPLY_MAGIC, bounded, length_u32, read_text,
};

/// Bytes that every reply begins with; all of a simple one but the bytes of a read.
pub const REPLY_BYTES: usize = 16;

/// Bytes of a chunk's length, which follows them.
pub const CHUNK_LENGTH_BYTES: usize = 4;

/// The flag of a request's last chunk.
const DONE: u16 = 1;

/// Kinds of chunks. Those with the highest bit are errors.
mod kind {
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const OFFSET_HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR_BIT: u16 = 1 << 15;
    pub(super) const ERROR: u16 = ERROR_BIT | 1;
    pub(super) const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Most extents that a BLOCK_STATUS chunk tells here: a client asks again from where it ends.
pub const EXTENTS_MAX: usize = 4096;

/// One extent of `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u32,
    /// Takes no room.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// A simple reply.
pub fn simple(cookie: u64, error: Option<ErrorNumber>) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, ErrorNumber::number).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

fn chunk(last: bool, kind: u16, cookie: u64, body: &[u8], bytes_to_follow: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REPLY_BYTES + CHUNK_LENGTH_BYTES + body.len());
    bytes.extend(CHUNK_MAGIC.to_be_bytes());
    bytes.extend(if last { DONE } else { 0 }.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(length_u32(body.len()).saturating_add(bytes_to_follow).to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A last chunk that says nothing.
pub fn none(cookie: u64) -> Vec<u8> {
    chunk(true, kind::NONE, cookie, &[], 0)
}

/// What comes before the bytes of a read.
pub fn data_head(last: bool, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    chunk(last, kind::OFFSET_DATA, cookie, &offset.to_be_bytes(), length)
}

/// A part of a read that is zeroes.
pub fn hole(last: bool, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let body = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    chunk(last, kind::OFFSET_HOLE, cookie, &body, 0)
}

/// Which parts hold data, as one last chunk.
pub fn block_status(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    let mut body = BASE_ALLOCATION_ID.to_be_bytes().to_vec();
    for extent in extents.iter().take(EXTENTS_MAX) {
        body.extend(extent.length.to_be_bytes());
        body.extend((u32::from(extent.hole) | u32::from(extent.zero) << 1).to_be_bytes());
    }
    chunk(true, kind::BLOCK_STATUS, cookie, &body, 0)
}

/// The last chunk of what was not done, with a text.
pub fn error(cookie: u64, error: ErrorNumber, text: &str) -> Vec<u8> {
    chunk(true, kind::ERROR, cookie, &error_body(error, text), 0)
}

/// The same, of a read that failed at `offset`.
pub fn error_offset(cookie: u64, error: ErrorNumber, text: &str, offset: u64) -> Vec<u8> {
    let body = [&error_body(error, text)[..], &offset.to_be_bytes()].concat();
    chunk(true, kind::ERROR_OFFSET, cookie, &body, 0)
}

fn error_body(error: ErrorNumber, text: &str) -> Vec<u8> {
    let text = bounded(text);
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    [&error.number().to_be_bytes()[..], &length.to_be_bytes(), text.as_bytes()].concat()
}

/// What every reply begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// All of it, but for the bytes of a read that was done.
    Simple {
        /// The request's number.
        cookie: u64,
        /// Why it was not done.
        error: Option<ErrorNumber>,
    },
    /// A chunk; its length follows ([`chunk_length`]).
    Chunk {
        /// The request's number.
        cookie: u64,
        /// No chunk follows it.
        last: bool,
        /// Its kind, for [`ChunkHead::read`].
        kind: u16,
    },
}

impl ReplyHead {
    /// Reads it.
    pub fn read(bytes: [u8; REPLY_BYTES]) -> Result<Self, NbdError> {
        let mut rest = Reader(&bytes);
        let magic = rest.u32().unwrap_or(0);
        match magic {
            SIMPLE_REPLY_MAGIC => {
                let number = rest.u32().unwrap_or(0);
                let error = (number != 0).then(|| ErrorNumber::from_number(number));
                Ok(Self::Simple { cookie: rest.u64().unwrap_or(0), error })
            }
            CHUNK_MAGIC => {
                let (flags, kind) = (rest.u16().unwrap_or(0), rest.u16().unwrap_or(0));
                Ok(Self::Chunk { cookie: rest.u64().unwrap_or(0), last: flags & DONE != 0, kind })
            }
            found => Err(NbdError::Magic { what: "a reply", found: found.into() }),
        }
    }
}

/// Bytes of a chunk's body, by its kind within the bound.
pub fn chunk_length(kind: u16, bytes: [u8; CHUNK_LENGTH_BYTES]) -> Result<u32, NbdError> {
    let found = u32::from_be_bytes(bytes);
    let most = if kind == kind::OFFSET_DATA { PAYLOAD_BYTES_MAX + 8 } else { OPTION_BYTES_MAX };
    if found > most {
        return Err(NbdError::Length { what: "a chunk of a reply", found: found.into(), most: most.into() });
    }
    Ok(found)
}

/// What a chunk says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkHead {
    /// Nothing.
    None,
    /// Bytes of a read, which follow.
    Data {
        /// Where they are in the export.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Zeroes of a read.
    Hole {
        /// Where they are in the export.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Which parts hold data.
    BlockStatus {
        /// The metadata context.
        context: u32,
        /// From the request's offset on.
        extents: Vec<Extent>,
    },
    /// Why it was not done.
    Error {
        /// The number.
        error: ErrorNumber,
        /// For people.
        text: String,
        /// Where, if a read says it.
        offset: Option<u64>,
    },
}

impl ChunkHead {
    /// How many bytes of a body of this kind are to be given to [`Self::read`]: all, but of the bytes of a read none.
    pub const fn bytes(kind: u16, length: u32) -> u32 {
        if kind == kind::OFFSET_DATA && length > 8 { 8 } else { length }
    }

    /// Reads it. `length`: of the whole body, as [`chunk_length`] gave it.
    pub fn read(kind: u16, body: &[u8], length: u32) -> Result<Self, NbdError> {
        let malformed = NbdError::Malformed { what: "a chunk of a reply" };
        let mut rest = Reader(body);
        let read = match kind {
            kind::NONE => Some(Self::None),
            kind::OFFSET_DATA => rest
                .u64()
                .zip(length.checked_sub(8).filter(|length| *length > 0))
                .map(|(offset, length)| Self::Data { offset, length }),
            kind::OFFSET_HOLE => rest.u64().zip(rest.u32()).map(|(offset, length)| Self::Hole { offset, length }),
            kind::BLOCK_STATUS => read_extents(&mut rest),
            kind if kind & kind::ERROR_BIT != 0 => read_error(kind, &mut rest),
            _ => None,
        };
        read.filter(|_| rest.is_empty()).ok_or(malformed)
    }
}

fn read_extents(rest: &mut Reader<'_>) -> Option<ChunkHead> {
    let context = rest.u32()?;
    let mut extents = Vec::new();
    while !rest.is_empty() {
        let (length, flags) = (rest.u32()?, rest.u32()?);
        if length == 0 {
            return None;
        }
        extents.push(Extent { length, hole: flags & 1 != 0, zero: flags & 2 != 0 });
    }
    (!extents.is_empty()).then_some(ChunkHead::BlockStatus { context, extents })
}

fn read_error(kind: u16, rest: &mut Reader<'_>) -> Option<ChunkHead> {
    let error = ErrorNumber::from_number(rest.u32()?);
    let length = usize::from(rest.u16()?);
    let (text, after) = rest.0.split_at_checked(length)?;
    rest.0 = after;
    let text = read_text(text)?.to_owned();
    let offset = if kind == kind::ERROR_OFFSET { Some(rest.u64()?) } else { None };
    if kind != kind::ERROR && kind != kind::ERROR_OFFSET {
        // An error of a kind that is not known here has its number and text in the same place.
        rest.0 = &[];
    }
    Some(ChunkHead::Error { error, text, offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads what was made, as a client does.
    fn read(bytes: &[u8], follows: u32) -> Result<(u64, bool, ChunkHead), NbdError> {
        let (head, rest) = bytes.split_first_chunk().unwrap();
        let ReplyHead::Chunk { cookie, last, kind } = ReplyHead::read(*head)? else { panic!("a simple reply") };
        let (length, body) = rest.split_first_chunk().unwrap();
        let length = chunk_length(kind, *length)?;
        assert_eq!(length as usize, body.len() + follows as usize);
        assert_eq!(ChunkHead::bytes(kind, length) as usize, body.len());
        Ok((cookie, last, ChunkHead::read(kind, body, length)?))
    }

    #[test]
    fn replies_are_what_the_protocol_says() {
        assert_eq!(simple(7, Some(ErrorNumber::NoSpace)), *b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x07");
        assert_eq!(none(7), b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0");
        assert_eq!(
            data_head(false, 7, 512, 3),
            b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x07\0\0\0\x0b\0\0\0\0\0\0\x02\0"
        );
        let status = block_status(7, &[Extent { length: 512, hole: true, zero: true }]);
        assert_eq!(status, b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x0c\0\0\0\x01\0\0\x02\0\0\0\0\x03");
        assert_eq!(
            error(7, ErrorNumber::Io, "no"),
            b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x08\0\0\0\x05\0\x02no"
        );
    }

    #[test]
    fn what_was_said_is_read_back() {
        let head = ReplyHead::read(simple(9, None)).unwrap();
        assert_eq!(head, ReplyHead::Simple { cookie: 9, error: None });
        assert_eq!(read(&none(9), 0).unwrap(), (9, true, ChunkHead::None));
        let data = ChunkHead::Data { offset: 4096, length: 512 };
        assert_eq!(read(&data_head(false, 9, 4096, 512), 512).unwrap(), (9, false, data));
        let zeroes = ChunkHead::Hole { offset: 4096, length: 512 };
        assert_eq!(read(&hole(true, 9, 4096, 512), 0).unwrap(), (9, true, zeroes));
        let said = ChunkHead::Error { error: ErrorNumber::Io, text: "why".to_owned(), offset: Some(8192) };
        assert_eq!(read(&error_offset(9, ErrorNumber::Io, "why", 8192), 0).unwrap(), (9, true, said));
        let extents =
            vec![Extent { length: 1, hole: false, zero: false }, Extent { length: 2, hole: true, zero: true }];
        let status = block_status(9, &extents);
        let told = ChunkHead::BlockStatus { context: BASE_ALLOCATION_ID, extents };
        assert_eq!(read(&status, 0).unwrap(), (9, true, told));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(ReplyHead::read([0; REPLY_BYTES]).is_err());
        assert!(chunk_length(kind::OFFSET_DATA, (PAYLOAD_BYTES_MAX + 9).to_be_bytes()).is_err());
        assert!(chunk_length(kind::ERROR, (OPTION_BYTES_MAX + 1).to_be_bytes()).is_err());
        for (kind, body) in [
            (kind::NONE, &b"x"[..]),
            (kind::OFFSET_DATA, b"\0\0\0\0\0\0\0\0"),
            (kind::OFFSET_HOLE, b"\0\0\0\0"),
            (kind::BLOCK_STATUS, b"\0\0\0\x01"),
            (kind::BLOCK_STATUS, b"\0\0\0\x01\0\0\0\0\0\0\0\0"),
            (kind::ERROR, b"\0\0\0\x05\0\x09no"),
            (77, b""),
        ] {
            assert!(ChunkHead::read(kind, body, length_u32(body.len())).is_err(), "{kind} {body:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(kind: u16, known in 0_u16..8, body: Vec<u8>, length: u32, head: [u8; REPLY_BYTES]) {
            let _ = ReplyHead::read(head);
            for kind in [kind, known, known | kind::ERROR_BIT] {
                let _ = ChunkHead::read(kind, &body, length);
                let _ = chunk_length(kind, length.to_be_bytes());
            }
        }
    }
}
