//! What is known of a bundle and is no part of it, in `.signatures/<id>.json`: whose signatures it has, and whether it was
//! made on this host. A bundle is never changed, and a signature comes after it; so it lies beside it.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::damage::ReadBundleError;
use super::digest::Digest;
use super::stage::is_no_space;
use super::store::Store;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::signing::{PublicKey, Signature};
use crate::sys::file;

/// Version of the file.
const FORMAT: u32 = 1;

/// Most signatures of a bundle.
pub const SIGNATURES_MAX: usize = 64;

/// Longest file: a signature with its key takes 180 bytes.
pub(super) const FILE_BYTES_MAX: u64 = 64 << 10;

/// Somebody's signature of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleSignature {
    /// Whose.
    pub key: PublicKey,
    /// Of the digest of the manifest.
    pub signature: Signature,
}

/// What is known beside a bundle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Beside {
    /// Whether it was made on this host.
    pub(super) made_here: bool,
    /// Its signatures, one of each key.
    pub(super) signatures: Vec<BundleSignature>,
}

/// Who stands for a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Digest of its manifest: what is signed.
    pub manifest_digest: Digest,
    /// Whether it was made on this host.
    pub made_here: bool,
    /// Its signatures, one of each key, in the order of the keys. Whether they are any is for whoever relies on them.
    pub signatures: Vec<BundleSignature>,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    made_here: bool,
    signatures: Vec<BundleSignature>,
}

/// Why a signature was not kept, or the signatures are not known.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The bundle cannot be read.
    #[error(transparent)]
    Read(#[from] ReadBundleError),
    /// It is not one of this key and this bundle.
    #[error("this is no signature of bundle {bundle} by {key}")]
    Invalid {
        /// The bundle.
        bundle: BundleId,
        /// The key.
        key: PublicKey,
    },
    /// There are as many as there may be.
    #[error("bundle {bundle} has {SIGNATURES_MAX} signatures, and no more are kept")]
    TooMany {
        /// The bundle.
        bundle: BundleId,
    },
    /// The file is not what it has to be.
    #[error("{} is no list of signatures of version {FORMAT}: remove it, and sign the bundle again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The disk is full.
    #[error("no space left for {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("signatures of a bundle: {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl SignError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Read(error) => error.retry(),
            Self::Invalid { .. } => Retry::Never,
            Self::TooMany { .. } | Self::Malformed { .. } => Retry::WithChange,
            Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }
}

impl BundleSignature {
    /// Whether its key's holder signed the bundle whose manifest has this digest.
    pub fn is_of(&self, manifest_digest: &Digest) -> bool {
        self.key.has_signed_bundle(manifest_digest.as_bytes(), &self.signature)
    }
}

impl Store {
    /// Who stands for a bundle.
    pub fn signed(&self, id: &BundleId) -> Result<Signed, SignError> {
        let (_, manifest_digest) = self.manifest_and_digest(id)?;
        let Beside { made_here, signatures } = self.beside(id)?;
        Ok(Signed { manifest_digest, made_here, signatures })
    }

    /// Keeps a signature of a bundle; one that the same key made before gives way.
    pub fn sign(&self, id: &BundleId, signature: BundleSignature) -> Result<(), SignError> {
        let _changes = self.lock_changes();
        let (_, manifest_digest) = self.manifest_and_digest(id)?;
        if !signature.is_of(&manifest_digest) {
            return Err(SignError::Invalid { bundle: id.clone(), key: signature.key });
        }
        self.add_beside(id, Beside { made_here: false, signatures: vec![signature] })
    }

    /// Adds to what is known beside a bundle. The lock of changes is held.
    pub(super) fn add_beside(&self, id: &BundleId, more: Beside) -> Result<(), SignError> {
        let before = self.beside(id)?;
        let mut after = before.clone();
        after.made_here |= more.made_here;
        for one in more.signatures {
            match after.signatures.binary_search_by_key(&one.key, |known| known.key) {
                Ok(at) => after.signatures[at] = one,
                Err(at) => after.signatures.insert(at, one),
            }
        }
        if after == before {
            return Ok(());
        }
        if after.signatures.len() > SIGNATURES_MAX {
            return Err(SignError::TooMany { bundle: id.clone() });
        }
        let path = self.places().signatures_of(id);
        let written = Written { format: FORMAT, made_here: after.made_here, signatures: after.signatures };
        let bytes = serde_json::to_vec(&written).map_err(|_| SignError::Malformed { path: path.clone() })?;
        // The store's disk may have been mounted since it was opened.
        let kept = file::make_directories(&self.places().signatures()).and_then(|()| file::replace(&path, &bytes));
        kept.map_err(
            |source| {
                if is_no_space(&source) { SignError::NoSpace { path } } else { SignError::File { path, source } }
            },
        )
    }

    pub(super) fn beside(&self, id: &BundleId) -> Result<Beside, SignError> {
        let path = self.places().signatures_of(id);
        let file = match file::open_regular(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return Err(SignError::Malformed { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Beside::default()),
            Err(source) => return Err(SignError::File { path, source }),
        };
        match read(file) {
            Ok(Some(beside)) => Ok(beside),
            Ok(None) => Err(SignError::Malformed { path }),
            Err(source) => Err(SignError::File { path, source }),
        }
    }
}

/// The signatures in bytes of such a file, wherever they come from; none in no bytes. `None`: it is no such file. Whether they
/// are any is not looked at, and that a bundle was made there does not count here.
pub fn read_signatures(bytes: &[u8]) -> Option<Vec<BundleSignature>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    parse(bytes).map(|beside| beside.signatures)
}

/// The bytes of such a file, for another host.
pub(super) fn write_signatures(signatures: Vec<BundleSignature>) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Written { format: FORMAT, made_here: false, signatures })
}

/// The content of the file; `None` when it is none.
fn read(file: File) -> io::Result<Option<Beside>> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(parse(&bytes))
}

fn parse(bytes: &[u8]) -> Option<Beside> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return None;
    }
    let Written { format, made_here, signatures } = serde_json::from_slice(bytes).ok()?;
    let ascend = signatures.windows(2).all(|pair| pair[0].key < pair[1].key);
    let fits = format == FORMAT && ascend && signatures.len() <= SIGNATURES_MAX;
    fits.then_some(Beside { made_here, signatures })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::RemoveError;
    use crate::bundle::samples::Rig;
    use crate::signing::PrivateKey;

    fn key(number: u8) -> PrivateKey {
        PrivateKey::from_seed([number; 32]).unwrap()
    }

    fn by(number: u8, digest: &Digest) -> BundleSignature {
        BundleSignature { key: key(number).public(), signature: key(number).sign_bundle(digest.as_bytes()) }
    }

    #[test]
    fn signatures_are_kept_beside_and_go_with_the_bundle() {
        let rig = Rig::new(1 << 20);
        let id = rig.full("signed", &[(0, b"x")]).id;
        let Signed { manifest_digest, made_here, signatures } = rig.store.signed(&id).unwrap();
        assert!(made_here && signatures.is_empty());
        assert_eq!(BundleId::from_digest(manifest_digest.as_bytes()[..16].try_into().unwrap()), id);
        for number in [3, 1, 2, 3] {
            rig.store.sign(&id, by(number, &manifest_digest)).unwrap();
        }
        let found = rig.restarted().signed(&id).unwrap();
        assert!(found.signatures.len() == 3 && found.signatures.iter().all(|one| one.is_of(&manifest_digest)));
        let wrong = rig.store.sign(&id, by(4, &Digest::of(b"another")));
        assert!(matches!(wrong, Err(SignError::Invalid { .. })), "{wrong:?}");
        rig.store.remove(&id).unwrap();
        assert!(matches!(rig.store.signed(&id), Err(SignError::Read(ReadBundleError::Unknown { .. }))));
        let again = rig.full("signed", &[(0, b"x")]).id;
        assert_eq!((again == id, rig.store.signed(&id).unwrap().signatures), (true, vec![]));
    }

    #[test]
    fn there_is_a_bound_and_a_file_of_another_kind_is_told() {
        let rig = Rig::new(1 << 20);
        let id = rig.full("many", &[]).id;
        let digest = rig.store.signed(&id).unwrap().manifest_digest;
        for number in 0..64 {
            rig.store.sign(&id, by(number, &digest)).unwrap();
        }
        assert!(matches!(rig.store.sign(&id, by(64, &digest)), Err(SignError::TooMany { .. })));
        rig.store.sign(&id, by(7, &digest)).unwrap();
        let path = rig.root.join(".signatures").join(format!("{id}.json"));
        let whole = std::fs::read(&path).unwrap();
        for bytes in [&b""[..], b"{}", &whole[..whole.len() - 1], &[whole.as_slice(), b"x"].concat(), &[b' '; 70_000]] {
            file::replace(&path, bytes).unwrap();
            assert!(matches!(rig.store.signed(&id), Err(SignError::Malformed { .. })));
        }
        rig.store.remove(&id).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_copy_of_what_came_from_elsewhere_is_not_made_here() {
        let rig = Rig::new(1 << 20);
        let base = rig.full("base", &[(0, b"x")]).id;
        let diff = rig.diff("diff", &base, &[(1, 1)], &[(4096, b"y")]).id;
        let compact = |token: &str| {
            let compaction = crate::bundle::Compaction {
                token: token.to_owned(),
                name: Some(token.to_owned()),
                built_at: crate::clock::UnixNanos(1),
            };
            rig.store.compact(&diff, compaction, &mut |_| ()).unwrap().id
        };
        assert!(rig.store.signed(&compact("one")).unwrap().made_here);
        std::fs::remove_file(rig.root.join(".signatures").join(format!("{diff}.json"))).unwrap();
        let two = compact("two");
        assert!(!rig.store.signed(&two).unwrap().made_here);
        let left = rig.root.join(".signatures/b-77777777777777777777777774.json");
        file::replace(&left, b"{}").unwrap();
        rig.store.sweep(&[]).unwrap();
        assert!(!left.exists() && rig.store.signed(&base).unwrap().made_here);
        assert!(matches!(rig.store.remove(&base), Err(RemoveError::HasChildren { .. })));
    }
}
