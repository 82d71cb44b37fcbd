//! Whose bundles are launched here: a list of keys in the configuration, and whether a bundle has a signature of one of
//! them. Without a list nothing is asked. Looked at before anything of a VM is there; a VM that is there goes on, and
//! wakes, whatever the list says by then.

use super::bundles::{BundleError, BundleView};
use super::shared::Shared;
use super::world::World;
use crate::bundle::Signed;
use crate::signing::PublicKey;

/// Most keys of the list.
pub(super) const TRUSTED_KEYS_MAX: usize = 256;

/// Whose bundles are launched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustConfig {
    /// Keys of those who sign bundles; none: all bundles are launched.
    pub trusted_keys: Vec<PublicKey>,
    /// Whether bundles that were made on this host need no signature.
    pub trust_local: bool,
}

/// Whether a bundle may be launched here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// There is no list.
    Unchecked,
    /// It has a signature of a key of the list.
    Signed {
        /// The key.
        by: PublicKey,
    },
    /// It was made here, and that is enough.
    MadeHere,
    /// It has none.
    Untrusted,
}

impl TrustConfig {
    /// What the list says of a bundle.
    pub(super) fn judge(&self, signed: &Signed) -> Trust {
        if self.trusted_keys.is_empty() {
            return Trust::Unchecked;
        }
        let Signed { manifest_digest, made_here, signatures } = signed;
        let trusted = signatures.iter().filter(|one| self.trusted_keys.contains(&one.key));
        match trusted.into_iter().find(|one| one.is_of(manifest_digest)) {
            Some(one) => Trust::Signed { by: one.key },
            None if *made_here && self.trust_local => Trust::MadeHere,
            None => Trust::Untrusted,
        }
    }
}

impl<W: World> Shared<W> {
    /// Whether a bundle may be launched here.
    pub(super) fn require_trust(&self, view: &BundleView) -> Result<(), BundleError> {
        match self.config.trust.judge(&view.signed) {
            Trust::Unchecked | Trust::Signed { .. } | Trust::MadeHere => Ok(()),
            Trust::Untrusted => {
                let signers = view.signed.signatures.iter().map(|one| one.key).collect();
                Err(BundleError::Untrusted { bundle: view.id.clone(), signers })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{BundleSignature, Digest};
    use crate::signing::PrivateKey;

    fn key(number: u8) -> PrivateKey {
        PrivateKey::from_seed([number; 32]).unwrap()
    }

    fn signed(made_here: bool, by: &[u8], digest: &Digest) -> Signed {
        let one = |number: &u8| BundleSignature {
            key: key(*number).public(),
            signature: key(*number).sign_bundle(digest.as_bytes()),
        };
        let signatures = by.iter().map(one).collect();
        Signed { manifest_digest: Digest::of(b"manifest"), made_here, signatures }
    }

    #[test]
    fn a_list_asks_for_a_signature_of_one_of_its_keys() {
        let (right, wrong) = (Digest::of(b"manifest"), Digest::of(b"another"));
        let list = |keys: &[u8], trust_local| TrustConfig {
            trusted_keys: keys.iter().map(|number| key(*number).public()).collect(),
            trust_local,
        };
        let by = |number| Trust::Signed { by: key(number).public() };
        for (config, signed, wanted) in [
            (list(&[], false), signed(false, &[], &right), Trust::Unchecked),
            (list(&[], true), signed(false, &[3], &wrong), Trust::Unchecked),
            (list(&[1, 2], false), signed(false, &[3, 2], &right), by(2)),
            (list(&[1, 2], false), signed(false, &[2], &wrong), Trust::Untrusted),
            (list(&[1, 2], false), signed(false, &[3], &right), Trust::Untrusted),
            (list(&[1], false), signed(true, &[], &right), Trust::Untrusted),
            (list(&[1], true), signed(true, &[], &right), Trust::MadeHere),
            (list(&[1], true), signed(true, &[1], &right), by(1)),
            (list(&[1], true), signed(false, &[], &right), Trust::Untrusted),
        ] {
            assert_eq!(config.judge(&signed), wanted, "{config:?} {signed:?}");
        }
    }
}
