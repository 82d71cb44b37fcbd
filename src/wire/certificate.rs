//! An agent's X.509 certificate, as another agent reads it: where its public key is, and the proof in it.
//!
//! The proof is an extension, not critical, with the object identifier [`PROOF_OID`]. Its value is one DER OCTET STRING
//! of 35 bytes: the version 1, a host number (big-endian), and a MAC of 32 bytes. What the MAC says is not known here.
//!
//! Nothing else of a certificate counts: neither names, nor times, nor who signed it. So this reader knows the one shape
//! that agents make, DER with every length minimal and every byte accounted for, and refuses the rest. It allocates
//! nothing and looks at each byte once.

/// The object identifier of the proof: below the arc for UUIDs (ITU-T X.667), where nobody has to be asked for one; the
/// UUID is 00000000-0000-0000-5d1f-86c20b7e43a9.
pub const PROOF_OID: [u64; 3] = [2, 25, 6_710_230_137_779_930_025];

/// The same as it is encoded.
const PROOF_OID_DER: [u8; 10] = [0x69, 0xdd, 0x8f, 0xe1, 0xd8, 0xa0, 0xdb, 0xf9, 0x87, 0x29];

/// Longest certificate in bytes; agents' have about 350.
pub const CERTIFICATE_BYTES_MAX: usize = 2048;

/// Most extensions of a certificate.
const EXTENSIONS_MAX: usize = 8;

/// The version of the proof.
const PROOF_VERSION: u8 = 1;

/// Bytes of a proof: version, host number, MAC.
const PROOF_BYTES: usize = 1 + 2 + 32;

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
/// Context-specific and constructed: the certificate's version.
const VERSION: u8 = 0xa0;
/// Context-specific and constructed: its extensions.
const EXTENSIONS: u8 = 0xa3;

/// What of an agent's certificate counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentCertificate<'a> {
    /// The SubjectPublicKeyInfo, as it is encoded.
    pub public_key: &'a [u8],
    /// The proof in it.
    pub proof: Proof,
}

/// Whose a certificate is, and what shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The host's number.
    pub host: u16,
    /// A MAC over number and public key.
    pub mac: [u8; 32],
}

/// Why a certificate is not an agent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Longer than any agent's.
    #[error("a certificate of {bytes} bytes: {CERTIFICATE_BYTES_MAX} are possible")]
    TooLong {
        /// How long it is.
        bytes: usize,
    },
    /// None, or one with others that vouch for it.
    #[error("{count} certificates: one is possible")]
    Count {
        /// How many there are.
        count: usize,
    },
    /// Not what agents make.
    #[error("not a certificate as agents make them: its {part} is malformed")]
    Malformed {
        /// Which part of it.
        part: &'static str,
    },
    /// An extension that says that it has to be understood, and is not.
    #[error("a certificate with a critical extension, of which none is known")]
    Critical,
    /// The extension is not there.
    #[error("a certificate without the proof that an agent's has")]
    NoProof,
    /// The extension is of another version.
    #[error("a certificate with a proof of version {version}: {PROOF_VERSION} is known")]
    Version {
        /// Which.
        version: u8,
    },
}

impl Proof {
    /// The value of the extension.
    pub fn to_extension(self) -> Vec<u8> {
        // 35 bytes: one byte of length.
        let mut value = vec![OCTET_STRING, 35, PROOF_VERSION];
        value.extend_from_slice(&self.host.to_be_bytes());
        value.extend_from_slice(&self.mac);
        value
    }

    fn read(value: &[u8]) -> Result<Self, CertificateError> {
        const PART: &str = "proof";
        let mut reader = Der(value);
        let content = reader.take(OCTET_STRING, PART)?;
        reader.end(PART)?;
        // The version first: the rest is what it says it is.
        let version = *content.first().ok_or(CertificateError::Malformed { part: PART })?;
        if version != PROOF_VERSION {
            return Err(CertificateError::Version { version });
        }
        let content: &[u8; PROOF_BYTES] = content.try_into().map_err(|_| CertificateError::Malformed { part: PART })?;
        let [_, high, low, mac @ ..] = *content;
        Ok(Self { host: u16::from_be_bytes([high, low]), mac })
    }
}

impl<'a> AgentCertificate<'a> {
    /// Reads a certificate in DER. Refuses what agents do not make; never what time it is, or who signed it.
    pub fn read(certificate: &'a [u8]) -> Result<Self, CertificateError> {
        if certificate.len() > CERTIFICATE_BYTES_MAX {
            return Err(CertificateError::TooLong { bytes: certificate.len() });
        }
        let mut whole = Der(certificate);
        let mut outer = Der(whole.take(SEQUENCE, "frame")?);
        whole.end("frame")?;
        let mut inner = Der(outer.take(SEQUENCE, "frame")?);
        outer.take(SEQUENCE, "signature")?;
        outer.take(BIT_STRING, "signature")?;
        outer.end("signature")?;

        let mut version = Der(inner.take(VERSION, "version")?);
        // X.509 version 3, the only one with extensions.
        if version.take(INTEGER, "version")? != [2] {
            return Err(CertificateError::Malformed { part: "version" });
        }
        version.end("version")?;
        inner.take(INTEGER, "serial number")?;
        for part in ["signature's algorithm", "issuer", "validity", "subject"] {
            inner.take(SEQUENCE, part)?;
        }
        let public_key = inner.take_whole(SEQUENCE, "public key")?;
        let mut wrapper = match inner.0 {
            [] => return Err(CertificateError::NoProof),
            _ => Der(inner.take(EXTENSIONS, "list of extensions")?),
        };
        inner.end("end")?;
        let extensions = Der(wrapper.take(SEQUENCE, "list of extensions")?);
        wrapper.end("list of extensions")?;
        Ok(Self { public_key, proof: proof(extensions)? })
    }
}

/// The proof among extensions: there has to be exactly one.
fn proof(mut extensions: Der<'_>) -> Result<Proof, CertificateError> {
    const PART: &str = "extension";
    let mut found = None;
    for _ in 0..EXTENSIONS_MAX {
        if extensions.0.is_empty() {
            break;
        }
        let mut extension = Der(extensions.take(SEQUENCE, PART)?);
        let identifier = extension.take(OBJECT_IDENTIFIER, PART)?;
        if extension.0.first() == Some(&BOOLEAN) {
            // DER leaves out what is the default: what is written is true.
            return match extension.take(BOOLEAN, PART)? {
                [0xff] => Err(CertificateError::Critical),
                _ => Err(CertificateError::Malformed { part: PART }),
            };
        }
        let value = extension.take(OCTET_STRING, PART)?;
        extension.end(PART)?;
        if identifier == PROOF_OID_DER && found.replace(Proof::read(value)?).is_some() {
            return Err(CertificateError::Malformed { part: "second proof" });
        }
    }
    extensions.end("list of extensions")?;
    found.ok_or(CertificateError::NoProof)
}

/// What is left to read.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next element, which has to be of this kind.
    fn take(&mut self, tag: u8, part: &'static str) -> Result<&'a [u8], CertificateError> {
        self.element(tag).map(|(_, content)| content).ok_or(CertificateError::Malformed { part })
    }

    /// The next element with its head.
    fn take_whole(&mut self, tag: u8, part: &'static str) -> Result<&'a [u8], CertificateError> {
        self.element(tag).map(|(whole, _)| whole).ok_or(CertificateError::Malformed { part })
    }

    fn element(&mut self, tag: u8) -> Option<(&'a [u8], &'a [u8])> {
        let (head, length) = match *self.0 {
            [found, ..] if found != tag => return None,
            [_, length @ 0..=0x7f, ..] => (2, usize::from(length)),
            // Longer forms only where the shorter one would not do.
            [_, 0x81, length @ 0x80..=0xff, ..] => (3, usize::from(length)),
            [_, 0x82, high @ 1..=0xff, low, ..] => (4, usize::from(u16::from_be_bytes([high, low]))),
            _ => return None,
        };
        let whole = self.0.get(..head + length)?;
        self.0 = &self.0[head + length..];
        Some((whole, &whole[head..]))
    }

    /// Nothing may be left.
    fn end(&self, part: &'static str) -> Result<(), CertificateError> {
        if self.0.is_empty() { Ok(()) } else { Err(CertificateError::Malformed { part }) }
    }
}

#[cfg(test)]
mod tests;
