//! Ed25519 keys and signatures (RFC 8032), as texts and as bytes. What is signed is the digest of something, behind a
//! prefix that says of what: a signature of a bundle is never one of anything else.
//!
//! | text | what |
//! |---|---|
//! | `ed25519:` and base64 of 32 bytes | a public key |
//! | `ed25519-private:` and base64 of 32 bytes | a private key: the seed of RFC 8032 section 5.1.5 |
//! | base64 of 64 bytes | a signature |
//!
//! Randomness is handed in, and files are read and written by others: this floor does no I/O.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use crate::base64::{decode, encode};

/// Bytes of a public key, and of a private key's seed.
pub const KEY_BYTES: usize = 32;

/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Bytes of the digest that is signed.
pub const DIGEST_BYTES: usize = 32;

const PUBLIC: &str = "ed25519:";
const PRIVATE: &str = "ed25519-private:";

/// What the digest of a bundle's manifest is signed behind. The zero ends it: none is the start of another.
const BUNDLE: &[u8] = b"hearth bundle manifest v1\0";

/// Most characters of a text that is not a key shown in an error.
const SHOWN_CHARS: usize = 80;

/// A public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; KEY_BYTES]);

/// A signature. Whether it is one is known only with a key and what was signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signature([u8; SIGNATURE_BYTES]);

/// A private key. It is never shown but by [`PrivateKey::to_text`].
pub struct PrivateKey {
    seed: [u8; KEY_BYTES],
    pair: Ed25519KeyPair,
}

/// A text is not a key or a signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// No public key.
    #[error("{text:?} is no public key: `ed25519:` and 44 characters of base64, as `hearth bundle key` prints it")]
    Public {
        /// What was given.
        text: String,
    },
    /// No private key. What was given is not repeated.
    #[error("this is no private key: `ed25519-private:` and 44 characters of base64, as `hearth bundle key` writes it")]
    Private,
    /// No signature.
    #[error("{text:?} is no signature: 88 characters of base64")]
    Signature {
        /// What was given.
        text: String,
    },
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}

fn bytes_of<const N: usize>(text: &str) -> Option<[u8; N]> {
    decode(text)?.try_into().ok()
}

/// What is signed of a bundle whose manifest has this digest.
fn bundle_message(manifest_digest: &[u8; DIGEST_BYTES]) -> Vec<u8> {
    [BUNDLE, manifest_digest].concat()
}

impl PublicKey {
    /// The key of these bytes. Whether they are a point of the curve is found out when something is verified.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// Whether the holder of this key signed the bundle whose manifest has this digest.
    pub fn has_signed_bundle(&self, manifest_digest: &[u8; DIGEST_BYTES], signature: &Signature) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(&bundle_message(manifest_digest), &signature.0).is_ok()
    }
}

impl Signature {
    /// The signature of these bytes.
    pub const fn from_bytes(bytes: [u8; SIGNATURE_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; SIGNATURE_BYTES] {
        &self.0
    }
}

impl PrivateKey {
    /// The key of this seed: 32 random bytes that nobody else knows.
    pub fn from_seed(seed: [u8; KEY_BYTES]) -> Result<Self, ParseKeyError> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| ParseKeyError::Private)?;
        Ok(Self { seed, pair })
    }

    /// Reads what [`PrivateKey::to_text`] wrote; white space around it does not matter.
    pub fn from_text(text: &str) -> Result<Self, ParseKeyError> {
        let seed = text.trim().strip_prefix(PRIVATE).and_then(bytes_of);
        Self::from_seed(seed.ok_or(ParseKeyError::Private)?)
    }

    /// The content of a key's file: one line.
    pub fn to_text(&self) -> String {
        format!("{PRIVATE}{}\n", encode(&self.seed))
    }

    /// The public key that belongs to it.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; KEY_BYTES];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(bytes)
    }

    /// Signs the bundle whose manifest has this digest.
    pub fn sign_bundle(&self, manifest_digest: &[u8; DIGEST_BYTES]) -> Signature {
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes.copy_from_slice(self.pair.sign(&bundle_message(manifest_digest)).as_ref());
        Signature(bytes)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("PrivateKey").field("public", &self.public().to_string()).finish_non_exhaustive()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{PUBLIC}{}", encode(&self.0))
    }
}

impl FromStr for PublicKey {
    type Err = ParseKeyError;
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let bytes = text.strip_prefix(PUBLIC).and_then(bytes_of);
        bytes.map(Self).ok_or_else(|| ParseKeyError::Public { text: shown(text) })
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&encode(&self.0))
    }
}

impl FromStr for Signature {
    type Err = ParseKeyError;
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        bytes_of(text).map(Self).ok_or_else(|| ParseKeyError::Signature { text: shown(text) })
    }
}

impl TryFrom<String> for PublicKey {
    type Error = ParseKeyError;
    fn try_from(text: String) -> Result<Self, ParseKeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl TryFrom<String> for Signature {
    type Error = ParseKeyError;
    fn try_from(text: String) -> Result<Self, ParseKeyError> {
        text.parse()
    }
}

impl From<Signature> for String {
    fn from(signature: Signature) -> Self {
        signature.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_seed_gives_the_key_of_the_rfc() {
        // RFC 8032 section 7.1, test 1.
        let seed = [
            0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44, 0x49,
            0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
        ];
        let public = PrivateKey::from_seed(seed).unwrap().public();
        assert_eq!(public.as_bytes()[..4], [0xd7, 0x5a, 0x98, 0x01]);
        assert_eq!(public.to_string(), "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=");
    }

    #[test]
    fn only_the_key_and_the_digest_of_a_signature_fit_it() {
        let key = PrivateKey::from_seed([7; KEY_BYTES]).unwrap();
        let other = PrivateKey::from_seed([8; KEY_BYTES]).unwrap();
        let signature = key.sign_bundle(&[1; DIGEST_BYTES]);
        assert!(key.public().has_signed_bundle(&[1; DIGEST_BYTES], &signature));
        assert!(!key.public().has_signed_bundle(&[2; DIGEST_BYTES], &signature));
        assert!(!other.public().has_signed_bundle(&[1; DIGEST_BYTES], &signature));
        for bit in 0..SIGNATURE_BYTES * 8 {
            let mut bytes = *signature.as_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!key.public().has_signed_bundle(&[1; DIGEST_BYTES], &Signature(bytes)), "bit {bit}");
        }
        let plain = Ed25519KeyPair::from_seed_unchecked(&[7; KEY_BYTES]).unwrap().sign(&[1; DIGEST_BYTES]);
        let plain = Signature(plain.as_ref().try_into().unwrap());
        assert!(
            !key.public().has_signed_bundle(&[1; DIGEST_BYTES], &plain),
            "the same digest signed as something else"
        );
        assert!(!format!("{key:?}").contains(&encode(&[7; KEY_BYTES])), "{key:?}");
    }

    proptest! {
        #[test]
        fn texts_parse_back(bytes: [u8; KEY_BYTES], more: [u8; KEY_BYTES]) {
            let public = PublicKey(bytes);
            prop_assert_eq!(public.to_string().parse(), Ok(public));
            let signature = Signature([bytes, more].concat().try_into().unwrap());
            prop_assert_eq!(signature.to_string().parse(), Ok(signature));
            let private = PrivateKey::from_seed(bytes).unwrap();
            let again = PrivateKey::from_text(&format!("  {}\n", private.to_text())).unwrap();
            prop_assert_eq!(again.public(), private.public());
            prop_assert!(PrivateKey::from_text(&public.to_string()).is_err());
            prop_assert!(private.to_text().parse::<PublicKey>().is_err());
        }

        #[test]
        fn other_texts_are_refused(text in "(ed25519:|ed25519-private:)?[A-Za-z0-9+/=]{0,43}", bytes: [u8; KEY_BYTES]) {
            prop_assert!(text.parse::<PublicKey>().is_err() && text.parse::<Signature>().is_err());
            prop_assert!(PrivateKey::from_text(&text).is_err());
            // Whatever the bytes are, they are a key that signed nothing.
            prop_assert!(!PublicKey(bytes).has_signed_bundle(&bytes, &Signature([0; SIGNATURE_BYTES])));
        }
    }
}
