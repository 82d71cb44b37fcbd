//! Options and their replies: one message of the handshake each, both directions.

use super::{
    BASE_ALLOCATION, NbdError, OPTION_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_MAGIC, Reader, bounded, length_u32,
    read_text,
};

/// Bytes before an option's data.
pub const OPTION_HEADER_BYTES: usize = 16;

/// Bytes before the data of a reply to an option.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// Numbers of options.
pub mod number {
    /// Ends the handshake with an export; has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the handshake without one.
    pub const ABORT: u32 = 2;
    /// Lists exports.
    pub const LIST: u32 = 3;
    /// Goes on in TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks what an export is.
    pub const INFO: u32 = 6;
    /// The same, and ends the handshake with it.
    pub const GO: u32 = 7;
    /// Replies come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Requests with 64-bit lengths: not spoken here.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options. Those with the highest bit are errors.
pub mod reply_kind {
    /// Done; the last reply.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit of errors.
    pub const ERROR: u32 = 1 << 31;
    /// Not known or not spoken.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Not allowed.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server ends.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// Kinds of information about an export.
pub mod info_kind {
    /// Size and flags; always told.
    pub const EXPORT: u16 = 0;
    /// The name it is known by.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Sizes of requests.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What comes before an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option; may be one that nobody knows.
    pub option: u32,
    /// Bytes of its data, within the bound.
    pub length: u32,
}

impl OptionHeader {
    /// Reads it. Data beyond the bound ends the connection: whoever sends that is not a client.
    pub fn read(bytes: [u8; OPTION_HEADER_BYTES]) -> Result<Self, NbdError> {
        let mut rest = Reader(&bytes);
        let magic = rest.u64().unwrap_or(0);
        if magic != OPTION_MAGIC {
            return Err(NbdError::Magic { what: "an option", found: magic });
        }
        let (option, length) = (rest.u32().unwrap_or(0), rest.u32().unwrap_or(0));
        within("the data of an option", length)?;
        Ok(Self { option, length })
    }
}

fn within(what: &'static str, length: u32) -> Result<(), NbdError> {
    if length > OPTION_BYTES_MAX {
        return Err(NbdError::Length { what, found: length.into(), most: OPTION_BYTES_MAX.into() });
    }
    Ok(())
}

/// An option with its data.
pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_HEADER_BYTES + data.len());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(length_u32(data.len()).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What comes before the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option it answers.
    pub option: u32,
    /// One of [`reply_kind`], or one that nobody knows.
    pub kind: u32,
    /// Bytes of its data, within the bound.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads it.
    pub fn read(bytes: [u8; OPTION_REPLY_HEADER_BYTES]) -> Result<Self, NbdError> {
        let mut rest = Reader(&bytes);
        let magic = rest.u64().unwrap_or(0);
        if magic != OPTION_REPLY_MAGIC {
            return Err(NbdError::Magic { what: "a reply to an option", found: magic });
        }
        let (option, kind, length) = (rest.u32().unwrap_or(0), rest.u32().unwrap_or(0), rest.u32().unwrap_or(0));
        within("the data of a reply to an option", length)?;
        Ok(Self { option, kind, length })
    }

    /// Whether no further reply to this option comes.
    pub const fn is_last(self) -> bool {
        self.kind == reply_kind::ACK || self.is_error()
    }

    /// Whether it was refused; the data is a text then.
    pub const fn is_error(self) -> bool {
        self.kind & reply_kind::ERROR != 0
    }
}

/// Appends a reply to an option.
pub fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(length_u32(data.len()).to_be_bytes());
    out.extend(data);
}

/// Appends a refusal with its text.
pub fn put_error(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    put_reply(out, option, kind, bounded(text).as_bytes());
}

/// The text of a refusal, for people.
pub fn error_text(data: &[u8]) -> String {
    String::from_utf8_lossy(data).chars().filter(|character| !character.is_control()).take(512).collect()
}

/// The data of INFO and GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// What the client wants to know besides size and flags ([`info_kind`]).
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Reads it.
    pub fn read(data: &'a [u8]) -> Result<Self, NbdError> {
        let malformed = NbdError::Malformed { what: "the data of INFO or GO" };
        let mut rest = Reader(data);
        let read = (|| {
            let name = rest.text()?;
            let count = rest.u16()?;
            let wanted = (0..count).map(|_| rest.u16()).collect::<Option<Vec<_>>>()?;
            Some(Self { name, wanted })
        })();
        read.filter(|_| rest.is_empty()).ok_or(malformed)
    }

    /// The data.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = text_with_length(self.name);
        bytes.extend(u16::try_from(self.wanted.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(self.wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        bytes
    }
}

/// The data of SET_META_CONTEXT and LIST_META_CONTEXT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// Names or patterns of contexts; none, in a list, is all of them.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    /// Reads it.
    pub fn read(data: &'a [u8]) -> Result<Self, NbdError> {
        let malformed = NbdError::Malformed { what: "the data of a metadata option" };
        let mut rest = Reader(data);
        let read = (|| {
            let name = rest.text()?;
            let count = rest.u32()? as usize;
            // Each takes four bytes at least, so a count beyond that is no count.
            let queries = (0..count.min(data.len())).map(|_| rest.text()).collect::<Option<Vec<_>>>()?;
            (queries.len() == count).then_some(Self { name, queries })
        })();
        read.filter(|_| rest.is_empty()).ok_or(malformed)
    }

    /// The data.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = text_with_length(self.name);
        bytes.extend(length_u32(self.queries.len()).to_be_bytes());
        bytes.extend(self.queries.iter().flat_map(|query| text_with_length(query)));
        bytes
    }

    /// Whether these queries choose the one context there is. A list knows patterns, a choice does not.
    pub fn wants_allocation(&self, list: bool) -> bool {
        let all = list && self.queries.is_empty();
        all || self.queries.iter().any(|query| *query == BASE_ALLOCATION || (list && *query == "base:"))
    }
}

fn text_with_length(text: &str) -> Vec<u8> {
    let text = bounded(text);
    [&length_u32(text.len()).to_be_bytes()[..], text.as_bytes()].concat()
}

/// The data of a reply with a text and its length before it (SERVER).
pub fn server_data(name: &str) -> Vec<u8> {
    text_with_length(name)
}

/// The data of a META_CONTEXT reply.
pub fn meta_context_data(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes()[..], name.as_bytes()].concat()
}

/// Reads the data of a META_CONTEXT reply: number and name.
pub fn read_meta_context(data: &[u8]) -> Result<(u32, &str), NbdError> {
    let malformed = NbdError::Malformed { what: "a metadata context" };
    let mut rest = Reader(data);
    let id = rest.u32();
    id.zip(read_text(rest.0)).ok_or(malformed)
}

/// What an export is told by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size in bytes, and [`super::export_flag`].
    Export {
        /// Bytes.
        size: u64,
        /// Flags.
        flags: u16,
    },
    /// The name it is known by.
    Name(&'a str),
    /// A text for people.
    Description(&'a str),
    /// Sizes of requests, in bytes.
    BlockSize {
        /// Offsets and lengths are multiples of it.
        least: u32,
        /// What is done best.
        preferred: u32,
        /// Longest payload.
        most: u32,
    },
    /// A kind that is not known here.
    Other(u16),
}

impl<'a> Info<'a> {
    /// The data of an INFO reply.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Export { size, flags } => {
                (info_kind::EXPORT, [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat())
            }
            Self::Name(name) => (info_kind::NAME, bounded(name).as_bytes().to_vec()),
            Self::Description(text) => (info_kind::DESCRIPTION, bounded(text).as_bytes().to_vec()),
            Self::BlockSize { least, preferred, most } => {
                (info_kind::BLOCK_SIZE, [least, preferred, most].iter().flat_map(|size| size.to_be_bytes()).collect())
            }
            Self::Other(kind) => (*kind, Vec::new()),
        };
        [&kind.to_be_bytes()[..], &body].concat()
    }

    /// Reads the data of an INFO reply.
    pub fn read(data: &'a [u8]) -> Result<Self, NbdError> {
        let malformed = NbdError::Malformed { what: "information about an export" };
        let mut rest = Reader(data);
        let mut read = || {
            let kind = rest.u16()?;
            let mut text = || read_text(std::mem::take(&mut rest.0));
            Some(match kind {
                info_kind::EXPORT => Self::Export { size: rest.u64()?, flags: rest.u16()? },
                info_kind::NAME => Self::Name(text()?),
                info_kind::DESCRIPTION => Self::Description(text()?),
                info_kind::BLOCK_SIZE => {
                    Self::BlockSize { least: rest.u32()?, preferred: rest.u32()?, most: rest.u32()? }
                }
                other => {
                    rest.0 = &[];
                    Self::Other(other)
                }
            })
        };
        let info = read();
        info.filter(|_| rest.is_empty()).ok_or(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_what_the_protocol_says() {
        assert_eq!(option(number::LIST, &[]), b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        let mut out = Vec::new();
        put_error(&mut out, number::GO, reply_kind::ERR_UNKNOWN, "no");
        assert_eq!(out, b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x02no");
        let go = InfoRequest { name: "ab", wanted: vec![info_kind::BLOCK_SIZE] };
        assert_eq!(go.to_bytes(), b"\0\0\0\x02ab\0\x01\0\x03");
        let info = Info::Export { size: 0x1000, flags: 1 };
        assert_eq!(info.to_bytes(), b"\0\0\0\0\0\0\0\0\x10\0\0\x01");
    }

    #[test]
    fn what_says_more_than_it_has_is_refused() {
        let header = |length: u32| {
            let mut bytes = [0; OPTION_HEADER_BYTES];
            bytes.copy_from_slice(&option(number::GO, &[]));
            bytes[12..].copy_from_slice(&length.to_be_bytes());
            OptionHeader::read(bytes)
        };
        assert!(header(OPTION_BYTES_MAX).is_ok());
        assert!(matches!(header(OPTION_BYTES_MAX + 1), Err(NbdError::Length { found: 65537, .. })));
        assert!(OptionHeader::read([0; OPTION_HEADER_BYTES]).is_err());
        for data in
            [&b"\0\0\0\x09ab\0\0"[..], b"\xff\xff\xff\xffab\0\0", b"\0\0\0\x02ab\0\x02\0\x03", b"\0\0\0\0\0\0\0", b""]
        {
            assert!(InfoRequest::read(data).is_err(), "{data:?}");
        }
        assert!(MetaContextRequest::read(b"\0\0\0\0\xff\xff\xff\xff").is_err());
        assert!(InfoRequest::read(b"\0\0\0\x02\xff\xfe\0\0").is_err(), "a name that is not UTF-8");
    }

    #[test]
    fn contexts_are_chosen_by_name_and_listed_by_pattern() {
        let request = |queries: &[&'static str]| MetaContextRequest { name: "x", queries: queries.to_vec() };
        assert!(request(&["qemu:dirty-bitmap:a", BASE_ALLOCATION]).wants_allocation(false));
        assert!(!request(&["base:"]).wants_allocation(false) && request(&["base:"]).wants_allocation(true));
        assert!(!request(&[]).wants_allocation(false) && request(&[]).wants_allocation(true));
    }

    proptest! {
        #[test]
        fn requests_are_read_back(name in "[a-z:0-9-]{0,40}", wanted: Vec<u16>, queries in proptest::collection::vec("[a-z:]{0,20}", 0..9)) {
            let info = InfoRequest { name: &name, wanted };
            let bytes = info.to_bytes();
            prop_assert_eq!(InfoRequest::read(&bytes), Ok(info.clone()));
            let meta = MetaContextRequest { name: &name, queries: queries.iter().map(String::as_str).collect() };
            let bytes = meta.to_bytes();
            prop_assert_eq!(MetaContextRequest::read(&bytes), Ok(meta.clone()));
        }

        #[test]
        fn information_is_read_back(size: u64, flags: u16, sizes: [u32; 3], name in "[a-z]{0,9}") {
            let [least, preferred, most] = sizes;
            for info in [
                Info::Export { size, flags },
                Info::BlockSize { least, preferred, most },
                Info::Name(&name),
                Info::Description(&name),
            ] {
                let bytes = info.to_bytes();
                prop_assert_eq!(Info::read(&bytes), Ok(info.clone()));
            }
        }

        #[test]
        fn garbage_never_panics(data: Vec<u8>, header: [u8; 16], reply: [u8; 20]) {
            let _ = InfoRequest::read(&data);
            let _ = MetaContextRequest::read(&data);
            let _ = Info::read(&data);
            let _ = read_meta_context(&data);
            let _ = error_text(&data);
            let _ = OptionHeader::read(header);
            let _ = OptionReplyHeader::read(reply);
        }
    }
}
