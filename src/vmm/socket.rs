//! The socket of one connection of a migration's stream, on which nothing takes forever.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::clock::{Clock, Monotonic, SystemClock};

/// A connected stream socket on which nothing takes forever: a call waits as long as the other end may keep still, and
/// all calls together until a deadline, if there is one.
#[derive(Debug)]
pub(super) struct BoundedSocket {
    socket: TcpStream,
    clock: SystemClock,
    silence: Duration,
    deadline: Option<Monotonic>,
}

impl BoundedSocket {
    /// The standard library's calls for TCP are those of every stream socket, whatever its family.
    pub(super) fn new(socket: OwnedFd, clock: SystemClock, silence: Duration) -> io::Result<Self> {
        let socket = TcpStream::from(socket);
        socket.set_nonblocking(false)?;
        let mut this = Self { socket, clock, silence, deadline: None };
        this.hurry(silence, None)?;
        Ok(this)
    }

    /// From here on with these bounds.
    pub(super) fn hurry(&mut self, silence: Duration, deadline: Option<Monotonic>) -> io::Result<()> {
        (self.silence, self.deadline) = (silence, deadline);
        self.socket.set_read_timeout(Some(silence))?;
        self.socket.set_write_timeout(Some(silence))
    }

    /// How long the next call may wait, where that is not what the socket knows already.
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(deadline) = self.deadline else { return Ok(None) };
        let left = deadline.since(self.clock.monotonic());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left.min(self.silence))) }
    }
}

impl Read for BoundedSocket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_read_timeout(Some(left))?;
        }
        self.socket.read(bytes)
    }
}

impl Write for BoundedSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_write_timeout(Some(left))?;
        }
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_write_timeout(Some(left))?;
        }
        self.socket.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::wire::link::Link;

    fn bounded(socket: UnixStream, silence_ms: u64) -> Link<BoundedSocket> {
        let silence = Duration::from_millis(silence_ms);
        Link::new(BoundedSocket::new(socket.into(), SystemClock::new(), silence).unwrap(), None)
    }

    #[test]
    fn nobody_waits_for_ever() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut link = bounded(one, 20);
        let error = link.receive(&mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the other end kept still for too long");
        // However often something comes: all calls together have a deadline.
        let clock = SystemClock::new();
        let deadline = clock.monotonic().after(Duration::from_millis(50));
        link.connection_mut().hurry(Duration::from_secs(5), Some(deadline)).unwrap();
        link.connection_mut().clock = clock;
        let dripping = std::thread::spawn(move || {
            let mut other = other;
            while other.write_all(b"H").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let error = link.receive(&mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the other end kept still for too long");
        drop(link);
        dripping.join().unwrap();
    }
}
