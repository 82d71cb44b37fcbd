//! From bytes to a checked manifest and from bytes to an id.

use serde::Deserialize;

use super::{FORMAT, InvalidManifest, MANIFEST_BYTES_MAX, Manifest};
use crate::bundle::digest::Digest;
use crate::ids::{BundleId, ID_DIGEST_BYTES};

/// Why bytes are not a manifest this program reads.
#[derive(Debug, thiserror::Error)]
pub enum ReadManifestError {
    /// Too long.
    #[error("{bytes} bytes are over the limit of {MANIFEST_BYTES_MAX}")]
    Size {
        /// How many there are.
        bytes: usize,
    },
    /// It has no version: it is no manifest of any version.
    #[error("no manifest: there is no format number in it")]
    NoFormat(#[source] serde_json::Error),
    /// Of a version this program does not read.
    #[error("format {found}, this program reads 1 to {FORMAT}")]
    Format {
        /// The version.
        found: u32,
    },
    /// Not of the shape its version has.
    #[error("malformed")]
    Syntax(#[source] serde_json::Error),
    /// Of the right shape, but it cannot be true.
    #[error("it contradicts itself or a limit")]
    Invalid(#[source] InvalidManifest),
}

/// All that is asked of a manifest of any version.
#[derive(Deserialize)]
struct AnyVersion {
    format: u32,
}

/// Reads and checks a manifest of any version this program knows.
pub fn read(bytes: &[u8]) -> Result<Manifest, ReadManifestError> {
    if bytes.len() > MANIFEST_BYTES_MAX {
        return Err(ReadManifestError::Size { bytes: bytes.len() });
    }
    let AnyVersion { format } = serde_json::from_slice(bytes).map_err(ReadManifestError::NoFormat)?;
    if format != FORMAT {
        return Err(ReadManifestError::Format { found: format });
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(ReadManifestError::Syntax)?;
    manifest.check().map_err(ReadManifestError::Invalid)?;
    Ok(manifest)
}

/// The id of the bundle whose `manifest.json` has these bytes.
pub fn id_of(bytes: &[u8]) -> BundleId {
    let digest = Digest::of(bytes);
    let mut first = [0; ID_DIGEST_BYTES];
    first.copy_from_slice(&digest.as_bytes()[..ID_DIGEST_BYTES]);
    BundleId::from_digest(first)
}
