//! Whether there is room for new work: not while the agent drains, not on a full disk, not without descriptors. What runs
//! already is never touched for it. Pure, but for asking the host.
//!
#![doc = include_str!("../LIMITS.md")]

use std::path::PathBuf;

use super::Agent;
use super::config::Config;
use super::world::{HostFacts, VmDisk, World};
use crate::report::Retry;
use crate::units::MIB;

/// Descriptors that a VM takes of the agent: eight while it runs (its process, its jail, the listeners and netlink
/// sockets in it), and what its launch, a console or a snapshot take for a while.
pub(crate) const DESCRIPTORS_PER_VM: u64 = 12;

/// Descriptors kept for the agent itself: the ledger, listeners, files that are read for a moment, calls of peers.
const DESCRIPTORS_KEPT: u64 = 64;

/// Why new work is not taken now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// The agent was asked to stop all VMs and end.
    #[error("this agent is draining: it takes no new work and ends when its VMs have stopped")]
    Draining,
    /// The disk is as good as full.
    #[error("{} has {free_mib} MiB free, and {reserve_mib} MiB are kept for the VMs that run", path.display())]
    Disk {
        /// Where records, bundles and VMs' directories lie.
        path: PathBuf,
        /// What is free there.
        free_mib: u64,
        /// What has to stay free: `limits.disk_reserve_mib`.
        reserve_mib: u64,
    },
    /// One more VM would leave none to serve the others with.
    #[error("{open} of the {max} descriptors of this agent are open, and one more VM takes up to {DESCRIPTORS_PER_VM}")]
    Descriptors {
        /// How many are open.
        open: u64,
        /// How many may be.
        max: u64,
    },
}

impl NoRoom {
    /// The error's code for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Disk { .. } => "disk_reserve",
            Self::Descriptors { .. } => "no_descriptors",
        }
    }

    /// All of it is a matter of time.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Draining | Self::Disk { .. } | Self::Descriptors { .. } => Retry::Later,
        }
    }

    /// What to do about it.
    pub const fn advice(&self) -> &'static str {
        match self {
            Self::Draining => "ask another host, or start the agent again once it has ended",
            Self::Disk { .. } => {
                "remove bundles (`hearth bundle ls`, `hearth bundle rm`), images or other files there, or lower \
                 limits.disk_reserve_mib; VMs that run go on"
            }
            Self::Descriptors { .. } => {
                "remove VMs, or start the agent with a higher limit (LimitNOFILE= of its systemd unit)"
            }
        }
    }
}

/// What is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewWork {
    /// A VM.
    Vm,
    /// Something that takes disk space only.
    Files,
}

/// Whether this host has room for it.
pub(crate) fn check(work: NewWork, facts: &HostFacts, config: &Config, is_draining: bool) -> Result<(), NoRoom> {
    if is_draining {
        return Err(NoRoom::Draining);
    }
    let (free_mib, reserve_mib) = (facts.disk_free_bytes / MIB, config.limits.disk_reserve_mib);
    if free_mib < reserve_mib {
        return Err(NoRoom::Disk { path: config.state_dir.clone(), free_mib, reserve_mib });
    }
    let (open, max) = (facts.descriptors_open, facts.descriptors_max);
    let kept = DESCRIPTORS_KEPT + u64::from(config.limits.connections_max);
    if work == NewWork::Vm && open.saturating_add(DESCRIPTORS_PER_VM).saturating_add(kept) > max {
        return Err(NoRoom::Descriptors { open, max });
    }
    Ok(())
}

impl<W: World> Agent<W> {
    /// Whether there is room for it now. A host that does not say what it has is asked again by what is done next.
    pub(super) async fn room(&self, work: NewWork) -> Result<(), NoRoom> {
        let is_draining = self.shared.is_draining();
        match self.shared.world.disk().host().await {
            Ok(facts) => check(work, &facts, &self.shared.config, is_draining),
            Err(_) if is_draining => Err(NoRoom::Draining),
            Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::{Overrides, load};

    fn facts(free_mib: u64, open: u64) -> HostFacts {
        let disk_free_bytes = free_mib * MIB;
        HostFacts { disk_free_bytes, descriptors_open: open, descriptors_max: 1024, ..HostFacts::default() }
    }

    #[test]
    fn each_bound_holds_to_the_last() {
        let config = load(Overrides::default()).unwrap();
        let reserve = config.limits.disk_reserve_mib;
        let most = 1024 - DESCRIPTORS_KEPT - u64::from(config.limits.connections_max) - DESCRIPTORS_PER_VM;
        assert_eq!(check(NewWork::Vm, &facts(reserve, most), &config, false), Ok(()));
        let path = config.state_dir.clone();
        let full = NoRoom::Disk { path, free_mib: reserve - 1, reserve_mib: reserve };
        assert_eq!(check(NewWork::Files, &facts(reserve - 1, 0), &config, false), Err(full));
        let none = NoRoom::Descriptors { open: most + 1, max: 1024 };
        assert_eq!(check(NewWork::Vm, &facts(reserve, most + 1), &config, false), Err(none));
        assert_eq!(check(NewWork::Files, &facts(reserve, most + 1), &config, false), Ok(()));
        assert_eq!(check(NewWork::Files, &facts(reserve, 0), &config, true), Err(NoRoom::Draining));
    }
}
