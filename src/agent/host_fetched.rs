//! Bundles that come from elsewhere, on this host's disk.

use std::sync::Arc;

use super::bundles::{BundleError, BundleView};
use super::fetched::{Coming, FetchedBundles};
use super::host_bundles::HostBundles;
use crate::bundle::admit::admit;
use crate::bundle::{Fetched, FetchedBundle, Manifest, Partial};
use crate::clock::UnixNanos;
use crate::ids::BundleId;
use crate::report::chain;

impl FetchedBundles for HostBundles {
    async fn partials(&self) -> Result<Vec<BundleId>, BundleError> {
        self.blocking(|this| Ok(this.store().partials()?)).await
    }

    async fn open_partial(&self, bundle: &BundleId) -> Result<Option<Arc<Partial>>, BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| {
            if !this.store().partials()?.contains(&bundle) {
                return Ok(None);
            }
            let partial = this.store().open_partial(&bundle)?;
            // An agent may have ended before it noted that: it gives way as one that was not used since it was made.
            if this.store().fetched(&bundle)?.is_none() {
                this.store().note_fetched(&bundle, partial.from(), partial.manifest().provenance.built_at)?;
            }
            Ok(Some(Arc::new(partial)))
        })
        .await
    }

    async fn begin_partial(&self, coming: Coming) -> Result<(), BundleError> {
        self.blocking(move |this| {
            let Coming { bundle, manifest, state, signatures, from, at } = coming;
            this.store().begin_partial(&bundle, &manifest, &state, signatures, &from)?;
            Ok(this.store().note_fetched(&bundle, &from, at)?)
        })
        .await
    }

    async fn publish_partial(&self, partial: &Arc<Partial>) -> Result<(), BundleError> {
        let partial = Arc::clone(partial);
        self.blocking(move |_| Ok(partial.publish().map(drop)?)).await
    }

    async fn remove_partial(&self, bundle: &BundleId) -> Result<(), BundleError> {
        let bundle = bundle.clone();
        self.blocking(move |this| Ok(this.store().remove_partial(&bundle)?)).await
    }

    async fn find_partial(&self, word: &str) -> Result<Option<BundleId>, BundleError> {
        let word = word.to_owned();
        self.blocking(move |this| match this.store().find(&word) {
            // A whole one is meant before one that is not.
            Ok(_) => Ok(None),
            Err(_) => Ok(this.store().find_partial(&word)?),
        })
        .await
    }

    fn partial_view(&self, partial: &Partial) -> Result<BundleView, BundleError> {
        Ok(BundleView {
            id: partial.id().clone(),
            manifest: Arc::clone(partial.manifest()),
            disk_bytes: partial.progress().done_bytes,
            signed: partial.signed()?,
            fetched: self.fetched_note(partial.id()),
            fetch: None,
        })
    }

    async fn fits(&self, bundle: &BundleId, manifest: &Manifest) -> Result<(), BundleError> {
        let bundle = bundle.clone();
        admit(manifest, &self.facts().await?).map_err(|source| BundleError::Incompatible { bundle, source })
    }

    async fn fetched(&self) -> Result<Vec<FetchedBundle>, BundleError> {
        self.blocking(|this| Ok(this.store().fetched_list()?)).await
    }

    async fn touch_fetched(&self, bundle: &BundleId, now: UnixNanos) {
        let id = bundle.clone();
        let touched = self.blocking(move |this| Ok(this.store().touch_fetched(&id, now)?)).await;
        if let Err(error) = touched {
            tracing::debug!(%bundle, error = %chain(&error), "that a bundle is used is not noted");
        }
    }

    async fn pin(&self, bundle: &BundleId, pinned: bool) -> Result<(), BundleError> {
        let id = bundle.clone();
        self.blocking(move |this| Ok(this.store().set_pinned(&id, pinned)?)).await
    }
}

impl HostBundles {
    /// What is known of a bundle that was fetched. A note that cannot be read says nothing.
    pub(super) fn fetched_note(&self, bundle: &BundleId) -> Option<Fetched> {
        self.store().fetched(bundle).unwrap_or_else(|error| {
            tracing::warn!(%bundle, error = %chain(&error), "where it came from is not known");
            None
        })
    }
}
