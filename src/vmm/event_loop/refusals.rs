//! Why a request was not carried out, as the agent is told: whose fault it is, the request's, the image's or the host's.

use crate::machine::BuildError;
use crate::machine::image::WriteImageError;
use crate::machine::ram::MakeRamError;
use crate::machine::sealed::{SealError, UnsealError};
use crate::report;
use crate::vmm::bounded;
use crate::vmm::save::SaveMachineError;
use crate::wire::refusal::Refusal;

/// The host refused something.
pub(super) fn host(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::Host { reason: bounded(report::chain(error)) }
}

/// The request is wrong.
pub(super) fn bad_request(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::BadRequest { reason: bounded(report::chain(error)) }
}

/// Why a machine was not saved.
pub(super) fn refusal_to_save(error: &SaveMachineError) -> Refusal {
    match error {
        SaveMachineError::Memory(WriteImageError::NoOriginal)
        | SaveMachineError::Seal(SealError::Memory(WriteImageError::NoOriginal)) => bad_request(error),
        SaveMachineError::Collect(_)
        | SaveMachineError::Encode(_)
        | SaveMachineError::Write { .. }
        | SaveMachineError::Memory(_)
        | SaveMachineError::Seal(_) => host(error),
    }
}

/// Why a sealed file was not opened.
pub(super) fn refusal_to_unseal(error: &UnsealError) -> Refusal {
    let reason = bounded(report::chain(error));
    if error.is_damage() { Refusal::BadState { reason } } else { Refusal::Host { reason } }
}

/// Why a machine was not built.
pub(super) fn refusal_of(error: &BuildError) -> Refusal {
    let reason = bounded(report::chain(error));
    match error {
        BuildError::VcpuCount { .. } | BuildError::SlotTwice { .. } => Refusal::BadRequest { reason },
        BuildError::Boot(_) => Refusal::BadImage { reason },
        BuildError::Unseal(error) if error.is_damage() => Refusal::BadState { reason },
        BuildError::Sections(_)
        | BuildError::RestoreVm(_)
        | BuildError::RestoreVcpu { .. }
        | BuildError::Ram(MakeRamError::OtherSize { .. }) => Refusal::BadState { reason },
        BuildError::Unseal(_)
        | BuildError::Kvm(_)
        | BuildError::Ram(_)
        | BuildError::Call(_)
        | BuildError::Serial(_)
        | BuildError::Device(_)
        | BuildError::Address(_)
        | BuildError::Host { .. } => Refusal::Host { reason },
    }
}
