//! Fills the memory of a machine whose image is only partly on this host, while it is built and while it runs: one thread
//! of its own, which asks the agent for what is reached and maps what the agent says is there.
//!
//! ```text
//!  who reaches a missing chunk     this thread                          the agent
//!  waits (in the kernel) ────────▶ not asked for yet: Wanted(chunk) ──▶ fetches it, verifies it, writes it to the file
//!                                  maps the file there          ◀────── Present(first, count), also unasked
//!  goes on             ◀────────── wakes who waits; Mapped(how many) ─▶
//! ```
//! It must never wait for guest memory itself, so it reads and writes none. It is started before anything looks at the
//! memory: the first thread does as it builds the machine. Agents connect to a listening socket of its own, since the
//! first thread may be waiting for a device that waits for a chunk; the newest connection is the one that counts, and
//! what is wanted is said on each from the beginning. Nothing that an agent says can harm what the guest wrote: a chunk
//! that is there is never mapped again.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::log;
use crate::machine::filling::{CHUNKS_MAX, PutChunksError};
use crate::machine::{FillingRam, Presence};
use crate::report;
use crate::sys::thread::{self, ThreadClass};
use crate::wire::control::FILLED_CHUNKS_MAX;
use crate::wire::filling::{FRAME_BYTES, FillingError, ToAgent, ToVmm};

/// The agent refuses what this process would.
const _: () = assert!(FILLED_CHUNKS_MAX == CHUNKS_MAX);

/// Frames that are read, or written, at once.
const FRAMES: usize = 64;

/// Why a connection is of no further use.
#[derive(Debug, thiserror::Error)]
enum LineError {
    /// The other end is gone: its process ends, or another one comes.
    #[error("hung up")]
    HungUp,
    /// The socket failed.
    #[error("the connection")]
    Io(#[source] io::Error),
    /// What came is not this protocol.
    #[error("read a frame")]
    Frame(#[from] FillingError),
    /// What came does not fit the memory, or could not be mapped.
    #[error(transparent)]
    Put(#[from] PutChunksError),
}

/// The thread, as the first thread has it. Dropped before there is a machine it ends; a machine that ends must not drop it
/// while chunks are missing and threads may still look.
#[derive(Debug)]
pub(super) struct FillThread {
    end: Arc<EventFd>,
    presence: Arc<Presence>,
}

impl FillThread {
    /// Starts the thread, which takes connections from here on.
    pub(super) fn start(filling: FillingRam, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let end = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let presence = Arc::clone(filling.presence());
        let filler = Filler {
            end: Arc::clone(&end),
            listener,
            presence: Arc::clone(&presence),
            filling: Some(filling),
            is_deaf: false,
            wanted: BTreeSet::new(),
            line: None,
        };
        drop(thread::start(ThreadClass::Fill, "fill".to_owned(), move || filler.run())?);
        Ok(Self { end, presence })
    }

    /// Which chunks are there.
    pub(super) fn presence(&self) -> &Arc<Presence> {
        &self.presence
    }
}

impl Drop for FillThread {
    fn drop(&mut self) {
        let _ = self.end.write(1);
    }
}

/// The thread's own side.
struct Filler {
    /// Readable when there is no machine: the memory is nobody's.
    end: Arc<EventFd>,
    listener: UnixListener,
    presence: Arc<Presence>,
    /// The memory; `None` once all of it is there.
    filling: Option<FillingRam>,
    /// Whether the kernel no longer tells who waits.
    is_deaf: bool,
    /// Missing chunks that somebody waits for.
    wanted: BTreeSet<u32>,
    line: Option<Line>,
}

/// What poll(2) said is ready.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    end: bool,
    listener: bool,
    faults: bool,
    line: bool,
}

impl Filler {
    fn run(mut self) {
        loop {
            self.speak();
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Who waits for memory goes on waiting: zeroes in its place would be worse.
                    log::say(format_args!("filling memory: {error}"));
                    std::mem::forget(self.filling.take());
                    return;
                }
            };
            if ready.end {
                return;
            }
            if ready.listener {
                self.accept();
            }
            if ready.faults {
                self.look();
            }
            // One that was just replaced has nothing yet, which reading it says too.
            if ready.line {
                self.hear();
            }
            if self.presence.missing() == 0 {
                // Nobody waits any more, nor will.
                self.filling = None;
            }
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> io::Result<Ready> {
        let faults = self.filling.as_ref().filter(|_| !self.is_deaf);
        let mut sources =
            [self.end.as_fd(), self.listener.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN)).to_vec();
        sources.extend(faults.map(|filling| PollFd::new(filling.as_fd(), PollFlags::POLLIN)));
        if let Some(line) = &self.line {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, line.has_more());
            sources.push(PollFd::new(line.socket.as_fd(), events));
        }
        poll(&mut sources, PollTimeout::NONE)?;
        let mut any = sources.iter().map(|source| source.any().unwrap_or(true));
        Ok(Ready {
            end: any.next() == Some(true),
            listener: any.next() == Some(true),
            faults: faults.is_some() && any.next() == Some(true),
            line: self.line.is_some() && any.next() == Some(true),
        })
    }

    /// Takes another connection in the place of the one there is.
    fn accept(&mut self) {
        // One that cannot be taken is hung up on: the agent tries again.
        let Ok((socket, _)) = self.listener.accept() else { return };
        if socket.set_nonblocking(true).is_ok() {
            self.line = Some(Line::new(socket, self.wanted.iter().copied()));
        }
    }

    /// Sees who waits for what.
    fn look(&mut self) {
        let Some(filling) = &self.filling else { return };
        let mut chunks = Vec::new();
        if let Err(error) = filling.reached(&mut chunks) {
            log::say(format_args!("see what memory is waited for: {error}"));
            self.is_deaf = true;
        }
        for chunk in chunks {
            if self.wanted.insert(chunk)
                && let Some(line) = &mut self.line
            {
                line.unsaid.push_back(chunk);
            }
        }
    }

    /// Maps what the agent says is there.
    fn hear(&mut self) {
        let Some(line) = &mut self.line else { return };
        let filling = self.filling.as_ref();
        let heard = line.hear(|ToVmm::Present { first, count }| {
            // With nothing missing there is nothing to do, whatever is said.
            filling.map_or(Ok(()), |filling| filling.put(first, count))
        });
        self.wanted.retain(|chunk| self.presence.is_missing(*chunk));
        if let Err(error) = heard {
            self.hang_up(&error);
        }
    }

    /// Says what there is to say, as far as the other end takes it. With all of it mapped and said, it hangs up.
    fn speak(&mut self) {
        let Some(line) = &mut self.line else { return };
        let spoken = line.speak(&self.presence);
        let is_over = self.presence.missing() == 0 && !line.has_more();
        match spoken {
            Err(error) => self.hang_up(&error),
            Ok(()) if is_over => self.line = None,
            Ok(()) => {}
        }
    }

    fn hang_up(&mut self, error: &LineError) {
        if !matches!(error, LineError::HungUp) {
            log::say(format_args!("filling connection ended: {}", report::chain(error)));
        }
        self.line = None;
    }
}

/// One connection. What waits to be said is bounded by the number of chunks.
struct Line {
    socket: UnixStream,
    /// Wanted chunks that were not named on it.
    unsaid: VecDeque<u32>,
    /// Whether how many are mapped is to be said.
    counts: bool,
    /// Bytes on their way out.
    out: VecDeque<u8>,
    /// Bytes that came and are no whole frame yet.
    part: Vec<u8>,
}

impl Line {
    /// On a new one all is said from the beginning.
    fn new(socket: UnixStream, wanted: impl Iterator<Item = u32>) -> Self {
        Self { socket, unsaid: wanted.collect(), counts: true, out: VecDeque::new(), part: Vec::new() }
    }

    fn has_more(&self) -> bool {
        self.counts || !self.unsaid.is_empty() || !self.out.is_empty()
    }

    /// Writes until there is nothing more, or no room for it.
    fn speak(&mut self, presence: &Presence) -> Result<(), LineError> {
        while self.has_more() {
            if self.out.is_empty() {
                self.put_into_words(presence);
            }
            let (bytes, _) = self.out.as_slices();
            if bytes.is_empty() {
                continue;
            }
            match self.socket.write(bytes) {
                Ok(0) => return Err(LineError::HungUp),
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    /// The next frames. What came since it was wanted is not asked for.
    fn put_into_words(&mut self, presence: &Presence) {
        if std::mem::take(&mut self.counts) {
            let chunks = presence.chunks() - presence.missing();
            self.out.extend(ToAgent::Mapped { chunks }.to_bytes());
        }
        let next = self.unsaid.drain(..self.unsaid.len().min(FRAMES)).filter(|chunk| presence.is_missing(*chunk));
        self.out.extend(next.flat_map(|chunk| ToAgent::Wanted { chunk }.to_bytes()));
    }

    /// Reads once, and does what is said.
    fn hear(&mut self, mut put: impl FnMut(ToVmm) -> Result<(), PutChunksError>) -> Result<(), LineError> {
        let mut bytes = [0; FRAMES * FRAME_BYTES];
        match self.socket.read(&mut bytes) {
            Ok(0) => return Err(LineError::HungUp),
            Ok(count) => self.part.extend(&bytes[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        }
        let (whole, rest) = self.part.as_chunks::<FRAME_BYTES>();
        self.counts |= !whole.is_empty();
        for frame in whole {
            put(ToVmm::from_bytes(*frame)?)?;
        }
        self.part = rest.to_vec();
        Ok(())
    }
}

fn failed(error: io::Error) -> LineError {
    let is_gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    if is_gone { LineError::HungUp } else { LineError::Io(error) }
}

#[cfg(test)]
mod tests;
