//! The files a machine is saved into, and how its memory is copied while it runs.

use std::os::fd::OwnedFd;

use super::host_open::{open_pagemap, unopened};
use super::host_vmm::{HostVmm, names};
use super::record::VmRecord;
use super::world::AskError;
use crate::bundle::Staging;
use crate::units::MIB;
use crate::wire::control::{CopySpec, SavedPages};

/// Longest pause that is aimed at while memory is copied, in milliseconds.
const PAUSE_MS_MAX: u32 = 8;

/// Rounds after which the guest is held all the same.
const ROUNDS_MAX: u32 = 16;

/// Time after which no other round begins, in seconds: then the guest is held all the same.
pub(super) const COPY_S_MAX: u32 = 60;

/// How memory is copied.
pub(super) const fn copy_spec(pages: SavedPages) -> CopySpec {
    CopySpec { pages, pause_ms_max: PAUSE_MS_MAX, rounds_max: ROUNDS_MAX, deadline_ms: COPY_S_MAX as u64 * 1000 }
}

impl HostVmm {
    /// Files to save a machine into, in the order the request names them.
    pub(super) fn open_to_save(&self, vm: &VmRecord, pages: SavedPages) -> Result<Vec<OwnedFd>, AskError> {
        let pagemap = open_pagemap(vm)?;
        let staging = self.stage(vm)?;
        let memory = staging.memory_file().map_err(AskError::Stage)?;
        let mut rest = self.open_rest(vm, &staging, pages)?.into_iter();
        // The state first.
        let state = rest.next();
        Ok([pagemap].into_iter().chain(state).chain([memory.into()]).chain(rest).collect())
    }

    /// Files to copy a machine's memory into.
    pub(super) fn open_to_copy(&self, vm: &VmRecord) -> Result<Vec<OwnedFd>, AskError> {
        let pagemap = open_pagemap(vm)?;
        let memory = self.stage(vm)?.memory_file().map_err(AskError::Stage)?;
        Ok(vec![pagemap, memory.into()])
    }

    /// Files for what such a copy left.
    pub(super) fn open_for_rest(&self, vm: &VmRecord, pages: SavedPages) -> Result<Vec<OwnedFd>, AskError> {
        let staging = self.bundles.reopen(vm.id.as_str()).map_err(AskError::Stage)?;
        let staging = staging.ok_or(AskError::NothingCopied)?;
        self.open_rest(vm, &staging, pages)
    }

    fn stage(&self, vm: &VmRecord) -> Result<Staging, AskError> {
        let token = vm.id.as_str();
        // What an earlier try left is not whole.
        if let Some(earlier) = self.bundles.reopen(token).map_err(AskError::Stage)? {
            earlier.discard().map_err(AskError::Stage)?;
        }
        let memory_bytes = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
        self.bundles.stage(token, memory_bytes).map_err(AskError::Stage)
    }

    /// For the state, and for the list of pages if there is to be one.
    fn open_rest(&self, vm: &VmRecord, staging: &Staging, pages: SavedPages) -> Result<Vec<OwnedFd>, AskError> {
        let mut files: Vec<OwnedFd> = vec![staging.state_file().map_err(AskError::Stage)?.into()];
        if pages == SavedPages::Changed {
            let list = self.dirs.create(&vm.id, names::PAGES).map_err(unopened("the list of pages"))?;
            files.push(list.into());
        }
        Ok(files)
    }
}
