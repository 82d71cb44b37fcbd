//! The host's side of a stream: a unix socket, and the bytes it has not taken yet.
//!
//! A host program connects and writes `CONNECT <port>\n`; until that line is there the socket is a [`Greeting`]. Then it
//! is a [`Connection`]: the program is answered `OK <host port>\n` once the guest accepted, or `ERR <reason>\n` and
//! closed. Bytes from the guest go straight from its memory to the socket; what the socket does not take waits in a
//! buffer that the stream's credit keeps below [`Stream`]'s own. Bytes to the guest are never held.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::packet::Ports;
use super::stream::{Stage, Stream};
use crate::machine::virtio::chain::GuestSlice;
use crate::sys::vectored;

/// Longest greeting: `CONNECT `, ten digits, a newline, and a carriage return for those who type it.
pub(crate) const GREETING_BYTES_MAX: usize = 20;

/// A socket whose `CONNECT` line is not complete.
#[derive(Debug)]
pub(crate) struct Greeting {
    socket: UnixStream,
    line: Vec<u8>,
}

/// What has become of a greeting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeted {
    /// The line is not complete.
    Waiting,
    /// It names this guest port.
    Port(u32),
    /// It is not a greeting.
    Nonsense,
    /// The program went away.
    Gone,
}

impl Greeting {
    /// A greeting of which nothing has been read.
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket, line: Vec::with_capacity(GREETING_BYTES_MAX) }
    }

    /// Reads on. Never beyond the line: what follows belongs to the stream.
    pub(crate) fn read(&mut self) -> Greeted {
        while self.line.len() < GREETING_BYTES_MAX {
            let mut byte = [0];
            match self.socket.read(&mut byte) {
                Ok(0) => return Greeted::Gone,
                Ok(_) if byte == *b"\n" => return port_of(&self.line).map_or(Greeted::Nonsense, Greeted::Port),
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeted::Waiting,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Greeted::Gone,
            }
        }
        Greeted::Nonsense
    }

    /// The socket, to be a connection's or to be refused.
    pub(crate) fn into_socket(self) -> UnixStream {
        self.socket
    }
}

fn port_of(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let digits = line.strip_suffix('\r').unwrap_or(line).strip_prefix("CONNECT ")?;
    // `parse` alone would take a sign.
    if digits.bytes().all(|digit| digit.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Tells a host program why it gets no stream, and closes.
pub(crate) fn refuse(mut socket: UnixStream, reason: &str) {
    // The socket's buffer has room for the first few bytes; a program that went away need not hear it.
    let _ = socket.write(format!("ERR {reason}\n").as_bytes());
}

/// A stream with its socket.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The two ports.
    pub(crate) ports: Ports,
    /// What was said and what is owed.
    pub(crate) stream: Stream,
    /// The host program's socket, while it is of use.
    socket: Option<UnixStream>,
    /// Bytes from the guest that the socket has not taken.
    backlog: VecDeque<u8>,
    /// Whether reading the socket may give something.
    readable: bool,
    /// Whether the program has closed its end altogether.
    hung_up: bool,
    /// Whether it stands in the list of those with something for the guest.
    pub(crate) queued: bool,
}

/// What reading the host's socket gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes are in the guest's buffer.
    Bytes(u32),
    /// Nothing for now.
    Nothing,
    /// The stream's state has changed instead.
    Ended,
}

impl Connection {
    /// A stream on this socket.
    pub(crate) fn new(ports: Ports, stream: Stream, socket: UnixStream) -> Self {
        let backlog = VecDeque::new();
        // Bytes may have come before anyone watched.
        Self { ports, stream, socket: Some(socket), backlog, readable: true, hung_up: false, queued: false }
    }

    /// Something happened on the socket.
    pub(crate) fn event(&mut self, ready: EventSet) {
        self.readable |= ready.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            if matches!(self.stream.stage(), Stage::Asking { .. }) {
                // Nobody is left to be told the answer.
                self.stream.abort();
                self.socket = None;
            } else if !self.stream.ends().host_sends || !self.stream.ends().guest_receives {
                self.host_is_gone();
            }
        }
        if ready.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Whether there is something for the guest.
    pub(crate) fn wants_turn(&self) -> bool {
        self.stream.control().is_some() || self.wants_data() || self.wants_credit()
    }

    /// Whether bytes may be moved to the guest.
    pub(crate) fn wants_data(&self) -> bool {
        self.readable && self.socket.is_some() && self.stream.sendable() > 0
    }

    /// Whether the guest is to be asked for room.
    pub(crate) fn wants_credit(&self) -> bool {
        self.readable && self.socket.is_some() && self.stream.credit_question().is_some()
    }

    /// Tells the host program that the guest accepted.
    pub(crate) fn tell_accepted(&mut self) {
        let line = format!("OK {}\n", self.ports.host);
        let told = self.socket.as_mut().is_some_and(|socket| socket.write_all(line.as_bytes()).is_ok());
        if !told {
            self.stream.abort();
            self.socket = None;
        }
    }

    /// Tells the host program that it gets no stream.
    pub(crate) fn tell_refused(&mut self, reason: &str) {
        if let Some(socket) = self.socket.take() {
            refuse(socket, reason);
        }
    }

    /// Moves bytes from the socket to the guest's memory.
    pub(crate) fn take(&mut self, to: &[GuestSlice<'_>]) -> Taken {
        let Some(socket) = &self.socket else { return Taken::Nothing };
        match vectored::read(socket, to) {
            Ok(0) => {
                self.readable = false;
                if self.hung_up {
                    self.host_is_gone();
                } else {
                    self.stream.host_sent_all();
                }
                Taken::Ended
            }
            Ok(count) => Taken::Bytes(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Taken::Nothing
            }
            // ECONNRESET: the program closed without reading all it was sent. What it sent has been read.
            Err(_) => {
                self.readable = false;
                self.host_is_gone();
                Taken::Ended
            }
        }
    }

    /// Moves bytes from the guest's memory to the socket; returns how many are dealt with. The rest is to be given to
    /// [`Connection::hold`].
    pub(crate) fn give(&mut self, from: &[GuestSlice<'_>]) -> u32 {
        let total = from.iter().map(|slice| slice.len()).sum::<usize>();
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        if !self.backlog.is_empty() {
            return 0;
        }
        let Some(socket) = self.socket.as_ref().filter(|_| self.stream.ends().host_receives) else {
            self.stream.forwarded(total);
            return total;
        };
        match vectored::send(socket, from) {
            Ok(count) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.stream.forwarded(count);
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.stream.forwarded(total);
                self.stop_receiving();
                total
            }
        }
    }

    /// Keeps bytes until the socket takes them. The stream has checked that they are within its buffer.
    pub(crate) fn hold(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    fn flush(&mut self) {
        while let (Some(mut socket), (part, _)) = (self.socket.as_ref(), self.backlog.as_slices()) {
            if part.is_empty() {
                break;
            }
            match socket.write(part) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.stream.forwarded(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.stop_receiving(),
            }
        }
        // A burst is over: give its memory back.
        self.backlog = VecDeque::new();
        self.settle();
    }

    fn host_is_gone(&mut self) {
        self.stream.host_sent_all();
        self.stop_receiving();
    }

    /// The host program takes no more: what is held for it is thrown away.
    fn stop_receiving(&mut self) {
        self.stream.forwarded(u32::try_from(self.backlog.len()).unwrap_or(u32::MAX));
        self.backlog = VecDeque::new();
        self.stream.host_stopped_receiving();
        if self.stream.host_closed() {
            self.socket = None;
        }
        self.settle();
    }

    /// Does for the host program what the guest's end asks for: pass on that it sends or receives no more, and let go
    /// once it is gone and everything is delivered.
    pub(crate) fn settle(&mut self) {
        let ends = self.stream.ends();
        if let Some(socket) = &self.socket {
            // Errors: the program is gone, which its own event tells.
            if !ends.guest_receives {
                let _ = socket.shutdown(Shutdown::Read);
            }
            if !ends.guest_sends && self.backlog.is_empty() {
                let _ = socket.shutdown(Shutdown::Write);
            }
        }
        if self.backlog.is_empty() {
            self.stream.finish();
        }
        let guest_is_done = self.stream.stage() == Stage::Over;
        // A guest that said all it had to say before it went is heard to the end.
        if guest_is_done && (self.backlog.is_empty() || ends.guest_sends) {
            self.backlog = VecDeque::new();
            self.socket = None;
        }
    }

    /// Whether the socket is gone and the stream as well.
    pub(crate) fn is_finished(&self) -> bool {
        self.socket.is_none() && self.stream.is_finished()
    }

    /// Whether only the guest's last word is missing.
    pub(crate) fn is_closing(&self) -> bool {
        self.socket.is_none() && self.stream.stage() == Stage::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_name_a_port_and_nothing_else() {
        let read = |text: &str| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            ours.write_all(text.as_bytes()).unwrap();
            Greeting::new(theirs).read()
        };
        assert_eq!(read("CONNECT 1024\nrest"), Greeted::Port(1024));
        assert_eq!(read("CONNECT 4294967295\r\n"), Greeted::Port(u32::MAX));
        for text in
            ["CONNECT 4294967296\n", "CONNECT +1\n", "CONNECT \n", "connect 1\n", "\n", "CONNECT 000000000000001"]
        {
            assert_eq!(read(text), Greeted::Nonsense, "{text:?}");
        }
        assert_eq!(read("CONNECT 10"), Greeted::Waiting);
    }

    #[test]
    fn a_greeting_reads_nothing_that_follows_it() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::new(theirs);
        ours.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read(), Greeted::Waiting);
        ours.write_all(b"ECT 7\nhello").unwrap();
        assert_eq!(greeting.read(), Greeted::Port(7));
        let mut rest = [0; 5];
        greeting.into_socket().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }
}
