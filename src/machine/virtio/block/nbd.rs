//! The client's half of the NBD protocol, as far as a volume needs it: the fixed newstyle handshake with NBD_OPT_GO and
//! the empty export name, requests, and simple replies. Bytes in, bytes out; fuzzed. Numbers are big-endian; names and
//! sections are those of `doc/proto.md` of the NBD project.

/// "NBDMAGIC", the first bytes of a server.
const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// "IHAVEOPT": newstyle, and the beginning of each option.
const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// The beginning of each reply to an option.
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// The beginning of a request.
const REQUEST: u32 = 0x2560_9513;
/// The beginning of a simple reply.
const SIMPLE_REPLY: u32 = 0x6744_6698;

/// Handshake flags of both sides: fixed newstyle.
const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// And no zeroes at the end.
const FLAG_NO_ZEROES: u16 = 1 << 1;

const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
/// The bit of replies that are errors.
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Bytes of the server's first words: two magics and its flags.
const GREETING_BYTES: usize = 18;
/// Bytes of the head of an option's reply: magic, option, kind, length.
const OPTION_REPLY_BYTES: usize = 20;
/// Longest body of an option's reply that is read: an error's text, or a description of the export.
const BODY_BYTES_MAX: usize = 4096;
/// Most replies to the one option: there are five kinds of information.
const REPLIES_MAX: u8 = 16;

/// Bytes of a request, without the data of a write.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply, without the data of a read.
pub const REPLY_BYTES: usize = 16;

/// What a server that says nothing of its block sizes takes at once ("Block size constraints").
const BLOCK_BYTES_MAX_DEFAULT: u32 = 32 << 20;

/// Transmission flag: the flags mean something.
pub const HAS_FLAGS: u16 = 1;
/// The export is read-only.
pub const READ_ONLY: u16 = 1 << 1;
/// The server takes NBD_CMD_FLUSH.
pub const SEND_FLUSH: u16 = 1 << 2;
/// The server takes NBD_CMD_TRIM.
pub const SEND_TRIM: u16 = 1 << 5;
/// The server takes NBD_CMD_WRITE_ZEROES.
pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// A flush on one connection covers what was written on all.
pub const CAN_MULTI_CONN: u16 = 1 << 8;

/// Command flag of write-zeroes: the space stays allocated.
pub const NO_HOLE: u16 = 1 << 1;

/// What a server exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Its size.
    pub bytes: u64,
    /// Transmission flags; 0 if it does not say that they mean something.
    pub flags: u16,
    /// What offsets and lengths are multiples of.
    pub block_bytes_min: u32,
    /// Most bytes of data in one request.
    pub block_bytes_max: u32,
}

impl Export {
    /// Whether it has this transmission flag.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Why there is no export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The first bytes are not a server's.
    #[error("no NBD server of the newstyle handshake")]
    Greeting,
    /// It does not negotiate.
    #[error("the server's handshake is not the fixed newstyle one")]
    NotFixed,
    /// What answers the option is no reply to it.
    #[error("malformed reply to NBD_OPT_GO")]
    Reply,
    /// It answers without end.
    #[error("more than {REPLIES_MAX} replies to NBD_OPT_GO")]
    Flood,
    /// It has no such export, or does not give it.
    #[error("the server refuses the export: NBD_REP_ERR {}", .kind & !REP_ERROR)]
    Refused {
        /// The kind of its reply.
        kind: u32,
    },
    /// It said nothing of the export's size.
    #[error("the server did not say what it exports")]
    NoExport,
    /// The block sizes contradict each other.
    #[error("block sizes {min} to {max} bytes are impossible")]
    BlockSizes {
        /// Its smallest.
        min: u32,
        /// Its largest.
        max: u32,
    },
}

/// What a handshake comes to with some more bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// More has to come.
    More,
    /// These bytes are to be sent; then more has to come.
    Say(Vec<u8>),
    /// Requests may follow.
    Ready(Export),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Greeting,
    ReplyHead,
    ReplyBody { kind: u32, bytes: usize },
}

/// A handshake under way.
#[derive(Debug, Clone)]
pub struct Handshake {
    stage: Stage,
    part: Vec<u8>,
    replies: u8,
    export: Option<(u64, u16)>,
    blocks: (u32, u32),
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// Before the server's first byte.
    pub fn new() -> Self {
        let blocks = (1, BLOCK_BYTES_MAX_DEFAULT);
        Self { stage: Stage::Greeting, part: Vec::new(), replies: 0, export: None, blocks }
    }

    /// How many bytes it wants to see next, at most; above 0 until it is ready.
    pub fn wants(&self) -> usize {
        let whole = match self.stage {
            Stage::Greeting => GREETING_BYTES,
            Stage::ReplyHead => OPTION_REPLY_BYTES,
            Stage::ReplyBody { bytes, .. } => bytes,
        };
        whole.saturating_sub(self.part.len())
    }

    /// Takes what came, no more than it wants.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Step, HandshakeError> {
        self.part.extend(&bytes[..bytes.len().min(self.wants())]);
        if self.wants() > 0 {
            return Ok(Step::More);
        }
        let part = std::mem::take(&mut self.part);
        match self.stage {
            Stage::Greeting => self.greeted(&part),
            Stage::ReplyHead => self.reply_begins(&part),
            Stage::ReplyBody { kind, .. } => self.replied(kind, &part),
        }
    }

    fn greeted(&mut self, part: &[u8]) -> Result<Step, HandshakeError> {
        let mut part = Fields(part);
        if (part.u64(), part.u64()) != (Some(GREETING), Some(OPTION)) {
            return Err(HandshakeError::Greeting);
        }
        let flags = part.u16().unwrap_or(0);
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::NotFixed);
        }
        let mut say = Vec::new();
        say.extend(u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes());
        say.extend(OPTION.to_be_bytes());
        say.extend(OPT_GO.to_be_bytes());
        // The data's length; the name's length and no name; one piece of information is asked for.
        say.extend(8_u32.to_be_bytes());
        say.extend(0_u32.to_be_bytes());
        say.extend(1_u16.to_be_bytes());
        say.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.stage = Stage::ReplyHead;
        Ok(Step::Say(say))
    }

    fn reply_begins(&mut self, part: &[u8]) -> Result<Step, HandshakeError> {
        let mut part = Fields(part);
        if (part.u64(), part.u32()) != (Some(OPTION_REPLY), Some(OPT_GO)) {
            return Err(HandshakeError::Reply);
        }
        let (Some(kind), Some(bytes)) = (part.u32(), part.u32()) else { return Err(HandshakeError::Reply) };
        if kind & REP_ERROR != 0 {
            return Err(HandshakeError::Refused { kind });
        }
        let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes <= BODY_BYTES_MAX);
        let bytes = bytes.ok_or(HandshakeError::Reply)?;
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(HandshakeError::Flood);
        }
        if bytes == 0 {
            return self.replied(kind, &[]);
        }
        self.stage = Stage::ReplyBody { kind, bytes };
        Ok(Step::More)
    }

    fn replied(&mut self, kind: u32, body: &[u8]) -> Result<Step, HandshakeError> {
        self.stage = Stage::ReplyHead;
        match kind {
            REP_ACK if body.is_empty() => {
                let (bytes, flags) = self.export.ok_or(HandshakeError::NoExport)?;
                let (min, max) = self.blocks;
                // At least 64 KiB says the protocol; the smallest block is as much as is needed here.
                if !min.is_power_of_two() || max < min {
                    return Err(HandshakeError::BlockSizes { min, max });
                }
                let flags = if flags & HAS_FLAGS == 0 { 0 } else { flags };
                Ok(Step::Ready(Export { bytes, flags, block_bytes_min: min, block_bytes_max: max }))
            }
            REP_INFO => {
                let mut body = Fields(body);
                match body.u16().ok_or(HandshakeError::Reply)? {
                    INFO_EXPORT => {
                        let (Some(bytes), Some(flags)) = (body.u64(), body.u16()) else {
                            return Err(HandshakeError::Reply);
                        };
                        self.export = Some((bytes, flags));
                    }
                    INFO_BLOCK_SIZE => {
                        let (Some(min), Some(_preferred), Some(max)) = (body.u32(), body.u32(), body.u32()) else {
                            return Err(HandshakeError::Reply);
                        };
                        self.blocks = (min, max);
                    }
                    // A server may say more than it was asked.
                    _ => {}
                }
                Ok(Step::More)
            }
            _ => Err(HandshakeError::Reply),
        }
    }
}

/// Big-endian numbers from the front of bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const BYTES: usize>(&mut self) -> Option<[u8; BYTES]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.next().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.next().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.next().map(u64::from_be_bytes)
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Data follows the reply.
    Read = 0,
    /// Data follows the request.
    Write = 1,
    /// What was written is durable when it is answered.
    Flush = 3,
    /// The contents do not matter any more.
    Trim = 4,
    /// The range reads as zeroes from now on.
    WriteZeroes = 6,
}

/// A request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub command: Command,
    /// Command flags.
    pub flags: u16,
    /// What its reply is known by.
    pub handle: u64,
    /// Where.
    pub offset: u64,
    /// How much.
    pub bytes: u32,
}

impl Request {
    /// Its bytes.
    pub fn to_bytes(&self) -> [u8; REQUEST_BYTES] {
        let mut all = [0; REQUEST_BYTES];
        all[..4].copy_from_slice(&REQUEST.to_be_bytes());
        all[4..6].copy_from_slice(&self.flags.to_be_bytes());
        all[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        all[8..16].copy_from_slice(&self.handle.to_be_bytes());
        all[16..24].copy_from_slice(&self.offset.to_be_bytes());
        all[24..].copy_from_slice(&self.bytes.to_be_bytes());
        all
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was carried out.
    Done,
    /// This client may not (any more): NBD_EPERM.
    Fenced,
    /// The server goes away: NBD_ESHUTDOWN. Another one may carry it out.
    ShutDown,
    /// It failed, with this error.
    Failed(u32),
}

/// The head of a simple reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Which request's.
    pub handle: u64,
    /// What became of it.
    pub verdict: Verdict,
}

/// Bytes that are no simple reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the first bytes of a reply are {found:#010x}")]
pub struct NoReply {
    /// What stands in its magic's place.
    pub found: u32,
}

impl Reply {
    /// Reads one.
    pub fn parse(bytes: &[u8; REPLY_BYTES]) -> Result<Self, NoReply> {
        let [m0, m1, m2, m3, e0, e1, e2, e3, handle @ ..] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != SIMPLE_REPLY {
            return Err(NoReply { found: magic });
        }
        let verdict = match u32::from_be_bytes([e0, e1, e2, e3]) {
            0 => Verdict::Done,
            1 => Verdict::Fenced,
            108 => Verdict::ShutDown,
            other => Verdict::Failed(other),
        };
        Ok(Self { handle: u64::from_be_bytes(handle), verdict })
    }
}

#[cfg(test)]
mod tests;
