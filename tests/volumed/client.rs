//! A small NBD client, made of the crate's own messages: one request after another.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use hearth::wire::nbd::option::{
    Info, InfoRequest, MetaContextRequest, OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, error_text, number, option,
    reply_kind,
};
use hearth::wire::nbd::reply::{CHUNK_LENGTH_BYTES, ChunkHead, Extent, REPLY_BYTES, ReplyHead, chunk_length};
use hearth::wire::nbd::request::{Command, RequestHeader};
use hearth::wire::nbd::{BASE_ALLOCATION, ErrorNumber, GREETING_BYTES, client_flags, command_flag, read_greeting};

/// Why a request was not done.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// The server said so.
    Refused(ErrorNumber, String),
    /// The connection broke.
    Broken(io::Error),
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl ClientError {
    /// The number the server said.
    pub(crate) fn number(&self) -> ErrorNumber {
        match self {
            Self::Refused(number, _) => *number,
            Self::Broken(error) => panic!("the connection broke: {error}"),
        }
    }
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) size: u64,
    pub(crate) flags: u16,
    cookie: u64,
}

type Done<T> = Result<T, ClientError>;

impl Client {
    pub(crate) fn connect(socket: &Path, export: &str) -> Done<Self> {
        Self::greet(UnixStream::connect(socket)?, export)
    }

    /// Shakes hands on a connection that is there: with structured replies and base:allocation.
    pub(crate) fn greet(socket: UnixStream, export: &str) -> Done<Self> {
        let mut client = Self { socket, size: 0, flags: 0, cookie: 0 };
        let mut greeting = [0; GREETING_BYTES];
        client.socket.read_exact(&mut greeting)?;
        client.socket.write_all(&client_flags(read_greeting(greeting).expect("a greeting")))?;
        client.option(number::STRUCTURED_REPLY, &[])?;
        let meta = MetaContextRequest { name: export, queries: vec![BASE_ALLOCATION] };
        client.option(number::SET_META_CONTEXT, &meta.to_bytes())?;
        let go = InfoRequest { name: export, wanted: Vec::new() };
        client.option(number::GO, &go.to_bytes())?;
        Ok(client)
    }

    fn option(&mut self, asked: u32, data: &[u8]) -> Done<()> {
        self.socket.write_all(&option(asked, data))?;
        loop {
            let mut head = [0; OPTION_REPLY_HEADER_BYTES];
            self.socket.read_exact(&mut head)?;
            let head = OptionReplyHeader::read(head).expect("a reply");
            let mut data = vec![0; head.length as usize];
            self.socket.read_exact(&mut data)?;
            if head.kind == reply_kind::INFO
                && let Ok(Info::Export { size, flags }) = Info::read(&data)
            {
                (self.size, self.flags) = (size, flags);
            }
            if head.is_error() {
                return Err(ClientError::Refused(ErrorNumber::Invalid, error_text(&data)));
            }
            if head.is_last() {
                return Ok(());
            }
        }
    }

    /// Sends a request; gives its number.
    pub(crate) fn send(&mut self, command: Command, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Done<u64> {
        self.cookie += 1;
        let header = RequestHeader { flags, command: command as u16, cookie: self.cookie, offset, length };
        self.socket.write_all(&[&header.to_bytes()[..], payload].concat())?;
        Ok(self.cookie)
    }

    /// Waits for the answer to the request that was sent last; bytes of a read go to `into`, from `offset` on.
    pub(crate) fn wait(&mut self, offset: u64, into: &mut [u8]) -> Done<Vec<Extent>> {
        let mut extents = Vec::new();
        loop {
            let mut head = [0; REPLY_BYTES];
            self.socket.read_exact(&mut head)?;
            let ReplyHead::Chunk { cookie, last, kind } = ReplyHead::read(head).expect("a reply") else {
                panic!("a simple reply")
            };
            assert_eq!(cookie, self.cookie);
            let mut length = [0; CHUNK_LENGTH_BYTES];
            self.socket.read_exact(&mut length)?;
            let length = chunk_length(kind, length).expect("a length");
            let mut body = vec![0; ChunkHead::bytes(kind, length) as usize];
            self.socket.read_exact(&mut body)?;
            match ChunkHead::read(kind, &body, length).expect("a chunk") {
                ChunkHead::None => {}
                ChunkHead::Data { offset: at, length } => {
                    let from = usize::try_from(at - offset).expect("an index");
                    self.socket.read_exact(&mut into[from..from + length as usize])?;
                }
                ChunkHead::Hole { offset: at, length } => {
                    let from = usize::try_from(at - offset).expect("an index");
                    into[from..from + length as usize].fill(0);
                }
                ChunkHead::BlockStatus { extents: told, .. } => extents = told,
                ChunkHead::Error { error, text, .. } => {
                    assert!(last);
                    return Err(ClientError::Refused(error, text));
                }
            }
            if last {
                return Ok(extents);
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Done<()> {
        self.write_with(0, offset, bytes)
    }

    pub(crate) fn write_with(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> Done<()> {
        let length = u32::try_from(bytes.len()).expect("a length");
        self.send(Command::Write, flags, offset, length, bytes)?;
        self.wait(0, &mut []).map(drop)
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Done<Vec<u8>> {
        let mut bytes = vec![0xee; length as usize];
        self.send(Command::Read, 0, offset, length, &[])?;
        self.wait(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn flush(&mut self) -> Done<()> {
        self.send(Command::Flush, 0, 0, 0, &[])?;
        self.wait(0, &mut []).map(drop)
    }

    pub(crate) fn zero(&mut self, flags: u16, offset: u64, length: u32) -> Done<()> {
        self.send(Command::WriteZeroes, flags, offset, length, &[])?;
        self.wait(0, &mut []).map(drop)
    }

    pub(crate) fn trim(&mut self, offset: u64, length: u32) -> Done<()> {
        self.send(Command::Trim, command_flag::FUA, offset, length, &[])?;
        self.wait(0, &mut []).map(drop)
    }

    pub(crate) fn status(&mut self, offset: u64, length: u32) -> Done<Vec<Extent>> {
        self.send(Command::BlockStatus, 0, offset, length, &[])?;
        self.wait(0, &mut [])
    }
}
