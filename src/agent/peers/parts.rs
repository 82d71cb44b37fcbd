//! Parts of bundles from agent to agent: a host that has a bundle in part has the rest from here, piece by piece. What comes
//! is compared with the bundle's id by who asked, so nothing is believed here; who may ask is whoever has the key.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::calls::PeerError;
use super::{ANSWER_BYTES_MAX, BUNDLE_PART_PATH, PeerCall};
use crate::agent::Agent;
use crate::agent::bundles::BundleError;
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::shared::Shared;
use crate::agent::world::{VmBundles, World};
use crate::bundle::BundlePart;
use crate::ids::BundleId;
use crate::report::Retry;

/// Most bytes of one piece: the largest chunk there is.
pub const PIECE_BYTES_MAX: u32 = 512 << 10;

// An answer has room for it in base64, and for what is around it.
const _: () = assert!(PIECE_BYTES_MAX as usize / 3 * 4 + 1024 < ANSWER_BYTES_MAX);

/// Longest wait for a piece. The other host may have to read the whole bundle first, of one that builds on others.
const PIECE_LIMIT: Duration = Duration::from_secs(25);

/// Which part of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartName {
    /// Its manifest.
    Manifest,
    /// Its saved state.
    State,
    /// Its signatures.
    Signatures,
    /// Guest memory.
    Memory,
}

/// `POST /peer/v1/bundles/part`: a piece of a part of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartOrder {
    /// The bundle.
    pub bundle_id: BundleId,
    /// Of which part.
    pub part: PartName,
    /// Its first byte.
    pub offset: u64,
    /// How many bytes, 1 to [`PIECE_BYTES_MAX`]. Fewer come where the part ends, but of memory.
    pub bytes: u32,
}

/// Answer to [`PartOrder`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartBody {
    /// The bytes, in base64.
    #[serde(with = "base64_text")]
    pub bytes: Vec<u8>,
    /// How long the part is; absent of memory, whose length is in the manifest.
    #[serde(default)]
    pub total_bytes: Option<u64>,
}

mod base64_text {
    use serde::de::{Deserialize as _, Deserializer, Error as _};
    use serde::ser::Serializer;

    use crate::base64;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&base64::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
        base64::decode(&text).ok_or_else(|| D::Error::custom("not base64"))
    }
}

/// Why another host does not get a piece.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// No bytes were asked for, or too many.
    #[error("{bytes} bytes of a bundle were asked for: 1 to {PIECE_BYTES_MAX} are possible")]
    Bytes {
        /// How many.
        bytes: u32,
    },
    /// The part ends before.
    #[error("the part of {bundle} has {total_bytes} bytes, and those from {offset} were asked for")]
    Beyond {
        /// The bundle.
        bundle: BundleId,
        /// The first byte that was asked for.
        offset: u64,
        /// How many there are.
        total_bytes: u64,
    },
    /// The bundle is not here, or cannot be read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

impl PieceError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Bytes { .. } | Self::Beyond { .. } => Retry::Never,
            Self::Bundle(error) => error.retry(),
        }
    }
}

impl<W: World> Agent<W> {
    pub(super) fn read_piece(&self, order: PartOrder) -> BoxFuture<'_, Result<PartBody, PieceError>> {
        async move {
            let PartOrder { bundle_id, part, offset, bytes } = order;
            if !(1..=PIECE_BYTES_MAX).contains(&bytes) {
                return Err(PieceError::Bytes { bytes });
            }
            let bundles = self.shared.world.bundles();
            let part = match part {
                PartName::Memory => {
                    let part = BundlePart::Memory { offset, bytes: bytes.into() };
                    let bytes = bundles.read_part(&bundle_id, part).await?;
                    return Ok(PartBody { bytes, total_bytes: None });
                }
                PartName::Manifest => BundlePart::Manifest,
                PartName::State => BundlePart::State,
                PartName::Signatures => BundlePart::Signatures,
            };
            let whole = bundles.read_part(&bundle_id, part).await?;
            let total_bytes = whole.len() as u64;
            let Some(rest) = usize::try_from(offset).ok().and_then(|offset| whole.get(offset..)) else {
                return Err(PieceError::Beyond { bundle: bundle_id, offset, total_bytes });
            };
            let count = rest.len().min(bytes as usize);
            Ok(PartBody { bytes: rest[..count].to_vec(), total_bytes: Some(total_bytes) })
        }
        .boxed()
    }
}

impl<W: World> Shared<W> {
    /// Has a piece of a part of a bundle from a peer.
    pub(in crate::agent) async fn piece_from_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        order: &PartOrder,
    ) -> Result<PartBody, PeerError> {
        let body = serde_json::to_vec(order);
        let body = body.map_err(|source| PeerError::Malformed { peer: peer.name.clone(), source })?;
        let call = PeerCall { method: "POST", path: BUNDLE_PART_PATH.to_owned(), body, head: None };
        self.ask_peer_signed(fabric, peer, call, PIECE_LIMIT).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_piece_fits_into_an_answer_and_comes_back() {
        let bytes: Vec<u8> = (0..PIECE_BYTES_MAX).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
        let body = PartBody { bytes, total_bytes: Some(u64::MAX) };
        let written = serde_json::to_vec(&body).unwrap();
        assert!(written.len() < ANSWER_BYTES_MAX, "{}", written.len());
        assert_eq!(serde_json::from_slice::<PartBody>(&written).unwrap(), body);
        for wrong in [r#"{"bytes":"Zg"}"#, r#"{"bytes":[1]}"#, "{}", r#"{"bytes":"Z\u0067=="}"#] {
            let read = serde_json::from_str::<PartBody>(wrong);
            assert_eq!(read.is_ok(), wrong.contains("u0067"), "{wrong}");
        }
    }
}
