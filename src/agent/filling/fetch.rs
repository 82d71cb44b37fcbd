//! Fetches what is missing of one bundle: what guests wait for first, a few chunks at once, and again what did not come.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};

use super::{AT_ONCE_MAX, Filling};
use crate::agent::fetched::FetchedBundles;
use crate::agent::shared::Shared;
use crate::agent::sources::{SourceError, read_part};
use crate::agent::world::World;
use crate::bundle::{BundlePart, InstallError, ParseSourceError, Partial};
use crate::report::chain;

/// Time until a source is asked again after it failed: the first, doubled up to the last.
const AGAIN_FIRST: Duration = Duration::from_millis(100);
const AGAIN_LAST: Duration = Duration::from_secs(2);

/// Time until a bundle that is complete and could not be published is looked at again: all of it is read. The first, doubled
/// up to the last.
const PUBLISH_AGAIN_FIRST: Duration = Duration::from_secs(10);
const PUBLISH_AGAIN_LAST: Duration = Duration::from_secs(300);

/// Why a chunk did not come.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// Nobody knows where it is any more.
    #[error("it is not known where the bundle comes from: fetch it again, with --from")]
    Nowhere(#[source] ParseSourceError),
    /// From its source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Onto the disk; or it was not what it has to be.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
}

/// Until all of it is there, and published; or until nobody wants it.
pub(super) async fn run<W: World>(shared: Arc<Shared<W>>, filling: Arc<Filling>) {
    let mut wait = PUBLISH_AGAIN_FIRST;
    loop {
        fetch_missing(&shared, &filling).await;
        if filling.state().is_over || publish(&shared, &filling).await {
            return;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(PUBLISH_AGAIN_LAST);
        // What turned out to be damaged is missing again.
        filling.state().next = 0;
    }
}

async fn fetch_missing<W: World>(shared: &Arc<Shared<W>>, filling: &Arc<Filling>) {
    let partial = Arc::clone(&filling.partial);
    let mut changed = filling.changed.subscribe();
    // Apart: what is verified and written keeps nothing from being asked for.
    let (mut fetches, mut installs) = (FuturesUnordered::new(), FuturesUnordered::new());
    // When the source may be asked again, and how long the next wait is.
    let (mut again, mut wait) = (None::<Instant>, AGAIN_FIRST);
    while partial.missing() > 0 || !fetches.is_empty() || !installs.is_empty() {
        if filling.state().is_over {
            return;
        }
        while again.is_none() && fetches.len() < AT_ONCE_MAX {
            let taken = filling.state().take(partial.chunks(), Instant::now(), |chunk| !partial.is_present(chunk));
            let Some(chunk) = taken else { break };
            fetches.push(async move { (chunk, fetch(shared, filling, chunk).await) });
        }
        if fetches.is_empty() && installs.is_empty() && again.is_none() {
            again = filling.state().again();
        }
        let failed = tokio::select! {
            Some((chunk, fetched)) = fetches.next(), if !fetches.is_empty() => match fetched {
                Ok(bytes) => {
                    filling.state().fetched(chunk);
                    let partial = Arc::clone(&partial);
                    installs.push(async move { (chunk, install(partial, chunk, bytes).await) });
                    None
                }
                Err(error) => Some((chunk, error)),
            },
            Some((chunk, installed)) = installs.next(), if !installs.is_empty() => match installed {
                Ok(bytes) => {
                    (again, wait) = (None, AGAIN_FIRST);
                    filling.state().came(chunk);
                    shared.metrics.fetched(bytes);
                    filling.note_change();
                    None
                }
                Err(error) => Some((chunk, error)),
            },
            () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                again = None;
                None
            }
            // Only its owner ends it, and that is held here.
            _ = changed.changed() => None,
        };
        if let Some((chunk, error)) = failed {
            let now = Instant::now();
            tell_of(shared, filling, chunk, now, &error).await;
            if again.is_none() {
                again = Some(now + wait);
                wait = (wait * 2).min(AGAIN_LAST);
            }
        }
    }
}

/// A chunk did not come. That is told when it is the first trouble.
async fn tell_of<W: World>(shared: &Shared<W>, filling: &Filling, chunk: u32, now: Instant, error: &FetchError) {
    let (bundle, why) = (filling.partial.id(), chain(error));
    shared.metrics.fetch_failed();
    if filling.state().did_not_come(chunk, now, why.clone()) {
        tracing::warn!(%bundle, chunk, error = why, "a part of a bundle does not come");
        let body = serde_json::json!({ "bundle_id": bundle, "chunk": chunk, "reason": why });
        shared.bundle_event("bundle_fetch_failing", body).await;
    }
}

/// One chunk's bytes, as the source has them.
async fn fetch<W: World>(shared: &Arc<Shared<W>>, filling: &Filling, chunk: u32) -> Result<Bytes, FetchError> {
    let partial = &filling.partial;
    // One without content is there.
    let Some(range) = partial.chunk_range(chunk) else { return Ok(Bytes::new()) };
    let part = BundlePart::Memory { offset: range.start, bytes: range.end - range.start };
    let source = filling.source().spec.clone().map_err(FetchError::Nowhere)?;
    Ok(read_part(shared, &source, partial.id(), part).await?)
}

/// Has a chunk where it belongs, if it is what it has to be; its size.
async fn install(partial: Arc<Partial>, chunk: u32, bytes: Bytes) -> Result<u64, FetchError> {
    let count = bytes.len() as u64;
    if count == 0 {
        return Ok(0);
    }
    let installed = spawn_blocking(move || partial.install(chunk, &bytes)).await;
    installed.map_err(|_| FetchError::Ending)??;
    Ok(count)
}

/// Whether nothing is left to do: it is a bundle now, or nobody wants it.
async fn publish<W: World>(shared: &Arc<Shared<W>>, filling: &Filling) -> bool {
    let bundle = filling.partial.id().clone();
    // All of it is read: nobody waits for that. Until it is over, the bundle is one that is on its way.
    let published = shared.world.bundles().publish_partial(&filling.partial).await;
    if filling.state().is_over {
        return true;
    }
    if let Err(error) = published {
        let why = chain(&error);
        tracing::error!(%bundle, error = why, "a bundle that has come as a whole cannot be kept");
        filling.state().trouble = Some(why);
        return false;
    }
    shared.fillings.bundles().remove(&bundle);
    tracing::info!(%bundle, "a bundle is here as a whole");
    shared.bundle_event("bundle_fetched", serde_json::json!({ "bundle_id": bundle })).await;
    shared.evict_fetched(&bundle).await;
    true
}
