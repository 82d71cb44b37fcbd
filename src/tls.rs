//! TLS 1.3 between programs that know each other by their certificates (RFC 8446): no authorities, no names, nothing
//! resumed, nothing sent early. Which certificate the other end may have, whoever uses this says ([`Accepted`]); that the
//! other end has its key, the handshake's signature proves (section 4.4.3 there).
#![forbid(unsafe_code)]

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption, WantsClientCert};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConfig};
use rustls::version::TLS13;
use rustls::{ConfigBuilder, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// Which certificates the other end may have.
pub(crate) trait Accepted: fmt::Debug + Send + Sync + 'static {
    /// Whether it may have this one, with `others` sent beside it.
    fn accept(&self, certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error>;

    /// The public key in it, for who reads certificates by itself: two readers need not agree then. `None`: the library
    /// reads it.
    fn public_key(&self, certificate: &CertificateDer<'_>) -> Result<Option<SubjectPublicKeyInfoDer<'static>>, Error> {
        let _ = certificate;
        Ok(None)
    }
}

/// What an end shows of itself: its certificate, and its key in PKCS #8, both DER.
pub(crate) struct Own {
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// How an end that connects to an accepted one, and shows nothing of itself, speaks.
pub(crate) fn client(accepted: impl Accepted) -> Result<ClientConfig, Error> {
    Ok(bare(client_of(accepted)?.with_no_client_auth()))
}

/// How one that connects, and shows who it is, speaks.
pub(crate) fn mutual_client(accepted: impl Accepted, own: Own) -> Result<ClientConfig, Error> {
    let (certificates, key) = own.parts();
    Ok(bare(client_of(accepted)?.with_client_auth_cert(certificates, key)?))
}

/// How one speaks that is connected to by whoever knows it.
pub(crate) fn server(own: Own) -> Result<ServerConfig, Error> {
    let config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()));
    let config = config.with_protocol_versions(&[&TLS13])?.with_no_client_auth();
    let (certificates, key) = own.parts();
    Ok(forgetful(config.with_single_cert(certificates, key)?))
}

/// How one speaks that is connected to by accepted ones.
pub(crate) fn mutual_server(accepted: impl Accepted, own: Own) -> Result<ServerConfig, Error> {
    let verifier = ByCertificate::new(accepted);
    let config = ServerConfig::builder_with_provider(Arc::clone(&verifier.provider));
    let config = config.with_protocol_versions(&[&TLS13])?.with_client_cert_verifier(Arc::new(verifier));
    let (certificates, key) = own.parts();
    Ok(forgetful(config.with_single_cert(certificates, key)?))
}

/// The name to connect by, which nobody looks at: the certificate itself is known.
pub(crate) fn no_name() -> ServerName<'static> {
    ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into())
}

/// A client that will be told what it shows.
pub(crate) fn client_of(accepted: impl Accepted) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error> {
    let verifier = ByCertificate::new(accepted);
    let config = ClientConfig::builder_with_provider(Arc::clone(&verifier.provider));
    let config = config.with_protocol_versions(&[&TLS13])?;
    Ok(config.dangerous().with_custom_certificate_verifier(Arc::new(verifier)))
}

fn bare(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config
}

fn forgetful(mut config: ServerConfig) -> ServerConfig {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

impl Own {
    fn parts(self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![CertificateDer::from(self.certificate)], PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key)))
    }
}

/// Takes accepted certificates, from either end.
struct ByCertificate<A> {
    accepted: A,
    provider: Arc<CryptoProvider>,
}

impl<A: Accepted> fmt::Debug for ByCertificate<A> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("ByCertificate").field(&self.accepted).finish()
    }
}

impl<A: Accepted> ByCertificate<A> {
    fn new(accepted: A) -> Self {
        Self { accepted, provider: Arc::new(provider::default_provider()) }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        match self.accepted.public_key(certificate)? {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, signed, algorithms),
            None => verify_tls13_signature(message, certificate, signed, algorithms),
        }
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Only 1.3 is spoken.
fn older() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken".to_owned()))
}

impl<A: Accepted> ServerCertVerifier for ByCertificate<A> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.accepted.accept(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        older()
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
        self.schemes()
    }
}

impl<A: Accepted> ClientCertVerifier for ByCertificate<A> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.accepted.accept(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        older()
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
        self.schemes()
    }
}
