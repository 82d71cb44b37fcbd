//! Who is at the other end of a connection: the certificate that an agent makes for its life, with a proof in it.
//!
//! The proof is a MAC over host number and public key, made with a key that is derived from the fabric's and used for
//! nothing else. The handshake shows that the other end has the certificate's private key; the proof shows that whoever
//! made it knows the fabric's key, and which host it is. So hosts need no authority that signs certificates, none has to
//! be renewed, and nothing has to be configured beside the key that is there anyway. What a certificate says beyond
//! that (names, times, a signature of its own) is not looked at.

use std::fmt;
use std::io;

use rcgen::{CertificateParams, CustomExtension, KeyPair, PKCS_ED25519};

use super::auth::PeerKey;
use crate::wire::certificate::{AgentCertificate, PROOF_OID, Proof};

pub use crate::wire::certificate::CertificateError;

/// A host's certificate and its private key. They are made at an agent's start and are nowhere but in its memory.
pub struct HostCertificate {
    /// The certificate in DER.
    pub certificate: Vec<u8>,
    /// Its private key, in PKCS #8.
    pub private_key: Vec<u8>,
}

impl fmt::Debug for HostCertificate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("HostCertificate")
    }
}

/// A host that has proved its number, and the public key that its connection has to prove to have the other half of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProvenHost<'a> {
    /// Its number.
    pub number: u16,
    /// The SubjectPublicKeyInfo.
    pub public_key: &'a [u8],
}

/// Why a certificate proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// It is no agent's.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// Its proof was made with another key.
    #[error("its certificate was made with another key: fabric.key_file has to be the same on both hosts")]
    OtherKey,
}

impl HostCertificate {
    /// Makes a key pair, and a certificate that proves that it is this host's of the fabric with this key.
    pub fn make(key: &PeerKey, host: u16) -> io::Result<Self> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(io::Error::other)?;
        // A name is only for who looks at connections with other tools; its times are the widest there are.
        let mut parameters = CertificateParams::new([format!("host-{host}")]).map_err(io::Error::other)?;
        let public_key = rcgen::PublicKeyData::subject_public_key_info(&pair);
        let proof = Proof { host, mac: *key.proof(host, &public_key).as_bytes() };
        parameters.custom_extensions.push(CustomExtension::from_oid_content(&PROOF_OID, proof.to_extension()));
        let made = parameters.self_signed(&pair).map_err(io::Error::other)?;
        Ok(Self { certificate: made.der().to_vec(), private_key: pair.serialize_der() })
    }
}

impl PeerKey {
    fn proof(&self, host: u16, public_key: &[u8]) -> blake3::Hash {
        // Number first: it has one length, so no two pairs make the same bytes.
        blake3::Hasher::new_keyed(self.for_certificates()).update(&host.to_be_bytes()).update(public_key).finalize()
    }

    /// Whose a certificate is, if its proof was made with this key.
    pub fn host_of<'a>(&self, certificate: &'a [u8]) -> Result<ProvenHost<'a>, ProofError> {
        let AgentCertificate { public_key, proof } = AgentCertificate::read(certificate)?;
        // Hashes are compared in constant time.
        match self.proof(proof.host, public_key) == blake3::Hash::from_bytes(proof.mac) {
            true => Ok(ProvenHost { number: proof.host, public_key }),
            false => Err(ProofError::OtherKey),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> PeerKey {
        PeerKey::new(&[7; 32])
    }

    #[test]
    fn a_certificate_proves_its_host_to_who_has_the_key() {
        for host in [1, 3, 255, u16::MAX] {
            let made = HostCertificate::make(&key(), host).unwrap();
            let proven = key().host_of(&made.certificate).unwrap();
            assert_eq!(proven.number, host);
            assert_eq!(PeerKey::new(&[8; 32]).host_of(&made.certificate), Err(ProofError::OtherKey));
            assert_eq!(format!("{made:?}"), "HostCertificate");
        }
    }

    #[test]
    fn each_life_has_its_own() {
        let [one, other] = [(); 2].map(|()| HostCertificate::make(&key(), 3).unwrap());
        let keys = [&one, &other].map(|made| key().host_of(&made.certificate).unwrap().public_key.to_vec());
        assert_ne!(keys[0], keys[1]);
        assert_ne!(one.private_key, other.private_key);
    }

    #[test]
    fn another_number_or_public_key_has_another_proof() {
        let made = HostCertificate::make(&key(), 3).unwrap();
        let proof = key().proof(3, key().host_of(&made.certificate).unwrap().public_key);
        let changed = |from: &[u8], to: &[u8]| {
            let at = made.certificate.windows(from.len()).position(|window| window == from).unwrap();
            let mut bytes = made.certificate.clone();
            bytes[at..at + from.len()].copy_from_slice(to);
            key().host_of(&bytes).map(|proven| proven.number)
        };
        let with = |host: u16| Proof { host, mac: *proof.as_bytes() }.to_extension();
        assert_eq!(changed(&with(3), &with(4)), Err(ProofError::OtherKey));
        let public_key = key().host_of(&made.certificate).unwrap().public_key.to_vec();
        let mut other = public_key.clone();
        *other.last_mut().unwrap() ^= 1;
        assert_eq!(changed(&public_key, &other), Err(ProofError::OtherKey));
    }

    #[test]
    fn a_proof_is_no_other_mac_of_the_key() {
        // The same bytes under the key of requests would be another MAC: nothing that is signed can be put into a proof.
        let proof = key().proof(3, b"key");
        let keyed = blake3::Hasher::new_keyed(key().for_requests()).update(&[0, 3]).update(b"key").finalize();
        assert_ne!(proof, keyed);
    }

    #[test]
    fn a_certificate_of_something_else_is_named() {
        let made = rcgen::generate_simple_self_signed(vec!["hearth".to_owned()]).unwrap();
        assert_eq!(key().host_of(made.cert.der()), Err(ProofError::Certificate(CertificateError::NoProof)));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_makes_it_anothers(at in 0usize..400, flip in 1u8..) {
            let made = HostCertificate::make(&key(), 3).unwrap();
            let mut bytes = made.certificate.clone();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            // What is not covered by the proof is not looked at, so it may still be host 3, with the same key.
            if let Ok(proven) = key().host_of(&bytes) {
                let wanted = key().host_of(&made.certificate).unwrap();
                prop_assert_eq!(proven, wanted);
            }
        }
    }
}
