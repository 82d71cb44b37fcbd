//! How long a new agent takes until every VM that an earlier one left is its own: found, greeted, and fenced off from
//! earlier agents. The API is open meanwhile: this is for those who want to know when all of it is under one roof again.

use std::sync::{Mutex, PoisonError};

use super::ledger::{LedgerError, NewEvent, Write};
use super::record::Subject;
use super::shared::Shared;
use super::world::World;
use crate::clock::{Clock, Monotonic};

/// What is left to look at.
#[derive(Debug, Default)]
pub(super) struct Adoption(Mutex<Left>);

#[derive(Debug, Default)]
struct Left {
    began: Option<Monotonic>,
    vms: usize,
    waiting: usize,
}

impl<W: World> Shared<W> {
    /// This many VMs are going to be looked at.
    pub(super) fn begin_adoption(&self, vms: usize) {
        let began = Some(self.world.clock().monotonic());
        *self.adoption.0.lock().unwrap_or_else(PoisonError::into_inner) = Left { began, vms, waiting: vms };
    }

    /// One is this agent's, or known not to be; the last one is an event.
    pub(super) async fn note_adopted(&self) -> Result<(), LedgerError> {
        let (began, vms) = {
            let mut left = self.adoption.0.lock().unwrap_or_else(PoisonError::into_inner);
            left.waiting = left.waiting.saturating_sub(1);
            let Some(began) = left.began.filter(|_| left.waiting == 0) else { return Ok(()) };
            (began, left.vms)
        };
        let took = self.world.clock().monotonic().since(began);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(vms, took_ms, "the VMs of the agent before are this one's");
        let event = NewEvent {
            at: self.world.clock().wall(),
            kind: "vms_adopted",
            subject: Subject::Host,
            operation: None,
            body: serde_json::json!({ "vms": vms, "took_ms": took_ms }),
        };
        self.commit(vec![Write::Event(event)]).await
    }
}
