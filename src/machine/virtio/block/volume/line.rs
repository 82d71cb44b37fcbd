//! One connection of a volume's server: handshake, requests out, replies in, in any order. Data goes between the socket
//! and the guest's buffers without a copy in between. Nothing here waits: what does not go on now is gone on with later.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::tasks::{Part, PartKind, Tasks};
use crate::clock::Monotonic;
use crate::machine::ram::GuestRam;
use crate::machine::virtio::block::nbd::{self, Export, Handshake, HandshakeError, NoReply, Reply, Step, Verdict};
use crate::machine::virtio::spec::block::HEADER_BYTES;
use crate::sys::vectored;

/// Most requests under way on one connection. What it cannot take now, another one may.
const UNDER_WAY_MAX: usize = 16;

/// Zeroes that are written where the server cannot make a range zero.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes read at a time while shaking hands.
const SHAKING_BYTES: usize = 1024;

/// Why a connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    /// The server hung up.
    #[error("hung up")]
    HungUp,
    /// It says that it goes away.
    #[error("the server shuts down")]
    ShutDown,
    /// The socket failed.
    #[error("the connection: {0}")]
    Io(io::Error),
    /// There is no export.
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    /// What is exported is not the volume.
    #[error("{0}")]
    Unfit(String),
    /// What came is no reply.
    #[error("{0}")]
    NoReply(#[from] NoReply),
    /// It answers what was not asked.
    #[error("a reply to no request")]
    UnknownHandle,
    /// It says that it wrote what it was not sent.
    #[error("a write was answered before its data was sent")]
    Early,
}

/// A part with its answer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) part: Part,
    pub(super) verdict: Verdict,
    /// The handle it was sent with: they only grow.
    pub(super) handle: u64,
}

#[derive(Debug)]
enum Stage {
    Shaking(Handshake),
    Ready(Export),
}

/// What is on its way out.
#[derive(Debug)]
enum Out {
    /// Words of our own.
    Words(VecDeque<u8>),
    /// Data of a request.
    Data { handle: u64, part: Part, sent: u64 },
}

/// What comes next.
#[derive(Debug)]
enum In {
    Head { got: usize, bytes: [u8; nbd::REPLY_BYTES] },
    Data { handle: u64, part: Part, got: u64 },
}

const NEXT_HEAD: In = In::Head { got: 0, bytes: [0; nbd::REPLY_BYTES] };

/// One connection.
#[derive(Debug)]
pub(super) struct Line {
    socket: UnixStream,
    stage: Stage,
    /// When it was accepted.
    pub(super) since: Monotonic,
    /// Whether it gets no more requests, and is closed when those it has are answered.
    pub(super) retires: bool,
    out: VecDeque<Out>,
    coming: In,
    /// What was sent, or is on its way, and is not answered.
    sent: BTreeMap<u64, Part>,
    /// Answers that came before all data of their request was sent.
    early: Vec<(u64, Verdict)>,
}

impl Line {
    /// An accepted, non-blocking connection.
    pub(super) fn new(socket: UnixStream, since: Monotonic) -> Self {
        Self {
            socket,
            stage: Stage::Shaking(Handshake::new()),
            since,
            retires: false,
            out: VecDeque::new(),
            coming: NEXT_HEAD,
            sent: BTreeMap::new(),
            early: Vec::new(),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the server exports, once that is agreed upon.
    pub(super) fn export(&self) -> Option<&Export> {
        match &self.stage {
            Stage::Shaking(_) => None,
            Stage::Ready(export) => Some(export),
        }
    }

    /// Whether it has something to write.
    pub(super) fn has_more(&self) -> bool {
        !self.out.is_empty()
    }

    /// Requests under way.
    pub(super) fn under_way(&self) -> usize {
        self.sent.len()
    }

    /// Whether it takes another request.
    pub(super) fn has_room(&self) -> bool {
        self.export().is_some() && !self.retires && self.sent.len() < UNDER_WAY_MAX
    }

    /// Takes a part to the server. False if there is nothing to say: it is done.
    pub(super) fn send(&mut self, part: Part, handle: u64) -> bool {
        let Stage::Ready(export) = &self.stage else { return false };
        let Some(request) = part.request(export, handle) else { return false };
        self.say(&request.to_bytes());
        if request.command == nbd::Command::Write {
            self.out.push_back(Out::Data { handle, part, sent: 0 });
        }
        self.sent.insert(handle, part);
        true
    }

    fn say(&mut self, words: &[u8]) {
        match self.out.back_mut() {
            Some(Out::Words(more)) => more.extend(words),
            Some(Out::Data { .. }) | None => self.out.push_back(Out::Words(words.iter().copied().collect())),
        }
    }

    /// Writes until there is nothing more, or no room for it.
    pub(super) fn speak(&mut self, tasks: &Tasks, ram: &GuestRam) -> Result<Option<Answered>, LineError> {
        while let Some(out) = self.out.front_mut() {
            let written = match out {
                Out::Words(words) => self.socket.write(words.as_slices().0),
                Out::Data { part, sent, .. } => write_data(&self.socket, part, *sent, (tasks, ram)),
            };
            let count = match written {
                Ok(0) => return Err(LineError::HungUp),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            match out {
                Out::Words(words) => {
                    drop(words.drain(..count));
                    if words.is_empty() {
                        self.out.pop_front();
                    }
                }
                Out::Data { handle, part, sent } => {
                    *sent += count as u64;
                    let (handle, is_over) = (*handle, *sent >= part.bytes);
                    if is_over {
                        self.out.pop_front();
                        if let Some(answered) = self.was_early(handle) {
                            return Ok(Some(answered));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// The answer of a request whose data is now sent.
    fn was_early(&mut self, handle: u64) -> Option<Answered> {
        let at = self.early.iter().position(|(early, _)| *early == handle)?;
        let (_, verdict) = self.early.swap_remove(at);
        let part = self.sent.remove(&handle)?;
        Some(Answered { part, verdict, handle })
    }

    /// Goes on with the handshake. True when it is ready.
    pub(super) fn shake(&mut self) -> Result<bool, LineError> {
        let mut bytes = [0; SHAKING_BYTES];
        loop {
            let Stage::Shaking(handshake) = &mut self.stage else { return Ok(true) };
            let wants = handshake.wants().min(SHAKING_BYTES);
            let count = match self.socket.read(&mut bytes[..wants]) {
                Ok(0) => return Err(LineError::HungUp),
                Ok(count) => count,
                Err(error) if is_for_later(&error) => return Ok(false),
                Err(error) => return Err(failed(error)),
            };
            match handshake.take(&bytes[..count])? {
                Step::More => {}
                Step::Say(words) => self.say(&words),
                Step::Ready(export) => self.stage = Stage::Ready(export),
            }
        }
    }

    /// Reads up to the next answer; `None` if it is not all here yet.
    pub(super) fn hear(&mut self, tasks: &Tasks, ram: &GuestRam) -> Result<Option<Answered>, LineError> {
        loop {
            match &mut self.coming {
                In::Head { got, bytes } => {
                    match self.socket.read(&mut bytes[*got..]) {
                        Ok(0) => return Err(LineError::HungUp),
                        Ok(count) => *got += count,
                        Err(error) if is_for_later(&error) => return Ok(None),
                        Err(error) => return Err(failed(error)),
                    }
                    if *got < nbd::REPLY_BYTES {
                        continue;
                    }
                    let reply = Reply::parse(bytes)?;
                    self.coming = NEXT_HEAD;
                    if let Some(answered) = self.replied(reply)? {
                        return Ok(Some(answered));
                    }
                }
                In::Data { handle, part, got } => {
                    match read_data(&self.socket, part, *got, (tasks, ram)) {
                        Ok(0) => return Err(LineError::HungUp),
                        Ok(count) => *got += count as u64,
                        Err(error) if is_for_later(&error) => return Ok(None),
                        Err(error) => return Err(failed(error)),
                    }
                    if *got >= part.bytes {
                        let (handle, part) = (*handle, *part);
                        self.coming = NEXT_HEAD;
                        self.sent.remove(&handle);
                        return Ok(Some(Answered { part, verdict: Verdict::Done, handle }));
                    }
                }
            }
        }
    }

    /// What a reply's head says.
    fn replied(&mut self, Reply { handle, verdict }: Reply) -> Result<Option<Answered>, LineError> {
        let part = *self.sent.get(&handle).ok_or(LineError::UnknownHandle)?;
        if verdict == Verdict::ShutDown {
            // It stays among those that are sent, and goes back with them.
            return Err(LineError::ShutDown);
        }
        if verdict == Verdict::Done && part.kind == PartKind::Read {
            self.coming = In::Data { handle, part, got: 0 };
            return Ok(None);
        }
        let is_unsent = |out: &Out| matches!(out, Out::Data { handle: other, .. } if *other == handle);
        if self.out.iter().any(is_unsent) {
            // An error may come before the data was taken, and the data still has to follow.
            if verdict == Verdict::Done || self.early.iter().any(|(early, _)| *early == handle) {
                return Err(LineError::Early);
            }
            self.early.push((handle, verdict));
            return Ok(None);
        }
        self.sent.remove(&handle);
        Ok(Some(Answered { part, verdict, handle }))
    }

    /// The end of it: what was not answered, in the order it was sent.
    pub(super) fn close(self) -> Vec<Part> {
        self.sent.into_values().collect()
    }
}

/// Moves data of a request out.
fn write_data(socket: &UnixStream, part: &Part, sent: u64, at: (&Tasks, &GuestRam)) -> io::Result<usize> {
    let left = usize::try_from(part.bytes - sent).unwrap_or(usize::MAX);
    if let PartKind::Zero { .. } = part.kind {
        let mut socket = socket;
        return socket.write(&ZEROES[..left.min(ZEROES.len())]);
    }
    let (tasks, ram) = at;
    let chain = tasks.chain(part.task).ok_or(io::ErrorKind::NotFound)?;
    let from = HEADER_BYTES + usize::try_from(part.at + sent).map_err(io::Error::other)?;
    vectored::send(socket, &chain.readable_slices(ram, from, left).map_err(io::Error::other)?)
}

/// Moves data of a request in.
fn read_data(socket: &UnixStream, part: &Part, got: u64, at: (&Tasks, &GuestRam)) -> io::Result<usize> {
    let (tasks, ram) = at;
    let chain = tasks.chain(part.task).ok_or(io::ErrorKind::NotFound)?;
    let left = usize::try_from(part.bytes - got).unwrap_or(usize::MAX);
    let to = usize::try_from(part.at + got).map_err(io::Error::other)?;
    vectored::read(socket, &chain.writable_slices(ram, to, left).map_err(io::Error::other)?)
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn failed(error: io::Error) -> LineError {
    let is_gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    if is_gone { LineError::HungUp } else { LineError::Io(error) }
}
