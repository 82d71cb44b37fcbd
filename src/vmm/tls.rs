//! TLS on a migration's connections: mutual, 1.3 only, between two certificates that were made for this one migration.
//!
//! There is no authority and no name: each end was told by its agent exactly which certificate the other one has, and
//! takes no other. The agents exchanged them on their own channel; a host's own key never enters a VMM. The handshake's
//! signature proves that the other end has the key.
//!
//! The library needs nothing that a thread may not do once its system calls are filtered: randomness is getrandom(2)'s,
//! and what the processor has is asked of the processor.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ServerConfig, ServerConnection};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme, StreamOwned};

use super::socket::BoundedSocket;
use crate::clock::Monotonic;
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
    pub(super) fn new(socket: BoundedSocket, tls: Option<&StreamTls>, end: End) -> Result<Self, TlsError> {
        let Some(tls) = tls else { return Ok(Self::Plain(socket)) };
        let socket = Buffered::new(socket);
        let provider = Arc::new(ring::default_provider());
        let pinned = Pinned { certificate: CertificateDer::from(tls.peer.clone()), provider: Arc::clone(&provider) };
        let own = vec![CertificateDer::from(tls.certificate.clone())];
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(tls.key.0.clone()));
        match end {
            End::Source => {
                let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
                let config = config.dangerous().with_custom_certificate_verifier(Arc::new(pinned));
                let mut config = config.with_client_auth_cert(own, key)?;
                config.resumption = Resumption::disabled();
                config.enable_sni = false;
                // Nobody looks at it: the certificate itself is known.
                let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
                let mut connection = ClientConnection::new(Arc::new(config), name)?;
                connection.set_buffer_limit(Some(UNSENT_BYTES_MAX));
                Ok(Self::Client(Box::new(StreamOwned::new(connection, socket))))
            }
            End::Target => {
                let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
                let mut config = config.with_client_cert_verifier(Arc::new(pinned)).with_single_cert(own, key)?;
                config.send_tls13_tickets = 0;
                let mut connection = ServerConnection::new(Arc::new(config))?;
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

/// Takes one certificate and no other.
struct Pinned {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Pinned")
    }
}

impl Pinned {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        match *certificate == self.certificate {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    /// Only 1.3 is spoken.
    fn older() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
