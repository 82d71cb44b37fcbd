//! Sealed machines and held taps of a simulated host. A sealed machine carries what its guest had in memory, so that a
//! guest that is taken back to before it last ran is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::guest::Fate;
use super::{SimHost, State};
use crate::agent::world::AskError;
use crate::ids::VmId;
use crate::wire::control::SealingKey;
use crate::wire::refusal::Refusal;

/// A sealed machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sealed {
    key: SealingKey,
    /// What its guest had in memory.
    memory: u64,
    /// What becomes of its guest: that is its own, whichever process it is in.
    fate: Fate,
    /// Somebody flipped a bit.
    damaged: bool,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Swap {
    /// Being written, or written and not kept yet.
    sealing: BTreeMap<VmId, Sealed>,
    kept: BTreeMap<VmId, Sealed>,
    /// What each guest had in memory when it last began to run, on whatever host: a witness that hosts share.
    ran: Arc<Mutex<BTreeMap<VmId, u64>>>,
    /// VMs whose taps this agent holds.
    held: BTreeSet<VmId>,
    /// Packets that wait for a guest.
    waiting: BTreeMap<VmId, u64>,
    /// Packets that reached one.
    delivered: BTreeMap<VmId, u64>,
}

impl Swap {
    fn ran(&self) -> MutexGuard<'_, BTreeMap<VmId, u64>> {
        self.ran.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on with the witness of another host.
    pub(super) fn share_witness(&mut self, other: &Self) {
        self.ran = Arc::clone(&other.ran);
    }

    /// The agent that held them is dead.
    pub(super) fn forget_held(&mut self) {
        self.held.clear();
    }
}

impl State {
    pub(super) fn seal(&mut self, vm: &VmId, key: SealingKey, guest: (u64, Fate)) {
        let (memory, fate) = guest;
        self.swap.sealing.insert(vm.clone(), Sealed { key, memory, fate, damaged: false });
    }

    pub(super) fn unseal(&mut self, vm: &VmId, key: SealingKey) -> Result<(u64, Fate), AskError> {
        let gone = || AskError::Sealed(io::ErrorKind::NotFound.into());
        let sealed = *self.swap.kept.get(vm).ok_or_else(gone)?;
        if sealed.key != key || sealed.damaged {
            return Err(AskError::Refused(Refusal::BadState { reason: "chunk 0 was changed".to_owned() }));
        }
        if !self.ran_last(vm, sealed.memory) {
            self.violations.push(format!("{vm} was taken back to before it last ran"));
        }
        Ok((sealed.memory, sealed.fate))
    }

    pub(super) fn keep_sealed(&mut self, vm: &VmId) -> io::Result<()> {
        match self.swap.sealing.remove(vm) {
            Some(sealed) => {
                self.swap.kept.insert(vm.clone(), sealed);
            }
            None if self.swap.kept.contains_key(vm) => {}
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    pub(super) fn discard_sealed(&mut self, vm: &VmId) {
        self.swap.sealing.remove(vm);
        self.swap.kept.remove(vm);
    }

    /// Whether a guest had this in memory when it last began to run.
    pub(super) fn ran_last(&self, vm: &VmId, memory: u64) -> bool {
        self.swap.ran().get(vm) == Some(&memory)
    }

    /// A guest's vCPUs begin to run, with this in its memory; packets that waited are its.
    pub(super) fn note_run(&mut self, vm: &VmId, memory: u64) {
        self.swap.ran().insert(vm.clone(), memory);
        if let Some(count) = self.swap.waiting.remove(vm) {
            *self.swap.delivered.entry(vm.clone()).or_default() += count;
        }
    }
}

impl SimHost {
    pub(super) fn hold(&self, vm: &VmId) {
        self.state().swap.held.insert(vm.clone());
        self.changed.notify_waiters();
    }

    pub(super) fn release(&self, vm: &VmId) {
        self.state().swap.held.remove(vm);
    }

    pub(super) async fn packet(&self, vm: &VmId) {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                if state.swap.held.contains(vm) && state.swap.waiting.contains_key(vm) {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Sends a packet to a guest. Whether its tap takes it: one that no process has open takes none.
    pub fn send_packet(&self, vm: &VmId) -> bool {
        let mut state = self.state();
        let runs = state.living(vm).map(|vmm| vmm.machine == crate::wire::control::MachineState::Running);
        match runs {
            Some(true) => *state.swap.delivered.entry(vm.clone()).or_default() += 1,
            None if !state.swap.held.contains(vm) => return false,
            Some(false) | None => *state.swap.waiting.entry(vm.clone()).or_default() += 1,
        }
        drop(state);
        self.changed.notify_waiters();
        true
    }

    /// Packets that reached a guest.
    pub fn delivered(&self, vm: &VmId) -> u64 {
        self.state().swap.delivered.get(vm).copied().unwrap_or(0)
    }

    /// The VMs of which something sealed is there.
    pub fn sealed(&self) -> Vec<VmId> {
        let state = self.state();
        state.swap.kept.keys().chain(state.swap.sealing.keys()).cloned().collect()
    }

    /// Flips a bit of a sealed machine.
    pub fn damage_sealed(&self, vm: &VmId) {
        if let Some(sealed) = self.state().swap.kept.get_mut(vm) {
            sealed.damaged = true;
        }
    }
}
