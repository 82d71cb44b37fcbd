//! No bundle comes to a simulated host from elsewhere: what is fetched are bytes, and their digests are what counts, for
//! which a simulation has no use. The parts that decide are tested by themselves, the rest with real files.

use std::sync::Arc;

use super::SimHost;
use crate::agent::world::VmBundles;
use crate::agent::{BundleError, BundleView, Coming, FetchedBundles};
use crate::bundle::{FetchedBundle, Manifest, Partial};
use crate::clock::UnixNanos;
use crate::ids::BundleId;

fn none(bundle: &BundleId) -> BundleError {
    BundleError::NotPartial { bundle: bundle.clone() }
}

impl FetchedBundles for SimHost {
    async fn partials(&self) -> Result<Vec<BundleId>, BundleError> {
        Ok(Vec::new())
    }

    async fn open_partial(&self, _: &BundleId) -> Result<Option<Arc<Partial>>, BundleError> {
        Ok(None)
    }

    async fn begin_partial(&self, coming: Coming) -> Result<(), BundleError> {
        Err(none(&coming.bundle))
    }

    async fn publish_partial(&self, partial: &Arc<Partial>) -> Result<(), BundleError> {
        Err(none(partial.id()))
    }

    async fn remove_partial(&self, bundle: &BundleId) -> Result<(), BundleError> {
        Err(none(bundle))
    }

    async fn find_partial(&self, _: &str) -> Result<Option<BundleId>, BundleError> {
        Ok(None)
    }

    fn partial_view(&self, partial: &Partial) -> Result<BundleView, BundleError> {
        Err(none(partial.id()))
    }

    async fn fits(&self, bundle: &BundleId, _: &Manifest) -> Result<(), BundleError> {
        self.check(bundle).await.map(drop)
    }

    async fn fetched(&self) -> Result<Vec<FetchedBundle>, BundleError> {
        Ok(Vec::new())
    }

    async fn touch_fetched(&self, _: &BundleId, _: UnixNanos) {}

    async fn pin(&self, bundle: &BundleId, _: bool) -> Result<(), BundleError> {
        Err(none(bundle))
    }
}
