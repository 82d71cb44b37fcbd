//! How a piece of work ended, and which failures are whose.

use crate::agent::guest::GuestError;
use crate::agent::ledger::LedgerError;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{AskError, NetworkError, ProcessEnd, StartVmmError};
use crate::report::{Retry, chain};
use crate::wire::refusal::Refusal;

/// How a piece of work ended.
pub(in crate::agent) enum Outcome {
    /// All effects were performed.
    Done,
    /// It was cut short by a later request.
    Hurried,
    /// The VMM ended meanwhile.
    VmmEnded(ProcessEnd),
    /// An effect failed for good.
    Failed(FailureCause),
    /// On the way back, it turned out that there is none: the VM is another host's.
    Decided,
    /// The ledger failed: nothing can be recorded any more.
    Broken(LedgerError),
}

pub(super) fn note_of(outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Done => None,
        Outcome::Hurried => Some("cut short by a later request".to_owned()),
        Outcome::Decided => Some("the VM is the other host's: its lease was converted".to_owned()),
        Outcome::VmmEnded(end) => Some(format!("the VMM ended: {end}")),
        Outcome::Failed(cause) => Some(cause.detail().unwrap_or_else(|| cause.name().to_owned())),
        Outcome::Broken(error) => Some(chain(error)),
    }
}

pub(super) fn host(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::Host { detail })
}

pub(super) fn no_network(error: NetworkError) -> Outcome {
    host(format!("the VM's network: {}", chain(&error)))
}

pub(super) fn bad_image(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::BadImage { detail })
}

pub(super) fn unreachable(error: &GuestError) -> Outcome {
    let detail = chain(error);
    Outcome::Failed(match error {
        GuestError::NoRoot { retry: Retry::Later, .. } => FailureCause::Volume { detail },
        GuestError::NoRoot { .. } => FailureCause::BadRoot { detail },
        GuestError::Open(_)
        | GuestError::Stream(_)
        | GuestError::HungUp
        | GuestError::Frame(_)
        | GuestError::Version { .. }
        | GuestError::Failed { .. }
        | GuestError::Hooks { .. }
        | GuestError::Unexpected
        | GuestError::TimedOut { .. } => FailureCause::GuestUnreachable { detail },
    })
}

pub(super) fn start_failed(error: StartVmmError) -> Outcome {
    host(chain(&error))
}

pub(super) fn ask_failed(error: AskError) -> Outcome {
    match error {
        AskError::Refused(Refusal::BadImage { reason }) => bad_image(reason),
        AskError::Image(error) => bad_image(chain(&error)),
        AskError::Refused(Refusal::BadState { reason }) => Outcome::Failed(FailureCause::Bundle { detail: reason }),
        AskError::Bundle(error) => Outcome::Failed(FailureCause::Bundle { detail: chain(&error) }),
        AskError::Partial(error) => Outcome::Failed(FailureCause::Bundle { detail: chain(&error) }),
        AskError::Stage(_)
        | AskError::NothingCopied
        | AskError::Sealed(_)
        | AskError::OlderVmm { .. }
        | AskError::Refused(_)
        | AskError::Open { .. }
        | AskError::Socket(_)
        | AskError::Frame(_)
        | AskError::Unexpected
        | AskError::TimedOut { .. } => host(chain(&error)),
    }
}
