//! Clusters, registrations, calculations.

use axum::http::StatusCode;

use super::ApiError;
use crate::agent::{CalculationError, ClusterError, RegistrationRefusal};
use crate::report::chain;

impl From<ClusterError> for ApiError {
    fn from(error: ClusterError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code, todo) = match error {
            ClusterError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name", None),
            ClusterError::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken", None),
            ClusterError::Token { .. } => (StatusCode::BAD_REQUEST, "invalid_token", None),
            ClusterError::Endpoint { .. } => (StatusCode::BAD_REQUEST, "invalid_endpoint", None),
            ClusterError::Deadline { .. } => (StatusCode::BAD_REQUEST, "invalid_deadline", None),
            ClusterError::TooMany { .. } => (StatusCode::CONFLICT, "too_many_clusters", None),
            ClusterError::Unknown { .. } => {
                let todo = "`hearth cluster ls` lists the clusters of this host, `hearth cluster create` makes one";
                (StatusCode::NOT_FOUND, "unknown_cluster", Some(todo))
            }
            ClusterError::Ambiguous { .. } => (StatusCode::CONFLICT, "ambiguous_id", None),
            ClusterError::Draining { .. } => (StatusCode::CONFLICT, "cluster_draining", None),
            ClusterError::InUse { .. } => {
                let todo = "remove its VMs first, or let that be done: `hearth cluster rm --drain`, ?drain=true";
                (StatusCode::CONFLICT, "cluster_in_use", Some(todo))
            }
            ClusterError::NotDrained { .. } => {
                let todo = "the agent goes on trying; `hearth cluster members` tells what is left";
                (StatusCode::INTERNAL_SERVER_ERROR, "cluster_not_drained", Some(todo))
            }
            ClusterError::KeyMismatch => (StatusCode::CONFLICT, "idempotency_mismatch", None),
            ClusterError::Ending => (StatusCode::SERVICE_UNAVAILABLE, "agent_ending", None),
            ClusterError::Host { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None),
            ClusterError::Ledger(error) => return error.into(),
        };
        let answer = Self::new(status, code, message, retry);
        match todo {
            Some(todo) => answer.with_detail(todo),
            None => answer,
        }
    }
}

impl From<CalculationError> for ApiError {
    fn from(error: CalculationError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code) = match error {
            CalculationError::Cluster(error) => return error.into(),
            CalculationError::Program(error) => return error.into(),
            CalculationError::Words { .. } => (StatusCode::BAD_REQUEST, "words_too_long"),
            CalculationError::Input { .. } => (StatusCode::BAD_REQUEST, "stdin_too_long"),
            CalculationError::Timeout { .. } => (StatusCode::BAD_REQUEST, "invalid_timeout"),
            CalculationError::MemberAndExecutor => (StatusCode::BAD_REQUEST, "member_and_executor_id"),
            CalculationError::NoMember { .. } => {
                return Self::new(StatusCode::UNPROCESSABLE_ENTITY, "unknown_member", message, retry)
                    .with_detail("`hearth cluster members` lists the members of a cluster");
            }
            CalculationError::NotRegistered { .. } => (StatusCode::CONFLICT, "not_registered"),
            CalculationError::TooMany { .. } => (StatusCode::TOO_MANY_REQUESTS, "too_many_calculations"),
            CalculationError::Unknown { .. } => (StatusCode::NOT_FOUND, "unknown_calculation"),
            CalculationError::Ambiguous { .. } => (StatusCode::CONFLICT, "ambiguous_id"),
        };
        Self::new(status, code, message, retry)
    }
}

impl From<RegistrationRefusal> for ApiError {
    fn from(refusal: RegistrationRefusal) -> Self {
        let status = match refusal {
            RegistrationRefusal::WrongToken
            | RegistrationRefusal::WrongCluster
            | RegistrationRefusal::WrongExecutor
            | RegistrationRefusal::WrongVm
            | RegistrationRefusal::WrongGeneration => StatusCode::FORBIDDEN,
            RegistrationRefusal::NotInCluster
            | RegistrationRefusal::Elsewhere
            | RegistrationRefusal::Twice
            | RegistrationRefusal::NotNow => StatusCode::CONFLICT,
        };
        Self::new(status, refusal.name(), refusal.to_string(), refusal.retry())
    }
}
