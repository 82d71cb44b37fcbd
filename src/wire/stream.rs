//! Frames of a migration's stream, VMM to VMM: guest memory, saved state, packets that were held, and their
//! acknowledgements. The rules are in `PROTOCOL.md`; here are the bytes.
//!
//! ```text
//! magic u32 "HRMS" | version u16 | kind u16 | length u32 | sequence u32 | checksum [u8; 8]     (little-endian)
//! ```
//! `length` bytes follow. The sequence counts the frames of one direction of one connection from 0: one that is missing,
//! repeated or in another order is found. The checksum is XXH3 with 64 bits of the header before it and the body (in version
//! 1 the start of their blake3 digest): on a connection without TLS nothing else would find a flipped bit before the guest
//! does. It is no defence against whoever writes frames: that is what TLS is for.
//!
//! Nothing is allocated for a length that is not checked, and no page number is believed: [`Pages::check`] compares it with
//! the memory there is.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

use super::packed::UnpackError;
use crate::units::{PAGE_BYTES, PageCount, PageIndex};

/// First bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"HRMS");

/// Version of the stream this build speaks. 2 has [`Kind::PackedPages`], and a checksum that takes a tenth of the time.
pub const VERSION: u16 = 2;

/// Oldest version this build still speaks: hosts are upgraded one after the other. Both ends write in the version that the
/// source says Hello in, which is one that the target's agent said it knows.
pub const VERSION_MIN: u16 = 1;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 24;

/// Where the checksum begins in a header.
const CHECKED_BYTES: usize = 16;

/// Most pages in one frame: 1 MiB, so that an acknowledgement covers little and a frame fits a buffer that stays.
pub const PAGES_MAX: u32 = 256;

/// Bytes of a page.
const PAGE: u32 = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

/// Longest body in bytes: that many pages and what is said of them.
pub const BODY_BYTES_MAX: u32 = PAGES_HEAD_BYTES + PAGES_MAX * PAGE;

/// Most bytes of saved state in all frames of it together. A machine with 16 vCPUs and 19 devices has some 300 KiB.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// Longest packet that is handed over: 64 KiB of segmented TCP and its headers.
pub const PACKET_BYTES_MAX: u32 = 66_000;

/// What a page frame says before its pages.
pub const PAGES_HEAD_BYTES: u32 = 12;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// First on each connection, both ways: [`Hello`].
    Hello = 1,
    /// Pages as they are in memory: [`Pages`], then their bytes.
    Pages = 2,
    /// Pages that hold zeroes only: [`Pages`].
    ZeroPages = 3,
    /// The round is over on this connection: its number.
    RoundEnd = 4,
    /// A part of the saved state.
    State = 5,
    /// A packet that was held, in order: the number of the interface, then the frame.
    Packet = 6,
    /// All was sent; the digest of the state.
    End = 7,
    /// No packet follows; how many there were.
    PacketsEnd = 8,
    /// Pages as an lz4 block, shorter than they are: [`Pages`], then the block ([`super::packed`]). Since version 2.
    PackedPages = 9,
    /// To the source: how many frames of this connection are in the target's memory.
    Ack = 16,
    /// To the source: the machine stands ready, and its state has this digest.
    Ready = 17,
    /// Either way: why it cannot go on, as text.
    Abort = 18,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Hello,
        Self::Pages,
        Self::ZeroPages,
        Self::RoundEnd,
        Self::State,
        Self::Packet,
        Self::End,
        Self::PacketsEnd,
        Self::PackedPages,
        Self::Ack,
        Self::Ready,
        Self::Abort,
    ];

    /// The first version of the stream that has it.
    pub const fn since_version(self) -> u16 {
        match self {
            Self::Hello
            | Self::Pages
            | Self::ZeroPages
            | Self::RoundEnd
            | Self::State
            | Self::Packet
            | Self::End
            | Self::PacketsEnd
            | Self::Ack
            | Self::Ready
            | Self::Abort => 1,
            Self::PackedPages => 2,
        }
    }

    /// The lengths its body may have.
    const fn lengths(self) -> (u32, u32) {
        match self {
            Self::Hello => (HELLO_BYTES, HELLO_BYTES),
            Self::Pages => (PAGES_HEAD_BYTES + PAGE, BODY_BYTES_MAX),
            // As many as the pages have is not shorter.
            Self::PackedPages => (PAGES_HEAD_BYTES + 1, BODY_BYTES_MAX - 1),
            Self::ZeroPages => (PAGES_HEAD_BYTES, PAGES_HEAD_BYTES),
            Self::RoundEnd | Self::Ack => (4, 4),
            Self::State => (1, BODY_BYTES_MAX),
            Self::Packet => (2, 1 + PACKET_BYTES_MAX),
            Self::End | Self::Ready => (32, 32),
            Self::PacketsEnd => (8, 8),
            Self::Abort => (1, 1024),
        }
    }
}

/// Why bytes are not a frame that may come here. The connection is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Not this protocol.
    #[error("the first bytes are {found:#010x}, not a migration's stream")]
    Magic {
        /// What was there.
        found: u32,
    },
    /// A version this build does not speak.
    #[error("stream version {found}, this build speaks {VERSION_MIN} to {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// Another version than the connection began with.
    #[error("a frame of version {found} on a connection that began with {began}")]
    OtherVersion {
        /// The version found.
        found: u16,
        /// The version it began with.
        began: u16,
    },
    /// No such kind.
    #[error("frame kind {found} is none of version {version} of a migration's stream")]
    Kind {
        /// The kind found.
        found: u16,
        /// The version it came in.
        version: u16,
    },
    /// A length that a frame of this kind cannot have.
    #[error("a {kind:?} frame of {found} bytes; {min} to {max} are allowed")]
    Length {
        /// The kind.
        kind: Kind,
        /// The length found.
        found: u32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// A frame is missing, or came twice.
    #[error("frame {found} where {wanted} has to follow")]
    Sequence {
        /// The number found.
        found: u32,
        /// The number expected.
        wanted: u32,
    },
    /// The bytes are not those that were sent.
    #[error("the checksum of frame {sequence} does not fit its bytes")]
    Checksum {
        /// The frame's number.
        sequence: u32,
    },
    /// Pages that are none, or not of this guest.
    #[error("{count} pages from page {first}, of a guest with {memory} pages")]
    Pages {
        /// The first.
        first: u64,
        /// How many.
        count: u32,
        /// What the guest has.
        memory: u64,
    },
    /// Packed pages that are none.
    #[error(transparent)]
    Packed(#[from] UnpackError),
    /// A frame that has no place here.
    #[error("a {found:?} frame where {wanted} was expected")]
    Unexpected {
        /// What came.
        found: Kind,
        /// What was expected.
        wanted: &'static str,
    },
    /// It is another migration's connection.
    #[error("the connection belongs to another migration: its {what} is not this one's")]
    Foreign {
        /// What differs.
        what: &'static str,
    },
    /// More state than a machine has.
    #[error("more than {STATE_BYTES_MAX} bytes of state")]
    TooMuchState,
    /// The state is not the one that was sent.
    #[error("the state's digest does not fit its bytes")]
    OtherState,
    /// A greeting that contradicts itself.
    #[error("connection {connection} of {connections}; 1 to {CONNECTIONS_MAX} there are")]
    Connections {
        /// The connection's number.
        connection: u8,
        /// How many there are said to be.
        connections: u8,
    },
}

/// A frame's header, checked as far as it can be without the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The version it is written in.
    pub version: u16,
    /// What it is.
    pub kind: Kind,
    /// Bytes that follow.
    pub length: u32,
    /// Its number among the frames of this direction.
    pub sequence: u32,
    head: [u8; CHECKED_BYTES],
    checksum: [u8; 8],
}

impl Header {
    /// A header in this version, for a body in these parts, which follow each other.
    pub fn for_body(
        version: u16,
        kind: Kind,
        sequence: u32,
        body: &[&[u8]],
    ) -> Result<[u8; HEADER_BYTES], StreamError> {
        check_version(version, kind)?;
        let length: usize = body.iter().map(|part| part.len()).sum();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        check_length(kind, length)?;
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&version.to_le_bytes());
        bytes[6..8].copy_from_slice(&(kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..16].copy_from_slice(&sequence.to_le_bytes());
        let checksum = checksum(version, &bytes[..CHECKED_BYTES], body);
        bytes[CHECKED_BYTES..].copy_from_slice(&checksum);
        Ok(bytes)
    }

    /// Checks a header that is to be the frame of this number.
    pub fn read(bytes: &[u8; HEADER_BYTES], wanted: u32) -> Result<Self, StreamError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (magic, version, number, length, sequence) = (u32_at(0), u16_at(4), u16_at(6), u32_at(8), u32_at(12));
        if magic != MAGIC {
            return Err(StreamError::Magic { found: magic });
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u16 == number);
        check_version(version, kind.unwrap_or(Kind::Hello))?;
        let kind = kind.ok_or(StreamError::Kind { found: number, version })?;
        check_length(kind, length)?;
        if sequence != wanted {
            return Err(StreamError::Sequence { found: sequence, wanted });
        }
        let (mut head, mut checksum) = ([0; CHECKED_BYTES], [0; 8]);
        head.copy_from_slice(&bytes[..CHECKED_BYTES]);
        checksum.copy_from_slice(&bytes[CHECKED_BYTES..]);
        Ok(Self { version, kind, length, sequence, head, checksum })
    }

    /// Whether the body, in these parts, is the one that was sent.
    pub fn check(&self, body: &[&[u8]]) -> Result<(), StreamError> {
        if checksum(self.version, &self.head, body) == self.checksum {
            Ok(())
        } else {
            Err(StreamError::Checksum { sequence: self.sequence })
        }
    }
}

/// Whether this build speaks a version, and that has the kind.
fn check_version(version: u16, kind: Kind) -> Result<(), StreamError> {
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(StreamError::Version { found: version });
    }
    match version < kind.since_version() {
        true => Err(StreamError::Kind { found: kind as u16, version }),
        false => Ok(()),
    }
}

fn check_length(kind: Kind, found: u32) -> Result<(), StreamError> {
    let (min, max) = kind.lengths();
    let odd = kind == Kind::Pages && !found.saturating_sub(min).is_multiple_of(PAGE);
    if found < min || found > max || odd {
        return Err(StreamError::Length { kind, found, min, max });
    }
    Ok(())
}

fn checksum(version: u16, head: &[u8], body: &[&[u8]]) -> [u8; 8] {
    let parts = std::iter::once(&head).chain(body);
    if version < 2 {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(part);
        }
        let mut start = [0; 8];
        start.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        return start;
    }
    let mut hasher = XxHash3_64::new();
    parts.for_each(|part| hasher.write(part));
    hasher.finish().to_le_bytes()
}

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    first: u64,
    count: u32,
}

impl Pages {
    /// Those of a run, if a frame may have them: 1 to [`PAGES_MAX`] with their bytes, any number of zeroes.
    pub fn new(first: PageIndex, count: PageCount) -> Option<Self> {
        let count = u32::try_from(count.0).ok().filter(|count| *count > 0)?;
        Some(Self { first: first.0, count })
    }

    /// The bytes in front of the pages' own.
    pub fn to_bytes(self) -> [u8; PAGES_HEAD_BYTES as usize] {
        let mut bytes = [0; PAGES_HEAD_BYTES as usize];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    /// Reads them; nothing is believed yet.
    pub fn from_bytes(bytes: [u8; PAGES_HEAD_BYTES as usize]) -> Self {
        let [a, b, c, d, e, f, g, h, count @ ..] = bytes;
        Self { first: u64::from_le_bytes([a, b, c, d, e, f, g, h]), count: u32::from_le_bytes(count) }
    }

    /// The run, if the guest has all of it, and the frame a body of that many pages, or a block for no more than a frame
    /// may have; zeroes have none. `memory` gives how many pages there are from the first one on, without a gap.
    pub fn check(
        self,
        kind: Kind,
        body_bytes: u32,
        memory: impl FnOnce(PageIndex) -> PageCount,
    ) -> Result<(PageIndex, PageCount), StreamError> {
        let there = memory(PageIndex(self.first)).0;
        let has = body_bytes.saturating_sub(PAGES_HEAD_BYTES) / PAGE;
        let fits = if kind == Kind::ZeroPages {
            true
        } else if kind == Kind::PackedPages {
            // A block is shorter than what it becomes.
            (has + 1..=PAGES_MAX).contains(&self.count)
        } else {
            has == self.count
        };
        if self.count == 0 || !fits || u64::from(self.count) > there {
            return Err(StreamError::Pages { first: self.first, count: self.count, memory: there });
        }
        Ok((PageIndex(self.first), PageCount(u64::from(self.count))))
    }
}

/// Digest of saved state, which both ends compare.
pub fn state_digest(state: &[u8]) -> [u8; 32] {
    *blake3::hash(state).as_bytes()
}

/// Most connections of one stream.
pub const CONNECTIONS_MAX: u8 = 8;

/// Bytes of a greeting.
const HELLO_BYTES: u32 = 34;

/// What each side says first on each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Made for this migration by its target, and known to these two VMMs only.
    pub token: [u8; 32],
    /// Which of the connections this is, from 0.
    pub connection: u8,
    /// How many there are.
    pub connections: u8,
}

impl Hello {
    /// As bytes.
    pub fn to_bytes(self) -> [u8; HELLO_BYTES as usize] {
        let mut bytes = [0; HELLO_BYTES as usize];
        bytes[..32].copy_from_slice(&self.token);
        bytes[32] = self.connection;
        bytes[33] = self.connections;
        bytes
    }

    /// Whether it is the expected one; which of the connections it is, its reader may leave to it.
    pub fn check(self, expected: Self) -> Result<(), StreamError> {
        let what = if self.token != expected.token {
            "token"
        } else if self.connections != expected.connections {
            "number of connections"
        } else if self.connection != expected.connection {
            "number"
        } else {
            return Ok(());
        };
        Err(StreamError::Foreign { what })
    }

    /// Reads one that does not contradict itself. Whether the token is the right one is the reader's to see.
    pub fn from_bytes(bytes: [u8; HELLO_BYTES as usize]) -> Result<Self, StreamError> {
        let [token @ .., connection, connections] = bytes;
        if !(1..=CONNECTIONS_MAX).contains(&connections) || connection >= connections {
            return Err(StreamError::Connections { connection, connections });
        }
        Ok(Self { token, connection, connections })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: [u8; 4096] = [7; 4096];

    fn header(kind: Kind, sequence: u32, body: &[&[u8]]) -> [u8; HEADER_BYTES] {
        Header::for_body(VERSION, kind, sequence, body).unwrap()
    }

    #[test]
    fn a_frame_is_read_back_and_a_flipped_bit_is_found() {
        let pages = Pages::new(PageIndex(3), PageCount(2)).unwrap();
        let head = pages.to_bytes();
        let body: [&[u8]; 3] = [&head, &PAGE, &PAGE];
        let bytes = header(Kind::Pages, 9, &body);
        let read = Header::read(&bytes, 9).unwrap();
        assert_eq!((read.kind, read.length, read.version), (Kind::Pages, 12 + 8192, VERSION));
        assert_eq!(read.check(&body), Ok(()));
        // However the body is cut.
        assert_eq!(read.check(&[&body.concat()]), Ok(()));
        for at in [0, 11, 12, 8203] {
            let mut body = body.concat();
            body[at] ^= 4;
            assert_eq!(read.check(&[&body]), Err(StreamError::Checksum { sequence: 9 }));
        }
        assert_eq!(Header::read(&bytes, 8), Err(StreamError::Sequence { found: 9, wanted: 8 }));
        assert_eq!(Pages::from_bytes(head), pages);
    }

    #[test]
    fn lengths_have_bounds() {
        let odd = [0; 12 + 4096 + 1];
        assert!(matches!(Header::for_body(VERSION, Kind::Pages, 0, &[&odd]), Err(StreamError::Length { .. })));
        let most = vec![0; BODY_BYTES_MAX as usize];
        assert!(Header::for_body(VERSION, Kind::Pages, 0, &[&most]).is_ok());
        assert!(Header::for_body(VERSION, Kind::State, 0, &[&most]).is_ok());
        for (kind, length) in [
            (Kind::Pages, most.len() + 4096),
            (Kind::PackedPages, most.len()),
            (Kind::PackedPages, 12),
            (Kind::State, most.len() + 1),
            (Kind::State, 0),
            (Kind::Hello, 33),
        ] {
            let body = vec![0; length];
            let refused = Header::for_body(VERSION, kind, 0, &[&body]);
            assert!(matches!(refused, Err(StreamError::Length { .. })), "{kind:?} of {length}");
        }
        assert_eq!(Header::read(&[0; HEADER_BYTES], 0), Err(StreamError::Magic { found: 0 }));
    }

    #[test]
    fn pages_are_compared_with_the_memory_there_is() {
        // A guest of ten pages.
        let memory = |first: PageIndex| PageCount(10_u64.saturating_sub(first.0));
        let check = |kind, first, count, body| {
            let mut bytes = [0; PAGES_HEAD_BYTES as usize];
            bytes[..8].copy_from_slice(&u64::to_le_bytes(first));
            bytes[8..].copy_from_slice(&u32::to_le_bytes(count));
            Pages::from_bytes(bytes).check(kind, body, memory)
        };
        assert_eq!(check(Kind::ZeroPages, 0, 10, 12), Ok((PageIndex(0), PageCount(10))));
        assert_eq!(check(Kind::Pages, 9, 1, 12 + 4096), Ok((PageIndex(9), PageCount(1))));
        for (kind, first, count, body) in [
            (Kind::ZeroPages, 0, 11, 12),
            (Kind::ZeroPages, 10, 1, 12),
            (Kind::ZeroPages, u64::MAX, 1, 12),
            (Kind::ZeroPages, 0, 0, 12),
            (Kind::Pages, 0, 2, 12 + 4096),
            (Kind::Pages, 0, 1, 12 + 8192),
            (Kind::Pages, 9, 2, 12 + 8192),
        ] {
            assert!(matches!(check(kind, first, count, body), Err(StreamError::Pages { .. })), "{first} {count}");
        }
    }

    #[test]
    fn packed_pages_are_fewer_than_a_frame_has_and_shorter_than_they_are() {
        let check = |count, body| {
            let mut bytes = [0; PAGES_HEAD_BYTES as usize];
            bytes[8..].copy_from_slice(&u32::to_le_bytes(count));
            Pages::from_bytes(bytes).check(Kind::PackedPages, body, |_| PageCount(1000)).is_ok()
        };
        let fits = [(1, 13), (1, 12 + 4095), (256, 13), (256, BODY_BYTES_MAX - 1), (2, 12 + 4096)];
        let wrong = [(0, 13), (1, 12 + 4096), (257, 13), (u32::MAX, 13), (2, 12 + 8192)];
        assert!(fits.iter().all(|(count, body)| check(*count, *body)));
        assert!(!wrong.iter().any(|(count, body)| check(*count, *body)));
    }

    #[test]
    fn a_version_has_its_kinds_and_no_later_ones() {
        let body: [&[u8]; 1] = [&[0; 14]];
        let refused = Err(StreamError::Kind { found: 9, version: 1 });
        assert_eq!(Header::for_body(1, Kind::PackedPages, 0, &body), refused);
        let mut bytes = header(Kind::PackedPages, 0, &body);
        assert_eq!(Header::read(&bytes, 0).map(|header| header.kind), Ok(Kind::PackedPages));
        bytes[4] = 1;
        assert_eq!(Header::read(&bytes, 0), Err(StreamError::Kind { found: 9, version: 1 }));
        for version in [0, VERSION + 1] {
            let refused = Err(StreamError::Version { found: version });
            assert_eq!(Header::for_body(version, Kind::Hello, 0, &[&[0; 34]]), refused);
        }
    }

    /// The bytes of version 1, which hosts of the version before send and take.
    #[test]
    fn version_1_stays_as_it_was() {
        let pages = Pages::new(PageIndex(3), PageCount(1)).unwrap().to_bytes();
        let bytes = Header::for_body(1, Kind::Pages, 2, &[&pages, &PAGE]).unwrap();
        assert_eq!(bytes[..16], [0x48, 0x52, 0x4d, 0x53, 1, 0, 2, 0, 12, 16, 0, 0, 2, 0, 0, 0]);
        let digest = blake3::hash(&[&bytes[..16], &pages, &PAGE].concat());
        assert_eq!(bytes[16..], digest.as_bytes()[..8]);
        assert_eq!(pages, [3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        let kinds: Vec<u16> =
            Kind::ALL.iter().filter(|kind| kind.since_version() == 1).map(|kind| *kind as u16).collect();
        assert_eq!(kinds, [1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 18]);
    }

    /// As whoever writes another end would have it: the hash of all of it in one piece, which has a reference of its own.
    #[test]
    fn version_2_has_the_checksum_that_is_written_down() {
        assert_eq!(XxHash3_64::oneshot(b""), 0x2d06_8005_38d3_94c2);
        let bytes = header(Kind::State, 0, &[b"some ", b"state"]);
        let whole = [&bytes[..16], b"some state"].concat();
        assert_eq!(bytes[16..], XxHash3_64::oneshot(&whole).to_le_bytes());
    }

    #[test]
    fn a_greeting_is_of_one_of_the_connections() {
        for (connection, connections, is_right) in
            [(0, 1, true), (7, 8, true), (1, 1, false), (0, 0, false), (0, 9, false)]
        {
            let hello = Hello { token: [5; 32], connection, connections };
            assert_eq!(Hello::from_bytes(hello.to_bytes()).is_ok(), is_right, "{connection} of {connections}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: [u8; HEADER_BYTES], sequence: u32, body in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(header) = Header::read(&bytes, sequence) {
                prop_assert!(header.length <= BODY_BYTES_MAX);
                let _ = header.check(&[&body]);
            }
        }

        #[test]
        fn a_header_that_was_changed_is_refused(at in 0..HEADER_BYTES, bit in 0_u32..8, body in proptest::collection::vec(any::<u8>(), 1..1000)) {
            let mut bytes = header(Kind::State, 5, &[&body]);
            bytes[at] ^= 1 << bit;
            let accepted = Header::read(&bytes, 5).is_ok_and(|header| header.check(&[&body]).is_ok());
            prop_assert!(!accepted);
        }
    }
}
