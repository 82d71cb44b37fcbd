//! TLS on a migration's connections: mutual, 1.3 only, between two certificates that were made for this one migration.
//!
//! There is no authority and no name: each end was told by its agent exactly which certificate the other one has, and
//! takes no other. The agents exchanged them on their own channel; a host's own key never enters a VMM. The handshake's
//! signature proves that the other end has the key.
//!
//! The library needs nothing that a thread may not do once its system calls are filtered: randomness is getrandom(2)'s,
//! and what the processor has is asked of the processor.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustls::client::ClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::ServerConnection;
use rustls::{CertificateError, Error, StreamOwned};

use super::socket::BoundedSocket;
use crate::clock::Monotonic;
use crate::tls::{self, Accepted, Own};
use crate::wire::control::StreamTls;

/// Bytes that are encrypted before the socket is written to.
const UNSENT_BYTES_MAX: usize = 1 << 20;

/// A connection of a migration's stream, as its agent wants it.
#[derive(Debug)]
pub(super) enum Wire {
    /// As it is: within one host, or over a link that the operator trusts by name.
    Plain(BoundedSocket),
    /// Encrypted; this end connected.
    Client(Box<StreamOwned<ClientConnection, Buffered>>),
    /// Encrypted; this end was connected to.
    Server(Box<StreamOwned<ServerConnection, Buffered>>),
}

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The source, which speaks first.
    Source,
    /// The target.
    Target,
}

/// Why a connection is not encrypted: it is not used then.
#[derive(Debug, thiserror::Error)]
#[error("prepare TLS")]
pub(super) struct TlsError(#[from] Error);

impl Wire {
    /// A connection with TLS if there is something to do it with.
    pub(super) fn new(socket: BoundedSocket, certified: Option<&StreamTls>, end: End) -> Result<Self, TlsError> {
        let Some(certified) = certified else { return Ok(Self::Plain(socket)) };
        let socket = Buffered::new(socket);
        let only = Only(CertificateDer::from(certified.peer.clone()));
        let own = Own { certificate: certified.certificate.clone(), key: certified.key.0.clone() };
        match end {
            End::Source => {
                let mut connection = ClientConnection::new(Arc::new(tls::mutual_client(only, own)?), tls::no_name())?;
                connection.set_buffer_limit(Some(UNSENT_BYTES_MAX));
                Ok(Self::Client(Box::new(StreamOwned::new(connection, socket))))
            }
            End::Target => {
                let mut connection = ServerConnection::new(Arc::new(tls::mutual_server(only, own)?))?;
                connection.set_buffer_limit(Some(UNSENT_BYTES_MAX));
                Ok(Self::Server(Box::new(StreamOwned::new(connection, socket))))
            }
        }
    }

    /// From here on with these bounds.
    pub(super) fn hurry(&mut self, silence: std::time::Duration, deadline: Option<Monotonic>) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.hurry(silence, deadline),
            Self::Client(stream) => stream.sock.socket.hurry(silence, deadline),
            Self::Server(stream) => stream.sock.socket.hurry(silence, deadline),
        }
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(bytes),
            Self::Client(stream) => stream.read(bytes),
            Self::Server(stream) => stream.read(bytes),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Client(stream) => stream.flush(),
            Self::Server(stream) => stream.flush(),
        }
    }
}

/// Bytes read at once: the library asks for 4 KiB at a time, a record has 16.
const READ_BYTES: usize = 256 * 1024;

/// A socket that is read ahead.
#[derive(Debug)]
pub(super) struct Buffered {
    socket: BoundedSocket,
    ahead: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Buffered {
    fn new(socket: BoundedSocket) -> Self {
        Self { socket, ahead: vec![0; READ_BYTES].into_boxed_slice(), from: 0, to: 0 }
    }
}

impl Read for Buffered {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.from == self.to {
            (self.from, self.to) = (0, self.socket.read(&mut self.ahead)?);
        }
        let count = bytes.len().min(self.to - self.from);
        bytes[..count].copy_from_slice(&self.ahead[self.from..][..count]);
        self.from += count;
        Ok(count)
    }
}

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// The one certificate that the other end may have.
#[derive(Debug)]
struct Only(CertificateDer<'static>);

impl Accepted for Only {
    fn accept(&self, certificate: &CertificateDer<'_>, _others: &[CertificateDer<'_>]) -> Result<(), Error> {
        match *certificate == self.0 {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }
}
