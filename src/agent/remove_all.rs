//! Removing many VMs: what draining a session or a cluster comes to.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::Agent;
use super::door::VmError;
use super::record::VmRecord;
use super::vm_actor::{Verb, VerbError};
use super::world::World;

/// Removals that are worked on at once.
const REMOVALS_AT_ONCE: usize = 8;

impl<W: World> Agent<W> {
    /// Removes these VMs; gives why some could not be.
    pub(super) async fn remove_all(&self, vms: &[Arc<VmRecord>], grace: Duration) -> Vec<String> {
        let handles: Vec<_> = {
            let known = self.shared.vms();
            vms.iter().filter_map(|vm| known.get(&vm.id).cloned()).collect()
        };
        let removals = handles.into_iter().map(|vm| async move {
            match self.ask_actor(&vm, Verb::Remove { grace }).await {
                // Somebody else was faster.
                Ok(_) | Err(VmError::Verb(VerbError::Gone { .. })) => None,
                Err(error) => Some(crate::report::chain(&error)),
            }
        });
        let failures = futures_util::stream::iter(removals).buffer_unordered(REMOVALS_AT_ONCE);
        failures.filter_map(std::future::ready).collect().await
    }
}
