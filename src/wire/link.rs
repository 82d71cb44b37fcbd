//! One connection of a migration's stream: whole frames out, whole frames in, counted and checked ([`super::stream`]).
//! What carries them is the user's: something that is read and written, by one thread, which blocks as that does. Frames
//! gather in a buffer until they are worth a system call.

use std::io::{self, Read, Write};

use super::stream::{BODY_BYTES_MAX, HEADER_BYTES, Header, Hello, Kind, StreamError, VERSION_MIN};

/// Bytes that gather before they are written: one full frame of pages.
const GATHERED_BYTES_MAX: usize = BODY_BYTES_MAX as usize;

/// Why a link is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection failed, ended, or stood still for too long.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// What came is no frame that may come.
    #[error("read the stream")]
    Frame(#[from] StreamError),
    /// The other end gave up.
    #[error("the other end gave up: {reason}")]
    GaveUp {
        /// What it said.
        reason: String,
    },
}

/// A connection that carries frames.
#[derive(Debug)]
pub struct Link<C> {
    connection: C,
    /// The version its frames are in; `None` before the other end's first, which says.
    version: Option<u16>,
    outgoing: Vec<u8>,
    /// Frames in it.
    gathered: u32,
    sent: u32,
    received: u32,
    wire_bytes: u64,
}

impl<C: Read + Write> Link<C> {
    /// One whose frames are in this version, or in the one that the other end begins with. Nothing was sent or received
    /// yet.
    pub const fn new(connection: C, version: Option<u16>) -> Self {
        Self { connection, version, outgoing: Vec::new(), gathered: 0, sent: 0, received: 0, wire_bytes: 0 }
    }

    /// The connection, for what only it can do.
    pub const fn connection_mut(&mut self) -> &mut C {
        &mut self.connection
    }

    /// Frames sent so far.
    pub const fn sent(&self) -> u32 {
        self.sent
    }

    /// Frames received so far.
    pub const fn received(&self) -> u32 {
        self.received
    }

    /// Bytes sent so far.
    pub const fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Adds a frame to what will be sent. The body is what `fill` appends.
    pub fn push<E>(&mut self, kind: Kind, fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), LinkError>
    where
        LinkError: From<E>,
    {
        // What is said before the other end's first frame is why nothing comes of it.
        let version = self.version.unwrap_or(VERSION_MIN);
        let head = self.outgoing.len();
        self.outgoing.resize(head + HEADER_BYTES, 0);
        fill(&mut self.outgoing)?;
        let (before, body) = self.outgoing.split_at_mut(head + HEADER_BYTES);
        before[head..].copy_from_slice(&Header::for_body(version, kind, self.sent, &[body])?);
        self.sent = self.sent.wrapping_add(1);
        self.gathered += 1;
        if self.outgoing.len() >= GATHERED_BYTES_MAX { self.flush() } else { Ok(()) }
    }

    /// Sends a frame with what was gathered before it.
    pub fn send(&mut self, kind: Kind, body: &[u8]) -> Result<(), LinkError> {
        self.push(kind, |bytes| {
            bytes.extend_from_slice(body);
            Ok::<_, LinkError>(())
        })?;
        self.flush()
    }

    /// Sends what was gathered.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        let failed = |source: io::Error| LinkError::Io { what: what_failed("send", &source), source };
        self.connection.write_all(&self.outgoing).map_err(failed)?;
        self.connection.flush().map_err(failed)?;
        self.wire_bytes += self.outgoing.len() as u64;
        self.outgoing.clear();
        self.gathered = 0;
        Ok(())
    }

    /// Waits for a frame; `body` becomes what it holds.
    pub fn receive(&mut self, body: &mut Vec<u8>) -> Result<Kind, LinkError> {
        let failed = |source: io::Error| LinkError::Io { what: what_failed("receive", &source), source };
        let mut header = [0; HEADER_BYTES];
        self.connection.read_exact(&mut header).map_err(failed)?;
        let header = Header::read(&header, self.received)?;
        // Bounded by the header's check.
        body.resize(header.length as usize, 0);
        self.connection.read_exact(body).map_err(failed)?;
        header.check(&[body])?;
        let (found, began) = (header.version, *self.version.get_or_insert(header.version));
        // One that gives up before it knows the version has the oldest.
        if found != began && header.kind != Kind::Abort {
            return Err(StreamError::OtherVersion { found, began }.into());
        }
        self.received = self.received.wrapping_add(1);
        if header.kind == Kind::Abort {
            return Err(LinkError::GaveUp { reason: printable(body) });
        }
        Ok(header.kind)
    }

    /// Waits for a frame that has to be of this kind.
    pub fn expect(&mut self, kind: Kind, wanted: &'static str, body: &mut Vec<u8>) -> Result<(), LinkError> {
        let found = self.receive(body)?;
        if found == kind { Ok(()) } else { Err(StreamError::Unexpected { found, wanted }.into()) }
    }

    /// Says Hello first; the other end has to say the same.
    pub fn greet(&mut self, hello: Hello) -> Result<(), LinkError> {
        self.send(Kind::Hello, &hello.to_bytes())?;
        let mut body = Vec::new();
        self.expect(Kind::Hello, "Hello", &mut body)?;
        // Its length was checked with the header.
        let bytes = body.as_array().copied().unwrap_or([0; _]);
        Ok(Hello::from_bytes(bytes)?.check(hello)?)
    }

    /// Tells the other end why this one gives up, if it can still be told.
    pub fn give_up(&mut self, reason: &str) {
        // What was not sent yet never was.
        self.outgoing.clear();
        self.sent = self.sent.wrapping_sub(std::mem::take(&mut self.gathered));
        let mut end = reason.len().min(1024);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        if end > 0 {
            let _ = self.send(Kind::Abort, &reason.as_bytes()[..end]);
        }
    }
}

/// What went wrong, for the kinds that say too little by themselves.
fn what_failed(what: &'static str, error: &io::Error) -> &'static str {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    let is = |kinds: &[io::ErrorKind]| kinds.contains(&error.kind());
    if is(&[WouldBlock, TimedOut]) {
        "the other end kept still for too long"
    } else if is(&[UnexpectedEof, BrokenPipe, ConnectionReset]) {
        "the other end hung up"
    } else {
        what
    }
}

/// What another host says goes to logs and answers: text, and no control characters.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|one| if one.is_control() { ' ' } else { one }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    const HELLO: Hello = Hello { token: [7; 32], connection: 1, connections: 2 };

    /// One end, which waits for two seconds at most.
    fn end(socket: UnixStream) -> Link<UnixStream> {
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        Link::new(socket, None)
    }

    /// Two ends that have greeted each other.
    fn pair() -> (Link<UnixStream>, Link<UnixStream>) {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut one, mut other) = (end(one), end(other));
        let answering = std::thread::spawn(move || {
            let mut body = Vec::new();
            other.expect(Kind::Hello, "Hello", &mut body).unwrap();
            other.send(Kind::Hello, &body).unwrap();
            other
        });
        one.greet(HELLO).unwrap();
        (one, answering.join().unwrap())
    }

    #[test]
    fn frames_arrive_as_they_were_sent_and_are_gathered_meanwhile() {
        let (mut one, mut other) = pair();
        for byte in 0..10_u8 {
            one.push(Kind::State, |bytes| {
                bytes.extend_from_slice(&[byte; 100]);
                Ok::<_, LinkError>(())
            })
            .unwrap();
        }
        let before = one.wire_bytes();
        one.flush().unwrap();
        assert_eq!(one.wire_bytes() - before, 10 * 124);
        let mut body = Vec::new();
        for byte in 0..10_u8 {
            assert_eq!(other.receive(&mut body).unwrap(), Kind::State);
            assert_eq!(body, [byte; 100]);
        }
        assert_eq!((one.sent(), other.received()), (11, 11));
    }

    #[test]
    fn strangers_are_told_apart() {
        for answered in
            [Hello { token: [8; 32], ..HELLO }, Hello { connections: 3, ..HELLO }, Hello { connection: 0, ..HELLO }]
        {
            let (one, other) = UnixStream::pair().unwrap();
            let (mut one, mut other) = (end(one), end(other));
            other.send(Kind::Hello, &answered.to_bytes()).unwrap();
            let error = one.greet(HELLO).unwrap_err();
            assert!(matches!(error, LinkError::Frame(StreamError::Foreign { .. })), "{error:?}");
        }
    }

    #[test]
    fn a_connection_keeps_the_version_it_began_with() {
        for version in [1, 2] {
            let (one, other) = UnixStream::pair().unwrap();
            let (mut one, mut other) = (end(one), end(other));
            one.version = Some(version);
            one.send(Kind::Hello, &HELLO.to_bytes()).unwrap();
            other.expect(Kind::Hello, "Hello", &mut Vec::new()).unwrap();
            assert_eq!(other.version, Some(version));
            // Who has not heard of it yet can give up all the same.
            let mut unknowing = end(other.connection.try_clone().unwrap());
            unknowing.give_up("no");
            let error = one.receive(&mut Vec::new()).unwrap_err();
            assert!(matches!(&error, LinkError::GaveUp { reason } if reason == "no"), "{error:?}");
            other.version = Some(3 - version);
            other.sent = 1;
            other.send(Kind::Ack, &[0; 4]).unwrap();
            let error = one.receive(&mut Vec::new()).unwrap_err();
            let wanted = StreamError::OtherVersion { found: 3 - version, began: version };
            assert!(matches!(error, LinkError::Frame(found) if found == wanted), "{error:?}");
        }
    }

    #[test]
    fn who_gives_up_says_why_and_what_was_not_sent_never_was() {
        let (mut one, mut other) = pair();
        one.push(Kind::State, |bytes| {
            bytes.push(1);
            Ok::<_, LinkError>(())
        })
        .unwrap();
        one.give_up(&format!("no more\n{}é", "x".repeat(1015)));
        let error = other.receive(&mut Vec::new()).unwrap_err();
        assert!(matches!(&error, LinkError::GaveUp { reason } if reason.starts_with("no more x")), "{error}");
        drop(one);
        let error = other.receive(&mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the other end hung up");
    }
}
