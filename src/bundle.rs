//! Bundles: guests frozen once, to be launched any number of times. This floor knows how one lies on the disk, when it
//! is whole, and which host can run it; who freezes and who launches is others' business.
//!
//! ```text
//! Store ── stage ──▶ Staging ── commit ──▶ <root>/<id>/{manifest.json, state.bin, memory.img}   never changed again
//!   │                   │ files for a VMM        │
//!   │                   └── discard              ├── open_for_launch ──▶ verified files, memory flat
//!   ├── list find children verify compact remove ┤
//!   ├── import ◀── one file ◀── export ◀─────────┤
//!   └── begin_partial ──▶ Partial ── install ── publish ──▶ the same, chunk by chunk from another store
//! ```
//!
//! All calls block on the disk: callers that may not wait use a thread for them. A store is for one process; it is free
//! to be used by all of its threads.
#![doc = include_str!("bundle/FORMAT.md")]
#![forbid(unsafe_code)]

pub mod admit;
pub mod archive;
mod commit;
mod compact;
mod damage;
mod digest;
pub mod eviction;
mod export;
mod fetched;
mod image;
mod import;
mod launch;
pub mod manifest;
mod part;
mod partial;
mod places;
mod remove;
mod run;
#[cfg(test)]
mod samples;
mod signatures;
mod source;
mod stage;
mod stamp;
mod store;
mod verify;
pub mod working_set;

pub use commit::{CommitError, Committed, Contents};
pub use compact::{CompactError, Compaction};
pub use damage::{Damage, ReadBundleError};
pub use digest::{Digest, ParseDigestError};
pub use export::{Export, ExportError};
pub use fetched::{Fetched, FetchedBundle, FetchedError};
pub use image::{OnProgress, Progress};
pub use import::ImportError;
pub use launch::{LaunchFiles, OpenBundleError};
pub use manifest::{Manifest, ManifestDraft};
pub use part::{BundlePart, PART_BYTES_MAX, ReadPartError};
pub use partial::{FROM_BYTES_MAX, InstallError, Installed, Partial, PartialError};
pub use remove::RemoveError;
pub use run::{Run, push as push_run};
pub use signatures::{BundleSignature, SIGNATURES_MAX, SignError, Signed, read_signatures};
pub use source::{ParseSourceError, ReadDirectoryError, SourceSpec, StorePath, part_path, read_from_directory};
pub use stage::{StageError, Staging};
pub use store::{FindError, Listed, Store, StoreError, Swept};
pub use verify::{Verified, VerifyError};
