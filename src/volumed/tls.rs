//! TLS between volume daemons: 1.3 only. The server has a certificate of its own, made when it starts; a client was told
//! by its agent which one that is, and takes no other. Who the client is, its lease's secret says.

use std::fmt::{self, Write};
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use ring::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ServerConfig;
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// No certificate could be made.
    #[error("make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// The library refuses.
    #[error("prepare TLS")]
    Tls(#[from] Error),
}

/// This process's certificate.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// For connections that are accepted.
    pub(super) server: Arc<ServerConfig>,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub(super) sha256: String,
}

impl Identity {
    /// A new one.
    pub(super) fn new() -> Result<Self, TlsError> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(Vec::new())?.self_signed(&key)?;
        let certificate = certificate.der().clone();
        let sha256 = sha256(&certificate);
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()));
        let config = config.with_protocol_versions(&[&rustls::version::TLS13])?.with_no_client_auth();
        let mut config = config.with_single_cert(vec![certificate], key)?;
        config.send_tls13_tickets = 0;
        Ok(Self { server: Arc::new(config), sha256 })
    }
}

/// A client's end of a connection to whoever has this certificate.
pub(super) fn connect_to(certificate_sha256: &str) -> Result<ClientConnection, TlsError> {
    let provider = Arc::new(provider::default_provider());
    let pinned = Pinned { sha256: certificate_sha256.to_ascii_lowercase(), provider: Arc::clone(&provider) };
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(pinned));
    let mut config = config.with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    // Nobody looks at it: the certificate itself is known.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    Ok(ClientConnection::new(Arc::new(config), name)?)
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
        // A string takes whatever it is given.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Takes one certificate and no other.
struct Pinned {
    sha256: String,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Pinned")
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
        if sha256(end_entity) == self.sha256 {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
