//! What a guest has reached of its memory, as the kernel tells of its VMM's.

use std::fs::File;

use super::host_open::{open_pagemap, unopened};
use super::host_vmm::HostVmm;
use super::record::VmRecord;
use super::world::{Ask, AskError};
use crate::bundle::working_set::{Touched, WorkingSet};
use crate::sys::pagemap;
use crate::units::PAGE_BYTES;
use crate::wire::control::{Answer, PrefaultSpec};

/// Most memory that is looked through: what lies beyond is in a mapping of its own (`machine::layout`).
const BYTES_MAX: u64 = 3 << 30;

impl HostVmm {
    pub(super) fn touched_blocking(&self, vm: &VmRecord, epoch: u64) -> Result<WorkingSet, AskError> {
        let Answer::Status(status) = self.ask_blocking(vm, epoch, &Ask::Status)? else {
            return Err(AskError::Unexpected);
        };
        let count = usize::try_from(status.memory_bytes.min(BYTES_MAX) / PAGE_BYTES).unwrap_or(0);
        let mut pages = vec![Touched::Not; count];
        let pagemap = File::from(open_pagemap(vm)?);
        let read = pagemap::read(&pagemap, status.guest_memory_host_address, count, |page, entry| {
            if let Some(page) = pages.get_mut(page).filter(|_| entry.is_mapped()) {
                *page = if entry.is_own() { Touched::Written } else { Touched::Read };
            }
        });
        read.map_err(unopened("the VMM's page map"))?;
        Ok(WorkingSet::of(pages.into_iter()))
    }
}

/// A working set as it is asked for. Pages beyond what a request can name are not.
pub(super) fn prefault_spec(set: &WorkingSet) -> PrefaultSpec {
    let runs = |runs: &[crate::bundle::Run]| {
        let small = |run: &crate::bundle::Run| Some((u32::try_from(run.first).ok()?, u32::try_from(run.count).ok()?));
        runs.iter().filter_map(small).collect()
    };
    PrefaultSpec { read: runs(&set.read), written: runs(&set.written) }
}
