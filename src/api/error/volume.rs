//! Volumes and their leases.

use axum::http::StatusCode;

use super::ApiError;
use crate::agent::{AskVolumesError, VolumeChangeError, VolumeError, VolumeRefusal as Refusal};
use crate::lease::LeaseRefusal;
use crate::report::{Retry, chain};

/// Status, code, and what to do about it.
type Answer = (StatusCode, &'static str, Option<&'static str>);

impl From<VolumeError> for ApiError {
    fn from(error: VolumeError) -> Self {
        if let VolumeError::Vm(error) = error {
            return error.into();
        }
        let message = chain(&error);
        let (status, code, todo) = match &error {
            VolumeError::Unknown { .. } => {
                (StatusCode::NOT_FOUND, "unknown_volume", Some("`hearth volume ls` lists the volumes of this host"))
            }
            VolumeError::Ambiguous { .. } => (StatusCode::CONFLICT, "ambiguous_id", None),
            VolumeError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name", None),
            VolumeError::Mount { .. } => (StatusCode::BAD_REQUEST, "invalid_mount", None),
            VolumeError::RootOfRunning => (
                StatusCode::BAD_REQUEST,
                "invalid_mount",
                Some(
                    "give it another directory, or launch a VM that has it from the beginning: `hearth vm launch --volume VOLUME:/`",
                ),
            ),
            VolumeError::Vm(_) | VolumeError::Vmm(_) => (StatusCode::SERVICE_UNAVAILABLE, "vmm_unavailable", None),
            VolumeError::Random(_) => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None),
            VolumeError::Ask(error) => ask(error),
        };
        let retry = if status.is_server_error() { Retry::Later } else { Retry::WithChange };
        let answer = Self::new(status, code, message, retry);
        match todo {
            Some(todo) => answer.with_detail(todo),
            None => answer,
        }
    }
}

/// Why a VM's volumes stay as they are.
pub(super) fn unchanged(error: &VolumeChangeError, message: String, retry: Retry) -> ApiError {
    match error {
        VolumeChangeError::Attached { .. } => ApiError::new(StatusCode::CONFLICT, "volume_attached", message, retry),
        VolumeChangeError::NotAttached { .. } => {
            ApiError::new(StatusCode::NOT_FOUND, "volume_not_attached", message, retry)
        }
        VolumeChangeError::Root { .. } => ApiError::new(StatusCode::CONFLICT, "volume_is_root", message, retry)
            .with_detail("stop the VM: the volume is free then"),
        VolumeChangeError::NoSlot { .. } => ApiError::new(StatusCode::CONFLICT, "no_volume_slot", message, retry)
            .with_detail("launch VMs that are to get volumes later with `--spare-disks`"),
    }
}

/// What the daemon, or the way to it, said.
pub(super) const fn ask(error: &AskVolumesError) -> Answer {
    match error {
        AskVolumesError::Refused(refusal) => refused(refusal),
        AskVolumesError::Start(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "volumes_unavailable",
            Some("its log is volumed/volumed.log in the state directory"),
        ),
        AskVolumesError::OtherVersion { .. } => (StatusCode::SERVICE_UNAVAILABLE, "volumes_other_version", None),
        AskVolumesError::TimedOut { .. }
        | AskVolumesError::Home { .. }
        | AskVolumesError::Socket(_)
        | AskVolumesError::Frame(_)
        | AskVolumesError::Unexpected => (StatusCode::SERVICE_UNAVAILABLE, "volumes_unavailable", None),
    }
}

const fn refused(refusal: &Refusal) -> Answer {
    match refusal {
        Refusal::NotFound { .. } => (StatusCode::NOT_FOUND, "unknown_volume", None),
        Refusal::Invalid { .. } => (StatusCode::BAD_REQUEST, "invalid_volume", None),
        Refusal::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken", None),
        Refusal::InUse { .. } => {
            (StatusCode::CONFLICT, "volume_in_use", Some("`hearth volume leases VOLUME` tells who has it"))
        }
        Refusal::Lease { lease } => leased(lease),
        Refusal::NoSpace { .. } => (
            StatusCode::INSUFFICIENT_STORAGE,
            "no_space",
            Some("`hearth volume ls` and `hearth bundle ls` tell what takes space"),
        ),
        Refusal::Damaged { .. } => (
            StatusCode::CONFLICT,
            "volume_damaged",
            Some("it can still be read: copy it, by `hearth volume create --from-volume`, or by NBD"),
        ),
        Refusal::Failed { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None),
        Refusal::Unknown => (StatusCode::SERVICE_UNAVAILABLE, "volumes_other_version", None),
    }
}

const fn leased(refusal: &LeaseRefusal) -> Answer {
    match refusal {
        LeaseRefusal::Held { .. } => (
            StatusCode::CONFLICT,
            "lease_held",
            Some("wait until it is released, or end it if its holder is dead: `hearth volume lease --break`"),
        ),
        LeaseRefusal::StandbyHeld { .. } => (StatusCode::CONFLICT, "lease_held", None),
        LeaseRefusal::Read { .. } | LeaseRefusal::SharedFull => (StatusCode::CONFLICT, "lease_held", None),
        LeaseRefusal::NothingActive => (StatusCode::CONFLICT, "no_active_lease", None),
        LeaseRefusal::Unknown { .. } => (StatusCode::NOT_FOUND, "unknown_lease", None),
        LeaseRefusal::OtherEpoch { .. } => (StatusCode::CONFLICT, "stale_epoch", None),
        LeaseRefusal::OtherMode { .. } => (StatusCode::CONFLICT, "lease_mode", None),
        LeaseRefusal::Used { .. } => (StatusCode::CONFLICT, "lease_ended", None),
        LeaseRefusal::Words => (StatusCode::BAD_REQUEST, "invalid_lease", None),
    }
}
