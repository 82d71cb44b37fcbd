//! How many streams lead into each VM: one that somebody has a terminal in is not idle, however little it does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ids::VmId;

/// The streams of all VMs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams(Arc<Mutex<BTreeMap<VmId, usize>>>);

/// A stream that is counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    streams: Streams,
    vm: VmId,
}

impl Streams {
    /// Counts one more.
    pub(crate) fn count(&self, vm: &VmId) -> Counted {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(vm.clone()).or_default() += 1;
        Counted { streams: self.clone(), vm: vm.clone() }
    }

    /// Whether there is any into this VM.
    pub(crate) fn any(&self, vm: &VmId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(vm)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut streams = self.streams.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = streams.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_that_ends_ends_it() {
        let (streams, vm) = (Streams::default(), VmId::from_random([1; 10]));
        let (one, other) = (streams.count(&vm), streams.count(&vm));
        drop(one);
        assert!(streams.any(&vm));
        drop(other);
        assert!(!streams.any(&vm));
    }
}
