//! What may be asked of the agent about clusters: make them, look at them, have their members calculate, remove them.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::Agent;
use super::calculation_record::{CalculationOutput, CalculationRecord};
use super::calculations::{CalculationRequest, CalculationTaken};
use super::cluster::{ClusterCreated, ClusterRequest, ClusterView};
use super::cluster_error::{CalculationError, ClusterError};
use super::ledger::LedgerError;
use super::world::World;

/// Clusters, as seen from above.
pub trait ClusterDoor: Send + Sync + 'static {
    /// Checks and records a cluster.
    fn create_cluster(&self, request: ClusterRequest) -> BoxFuture<'_, Result<ClusterCreated, ClusterError>>;
    /// All clusters, oldest first.
    fn clusters(&self) -> BoxFuture<'_, Result<Vec<ClusterView>, LedgerError>>;
    /// The cluster a word means: its id, its name, or the start of its id.
    fn cluster<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<ClusterView, ClusterError>>;
    /// Removes a cluster without living VMs; with `drain` its VMs first, whose guests have `grace` to power off.
    fn remove_cluster<'a>(
        &'a self,
        word: &'a str,
        drain: bool,
        grace: Duration,
    ) -> BoxFuture<'a, Result<(), ClusterError>>;
    /// Takes a calculation down, for one of a cluster's members.
    fn take_calculation<'a>(
        &'a self,
        cluster: &'a str,
        request: CalculationRequest,
    ) -> BoxFuture<'a, Result<CalculationTaken, CalculationError>>;
    /// A cluster's calculations that are kept, newest first.
    fn calculations<'a>(&'a self, cluster: &'a str) -> BoxFuture<'a, Result<Vec<CalculationRecord>, CalculationError>>;
    /// A calculation and what it wrote, once it is over; as it is when that takes longer than `wait`.
    fn calculation<'a>(
        &'a self,
        cluster: &'a str,
        word: &'a str,
        wait: Duration,
    ) -> BoxFuture<'a, Result<(CalculationRecord, CalculationOutput), CalculationError>>;
}

impl<W: World> ClusterDoor for Agent<W> {
    fn create_cluster(&self, request: ClusterRequest) -> BoxFuture<'_, Result<ClusterCreated, ClusterError>> {
        self.make_cluster(request).boxed()
    }

    fn clusters(&self) -> BoxFuture<'_, Result<Vec<ClusterView>, LedgerError>> {
        self.list_clusters().boxed()
    }

    fn cluster<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<ClusterView, ClusterError>> {
        async move { Ok(self.cluster_view(self.find_cluster(word).await?)) }.boxed()
    }

    fn remove_cluster<'a>(
        &'a self,
        word: &'a str,
        drain: bool,
        grace: Duration,
    ) -> BoxFuture<'a, Result<(), ClusterError>> {
        // On a task of its own: a client that hangs up does not leave a cluster half drained.
        let (agent, word) = (self.clone(), word.to_owned());
        async move {
            let ending = tokio::spawn(async move { agent.end_cluster(&word, drain, grace).await });
            ending.await.unwrap_or(Err(ClusterError::Ending))
        }
        .boxed()
    }

    fn take_calculation<'a>(
        &'a self,
        cluster: &'a str,
        request: CalculationRequest,
    ) -> BoxFuture<'a, Result<CalculationTaken, CalculationError>> {
        Self::take_calculation(self, cluster, request).boxed()
    }

    fn calculations<'a>(&'a self, cluster: &'a str) -> BoxFuture<'a, Result<Vec<CalculationRecord>, CalculationError>> {
        self.list_calculations(cluster).boxed()
    }

    fn calculation<'a>(
        &'a self,
        cluster: &'a str,
        word: &'a str,
        wait: Duration,
    ) -> BoxFuture<'a, Result<(CalculationRecord, CalculationOutput), CalculationError>> {
        self.await_calculation(cluster, word, wait).boxed()
    }
}
