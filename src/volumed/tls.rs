//! TLS between volume daemons: 1.3 only. The server has a certificate of its own, made at its first start and kept, so that
//! who was told of it finds it again; a client was told by its agent which one that is, and takes no other. Who the client
//! is, its lease's secret says.

use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use ring::digest::{SHA256, digest};
use rustls::client::ClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::ServerConfig;
use rustls::{CertificateError, Error};
use serde::{Deserialize, Serialize};

use super::log::say;
use crate::sys::file;
use crate::tls::{self, Accepted, Own};
use crate::{base64, report};

/// The file of key and certificate, in the daemon's own directory.
const FILE: &str = "identity.json";

/// Its content. It is not printed: the key is a secret.
#[derive(Serialize, Deserialize)]
struct Written {
    format: u32,
    /// DER, in Base64.
    certificate: String,
    /// PKCS #8, in Base64.
    key: String,
}

/// The only version.
const FORMAT: u32 = 1;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// No certificate could be made.
    #[error("make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// The library refuses.
    #[error("prepare TLS")]
    Tls(#[from] Error),
    /// A file could not be read or written.
    #[error("use the file")]
    Io(#[from] io::Error),
    /// What was kept is not what was written.
    #[error("it is not a certificate and its key")]
    Damaged,
}

/// The daemon's certificate.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// For connections that are accepted.
    pub(super) server: Arc<ServerConfig>,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub(super) sha256: String,
}

impl Identity {
    /// The one that is kept in this directory; a new one if there is none, or none that can be used.
    pub(super) fn kept_in(directory: &Path) -> Result<Self, TlsError> {
        let path = directory.join(FILE);
        match Self::read(&path) {
            Ok(Some(kept)) => return Ok(kept),
            Ok(None) => {}
            Err(error) => say(format_args!(
                "{}: {}; other hosts find another certificate from now on",
                path.display(),
                report::chain(&error)
            )),
        }
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(Vec::new())?.self_signed(&key)?;
        let (certificate, key) = (certificate.der().to_vec(), key.serialize_der());
        if let Err(error) = Self::write(&path, &certificate, &key) {
            // It is served with all the same: until the next start it is as good.
            say(format_args!("{}: {}; it is used, but not kept", path.display(), report::chain(&error)));
        }
        Self::new(certificate, key)
    }

    fn read(path: &Path) -> Result<Option<Self>, TlsError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let written = serde_json::from_slice::<Written>(&bytes).ok().filter(|written| written.format == FORMAT);
        let parts = written.and_then(|written| base64::decode(&written.certificate).zip(base64::decode(&written.key)));
        let (certificate, key) = parts.ok_or(TlsError::Damaged)?;
        // The library looks whether they belong together.
        Self::new(certificate, key).map(Some)
    }

    fn write(path: &Path, certificate: &[u8], key: &[u8]) -> Result<(), TlsError> {
        let (certificate, key) = (base64::encode(certificate), base64::encode(key));
        let written = serde_json::to_vec(&Written { format: FORMAT, certificate, key }).map_err(io::Error::other)?;
        Ok(file::replace(path, &written)?)
    }

    fn new(certificate: Vec<u8>, key: Vec<u8>) -> Result<Self, TlsError> {
        let sha256 = sha256(&certificate);
        let config = tls::server(Own { certificate, key })?;
        Ok(Self { server: Arc::new(config), sha256 })
    }
}

/// A client's end of a connection to whoever has this certificate.
pub(super) fn connect_to(certificate_sha256: &str) -> Result<ClientConnection, TlsError> {
    let config = tls::client(Only(certificate_sha256.to_ascii_lowercase()))?;
    Ok(ClientConnection::new(Arc::new(config), tls::no_name())?)
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
        // A string takes whatever it is given.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The digest of the one certificate that the other end may have.
#[derive(Debug)]
struct Only(String);

impl Accepted for Only {
    fn accept(&self, certificate: &CertificateDer<'_>, _others: &[CertificateDer<'_>]) -> Result<(), Error> {
        match sha256(certificate) == self.0 {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_certificate_is_kept_and_one_that_is_damaged_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let of = || Identity::kept_in(dir.path()).unwrap().sha256;
        let path = dir.path().join(FILE);
        let first = of();
        assert_eq!((first.len(), of()), (64, first.clone()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let written = std::fs::read(&path).unwrap();
        let other = tempfile::tempdir().unwrap();
        Identity::kept_in(other.path()).unwrap();
        let mut mixed: Written = serde_json::from_slice(&written).unwrap();
        mixed.key = serde_json::from_slice::<Written>(&std::fs::read(other.path().join(FILE)).unwrap()).unwrap().key;
        let unknown = String::from_utf8(written.clone()).unwrap().replace("\"format\":1", "\"format\":2");
        let damaged = [&written[..written.len() / 2], b"", &serde_json::to_vec(&mixed).unwrap(), unknown.as_bytes()];
        for damaged in damaged {
            file::replace(&path, damaged).unwrap();
            let next = of();
            assert!(next != first && of() == next, "another one, and kept as well");
        }
        file::replace(&path, &written).unwrap();
        assert_eq!(of(), first);
        // Where nothing can be written, there is one for now.
        assert!(Identity::kept_in(&dir.path().join("absent")).is_ok());
    }
}
