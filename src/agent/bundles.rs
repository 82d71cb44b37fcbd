//! What the agent wants of bundles, and why it does not get it. The store itself is `crate::bundle`.

use std::io;
use std::sync::Arc;

use super::fetched::FetchView;
use super::ledger::LedgerError;
use super::record::{BundleOrder, OperationRecord, VmRecord};
use super::room::NoRoom;
use super::sources::SourceError;
use crate::bundle::admit::Incompatible;
use crate::bundle::manifest::Provenance;
use crate::bundle::{
    CommitError, CompactError, ExportError, Fetched, FetchedError, FindError, ImportError, Manifest, OpenBundleError,
    PartialError, ReadBundleError, ReadPartError, RemoveError, SignError, Signed, StoreError, VerifyError,
};
use crate::ids::{BundleId, VmId};
use crate::report::Retry;
use crate::signing::PublicKey;

/// A bundle of this host.
#[derive(Debug, Clone)]
pub struct BundleView {
    /// Its id.
    pub id: BundleId,
    /// What it says of itself.
    pub manifest: Arc<Manifest>,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
    /// Who stands for it.
    pub signed: Signed,
    /// What is known of it, if it was fetched from elsewhere.
    pub fetched: Option<Fetched>,
    /// How far it is, if it is on its way here.
    pub fetch: Option<FetchView>,
}

/// One of all bundles: one that cannot be read is told of, too.
#[derive(Debug, Clone)]
pub enum BundleListed {
    /// It can be read.
    Readable(BundleView),
    /// It cannot.
    Unreadable {
        /// Its id.
        id: BundleId,
        /// Why.
        reason: String,
    },
}

/// Why something was not done with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It is not clear with which.
    #[error(transparent)]
    Find(#[from] FindError),
    /// No new work is taken now.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadBundleError),
    /// It is not whole, or cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenBundleError),
    /// This host cannot run it.
    #[error("bundle {bundle} does not run here")]
    Incompatible {
        /// Which.
        bundle: BundleId,
        /// What differs.
        #[source]
        source: Incompatible,
    },
    /// A guest of another host cannot go on here.
    #[error(transparent)]
    GuestDiffers(#[from] Incompatible),
    /// This host's facts are not known: the probe failed.
    #[error("what this host's KVM does is not known: the probe failed; see the agent's log and `hearth host probe`")]
    NoFacts,
    /// No bundle came of what was saved.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// What was saved is not there.
    #[error("nothing was saved of {vm}")]
    NothingSaved {
        /// The VM.
        vm: VmId,
    },
    /// It is damaged, or could not be looked at.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Nobody this host trusts stands for it.
    #[error("bundle {bundle} is not launched here: {}", describe(signers))]
    Untrusted {
        /// Which.
        bundle: BundleId,
        /// Who signed it.
        signers: Vec<PublicKey>,
    },
    /// A signature was not kept.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// A part of it cannot be read.
    #[error(transparent)]
    ReadPart(#[from] ReadPartError),
    /// It was not exported.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// It was not imported.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// As many as may be are on their way.
    #[error("{most} bundles are being exported or imported already")]
    TooManyTransfers {
        /// How many may be.
        most: usize,
    },
    /// It was not removed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// It was not made flat.
    #[error(transparent)]
    Compact(#[from] CompactError),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Not a name.
    #[error("{name:?} is not a name of a bundle: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// Another bundle has this name, or is about to get it.
    #[error("there is a bundle named {name:?} already, or one is being made")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// What is being made could not be read.
    #[error(transparent)]
    Ledger(LedgerError),
    /// It did not come from where it is.
    #[error("fetch a bundle")]
    Source(#[source] Box<SourceError>),
    /// What came of it cannot be kept.
    #[error(transparent)]
    Partial(#[from] PartialError),
    /// What is known of one that came from elsewhere cannot be kept.
    #[error(transparent)]
    Fetched(#[from] FetchedError),
    /// Some of it is still on its way.
    #[error("bundle {bundle} is still on its way here")]
    Coming {
        /// Which.
        bundle: BundleId,
    },
    /// It is not one that is on its way.
    #[error("bundle {bundle} is not on its way here")]
    NotPartial {
        /// Which.
        bundle: BundleId,
    },
    /// It has too many parts to be launched before all of them are here.
    #[error("bundle {bundle} has {found} chunks of memory: one of at most {max} is launched before all of it is here")]
    TooManyChunks {
        /// Which.
        bundle: BundleId,
        /// How many.
        found: u32,
        /// The most there can be.
        max: u32,
    },
    /// VMs run from it.
    #[error("bundle {bundle} is used by {vms} VMs")]
    InUse {
        /// Which.
        bundle: BundleId,
        /// How many.
        vms: usize,
    },
    /// Machines of it are kept ready.
    #[error("machines of bundle {bundle} are kept ready ({size} of them)")]
    Pooled {
        /// Which.
        bundle: BundleId,
        /// How many.
        size: u32,
    },
    /// A file beside it could not be used.
    #[error("{what}")]
    Host {
        /// Which.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl BundleError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Find(error) => error.retry(),
            Self::NoRoom(error) => error.retry(),
            Self::Read(error) => error.retry(),
            Self::Open(error) => error.retry(),
            Self::Incompatible { source, .. } | Self::GuestDiffers(source) => source.retry(),
            Self::Commit(error) => error.retry(),
            Self::Verify(error) => error.retry(),
            Self::Remove(error) => error.retry(),
            Self::Compact(error) => error.retry(),
            Self::Store(error) => error.retry(),
            Self::Ledger(error) => error.retry(),
            Self::Sign(error) => error.retry(),
            Self::ReadPart(error) => error.retry(),
            Self::Export(error) => error.retry(),
            Self::Import(error) => error.retry(),
            Self::Source(error) => error.retry(),
            Self::Partial(error) => error.retry(),
            Self::Fetched(error) => error.retry(),
            Self::NothingSaved { .. } => Retry::Never,
            Self::Untrusted { .. }
            | Self::Name { .. }
            | Self::NameTaken { .. }
            | Self::NotPartial { .. }
            | Self::TooManyChunks { .. } => Retry::WithChange,
            Self::NoFacts
            | Self::Coming { .. }
            | Self::TooManyTransfers { .. }
            | Self::Pooled { .. }
            | Self::InUse { .. }
            | Self::Host { .. } => Retry::Later,
        }
    }
}

impl From<SourceError> for BundleError {
    fn from(error: SourceError) -> Self {
        Self::Source(Box::new(error))
    }
}

fn describe(signers: &[PublicKey]) -> String {
    if signers.is_empty() {
        return "it has no signature, and this host asks for one".to_owned();
    }
    let signers: Vec<String> = signers.iter().map(ToString::to_string).collect();
    format!("it is signed by {}, and this host trusts other keys", signers.join(" and "))
}

/// A bundle to make of what was saved of a VM.
#[derive(Debug, Clone)]
pub struct CommitOrder {
    /// The VM, as it was saved.
    pub vm: VmRecord,
    /// The operation that saved it: when it began tells this bundle from others of the same VM.
    pub operation: OperationRecord,
    /// The bundle.
    pub order: BundleOrder,
    /// The guest agent's protocol.
    pub agent_protocol: u16,
}

impl CommitOrder {
    /// Whether this bundle was made of what this order saved, by an agent that ended before it recorded that.
    pub fn made(&self, manifest: &Manifest) -> bool {
        let Provenance { source_vm, built_at, .. } = &manifest.provenance;
        source_vm.as_ref() == Some(&self.vm.id) && *built_at == self.operation.created_at
    }
}
