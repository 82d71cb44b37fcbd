//! Volumes: block devices that outlive whoever uses them. This floor knows how they lie on the disk, what of a write is
//! there after which accident, and how they share what they have in common; who may write to one is others' business.
//!
//! ```text
//! Store ── create, create_from_image ──▶ Volume ── read_at write_at zero discard flush status changed_since
//!   │                                      │  ▲
//!   │                          take_snapshot  clone_of
//!   │                                      ▼  │
//!   ├── list resize remove               Snapshot ── read_at status digest
//!   └── Recorder: told every change of the disk
//! ```
//!
//! All calls block on the disk. A store is for one process, which holds a lock for as long as it has it open; it is free to
//! be used by all of its threads.
//!
//! Writes are promised two things: what was acknowledged is there after the process was killed at any moment, and what was
//! acknowledged before a flush began is there after a loss of power when the flush has succeeded.
#![doc = include_str!("volume/FORMAT.md")]
#![forbid(unsafe_code)]

mod about;
mod chunk;
mod digest;
mod disk;
mod error;
pub mod format;
mod layer;
mod live;
mod log;
mod map;
mod open;
mod snapshot;
mod space;
mod store;
#[cfg(test)]
mod tests;
mod view;

pub use about::Origin;
pub use chunk::{CHUNK_BYTES, SIZE_BYTES_MAX, SIZE_STEP_BYTES};
pub use digest::{OnProgress, Progress};
pub use disk::{Operation, Recorder};
pub use error::{Damage, ErrorKind, VolumeError};
pub use live::{Changed, Info, Volume};
pub use snapshot::{Snapshot, SnapshotInfo};
pub use store::{CreateSpec, Largest, Options, Store, image_bytes};
pub use view::StatusRun;
