//! The pool of machines that a bench launches from: filled before each launch, and afterwards as large as it was.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::BenchError;
use super::launched::{Bench, launch_limit};
use crate::api::types::{Bundle, Pool, PoolList, PoolRequest};
use crate::ctl::call::PROMPT;
use crate::ctl::output::note;

/// How often it is looked whether all are ready: less than one takes to be made.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A pool that was made, or changed, for a bench.
#[derive(Debug)]
pub(super) struct Changed {
    bundle: String,
    /// How large it was; 0: there was none.
    before: u32,
    now: u32,
}

impl Bench<'_> {
    /// Has so many machines of a bundle ready.
    pub(super) async fn fill_pool(&mut self, bundle: &Bundle, size: u32) -> Result<(), BenchError> {
        let path = format!("/v1/pools/{}", bundle.id);
        if self.pool.as_ref().is_none_or(|pool| pool.now != size) {
            let before = self.pooled(bundle).await?.map_or(0, |pool| pool.size);
            let before = self.pool.as_ref().map_or(before, |pool| pool.before);
            self.pool = Some(Changed { bundle: bundle.id.to_string(), before, now: size });
            self.agent.put::<Pool>(&path, &PoolRequest { size }, PROMPT).await?;
        }
        let deadline = Instant::now() + launch_limit(usize::try_from(size).unwrap_or(usize::MAX));
        loop {
            let found = self.pooled(bundle).await?;
            match found {
                Some(pool) if pool.ready >= size => return Ok(()),
                Some(Pool { trouble: Some(why), .. }) => return Err(BenchError::Pool { why }),
                Some(pool) if Instant::now() >= deadline => {
                    return Err(BenchError::Pool { why: format!("{} of {size} are ready in time", pool.ready) });
                }
                Some(_) => sleep(LOOK_INTERVAL).await,
                None => return Err(BenchError::Pool { why: "somebody removed it".to_owned() }),
            }
        }
    }

    async fn pooled(&self, bundle: &Bundle) -> Result<Option<Pool>, BenchError> {
        let list: PoolList = self.agent.get("/v1/pools").await?;
        Ok(list.pools.into_iter().find(|pool| pool.bundle_id == bundle.id))
    }

    /// The pool is as large as it was.
    pub(super) async fn leave_pool(&mut self) {
        let Some(Changed { bundle, before, .. }) = self.pool.take() else { return };
        let path = format!("/v1/pools/{bundle}");
        let left = match before {
            0 => self.agent.delete(&path, launch_limit(0)).await,
            size => self.agent.put::<Pool>(&path, &PoolRequest { size }, PROMPT).await.map(drop),
        };
        if let Err(error) = left {
            note(&format!("the pool of {bundle} is not as it was: {error}"));
        }
    }
}
