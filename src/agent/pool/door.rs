//! What may be asked of the agent about machines that are kept ready.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{POOL_SIZE_MAX, Pool};
use crate::agent::Agent;
use crate::agent::bundles::{BundleError, BundleListed};
use crate::agent::ledger::{LedgerError, Write};
use crate::agent::world::{Records, VmBundles, VmDisk, World};
use crate::bundle::manifest::DeviceKind;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::units::MIB;

/// A bundle's pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolView {
    /// Its bundle.
    pub bundle: BundleId,
    /// The bundle's name, if it has one and is there.
    pub name: Option<String>,
    /// How many machines are wanted.
    pub size: u32,
    /// How many are ready.
    pub ready: u32,
    /// Launches that took one, since this agent started.
    pub claimed: u64,
    /// Launches that found none, since this agent started.
    pub missed: u64,
    /// Why the last one was not made, if it was not.
    pub trouble: Option<String>,
}

/// Why a pool is not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// There is no such bundle, or it is of no use here.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// More than are ever kept ready.
    #[error("{found} machines: 1 to {POOL_SIZE_MAX} can be kept ready of one bundle")]
    Size {
        /// How many were asked for.
        found: u32,
    },
    /// They would not fit beside what has to stay free.
    #[error(
        "{size} machines of {bundle} with {memory_mib} MiB each do not fit: this host has {total_mib} MiB, of which \
         {reserve_mib} MiB stay free and other pools have {pools_mib} MiB"
    )]
    Memory {
        /// The bundle.
        bundle: BundleId,
        /// How many.
        size: u32,
        /// The guest memory of one.
        memory_mib: u64,
        /// All memory of the host.
        total_mib: u64,
        /// What has to stay free of it.
        reserve_mib: u64,
        /// What the other pools were promised.
        pools_mib: u64,
    },
    /// Its machines have disks, and each launch brings its own.
    #[error("machines of {bundle} have disks, which each launch brings: none can be made before it")]
    Disks {
        /// The bundle.
        bundle: BundleId,
    },
    /// There is no pool of it.
    #[error("no machines of {word:?} are kept ready")]
    Unknown {
        /// What was given.
        word: String,
    },
    /// The host does not tell what it has.
    #[error("ask the host")]
    Host(#[source] std::io::Error),
    /// It could not be written down.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl PoolError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Bundle(error) => error.retry(),
            Self::Ledger(error) => error.retry(),
            Self::Size { .. } | Self::Memory { .. } | Self::Disks { .. } => Retry::WithChange,
            Self::Unknown { .. } => Retry::Never,
            Self::Host(_) => Retry::Later,
        }
    }
}

/// Machines that are kept ready, as seen from above.
pub trait PoolDoor: Send + Sync + 'static {
    /// All pools, by their bundles' ids.
    fn pools(&self) -> BoxFuture<'_, Result<Vec<PoolView>, PoolError>>;
    /// The pool of the bundle a word means.
    fn pool<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<PoolView, PoolError>>;
    /// Has so many machines of a bundle ready from now on; they are made behind the answer.
    fn set_pool<'a>(&'a self, word: &'a str, size: u32) -> BoxFuture<'a, Result<PoolView, PoolError>>;
    /// Has no machines of a bundle ready.
    fn remove_pool<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), PoolError>>;
}

impl<W: World> Agent<W> {
    async fn pool_views(&self) -> Result<Vec<PoolView>, PoolError> {
        let names = self.shared.world.bundles().list().await?;
        let name = |bundle: &BundleId| {
            names.iter().find_map(|one| match one {
                BundleListed::Readable(view) if view.id == *bundle => view.manifest.name.clone(),
                BundleListed::Readable(_) | BundleListed::Unreadable { .. } => None,
            })
        };
        let state = self.shared.pools.state();
        let pools = state.pools.iter().filter(|(_, pool)| pool.size > 0);
        let view = |(bundle, pool): (&BundleId, &Pool<W>)| PoolView {
            bundle: bundle.clone(),
            name: name(bundle),
            size: pool.size,
            ready: u32::try_from(pool.ready.len()).unwrap_or(u32::MAX),
            claimed: pool.claimed,
            missed: pool.missed,
            trouble: pool.trouble.as_ref().map(|(why, ..)| why.clone()),
        };
        Ok(pools.map(view).collect())
    }

    async fn pool_view(&self, word: &str) -> Result<PoolView, PoolError> {
        let bundle = self.pooled(word).await?;
        let found = self.pool_views().await?.into_iter().find(|pool| pool.bundle == bundle);
        found.ok_or_else(|| PoolError::Unknown { word: word.to_owned() })
    }

    async fn resize_pool(&self, word: &str, size: u32) -> Result<PoolView, PoolError> {
        if !(1..=POOL_SIZE_MAX).contains(&size) {
            return Err(PoolError::Size { found: size });
        }
        let view = self.shared.world.bundles().find(word).await?;
        self.shared.require_trust(&view)?;
        let bundle = view.id;
        let manifest = self.shared.world.bundles().check(&bundle).await?;
        if manifest.machine.devices.iter().any(|device| device.kind == DeviceKind::Block) {
            return Err(PoolError::Disks { bundle });
        }
        let host = self.shared.world.disk().host().await.map_err(PoolError::Host)?;
        // The bundle cannot be removed meanwhile.
        let _admission = self.shared.admission.lock().await;
        self.shared.world.bundles().find(bundle.as_str()).await?;
        let memory_mib = manifest.machine.memory_bytes / MIB;
        let (total_mib, reserve_mib) = (host.memory_bytes / MIB, self.shared.config.limits.memory_reserve_mib);
        let pools_mib = self.promised_to_others(&bundle).await?;
        let free_mib = total_mib.saturating_sub(reserve_mib).saturating_sub(pools_mib);
        if u64::from(size).saturating_mul(memory_mib) > free_mib {
            return Err(PoolError::Memory { bundle, size, memory_mib, total_mib, reserve_mib, pools_mib });
        }
        self.shared.commit(vec![Write::Pool { bundle: bundle.clone(), size }]).await?;
        {
            let mut state = self.shared.pools.state();
            let pool = state.pools.entry(bundle.clone()).or_insert_with(|| Pool::new(0));
            (pool.size, pool.trouble) = (size, None);
        }
        self.shared.pools.changed.notify_one();
        self.pool_view(bundle.as_str()).await
    }

    /// Guest memory of the machines that are wanted of other bundles, made or not, in MiB.
    async fn promised_to_others(&self, bundle: &BundleId) -> Result<u64, PoolError> {
        let pools = self.shared.world.records().with(|store| store.pools()).await?;
        let mut sum = 0_u64;
        for (other, size) in pools.iter().filter(|(other, _)| other != bundle) {
            // Of a bundle that cannot be read no machine is made.
            if let Ok(view) = self.shared.world.bundles().find(other.as_str()).await {
                let memory_mib = view.manifest.machine.memory_bytes / MIB;
                sum = sum.saturating_add(u64::from(*size).saturating_mul(memory_mib));
            }
        }
        Ok(sum)
    }

    async fn drop_pool(&self, word: &str) -> Result<(), PoolError> {
        let bundle = self.pool_view(word).await?.bundle;
        self.shared.commit(vec![Write::Pool { bundle: bundle.clone(), size: 0 }]).await?;
        if let Some(pool) = self.shared.pools.state().pools.get_mut(&bundle) {
            (pool.size, pool.trouble) = (0, None);
        }
        // They are gone when this is answered.
        self.end_spares_of(&bundle).await;
        self.shared.pools.changed.notify_one();
        Ok(())
    }
}

impl<W: World> Agent<W> {
    /// The bundle a word means, also one that is not there any more but has a pool.
    async fn pooled(&self, word: &str) -> Result<BundleId, BundleError> {
        if let Some(bundle) = word.parse().ok().filter(|bundle| self.shared.pools.state().pools.contains_key(bundle)) {
            return Ok(bundle);
        }
        Ok(self.shared.world.bundles().find(word).await?.id)
    }
}

impl<W: World> PoolDoor for Agent<W> {
    fn pools(&self) -> BoxFuture<'_, Result<Vec<PoolView>, PoolError>> {
        self.pool_views().boxed()
    }

    fn pool<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<PoolView, PoolError>> {
        self.pool_view(word).boxed()
    }

    fn set_pool<'a>(&'a self, word: &'a str, size: u32) -> BoxFuture<'a, Result<PoolView, PoolError>> {
        self.resize_pool(word, size).boxed()
    }

    fn remove_pool<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(), PoolError>> {
        self.drop_pool(word).boxed()
    }
}
