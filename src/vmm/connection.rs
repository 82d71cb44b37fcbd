//! One connection of the control socket: whole frames in, whole frames out.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::sys::fd;
use crate::wire::control::{Answer, DESCRIPTORS_MAX, Request};
use crate::wire::frame::{self, FrameError, HEADER_BYTES};

/// Longest time a frame that has begun may take, and an answer may wait to be read. The agent writes a frame in one
/// call; only one that was stopped in the middle of it comes near this.
const FRAME_SECONDS_MAX: u64 = 5;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The other side hung up between frames: the ordinary end.
    #[error("hung up")]
    HungUp,
    /// The socket failed or the frame did not end in time.
    #[error("read a frame")]
    Io(#[source] io::Error),
    /// What came is not this protocol.
    #[error("read a frame")]
    Frame(#[source] FrameError),
}

/// A connected agent.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// The version of the last frame that came: answers are given in it.
    version: u16,
    /// The epoch its Hello named; `None` before Hello.
    pub(super) epoch: Option<u64>,
}

impl Connection {
    /// Takes a just accepted stream.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let limit = Some(Duration::from_secs(FRAME_SECONDS_MAX));
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        Ok(Self { stream, version: frame::VERSION, epoch: None })
    }

    /// Reads one request with its descriptors. Call when the socket is readable.
    pub(super) fn receive(&mut self) -> Result<(Request, Vec<OwnedFd>), ReceiveError> {
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER_BYTES];
        let first = fd::receive_with_fds(&self.stream, &mut header, &mut descriptors).map_err(ReceiveError::Io)?;
        if first == 0 {
            return Err(ReceiveError::HungUp);
        }
        self.stream.read_exact(&mut header[first..]).map_err(ReceiveError::Io)?;
        let length = frame::body_length::<Request>(header).map_err(ReceiveError::Frame)?;
        self.version = frame::version_of(header);
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).map_err(ReceiveError::Io)?;
        debug_assert!(descriptors.len() <= DESCRIPTORS_MAX);
        let request = frame::decode(&body).map_err(ReceiveError::Frame)?;
        Ok((request, descriptors))
    }

    /// Its descriptor's number.
    pub(super) fn number(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Writes one answer.
    pub(super) fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        let bytes = frame::encode_in(self.version, answer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.stream.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_request_arrives_with_its_descriptors_and_garbage_does_not() {
        let (mut agent, vmm) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(vmm).unwrap();
        let file = tempfile::tempfile().unwrap();
        fd::send_with_fds(&agent, &frame::encode(&Request::Status).unwrap(), &[file.as_fd()]).unwrap();
        let (request, descriptors) = connection.receive().unwrap();
        assert_eq!((request, descriptors.len()), (Request::Status, 1));
        connection.answer(&Answer::Done).unwrap();
        let mut answer = [0; HEADER_BYTES + 1];
        agent.read_exact(&mut answer).unwrap();
        // Who asks in the version before is answered in it.
        agent.write_all(&frame::encode_in(frame::VERSION_MIN, &Request::Status).unwrap()).unwrap();
        assert_eq!(connection.receive().unwrap().0, Request::Status);
        connection.answer(&Answer::Done).unwrap();
        agent.read_exact(&mut answer).unwrap();
        assert_eq!(frame::version_of(*answer.first_chunk().unwrap()), frame::VERSION_MIN);
        agent.write_all(&[0; HEADER_BYTES]).unwrap();
        assert!(matches!(connection.receive(), Err(ReceiveError::Frame(FrameError::Magic { .. }))));
        drop(agent);
        assert!(matches!(connection.receive(), Err(ReceiveError::HungUp)));
    }
}
