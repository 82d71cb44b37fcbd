//! The thread that owns the ledger in a running agent. Jobs queue up to a bound; a full queue makes askers wait.

use std::path::Path;
use std::thread;

use tokio::sync::{mpsc, oneshot};

use super::{LedgerError, Store};
use crate::agent::world::Records;

/// Jobs that may wait. Each is one request's commit, so this is about how many requests wait for the disk.
const JOBS_MAX: usize = 64;

type Job = Box<dyn FnOnce(&mut Store) + Send>;

/// The way to the thread. It ends, and closes the file, when the last of these is dropped.
#[derive(Debug, Clone)]
pub struct LedgerThread {
    jobs: mpsc::Sender<Job>,
}

impl LedgerThread {
    /// Opens the ledger and starts its thread.
    pub fn start(path: &Path) -> Result<Self, LedgerError> {
        let mut store = Store::open(path)?;
        let (jobs, mut queue) = mpsc::channel::<Job>(JOBS_MAX);
        let thread = thread::Builder::new().name("ledger".to_owned()).spawn(move || {
            while let Some(job) = queue.blocking_recv() {
                job(&mut store);
            }
        });
        match thread {
            Ok(_) => Ok(Self { jobs }),
            Err(_) => Err(LedgerError::Closed),
        }
    }
}

impl Records for LedgerThread {
    fn queued(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    async fn with<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            // The asker may have gone; what was written stays written.
            let _ = reply.send(job(store));
        });
        self.jobs.send(job).await.map_err(|_| LedgerError::Closed)?;
        answer.await.map_err(|_| LedgerError::Closed)?
    }
}
