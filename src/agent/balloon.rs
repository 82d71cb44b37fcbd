//! The balloons of VMs: how much of its memory a guest is to give back for now, and what it says of the rest.

use std::sync::Arc;

use super::door::VmError;
use super::record::VmRecord;
use super::shared::Shared;
use super::vm_state::{Denied, VmState};
use super::world::{Ask, AskError, VmmHost, World};
use crate::report::Retry;
use crate::units::MIB;
use crate::wire::control::{Answer, BalloonStatus};

/// What a guest keeps at least, in MiB: below that its kernel has nothing to take back from and ends programs.
const KEPT_MIB_MIN: u64 = 32;

/// Why a balloon did not get its target.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// It has none.
    #[error("{vm} has no balloon: it was launched by an earlier agent, or from a bundle made without one")]
    None {
        /// Which VM.
        vm: String,
    },
    /// It would leave too little.
    #[error(
        "target_mib {found_mib}: {vm} has {memory_mib} MiB and keeps {KEPT_MIB_MIN} MiB at least, so at most {max_mib} are possible"
    )]
    Target {
        /// Which VM.
        vm: String,
        /// What was asked for.
        found_mib: u64,
        /// The VM's memory.
        memory_mib: u64,
        /// The most that is possible.
        max_mib: u64,
    },
    /// Its VMM did not do it.
    #[error("set the balloon of {vm}")]
    Vmm {
        /// Which VM.
        vm: String,
        /// What it said, or why it said nothing.
        #[source]
        source: AskError,
    },
}

impl BalloonError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::None { .. } | Self::Target { .. } => Retry::WithChange,
            Self::Vmm { .. } => Retry::Later,
        }
    }
}

/// The most a balloon can be asked to hold, in MiB.
fn target_mib_max(vm: &VmRecord) -> u64 {
    u64::from(vm.spec.memory_mib).saturating_sub(KEPT_MIB_MIN)
}

/// Sets the target of a VM's balloon.
pub(super) async fn set_target<W: World>(
    shared: &Shared<W>,
    vm: &Arc<VmRecord>,
    target_mib: u64,
) -> Result<BalloonStatus, VmError> {
    let name = || vm.id.to_string();
    if !matches!(vm.state, VmState::Running | VmState::Paused) {
        return Err(Denied { state: vm.state.clone() }.into());
    }
    if !vm.spec.balloon {
        return Err(BalloonError::None { vm: name() }.into());
    }
    let (memory_mib, max_mib) = (u64::from(vm.spec.memory_mib), target_mib_max(vm));
    if target_mib > max_mib {
        return Err(BalloonError::Target { vm: name(), found_mib: target_mib, memory_mib, max_mib }.into());
    }
    let ask = Ask::Balloon { target_bytes: Some(target_mib * MIB) };
    let source = match shared.world.vmm().ask(vm, shared.epoch, ask).await {
        Ok(Answer::Balloon(status)) => return Ok(bounded(status, vm)),
        Ok(
            Answer::Welcome(_)
            | Answer::Launched(_)
            | Answer::Done
            | Answer::Status(_)
            | Answer::Refused(_)
            | Answer::Network(_)
            | Answer::Saved(_)
            | Answer::Sent(_)
            | Answer::SentIn { .. }
            | Answer::Sending(_)
            | Answer::Copied(_)
            | Answer::Volumes(_)
            | Answer::Forwarded { .. },
        ) => AskError::Unexpected,
        Err(error) => error,
    };
    Err(BalloonError::Vmm { vm: name(), source }.into())
}

/// What a VM's balloon holds, if it has one and its VMM says.
pub(super) async fn status<W: World>(shared: &Shared<W>, vm: &VmRecord) -> Option<BalloonStatus> {
    if !vm.spec.balloon {
        return None;
    }
    match shared.world.vmm().ask(vm, shared.epoch, Ask::Balloon { target_bytes: None }).await {
        Ok(Answer::Balloon(status)) => Some(bounded(status, vm)),
        Ok(_) | Err(_) => None,
    }
}

/// A balloon is never larger than its guest, whatever a VMM says.
fn bounded(status: BalloonStatus, vm: &VmRecord) -> BalloonStatus {
    let memory = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
    let (target_bytes, actual_bytes) = (status.target_bytes.min(memory), status.actual_bytes.min(memory));
    BalloonStatus { target_bytes, actual_bytes, ..status }
}
