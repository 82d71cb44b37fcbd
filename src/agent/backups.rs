//! Backups of the ledger in a running agent: one at its start and one a day, the newest few kept; and when somebody asks.
//! A ledger in memory has none.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::ledger::{BackupError, LedgerError, Store, backup};
use super::shared::Shared;
use super::world::{Records, World};
use crate::clock::Clock;
use crate::report::chain;

/// Time between two automatic backups.
const INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// An agent that starts again and again does not replace all backups by ones of the last minutes.
const INTERVAL_LEAST: Duration = Duration::from_secs(3600);

/// A ledger that was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackedUp {
    /// Where the copy is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// Why a ledger was not copied.
#[derive(Debug, thiserror::Error)]
pub enum BackUpError {
    /// The copy failed.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The ledger could not be asked.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Paths are taken as they are: whose directory it would be is not known.
    #[error("{} is not an absolute path", path.display())]
    Relative {
        /// What was given.
        path: PathBuf,
    },
    /// There is no file to copy.
    #[error("this agent's ledger is in memory only")]
    InMemory,
}

/// Copies the ledger to `to`, or to where automatic backups are kept.
pub(super) async fn back_up<W: World>(shared: &Shared<W>, to: Option<PathBuf>) -> Result<BackedUp, BackUpError> {
    if let Some(path) = to.as_ref().filter(|path| !path.is_absolute()) {
        return Err(BackUpError::Relative { path: path.clone() });
    }
    let now = shared.world.clock().wall();
    let kept = usize::try_from(shared.config.limits.ledger_backups_kept).unwrap_or(usize::MAX);
    let copy = move |store: &mut Store| {
        let Some(ledger) = store.file() else { return Ok(Err(BackUpError::InMemory)) };
        let copied = (|| {
            let path = match &to {
                Some(path) => path.clone(),
                None => backup::next(&ledger, now)?,
            };
            store.back_up(&path)?;
            if to.is_none()
                && let Err(error) = backup::drop_old(&ledger, kept)
            {
                tracing::warn!(%error, "cannot remove old backups of the ledger");
            }
            let bytes = std::fs::metadata(&path).map_or(0, |found| found.len());
            Ok(BackedUp { path, bytes })
        })();
        Ok(copied)
    };
    shared.world.records().with(copy).await?
}

/// Makes automatic backups until the agent ends.
pub(super) async fn keep<W: World>(shared: Arc<Shared<W>>) {
    loop {
        let now = shared.world.clock().wall();
        // One that will have been made only later is from before the clock was set back.
        let newest = move |store: &mut Store| {
            let made = |ledger: &Path| backup::backups(ledger).iter().map(|it| it.at).find(|at| *at <= now);
            Ok(store.file().map(|ledger| made(&ledger)))
        };
        let newest = match shared.world.records().with(newest).await {
            Ok(Some(newest)) => newest,
            // In memory, or the agent is ending.
            Ok(None) | Err(_) => return,
        };
        let is_due = newest.is_none_or(|at| Duration::from_nanos(now.0.saturating_sub(at.0)) >= INTERVAL_LEAST);
        if is_due {
            match back_up(&shared, None).await {
                Ok(BackedUp { path, bytes }) => tracing::info!(path = %path.display(), bytes, "ledger backed up"),
                Err(error) => tracing::error!(error = %chain(&error), "cannot back up the ledger"),
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
