//! Bundles that come from elsewhere: what the agent wants of them. The store itself is `crate::bundle`, what fetches them is
//! [`super::filling`].

use std::future::Future;
use std::sync::Arc;

use super::bundles::{BundleError, BundleView};
use crate::bundle::{BundleSignature, FetchedBundle, Manifest, Partial, Progress};
use crate::clock::UnixNanos;
use crate::ids::BundleId;

/// A bundle that is to come, of which all is here but its memory.
#[derive(Debug, Clone)]
pub struct Coming {
    /// Its id, which its manifest has to have.
    pub bundle: BundleId,
    /// The bytes of its manifest.
    pub manifest: Vec<u8>,
    /// The bytes of its state.
    pub state: Vec<u8>,
    /// Who signed it.
    pub signatures: Vec<BundleSignature>,
    /// Where the rest comes from.
    pub from: String,
    /// When that was said.
    pub at: UnixNanos,
}

/// How far a bundle is that is on its way.
#[derive(Debug, Clone)]
pub struct FetchView {
    /// Where it comes from.
    pub from: String,
    /// Bytes of memory with content, and how many of them are here.
    pub progress: Progress,
    /// Why the rest does not come, if it does not.
    pub trouble: Option<String>,
}

/// Bundles that come from elsewhere.
pub trait FetchedBundles: Send + Sync + 'static {
    /// Those of which something is missing.
    fn partials(&self) -> impl Future<Output = Result<Vec<BundleId>, BundleError>> + Send;
    /// What is there of one, all of which is read; `None`: there is nothing of it, or all.
    fn open_partial(&self, bundle: &BundleId)
    -> impl Future<Output = Result<Option<Arc<Partial>>, BundleError>> + Send;
    /// Has what has come of one; what is there of its memory stays.
    fn begin_partial(&self, coming: Coming) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Makes a bundle of one that is there as a whole.
    fn publish_partial(&self, partial: &Arc<Partial>) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Has nothing of one.
    fn remove_partial(&self, bundle: &BundleId) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// The one a word means: its id, the start of it, or its name.
    fn find_partial(&self, word: &str) -> impl Future<Output = Result<Option<BundleId>, BundleError>> + Send;
    /// How it looks to whoever asks for bundles.
    fn partial_view(&self, partial: &Partial) -> Result<BundleView, BundleError>;
    /// Whether a guest of it runs here, as far as its manifest tells.
    fn fits(&self, bundle: &BundleId, manifest: &Manifest) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Those that came from elsewhere, whole or not.
    fn fetched(&self) -> impl Future<Output = Result<Vec<FetchedBundle>, BundleError>> + Send;
    /// It is used now.
    fn touch_fetched(&self, bundle: &BundleId, now: UnixNanos) -> impl Future<Output = ()> + Send;
    /// Whether it is kept when there is little room.
    fn pin(&self, bundle: &BundleId, pinned: bool) -> impl Future<Output = Result<(), BundleError>> + Send;
}
