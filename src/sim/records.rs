//! The ledger of a simulated host: the real one, in memory. A commit is durable or did not happen; the agent may die
//! on either side of it.

use super::SimHost;
use crate::agent::world::Records;
use crate::agent::{LedgerError, Store};

impl Records for SimHost {
    fn queued(&self) -> usize {
        0
    }

    async fn with<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, LedgerError> {
        // It dies here like anywhere else; that it has to end because nothing can be written is `ledger_full_at_point`.
        self.point(false).await.map_err(|_| LedgerError::Closed)?;
        let done = {
            let mut state = self.state();
            let is_full = state.faults.ledger_full_at_point.is_some_and(|point| state.points >= point);
            state.store.refuse_writes(is_full)?;
            let done = job(&mut state.store);
            state.store.refuse_writes(false)?;
            state.look_at_ledger();
            done
        };
        self.point(false).await.map_err(|_| LedgerError::Closed)?;
        done
    }
}
