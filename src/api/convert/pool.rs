//! Machines that are kept ready.

use crate::agent::PoolView;
use crate::api::types::Pool;

pub(in crate::api) fn pool(view: PoolView) -> Pool {
    let PoolView { bundle, name, size, ready, claimed, missed, trouble } = view;
    Pool { bundle_id: bundle, name, size, ready, claimed, missed, trouble }
}
