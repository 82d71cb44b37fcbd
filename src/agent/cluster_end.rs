//! How clusters end: a cluster that is drained is `draining` in the ledger first; then its VMs are removed, then it is,
//! and its calculations with it. Whatever dies between, the next agent goes on.

use std::time::Duration;

use super::Agent;
use super::cluster_error::ClusterError;
use super::cluster_record::{ClusterRecord, ClusterState, called};
use super::shared::cluster_event;
use super::world::{Records, World};
use crate::clock::Clock;

/// How long a guest may take to power off when an agent goes on with a drain that another began.
const GRACE: Duration = Duration::from_secs(10);

impl<W: World> Agent<W> {
    /// Removes a cluster without living VMs; with `drain`, its VMs first.
    pub(super) async fn end_cluster(&self, word: &str, drain: bool, grace: Duration) -> Result<(), ClusterError> {
        if !drain {
            // No launch is admitted meanwhile that would join it.
            let _admission = self.shared.admission.lock().await;
            let cluster = self.find_cluster(word).await?;
            return self.forget_cluster(&cluster).await;
        }
        let cluster = self.begin_cluster_drain(word).await?;
        self.drain_cluster(&cluster, grace).await
    }

    /// From here on no VM joins: those that did are known to the agent.
    async fn begin_cluster_drain(&self, word: &str) -> Result<ClusterRecord, ClusterError> {
        // A launch holds this from its record until its VM is known.
        let _admission = self.shared.admission.lock().await;
        let found = self.find_cluster(word).await?;
        if found.state == ClusterState::Draining {
            return Ok(found);
        }
        let (id, now) = (found.id.clone(), self.shared.world.clock().wall());
        let drain = move |cluster: &mut ClusterRecord| {
            cluster.state = ClusterState::Draining;
            (cluster.clone(), vec![cluster_event(now, "cluster_draining", cluster)])
        };
        let drained = self.shared.world.records().with(move |store| store.change_cluster(&id, drain)).await;
        let (cluster, last) = drained.map_err(|error| ClusterError::refused(&found, error))?;
        self.shared.wake_readers(last);
        tracing::info!(cluster = %cluster.id, name = cluster.name, "cluster draining");
        Ok(cluster)
    }

    /// Removes a draining cluster's VMs, then it. May be done by several at once.
    async fn drain_cluster(&self, cluster: &ClusterRecord, grace: Duration) -> Result<(), ClusterError> {
        let mut failures = self.remove_all(&self.cluster_members(&cluster.id), grace).await;
        match self.forget_cluster(cluster).await {
            Ok(()) | Err(ClusterError::Unknown { .. }) => Ok(()),
            Err(ClusterError::InUse { members, .. }) => {
                let why = failures.pop().unwrap_or_else(|| "they are still being removed".to_owned());
                Err(ClusterError::NotDrained { cluster: called(cluster), left: members, why })
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes a cluster without living VMs.
    async fn forget_cluster(&self, cluster: &ClusterRecord) -> Result<(), ClusterError> {
        let writes = vec![cluster_event(self.shared.world.clock().wall(), "cluster_removed", cluster)];
        let id = cluster.id.clone();
        let removed = self.shared.world.records().with(move |store| store.remove_cluster(&id, &writes)).await;
        let last = removed.map_err(|error| ClusterError::refused(cluster, error))?;
        self.shared.wake_readers(last);
        tracing::info!(cluster = %cluster.id, name = cluster.name, "cluster removed");
        // Whoever waits for a calculation of it is told that there is none.
        self.shared.calculations.note_change();
        Ok(())
    }

    /// Goes on with the clusters that are being drained.
    pub(super) async fn go_on_draining(&self) -> Result<(), ClusterError> {
        for cluster in self.all_clusters().await? {
            if cluster.state == ClusterState::Draining
                && let Err(error) = self.drain_cluster(&cluster, GRACE).await
            {
                tracing::warn!(cluster = %cluster.id, error = %crate::report::chain(&error), "cannot drain a cluster");
            }
        }
        Ok(())
    }
}
