//! The registrar: may this guest be the member it says it is? Pure. Whoever asks it (the VM's work over vsock, the
//! metadata service) writes what it says to the ledger before it answers the guest.
//!
//! A guest may be hostile, so each word of a registration is compared with what the agent itself decided: nothing a
//! guest says makes it another one.

use super::cluster_record::ClusterRecord;
use super::record::VmRecord;
use super::vm_state::VmState;
use crate::report::Retry;

/// What a guest says to become a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrationWords {
    /// Who it says it is in the cluster.
    pub executor_id: String,
    /// The cluster.
    pub cluster_id: String,
    /// The VM it says it is; `None` where the way it came by says it.
    pub vm_id: Option<String>,
    /// Its generation: 32 hexadecimal digits.
    pub generation: String,
    /// The cluster's secret.
    pub token: String,
}

/// What a registration that is taken means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is the cluster's next one.
    New {
        /// Its number.
        epoch: u64,
    },
    /// It was taken before, and the guest has not heard of that for sure: it is told the same again.
    Again {
        /// Its number.
        epoch: u64,
    },
}

impl Admission {
    /// The number of the registration.
    pub const fn epoch(self) -> u64 {
        match self {
            Self::New { epoch } | Self::Again { epoch } => epoch,
        }
    }
}

/// Why a registration is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegistrationRefusal {
    /// The VM is in no cluster.
    #[error("this VM is in no cluster")]
    NotInCluster,
    /// The cluster's registrar is another.
    #[error("this cluster's registrar is not this host's agent")]
    Elsewhere,
    /// It is not the cluster's secret.
    #[error("the token is not the cluster's")]
    WrongToken,
    /// It names another cluster.
    #[error("the cluster is not this VM's")]
    WrongCluster,
    /// It names another member.
    #[error("the executor id is not this VM's")]
    WrongExecutor,
    /// It says it is another VM.
    #[error("the VM id is not this VM's")]
    WrongVm,
    /// It has the generation of another launch.
    #[error("the generation is not this VM's")]
    WrongGeneration,
    /// It has been registered, and heard of it.
    #[error("this VM is registered already")]
    Twice,
    /// The VM is not that far, or not there any more.
    #[error("this VM does not register now")]
    NotNow,
}

impl RegistrationRefusal {
    /// The refusal's name, as in events and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotInCluster => "not_in_cluster",
            Self::Elsewhere => "registrar_elsewhere",
            Self::WrongToken => "wrong_token",
            Self::WrongCluster => "wrong_cluster",
            Self::WrongExecutor => "wrong_executor",
            Self::WrongVm => "wrong_vm",
            Self::WrongGeneration => "wrong_generation",
            Self::Twice => "already_registered",
            Self::NotNow => "not_now",
        }
    }

    /// Whether the same request may succeed later.
    pub const fn retry(self) -> Retry {
        match self {
            Self::NotInCluster | Self::Elsewhere | Self::Twice => Retry::Never,
            Self::WrongToken | Self::WrongCluster | Self::WrongExecutor | Self::WrongVm | Self::WrongGeneration => {
                Retry::WithChange
            }
            Self::NotNow => Retry::Later,
        }
    }
}

/// Takes a VM's registration, or says why not. `cluster` is the one that the VM is in.
pub fn admit(
    cluster: &ClusterRecord,
    vm: &VmRecord,
    words: &RegistrationWords,
) -> Result<Admission, RegistrationRefusal> {
    use RegistrationRefusal as R;
    let member = vm.spec.cluster.as_ref().filter(|member| member.cluster == cluster.id).ok_or(R::NotInCluster)?;
    if cluster.endpoint.is_some() {
        return Err(R::Elsewhere);
    }
    // The secret first: who does not have it is not told which of the other words are right.
    if !cluster.token.is(&words.token) {
        return Err(R::WrongToken);
    }
    if words.cluster_id != cluster.id.as_str() {
        return Err(R::WrongCluster);
    }
    if words.executor_id != member.executor_id {
        return Err(R::WrongExecutor);
    }
    if words.vm_id.as_ref().is_some_and(|id| id != vm.id.as_str()) {
        return Err(R::WrongVm);
    }
    if words.generation != vm.generation {
        return Err(R::WrongGeneration);
    }
    match (&vm.state, vm.registration) {
        (VmState::Registering, None) => Ok(Admission::New { epoch: cluster.epoch.saturating_add(1) }),
        // Written, but an agent may have ended before the guest was told.
        (VmState::Registering, Some(registered)) => Ok(Admission::Again { epoch: registered.epoch }),
        (_, Some(_)) => Err(R::Twice),
        (_, None) => Err(R::NotNow),
    }
}

#[cfg(test)]
mod tests;
