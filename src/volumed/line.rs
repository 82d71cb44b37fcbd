//! One connection to a client: bytes in and out, in the clear or in TLS, with the patience that each moment deserves.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::server::{ServerConfig, ServerConnection};
use rustls::{StreamOwned, client::ClientConnection};

use crate::clock::{Clock, Monotonic, SystemClock};

/// How long a reply may wait for its client to read: a VM may be stopped meanwhile.
const WRITE_PATIENCE: Duration = Duration::from_secs(300);

/// How often a reader wakes up to see whether its time is over.
const TICK: Duration = Duration::from_secs(5);

/// Bytes read ahead: more than a request and a small payload.
const AHEAD_BYTES: usize = 64 * 1024;

/// A socket of either kind.
#[derive(Debug)]
pub(super) enum Socket {
    /// Within this host.
    Unix(UnixStream),
    /// Between hosts.
    Tcp(TcpStream),
}

impl Socket {
    /// Another handle of the same socket, to end it with.
    pub(super) fn handle(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
        })
    }

    /// Ends it, whoever reads or writes it just now.
    pub(super) fn end(&self) {
        // One that has ended already is what is wanted.
        let _ = match self {
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    /// Takes no more requests; what came already is there to be read.
    pub(super) fn end_requests(&self) {
        let _ = match self {
            Self::Unix(socket) => socket.shutdown(Shutdown::Read),
            Self::Tcp(socket) => socket.shutdown(Shutdown::Read),
        };
    }

    /// Blocking, with the patience of this module.
    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(TICK))?;
                socket.set_write_timeout(Some(WRITE_PATIENCE))
            }
            Self::Tcp(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(TICK))?;
                socket.set_write_timeout(Some(WRITE_PATIENCE))
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.read(bytes),
            Self::Tcp(socket) => socket.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.write(bytes),
            Self::Tcp(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the bytes go through.
enum Road {
    Plain(Socket),
    Server(Box<StreamOwned<ServerConnection, Socket>>),
    Client(Box<StreamOwned<ClientConnection, Socket>>),
    /// Between two of them; nothing goes through it.
    Gone,
}

/// A connection.
pub(super) struct Line {
    road: Road,
    clock: SystemClock,
    ahead: Box<[u8]>,
    from: usize,
    to: usize,
}

impl fmt::Debug for Line {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Line")
    }
}

/// By when bytes have to be there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Monotonic);

impl Line {
    /// A connection in the clear.
    pub(super) fn new(socket: Socket, clock: SystemClock) -> io::Result<Self> {
        socket.prepare()?;
        let ahead = vec![0; AHEAD_BYTES].into_boxed_slice();
        Ok(Self { road: Road::Plain(socket), clock, ahead, from: 0, to: 0 })
    }

    /// A deadline from now on.
    pub(super) fn within(&self, patience: Duration) -> Deadline {
        Deadline(self.clock.monotonic().after(patience))
    }

    /// Goes on in TLS, as the server. What was read ahead in the clear would be somebody else's words: there must be none.
    pub(super) fn start_tls(&mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let connection = ServerConnection::new(config).map_err(io::Error::other)?;
        let socket = self.take_plain()?;
        self.road = Road::Server(Box::new(StreamOwned::new(connection, socket)));
        Ok(())
    }

    /// Goes on in TLS, as the client.
    pub(super) fn start_tls_as_client(&mut self, connection: ClientConnection) -> io::Result<()> {
        let socket = self.take_plain()?;
        self.road = Road::Client(Box::new(StreamOwned::new(connection, socket)));
        Ok(())
    }

    fn take_plain(&mut self) -> io::Result<Socket> {
        if self.from != self.to {
            return Err(io::Error::new(ErrorKind::InvalidData, "bytes in the clear behind the request for TLS"));
        }
        match std::mem::replace(&mut self.road, Road::Gone) {
            Road::Plain(socket) => Ok(socket),
            Road::Server(_) | Road::Client(_) | Road::Gone => {
                Err(io::Error::new(ErrorKind::InvalidInput, "TLS within TLS"))
            }
        }
    }

    /// The parts of a connection that is to be copied from: what was read ahead, and the road.
    pub(super) fn into_parts(self) -> (Vec<u8>, Option<Socket>, Option<(ClientConnection, Socket)>) {
        let ahead = self.ahead[self.from..self.to].to_vec();
        match self.road {
            Road::Plain(socket) => (ahead, Some(socket), None),
            Road::Client(stream) => {
                let StreamOwned { conn, sock } = *stream;
                (ahead, None, Some((conn, sock)))
            }
            Road::Server(_) | Road::Gone => (ahead, None, None),
        }
    }

    fn read_some(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.road {
            Road::Plain(socket) => socket.read(bytes),
            Road::Server(stream) => stream.read(bytes),
            Road::Client(stream) => stream.read(bytes),
            Road::Gone => Ok(0),
        }
    }

    /// Reads until `bytes` is full. Without a deadline, one begins with the first byte: idle is no fault, half of a message
    /// is. `false`: the other end hung up before the first byte.
    pub(super) fn read_message(&mut self, bytes: &mut [u8], mut deadline: Option<Deadline>) -> io::Result<bool> {
        let mut done = 0;
        while done < bytes.len() {
            if self.from < self.to {
                let count = (bytes.len() - done).min(self.to - self.from);
                bytes[done..done + count].copy_from_slice(&self.ahead[self.from..self.from + count]);
                self.from += count;
                done += count;
            } else {
                let rest = bytes.len() - done;
                let read = if rest >= AHEAD_BYTES {
                    // Straight to where it belongs.
                    self.read_some(&mut bytes[done..])
                } else {
                    self.read_ahead()
                };
                match read {
                    Ok(0) if done == 0 => return Ok(false),
                    Err(error) if done == 0 && is_hang_up(&error) => return Ok(false),
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(count) if rest >= AHEAD_BYTES => done += count,
                    Ok(_) => {}
                    Err(error) if is_tick(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            if done > 0 && deadline.is_none() {
                deadline = Some(self.within(MESSAGE_PATIENCE));
            }
            if done < bytes.len() && deadline.is_some_and(|Deadline(end)| self.clock.monotonic() >= end) {
                return Err(io::Error::new(ErrorKind::TimedOut, "the rest of a message did not come"));
            }
        }
        Ok(true)
    }

    fn read_ahead(&mut self) -> io::Result<usize> {
        let mut ahead = std::mem::take(&mut self.ahead);
        let read = self.read_some(&mut ahead);
        self.ahead = ahead;
        (self.from, self.to) = (0, *read.as_ref().unwrap_or(&0));
        read
    }

    /// The same, where hanging up is a fault.
    pub(super) fn read_all(&mut self, bytes: &mut [u8], deadline: Deadline) -> io::Result<()> {
        match self.read_message(bytes, Some(deadline))? {
            true => Ok(()),
            false if bytes.is_empty() => Ok(()),
            false => Err(ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Writes all of it, and has it on its way.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.road {
            Road::Plain(socket) => socket.write_all(bytes),
            Road::Server(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
            Road::Client(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
            Road::Gone => Err(ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Line {
    /// Writes what belongs together; short bytes at once.
    pub(super) fn write_behind(&mut self, head: &[u8], bytes: &[u8]) -> io::Result<()> {
        if bytes.len() <= AHEAD_BYTES {
            return self.write(&[head, bytes].concat());
        }
        self.write(head)?;
        self.write(bytes)
    }
}

/// How long the rest of a message may take once its first byte is there.
pub(super) const MESSAGE_PATIENCE: Duration = Duration::from_secs(60);

/// Other ways to hang up: with answers left to read, or without the words that TLS has for it.
fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Nothing came for a while, or a signal did.
fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> (Line, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Line::new(Socket::Unix(ours), SystemClock::new()).unwrap(), theirs)
    }

    #[test]
    fn messages_are_read_whole_whatever_the_pieces() {
        let (mut line, mut other) = line();
        let sent: Vec<u8> = (0..300_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let writer = std::thread::spawn({
            let sent = sent.clone();
            move || sent.chunks(777).try_for_each(|piece| other.write_all(piece))
        });
        let mut read = Vec::new();
        for bytes in [28, 100, 200_000, 28, 99_844] {
            let mut message = vec![0; bytes];
            assert!(line.read_message(&mut message, None).unwrap());
            read.extend(message);
        }
        assert!(read == sent);
        writer.join().unwrap().unwrap();
        assert!(!line.read_message(&mut [0; 28], None).unwrap(), "the other end hung up");
    }

    #[test]
    fn half_a_message_is_a_fault() {
        let (mut line, mut other) = line();
        other.write_all(&[0; 5]).unwrap();
        drop(other);
        let error = line.read_message(&mut [0; 28], None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_message_in_drops_comes_to_an_end() {
        let (mut line, mut other) = line();
        other.write_all(&[0; 5]).unwrap();
        let deadline = line.within(Duration::ZERO);
        let error = line.read_all(&mut [0; 28], deadline).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
