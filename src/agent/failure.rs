//! Why VMs fail, as records, operations and clients tell it.

use serde::{Deserialize, Serialize};

/// Why a VM failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum FailureCause {
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest did what its virtual processor cannot go on from.
    GuestFault {
        /// What KVM said.
        detail: String,
    },
    /// The guest agent did not answer in time.
    GuestUnreachable {
        /// How long was waited, in milliseconds, and what the last try said.
        detail: String,
    },
    /// The VMM gave up and said why.
    VmmError {
        /// Its words.
        detail: String,
    },
    /// The VMM was ended by a signal.
    VmmKilled {
        /// Linux signal number.
        signal: i32,
    },
    /// The VMM exited without last words.
    VmmExited {
        /// Its exit code.
        code: i32,
    },
    /// The VMM was gone when the agent looked for it, and left no last words.
    VmmGone,
    /// The kernel, initrd or their fit into memory is wrong.
    BadImage {
        /// What is wrong.
        detail: String,
    },
    /// The host refused something.
    Host {
        /// What failed.
        detail: String,
    },
    /// The bundle cannot be made or restored.
    Bundle {
        /// What is wrong.
        detail: String,
    },
    /// Memory of its bundle that was not here did not come in time.
    BundleUnavailable {
        /// From where, and why not.
        detail: String,
    },
    /// One of its volumes cannot be had.
    Volume {
        /// Which, and why not.
        detail: String,
    },
    /// It cannot have its root on its volume, as that is.
    BadRoot {
        /// Which, and why not.
        detail: String,
    },
    /// It holds what no bundle is to have.
    Secrets {
        /// Which, and what helps.
        detail: String,
    },
    /// The program that warms a guest up failed, or did not get ready in time.
    WarmUp {
        /// What it said.
        detail: String,
    },
    /// It is not on the host that it was handed over to.
    LostOnTheWay {
        /// What that host says.
        detail: String,
    },
    /// What was kept of a hibernated VM is gone or damaged.
    SwapStateCorrupt {
        /// What is wrong.
        detail: String,
    },
    /// The guest did not register with its cluster.
    NotRegistered {
        /// What happened instead.
        detail: String,
    },
    /// The agent was restarted in the middle of something that is not begun again.
    Interrupted,
}

impl FailureCause {
    /// The cause's name, as in records and answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::GuestPanic => "guest_panic",
            Self::GuestFault { .. } => "guest_fault",
            Self::GuestUnreachable { .. } => "guest_unreachable",
            Self::VmmError { .. } => "vmm_error",
            Self::VmmKilled { .. } => "vmm_killed",
            Self::VmmExited { .. } => "vmm_exited",
            Self::VmmGone => "vmm_gone",
            Self::BadImage { .. } => "bad_image",
            Self::Host { .. } => "host",
            Self::Bundle { .. } => "bundle",
            Self::BundleUnavailable { .. } => "bundle_unavailable",
            Self::Volume { .. } => "volume",
            Self::BadRoot { .. } => "bad_root",
            Self::Secrets { .. } => "secrets",
            Self::WarmUp { .. } => "warm_up",
            Self::LostOnTheWay { .. } => "lost_on_the_way",
            Self::SwapStateCorrupt { .. } => "swap_state_corrupt",
            Self::NotRegistered { .. } => "not_registered",
            Self::Interrupted => "interrupted",
        }
    }

    /// What is known beyond the name.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::GuestPanic => Some("the guest's kernel panicked".to_owned()),
            Self::VmmGone => Some("the VMM of an earlier agent ended without last words".to_owned()),
            Self::VmmKilled { signal } => Some(killed_by(*signal)),
            Self::VmmExited { code } => Some(format!("exit code {code}")),
            Self::Interrupted => Some("the agent was restarted in the middle of it".to_owned()),
            Self::GuestFault { detail }
            | Self::GuestUnreachable { detail }
            | Self::VmmError { detail }
            | Self::BadImage { detail }
            | Self::Host { detail }
            | Self::Bundle { detail }
            | Self::BundleUnavailable { detail }
            | Self::Volume { detail }
            | Self::BadRoot { detail }
            | Self::Secrets { detail }
            | Self::WarmUp { detail }
            | Self::LostOnTheWay { detail }
            | Self::SwapStateCorrupt { detail }
            | Self::NotRegistered { detail } => Some(detail.clone()),
        }
    }
}

/// Linux's SIGSYS on x86 (signal(7)): what the kernel ends a VMM with for a system call that its filter forbids.
const SIGSYS: i32 = 31;

fn killed_by(signal: i32) -> String {
    if signal != SIGSYS {
        return format!("killed by signal {signal}");
    }
    "the kernel ended it for a system call that its filter forbids (SIGSYS): either the VMM was made to do something it \
      never does, or its filter lacks a line; where auditing is on, the kernel's log names the call (type=1326)"
        .to_owned()
}
