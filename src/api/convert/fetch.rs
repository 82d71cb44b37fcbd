//! Bundles from elsewhere, and memory that is on its way.

use crate::agent::{FetchView, MemoryView};
use crate::api::types::{BundleFetch, LaunchMode, VmFilling, VmMemory};

pub(in crate::api) fn fetch(view: FetchView) -> BundleFetch {
    let FetchView { from, progress, trouble } = view;
    BundleFetch { from, fetched_bytes: progress.done_bytes, total_bytes: progress.total_bytes, trouble }
}

pub(in crate::api) fn memory(view: MemoryView) -> VmMemory {
    let MemoryView { vm, filling, waits_ms } = view;
    let mode = if vm.spec.lazy { LaunchMode::Lazy } else { LaunchMode::Mmap };
    VmMemory {
        vm_id: vm.id.clone(),
        mode: vm.spec.bundle.as_ref().map(|_| mode),
        bundle_id: vm.spec.bundle.clone(),
        filling: filling.map(|(filling, coming)| VmFilling {
            chunks_mapped: filling.mapped,
            chunks_total: filling.chunks,
            chunks_wanted: u32::try_from(filling.wanted.len()).unwrap_or(u32::MAX),
            waits_ms,
            fetch: coming.map(fetch),
        }),
    }
}
