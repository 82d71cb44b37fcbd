//! TLS between agents: 1.3 only, mutual, without authorities and names. Each end shows the certificate that its agent
//! made at its start; what that has to prove, the agent says (`agent/peers/proof`): that its maker knows the fabric's
//! key, and which host it is. The handshake's signature is checked with the very public key that the proof is about, as
//! it stands in the certificate, so no two readers of certificates have to agree.
//!
//! No session is resumed and nothing is sent early: each connection proves everything anew, for one request.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use rustls::{AlertDescription, CertificateError, CommonState, Error, InvalidMessage, OtherError};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::agent::peers::{self, HostCertificate, PeerKey, ProofError, TlsError};
use crate::tls::{self, Accepted, Own};

/// What is spoken inside (ALPN).
const PROTOCOL: &[u8] = b"hearth-peer/1";

/// A host's end of connections with other hosts.
#[derive(Clone)]
pub(super) struct PeerTls {
    key: PeerKey,
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

impl fmt::Debug for PeerTls {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("PeerTls")
    }
}

impl PeerTls {
    /// Makes this host's certificate, and what checks those of others.
    pub(super) fn new(key: &PeerKey, host: u16) -> io::Result<Self> {
        Self::with(key, HostCertificate::make(key, host)?)
    }

    /// The same with a certificate that is there.
    pub(super) fn with(key: &PeerKey, own: HostCertificate) -> io::Result<Self> {
        let HostCertificate { certificate, private_key } = own;
        let own = || Own { certificate: certificate.clone(), key: private_key.clone() };
        let mut client = tls::mutual_client(ByProof(key.clone()), own()).map_err(io::Error::other)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let mut server = tls::mutual_server(ByProof(key.clone()), own()).map_err(io::Error::other)?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { key: key.clone(), connector: Arc::new(client).into(), acceptor: Arc::new(server).into() })
    }

    /// Opens a connection to a host, which has to prove this number if one is given. Nothing of a request was sent
    /// before it has.
    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        wanted: Option<u16>,
        limit: Duration,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let opened = timeout(limit, self.connector.connect(tls::no_name(), stream)).await;
        let stream = opened.map_err(|_| TlsError::TimedOut { limit })?.map_err(|error| told(&error))?;
        let proven = self.number(stream.get_ref().1)?;
        match wanted {
            Some(wanted) if wanted != proven => Err(TlsError::OtherHost { proven, wanted }),
            Some(_) | None => Ok(stream),
        }
    }

    /// Takes a connection of some host; says which.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
        limit: Duration,
    ) -> Result<(server::TlsStream<TcpStream>, u16), TlsError> {
        let taken = timeout(limit, self.acceptor.accept(stream)).await;
        let stream = taken.map_err(|_| TlsError::TimedOut { limit })?.map_err(|error| told(&error))?;
        let number = self.number(stream.get_ref().1)?;
        Ok((stream, number))
    }

    /// The number that the other end has proved.
    fn number(&self, connection: &CommonState) -> Result<u16, TlsError> {
        // An end that offers nothing is not refused by the library.
        if connection.alpn_protocol() != Some(PROTOCOL) {
            return Err(TlsError::OtherProtocol);
        }
        let certificate = connection.peer_certificates().and_then(<[_]>::first).ok_or(TlsError::NoCertificate)?;
        Ok(self.key.host_of(certificate)?.number)
    }
}

/// What an error of a connection says about the other end, if it is one of TLS.
pub(super) fn of_tls(error: &(dyn std::error::Error + 'static)) -> Option<TlsError> {
    let mut next = Some(error);
    while let Some(error) = next {
        let error_within = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = error_within.and_then(|within| within.downcast_ref::<Error>());
        if let Some(error) = found.or_else(|| error.downcast_ref()) {
            return Some(classified(error));
        }
        next = error.source();
    }
    None
}

fn told(error: &io::Error) -> TlsError {
    of_tls(error).unwrap_or_else(|| TlsError::Failed { why: error.to_string() })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's errors, of which a few are our own or told apart")]
fn classified(error: &Error) -> TlsError {
    let failed = || TlsError::Failed { why: error.to_string() };
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(ours))) => {
            ours.downcast_ref::<TlsError>().cloned().unwrap_or_else(failed)
        }
        Error::NoCertificatesPresented => TlsError::NoCertificate,
        // What was answered is no record at all.
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => TlsError::Plain,
        Error::NoApplicationProtocol => TlsError::OtherProtocol,
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateUnknown
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateRequired => TlsError::Refused,
            AlertDescription::NoApplicationProtocol => TlsError::OtherProtocol,
            _ => failed(),
        },
        _ => failed(),
    }
}

/// The certificates of hosts that know the fabric's key.
struct ByProof(PeerKey);

impl fmt::Debug for ByProof {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("ByProof")
    }
}

fn refusal(error: TlsError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

impl Accepted for ByProof {
    fn accept(&self, certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !others.is_empty() {
            let error = peers::CertificateError::Count { count: 1 + others.len() };
            return Err(refusal(error.into()));
        }
        self.0.host_of(certificate).map(|_| ()).map_err(|error| refusal(error.into()))
    }

    fn public_key(&self, certificate: &CertificateDer<'_>) -> Result<Option<SubjectPublicKeyInfoDer<'static>>, Error> {
        let proven = self.0.host_of(certificate).map_err(|error: ProofError| refusal(error.into()))?;
        Ok(Some(SubjectPublicKeyInfoDer::from(proven.public_key.to_vec())))
    }
}

#[cfg(test)]
mod tests;
