//! The closed list of reasons a process may give the other for not doing what was asked.

use serde::{Deserialize, Serialize};

use super::control::MachineState;
use crate::report::Retry;

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The connection did not start with Hello.
    #[error("the connection has to start with Hello")]
    HelloFirst,
    /// The nonce is another VMM's.
    #[error("the nonce is not this VMM's")]
    WrongNonce,
    /// A newer agent owns this VMM.
    #[error("epoch {offered} is over: epoch {current} owns this VMM")]
    StaleEpoch {
        /// The epoch the asker has.
        offered: u64,
        /// The epoch that owns this VMM.
        current: u64,
    },
    /// Not in this state.
    #[error("not possible while the machine is {state:?}")]
    State {
        /// The machine's state.
        state: MachineState,
    },
    /// The request contradicts itself or a limit.
    #[error("{reason}")]
    BadRequest {
        /// What is wrong, as a chain.
        reason: String,
    },
    /// The kernel, initrd or their fit into memory is wrong.
    #[error("{reason}")]
    BadImage {
        /// What is wrong, as a chain.
        reason: String,
    },
    /// The host refused something.
    #[error("{reason}")]
    Host {
        /// What failed, as a chain.
        reason: String,
    },
    /// Saved state or a memory image is not what this build can restore here.
    #[error("{reason}")]
    BadState {
        /// What is wrong, as a chain.
        reason: String,
    },
    /// The machine is being sent to another VMM.
    #[error("not possible while the machine is being sent")]
    Sending,
    /// A send or its other end failed; the machine is as it was.
    #[error("{reason}")]
    Stream {
        /// What failed, as a chain.
        reason: String,
    },
    /// A send was given up by request; the machine is as it was.
    #[error("the send was cancelled")]
    Cancelled,
    /// Parts of the guest's memory are not here yet; since version 5.
    #[error("not possible while parts of the guest's memory are not here yet")]
    Filling,
    /// The guest still waits for requests to a volume; since version 6.
    #[error("volume slot {index}: requests are under way")]
    VolumeInUse {
        /// The slot.
        index: u8,
    },
}

impl Refusal {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::HelloFirst | Self::WrongNonce | Self::StaleEpoch { .. } => Retry::Never,
            Self::State { .. }
            | Self::Host { .. }
            | Self::Sending
            | Self::Stream { .. }
            | Self::Cancelled
            | Self::Filling
            | Self::VolumeInUse { .. } => Retry::Later,
            Self::BadRequest { .. } | Self::BadImage { .. } | Self::BadState { .. } => Retry::WithChange,
        }
    }
}
