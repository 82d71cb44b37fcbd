//! What can be wrong with a committed bundle, by file and place, and the errors of reading one.

use std::io;
use std::path::PathBuf;

use super::manifest::ReadManifestError;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::saved::codec::CodecError;

/// One thing that is not as it was committed.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// The manifest is not one.
    #[error("manifest.json")]
    Manifest(#[source] ReadManifestError),
    /// The manifest is not the one the id was made of.
    #[error("manifest.json was changed: it is that of {found}")]
    Id {
        /// The id it gives.
        found: BundleId,
    },
    /// A file is missing.
    #[error("{file} is missing")]
    Missing {
        /// Its name.
        file: &'static str,
    },
    /// There is something that does not belong to a bundle.
    #[error("{file:?} does not belong here")]
    Extra {
        /// Its name.
        file: String,
    },
    /// It is not a regular file.
    #[error("{file} is not a regular file")]
    NotRegular {
        /// Its name.
        file: &'static str,
    },
    /// A file is too short or too long.
    #[error("{file} has {found} bytes instead of {wanted}")]
    Length {
        /// Its name.
        file: &'static str,
        /// Bytes it has.
        found: u64,
        /// Bytes the manifest says.
        wanted: u64,
    },
    /// The state is not what was saved.
    #[error("state.bin was changed")]
    State,
    /// The state is what was saved, and is no saved state.
    #[error("state.bin")]
    Sections(#[source] CodecError),
    /// A chunk is not what was saved.
    #[error("memory.img was changed: chunk {index}, guest pages {first_page} to {last_page}")]
    Chunk {
        /// Its number.
        index: u64,
        /// The first guest-physical page in it.
        first_page: u64,
        /// The last one.
        last_page: u64,
    },
    /// There is data where memory was zero.
    #[error("memory.img was changed: chunk {index} was zero, guest pages {first_page} to {last_page}")]
    NotZero {
        /// The chunk's number.
        index: u64,
        /// The first guest-physical page in it.
        first_page: u64,
        /// The last one.
        last_page: u64,
    },
    /// A diff has data in pages it does not hold.
    #[error("memory.img was changed: guest pages {first_page} to {last_page} are the parent's and not zero here")]
    NotHeld {
        /// The first guest-physical page.
        first_page: u64,
        /// The last one.
        last_page: u64,
    },
    /// A diff does not fit the bundle it builds on.
    #[error("it does not fit its parent {parent}: {reason}")]
    Parent {
        /// The parent.
        parent: BundleId,
        /// What differs.
        reason: &'static str,
    },
}

/// Why a committed bundle could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadBundleError {
    /// There is none of this id.
    #[error("there is no bundle {bundle}")]
    Unknown {
        /// The id.
        bundle: BundleId,
    },
    /// It is there and must not be used.
    #[error("bundle {bundle} is damaged")]
    Damaged {
        /// The id.
        bundle: BundleId,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// The disk did not answer.
    #[error("bundle {bundle}: {}", path.display())]
    File {
        /// The id.
        bundle: BundleId,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ReadBundleError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unknown { .. } => Retry::WithChange,
            Self::Damaged { .. } => Retry::Never,
            Self::File { .. } => Retry::Later,
        }
    }
}
