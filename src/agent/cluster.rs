//! Clusters: making them, finding them, and telling who is in one. How they end is in [`super::cluster_end`], how their
//! members register in [`super::registrar`].
//!
//! The ledger is the only place clusters are kept in; their members are the VMs that say so.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::cluster_error::ClusterError;
use super::cluster_record::{
    ClusterRecord, ClusterState, Membership, REGISTRATION_DEADLINE_S_DEFAULT, REGISTRATION_DEADLINE_S_MAX,
    TOKEN_BYTES_MAX, TOKEN_BYTES_MIN, Token, called, is_executor_id,
};
use super::images::is_name;
use super::launch::{Key, LaunchRequest};
use super::launch_error::LaunchError;
use super::ledger::{StoredAnswer, Write};
use super::record::{SCHEMA_VERSION, VmRecord};
use super::session_record::SessionRecord;
use super::shared::cluster_event;
use super::world::{Records, World, random_array};
use super::{Agent, LedgerError};
use crate::clock::Clock;
use crate::ids::{ClusterId, Generation, VmId};

/// Most clusters of a host.
const CLUSTERS_MAX: usize = 256;

/// The cluster of VMs outside sessions that have an executor id and name no cluster.
const IMPLICIT_NAME: &str = "default";

/// A cluster to make.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClusterRequest {
    /// Its name, if it gets one.
    pub name: Option<String>,
    /// Its secret; `None`: one is made.
    pub token: Option<String>,
    /// The registrar, when it is not this agent.
    pub endpoint: Option<SocketAddr>,
    /// How long a VM has for its registration, in seconds.
    pub registration_deadline_s: Option<u32>,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// What became of a request for a cluster.
#[derive(Debug, Clone)]
pub enum ClusterCreated {
    /// A cluster was made, or the same request had made it.
    Cluster(ClusterView),
    /// The same request was answered like this.
    Answered(StoredAnswer),
}

/// A cluster and who is in it.
#[derive(Debug, Clone)]
pub struct ClusterView {
    /// The cluster.
    pub record: ClusterRecord,
    /// Its VMs, oldest first, ended ones included.
    pub members: Vec<Arc<VmRecord>>,
    /// How many calculations run in each.
    pub running: BTreeMap<VmId, usize>,
}

/// A place in a cluster, for a VM that is being launched.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The cluster.
    pub cluster: ClusterRecord,
    /// Whether it is made with the VM.
    pub is_new: bool,
    /// Who the VM is there; `None`: its id.
    pub executor_id: Option<String>,
    /// The member it is launched instead of, with its attempt.
    pub replaces: Option<(VmId, u8)>,
}

impl Place {
    /// What a VM is to its cluster there.
    pub(super) fn membership(&self, vm: &VmId) -> Membership {
        Membership {
            cluster: self.cluster.id.clone(),
            executor_id: self.executor_id.clone().unwrap_or_else(|| vm.to_string()),
            attempt: self.replaces.as_ref().map_or(1, |(_, attempt)| attempt.saturating_add(1)),
            replaces: self.replaces.as_ref().map(|(vm, _)| vm.clone()),
        }
    }
}

impl<W: World> Agent<W> {
    /// Checks and records a cluster.
    pub(super) async fn make_cluster(&self, request: ClusterRequest) -> Result<ClusterCreated, ClusterError> {
        // Held through the record: of two requests with one key, the second finds what the first made.
        let _admission = self.shared.admission.lock().await;
        if let Some(key) = &request.key
            && let Some(earlier) = self.earlier_cluster(key).await?
        {
            return Ok(earlier);
        }
        check(&request)?;
        if self.all_clusters().await?.len() >= CLUSTERS_MAX {
            return Err(ClusterError::TooMany { max: CLUSTERS_MAX });
        }
        let ClusterRequest { name, token, endpoint, registration_deadline_s, key } = request;
        let deadline_s = registration_deadline_s.unwrap_or(REGISTRATION_DEADLINE_S_DEFAULT);
        let record = ClusterRecord { endpoint, ..self.draft_cluster(name, token, deadline_s)? };
        let now = record.created_at;
        let mut writes =
            vec![Write::NewCluster(Box::new(record.clone())), cluster_event(now, "cluster_created", &record)];
        writes.extend(key.map(|key| Write::Key(key.row(record.id.to_string(), self.shared.steady()))));
        self.shared.commit(writes).await.map_err(|error| ClusterError::refused(&record, error))?;
        tracing::info!(cluster = %record.id, name = record.name, "cluster made");
        Ok(ClusterCreated::Cluster(self.cluster_view(record)))
    }

    fn draft_cluster(
        &self,
        name: Option<String>,
        token: Option<String>,
        registration_deadline_s: u32,
    ) -> Result<ClusterRecord, ClusterError> {
        let random = |source| ClusterError::Host { what: "read randomness", source };
        let id = ClusterId::from_random(random_array(&self.shared.world).map_err(random)?);
        let token = match token {
            Some(token) => token,
            // 128 random bits as 32 hexadecimal digits.
            None => Generation(random_array(&self.shared.world).map_err(random)?).to_string(),
        };
        Ok(ClusterRecord {
            schema_version: SCHEMA_VERSION,
            id,
            name,
            token: Token::new(token),
            endpoint: None,
            registration_deadline_s,
            state: ClusterState::Active,
            epoch: 0,
            revision: 1,
            created_at: self.shared.world.clock().wall(),
        })
    }

    async fn earlier_cluster(&self, key: &Key) -> Result<Option<ClusterCreated>, ClusterError> {
        let Some(row) = self.key_row(key).await.map_err(ClusterError::Ledger)? else { return Ok(None) };
        if row.body_hash != key.body_hash {
            return Err(ClusterError::KeyMismatch);
        }
        if let Some(answer) = row.answer {
            return Ok(Some(ClusterCreated::Answered(answer)));
        }
        // Recorded but not answered: the client hung up, or an agent ended between.
        match self.find_cluster(&row.object).await {
            Ok(record) => Ok(Some(ClusterCreated::Cluster(self.cluster_view(record)))),
            Err(ClusterError::Unknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The cluster a word means: its id, its name, or the start of its id.
    pub(super) async fn find_cluster(&self, word: &str) -> Result<ClusterRecord, ClusterError> {
        let asked = word.to_owned();
        let exact = self.shared.world.records().with(move |store| store.cluster(&asked)).await;
        if let Some(found) = exact.map_err(ClusterError::Ledger)? {
            return Ok(found);
        }
        let start = word.strip_prefix(ClusterId::PREFIX).unwrap_or(word);
        if start.is_empty() {
            return Err(ClusterError::Unknown { word: word.to_owned() });
        }
        let prefix = format!("{}{start}", ClusterId::PREFIX);
        let found = self.shared.world.records().with(move |store| store.clusters_by_prefix(&prefix)).await;
        let mut found = found.map_err(ClusterError::Ledger)?;
        match (found.pop(), found.len()) {
            (Some(cluster), 0) => Ok(cluster),
            (Some(_), more) => Err(ClusterError::Ambiguous { word: word.to_owned(), count: more + 1 }),
            (None, _) => Err(ClusterError::Unknown { word: word.to_owned() }),
        }
    }

    pub(super) async fn all_clusters(&self) -> Result<Vec<ClusterRecord>, ClusterError> {
        let all = self.shared.world.records().with(|store| store.clusters()).await;
        all.map_err(ClusterError::Ledger)
    }

    /// All clusters, oldest first.
    pub(super) async fn list_clusters(&self) -> Result<Vec<ClusterView>, LedgerError> {
        let clusters = self.shared.world.records().with(|store| store.clusters()).await?;
        Ok(clusters.into_iter().map(|cluster| self.cluster_view(cluster)).collect())
    }

    /// A cluster and who is in it.
    pub(super) fn cluster_view(&self, record: ClusterRecord) -> ClusterView {
        let members = self.cluster_members(&record.id);
        ClusterView { running: self.shared.calculations.loads(), members, record }
    }

    /// The VMs of a cluster, oldest first, ended ones included.
    pub(super) fn cluster_members(&self, cluster: &ClusterId) -> Vec<Arc<VmRecord>> {
        let mut vms = self.records();
        vms.retain(|vm| vm.spec.cluster.as_ref().is_some_and(|member| member.cluster == *cluster));
        vms
    }

    /// The place that a launch asks for, if it does. Called while launches are admitted one at a time.
    pub(super) async fn place(
        &self,
        request: &LaunchRequest,
        session: Option<&SessionRecord>,
    ) -> Result<Option<Place>, LaunchError> {
        let LaunchRequest { cluster, executor_id, replaces, .. } = request;
        if let Some(found) = executor_id.as_ref().filter(|text| !is_executor_id(text)) {
            return Err(LaunchError::ExecutorId { found: found.clone() });
        }
        let implicit = || session.map_or_else(|| IMPLICIT_NAME.to_owned(), |session| session.id.to_string());
        let (cluster, is_new) = match (cluster, executor_id) {
            (None, None) => return Ok(None),
            (Some(word), _) => (self.find_cluster(word).await?, false),
            (None, Some(_)) => match self.find_cluster(&implicit()).await {
                Ok(cluster) => (cluster, false),
                Err(ClusterError::Unknown { word }) => {
                    (self.draft_cluster(Some(word), None, REGISTRATION_DEADLINE_S_DEFAULT)?, true)
                }
                Err(error) => return Err(error.into()),
            },
        };
        if cluster.state == ClusterState::Draining {
            return Err(ClusterError::Draining { cluster: called(&cluster) }.into());
        }
        let living = |vm: &&Arc<VmRecord>| vm.state.holds_resources();
        let has =
            |vm: &Arc<VmRecord>| vm.spec.cluster.as_ref().map(|member| &member.executor_id) == executor_id.as_ref();
        if executor_id.is_some() && self.cluster_members(&cluster.id).iter().filter(living).any(has) {
            let executor_id = executor_id.clone().unwrap_or_default();
            return Err(LaunchError::ExecutorTaken { executor_id, cluster: called(&cluster) });
        }
        let (executor_id, replaces) = (executor_id.clone(), replaces.clone());
        Ok(Some(Place { cluster, is_new, executor_id, replaces }))
    }
}

/// What can be said of a request without looking at other clusters.
fn check(request: &ClusterRequest) -> Result<(), ClusterError> {
    if let Some(name) = request.name.as_ref().filter(|name| !is_name(name)) {
        return Err(ClusterError::Name { name: name.clone() });
    }
    if let Some(token) = &request.token {
        let visible = token.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible || !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len()) {
            return Err(ClusterError::Token { found: token.len() });
        }
    }
    if let Some(endpoint) = request.endpoint {
        let reason = if endpoint.port() == 0 {
            Some("a port from 1 to 65535 is needed")
        } else if endpoint.ip().is_unspecified() || endpoint.ip().is_multicast() {
            Some("an address of one registrar is needed")
        } else if matches!(endpoint.ip(), IpAddr::V6(address) if address.is_unicast_link_local()) {
            Some("a link-local address means something else in every guest")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(ClusterError::Endpoint { endpoint: endpoint.to_string(), reason });
        }
    }
    match request.registration_deadline_s {
        Some(found) if !(1..=REGISTRATION_DEADLINE_S_MAX).contains(&found) => Err(ClusterError::Deadline { found }),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_can_mean_is_refused() {
        let with = |endpoint: &str| ClusterRequest { endpoint: endpoint.parse().ok(), ..ClusterRequest::default() };
        for good in ["192.0.2.1:7070", "[2001:db8::1]:1"] {
            assert!(check(&with(good)).is_ok(), "{good}");
        }
        for bad in ["192.0.2.1:0", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[fe80::1]:1"] {
            assert!(matches!(check(&with(bad)), Err(ClusterError::Endpoint { .. })), "{bad}");
        }
        let token = |token: &str| ClusterRequest { token: Some(token.to_owned()), ..ClusterRequest::default() };
        assert!(check(&token("12345678")).is_ok() && check(&token(&"x".repeat(256))).is_ok());
        for bad in ["", "1234567", "with blank", "wörter-wörter", &"x".repeat(257)] {
            assert!(matches!(check(&token(bad)), Err(ClusterError::Token { .. })), "{bad}");
        }
        let deadline = |s| ClusterRequest { registration_deadline_s: Some(s), ..ClusterRequest::default() };
        assert!(check(&deadline(1)).is_ok() && check(&deadline(0)).is_err() && check(&deadline(3601)).is_err());
    }
}
