//! Names of bundles: one bundle has each. A name is looked for before anything is begun, among the bundles and what is on
//! its way to become one; and once more when the bundle is about to be there, since two may have begun at once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::bundles::{BundleError, BundleListed, BundleView};
use super::images::is_name;
use super::ledger::Store;
use super::shared::Shared;
use super::world::{Records, VmBundles, World};

/// The names of the bundles that are being committed at this moment. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct BundleNames {
    held: Arc<Mutex<BTreeSet<String>>>,
}

/// A name that is held; nobody else commits a bundle of it until this is dropped.
#[derive(Debug)]
#[must_use = "the name is free again when this is dropped"]
pub(super) struct HeldName {
    names: BundleNames,
    name: String,
}

impl BundleNames {
    /// The name for whoever asks first.
    fn hold(&self, name: &str) -> Option<HeldName> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        held.then(|| HeldName { names: self.clone(), name: name.to_owned() })
    }
}

impl Drop for HeldName {
    fn drop(&mut self) {
        self.names.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl<W: World> Shared<W> {
    /// Whether a bundle of this name may be begun: there is none, and none is on its way.
    pub(super) async fn bundle_name_is_free(&self, name: Option<&str>) -> Result<(), BundleError> {
        let Some(name) = name else { return Ok(()) };
        if !is_name(name) {
            return Err(BundleError::Name { name: name.to_owned() });
        }
        let unfinished = self.world.records().with(|store: &mut Store| store.unfinished()).await;
        let mut unfinished = unfinished.map_err(BundleError::Ledger)?.into_iter();
        let makes = |order: &super::record::BundleOrder| order.name.as_deref() == Some(name);
        if unfinished.any(|operation| operation.makes.as_ref().is_some_and(makes)) {
            return Err(BundleError::NameTaken { name: name.to_owned() });
        }
        self.hold_bundle_name(Some(name), |_| false).await.map(drop)
    }

    /// Holds a name for a bundle that is about to be there. One that is there already may be `ours`.
    pub(super) async fn hold_bundle_name(
        &self,
        name: Option<&str>,
        ours: impl Fn(&BundleView) -> bool + Send,
    ) -> Result<Option<HeldName>, BundleError> {
        let Some(name) = name else { return Ok(None) };
        let taken = || BundleError::NameTaken { name: name.to_owned() };
        let held = self.bundle_names.hold(name).ok_or_else(taken)?;
        let others = self.world.bundles().list().await?.into_iter().any(|one| match one {
            BundleListed::Readable(view) => view.manifest.name.as_deref() == Some(name) && !ours(&view),
            BundleListed::Unreadable { .. } => false,
        });
        if others { Err(taken()) } else { Ok(Some(held)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_holder() {
        let names = BundleNames::default();
        let held = names.hold("warm");
        assert!(held.is_some());
        assert!(names.clone().hold("warm").is_none() && names.hold("cold").is_some());
        drop(held);
        assert!(names.hold("warm").is_some());
    }
}
