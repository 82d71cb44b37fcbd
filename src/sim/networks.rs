//! Jails of a simulated host. They outlive the agent, as namespaces do.

use std::collections::BTreeSet;

use super::SimHost;
use crate::agent::VmRecord;
use crate::agent::world::{Drops, NetworkChange, NetworkError, VmNetworks};
use crate::ids::VmId;

/// A jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Jail {
    pub(super) vm: VmId,
    pub(super) open: bool,
}

fn failed(error: &std::io::Error) -> NetworkError {
    NetworkError { failures: vec![error.to_string()] }
}

impl VmNetworks for SimHost {
    async fn make(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        self.point(true).await.map_err(|error| failed(&error))?;
        {
            let mut state = self.state();
            let jail = state.jails.entry(vm.jail).or_insert_with(|| Jail { vm: vm.id.clone(), open: false }).clone();
            if jail.vm != vm.id {
                state.violations.push(format!("{} and {} have the same jail", jail.vm, vm.id));
            }
        }
        self.point(false).await.map_err(|error| failed(&error))
    }

    async fn open(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        self.make(vm).await?;
        {
            let mut state = self.state();
            // One that was just ended from outside, or by its guest, is no fault of the agent's: it hears of it later.
            let may_be_in = |vmm: &super::vmm::Vmm| vmm.vm == vm.id && !vmm.ended_by_agent;
            // A hibernated guest is on its way back as soon as a packet comes.
            let is_hibernated = vm.swap_mode() == Some(crate::agent::SwapMode::Hibernate);
            if !is_hibernated && !state.vmms.values().any(may_be_in) {
                state.violations.push(format!("the network of {} was opened, but nobody is in", vm.id));
            }
            if let Some(jail) = state.jails.get_mut(&vm.jail) {
                jail.open = true;
            }
        }
        self.point(false).await.map_err(|error| failed(&error))
    }

    async fn remove(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        self.point(true).await.map_err(|error| failed(&error))?;
        {
            let mut state = self.state();
            if state.living(&vm.id).is_some() {
                state.violations.push(format!("the network of {} was removed while its VMM lives", vm.id));
            }
            if state.jails.get(&vm.jail).is_some_and(|jail| jail.vm == vm.id) {
                state.jails.remove(&vm.jail);
            }
        }
        self.point(false).await.map_err(|error| failed(&error))
    }

    async fn lead_elsewhere(&self, vm: &VmRecord, _host: u16) -> Result<(), NetworkError> {
        self.point(true).await.map_err(|error| failed(&error))?;
        if let Some(jail) = self.state().jails.get_mut(&vm.jail) {
            jail.open = false;
        }
        self.point(false).await.map_err(|error| failed(&error))
    }

    async fn leave(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        self.remove(vm).await
    }

    async fn sweep(&self, known: BTreeSet<u16>) -> Result<Vec<u16>, NetworkError> {
        self.point(true).await.map_err(|error| failed(&error))?;
        let mut state = self.state();
        let strays: Vec<u16> = state.jails.keys().filter(|jail| !known.contains(jail)).copied().collect();
        strays.iter().for_each(|jail| {
            state.jails.remove(jail);
        });
        Ok(strays)
    }

    async fn drops(&self, _vm: &VmRecord) -> Result<Drops, NetworkError> {
        Ok(Drops::default())
    }

    async fn start(&self) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn conflicts(&self) -> Result<Vec<String>, NetworkError> {
        Ok(Vec::new())
    }

    async fn end(&self) -> Result<(), NetworkError> {
        Ok(())
    }

    fn take(&self, used: &BTreeSet<u16>) -> Option<u16> {
        // Also what an earlier agent left is somebody's, until it is swept.
        let state = self.state();
        (0..4096).find(|number| !used.contains(number) && !state.jails.contains_key(number))
    }

    fn give_back(&self, _number: u16) {}

    fn metadata_sockets(&self, _vm: &VmRecord) -> std::io::Result<Vec<std::net::TcpListener>> {
        Ok(Vec::new())
    }

    fn changes(&self) -> Option<tokio::sync::mpsc::Receiver<NetworkChange>> {
        None
    }
}
