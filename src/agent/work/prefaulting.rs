//! What a guest from a bundle reaches first is mapped ahead: noted from the first of its guests to answer, and asked for
//! whenever a machine of it is made. Only speed depends on any of this.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};

use crate::agent::ledger::{NewEvent, Write};
use crate::agent::record::{Subject, VmRecord};
use crate::agent::shared::Shared;
use crate::agent::world::{Ask, VmBundles, VmmHost, World};
use crate::bundle::working_set::WorkingSet;
use crate::clock::Clock;
use crate::ids::BundleId;
use crate::report::chain;
use crate::units::MIB;

/// How many of a bundle's guests it is noted of: one that had other work than the first reaches other pages.
const NOTED_GUESTS: u32 = 3;

impl<W: World> Shared<W> {
    /// What is to be mapped ahead for a guest from a bundle, if that is known. It is being read into memory when this
    /// returns, or fetched where it is not here yet. What cannot be used is told of, and forgotten: the next launch notes it
    /// anew.
    pub(in crate::agent) async fn working_set(&self, vm: &VmRecord) -> Option<WorkingSet> {
        let bundle = vm.spec.bundle.as_ref()?;
        let bytes_max = self.config.limits.prefault_mib.saturating_mul(MIB);
        if bytes_max == 0 {
            return None;
        }
        match self.world.bundles().working_set(bundle, bytes_max).await {
            Ok(set) => {
                if let (Some(set), Some(filling)) = (&set, self.fillings.of(bundle)) {
                    filling.expect(set);
                }
                set
            }
            Err(error) => {
                tracing::warn!(vm = %vm.id, %bundle, error = %chain(&error), "a working set is ignored");
                let event = NewEvent {
                    at: self.world.clock().wall(),
                    kind: "working_set_ignored",
                    subject: Subject::Vm(vm.id.clone()),
                    operation: vm.operation.clone(),
                    body: serde_json::json!({ "bundle_id": bundle, "reason": chain(&error) }),
                };
                if let Err(error) = self.commit(vec![Write::Event(event)]).await {
                    tracing::warn!(error = %chain(&error), "an event is lost");
                }
                let _ = self.world.bundles().forget_working_set(bundle).await;
                self.noted_sets().remove(bundle);
                None
            }
        }
    }

    /// Has a machine that was made from a bundle map what its guest will reach first.
    pub(in crate::agent) async fn prefault(&self, vm: &VmRecord, set: WorkingSet) {
        if let Err(error) = self.world.vmm().ask(vm, self.epoch, Ask::Prefault(set)).await {
            tracing::debug!(vm = %vm.id, error = %chain(&error), "nothing is mapped ahead");
        }
    }

    fn noted_sets(&self) -> MutexGuard<'_, BTreeSet<BundleId>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the one to note what a guest of this bundle reached: one after the other, until there were enough.
    fn is_to_note(&self, bundle: &BundleId) -> bool {
        self.config.limits.prefault_mib > 0 && self.noted_sets().insert(bundle.clone())
    }
}

/// In the background: notes what a guest has reached until now, if its bundle is not known well enough.
pub(super) fn note<W: World>(shared: &Arc<Shared<W>>, vm: &VmRecord) {
    let Some(bundle) = vm.spec.bundle.clone().filter(|bundle| shared.is_to_note(bundle)) else { return };
    let (shared, vm) = (Arc::clone(shared), vm.clone());
    tokio::spawn(async move {
        let bundles = shared.world.bundles();
        let known = match bundles.working_set(&bundle, u64::MAX).await {
            Ok(known) => known.unwrap_or_default(),
            // The next launch forgets it.
            Err(_) => return,
        };
        if known.guests >= NOTED_GUESTS {
            return;
        }
        let noted = match shared.world.vmm().touched(&vm, shared.epoch).await {
            Ok(set) => bundles.keep_working_set(&bundle, known.with(&set)).await.map_err(|error| chain(&error)),
            Err(error) => Err(chain(&error)),
        };
        if let Err(error) = noted {
            tracing::debug!(%bundle, error, "what a guest reached first is not noted");
        }
        shared.noted_sets().remove(&bundle);
    });
}
