//! Machines that are kept ready.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::BundleId;

/// `PUT /v1/pools/{bundle}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolRequest {
    /// How many machines to keep ready.
    #[schema(minimum = 1, maximum = 256)]
    pub size: u32,
}

/// Machines of one bundle that are kept ready: restored and paused, each in a jail that is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// The bundle.
    #[schema(value_type = String)]
    pub bundle_id: BundleId,
    /// The bundle's name, if it has one.
    pub name: Option<String>,
    /// How many are wanted.
    pub size: u32,
    /// How many are ready.
    pub ready: u32,
    /// Launches that took one, since the agent started.
    pub claimed: u64,
    /// Launches that found none, since the agent started.
    pub missed: u64,
    /// Why the last one was not made, if it was not; it is tried again.
    pub trouble: Option<String>,
}

/// `GET /v1/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolList {
    /// The pools, by their bundles' ids.
    pub pools: Vec<Pool>,
}
