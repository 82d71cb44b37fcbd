//! What can go wrong with a volume, and what of its files is not as it was written.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::report::Retry;

/// A place of a volume's files that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, below the store's root.
    pub file: String,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What is wrong there.
    pub what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, offset, what } = self;
        write!(out, "{file} at byte {offset}: {what}")
    }
}

/// Why something was not done with a volume. `subject` is the volume's or the snapshot's id.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The name is none.
    #[error("{name:?} is no name of a volume: 1 to 63 of a-z, 0-9 and -")]
    Name {
        /// The name.
        name: String,
    },
    /// Something else has the name.
    #[error("the name {name:?} is taken")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is one of this id.
    #[error("{subject} is there already")]
    Exists {
        /// The id.
        subject: String,
    },
    /// No volume has this size.
    #[error("a volume has 1 to {max} bytes in steps of {step}, not {size_bytes}")]
    Size {
        /// The size asked for.
        size_bytes: u64,
        /// Sizes are multiples of it.
        step: u64,
        /// The largest.
        max: u64,
    },
    /// A volume never becomes smaller: what is beyond the new end would be lost.
    #[error("{subject} has {from_bytes} bytes and cannot shrink to {to_bytes}")]
    Shrink {
        /// The id.
        subject: String,
        /// Its size.
        from_bytes: u64,
        /// The size asked for.
        to_bytes: u64,
    },
    /// The image is longer than the volume that was to be made of it.
    #[error("an image of {image_bytes} bytes does not fit a volume of {size_bytes}")]
    Image {
        /// Bytes of the image.
        image_bytes: u64,
        /// Bytes the volume was to have.
        size_bytes: u64,
    },
    /// Bytes beyond the end.
    #[error("{subject} has {size_bytes} bytes, none of {length} at {offset}")]
    Range {
        /// The id.
        subject: String,
        /// The first byte asked for.
        offset: u64,
        /// How many.
        length: u64,
        /// Bytes there are.
        size_bytes: u64,
    },
    /// Too many snapshots and clones lie upon each other.
    #[error("{subject} lies in {max} layers already")]
    Layers {
        /// The id.
        subject: String,
        /// The most layers there may be.
        max: usize,
    },
    /// Whoever asked for it wants it no more.
    #[error("cancelled")]
    Cancelled,
    /// There is none of this id.
    #[error("no {subject}")]
    NotFound {
        /// The id.
        subject: String,
    },
    /// Somebody uses it.
    #[error("{subject} is in use")]
    InUse {
        /// The id, or the root of a store that another process has open.
        subject: String,
    },
    /// The disk is full, or what of it this user may have.
    #[error("{what} {subject}")]
    DiskFull {
        /// The id, or the root of the store.
        subject: String,
        /// What was tried, as a verb.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It would go beyond the store's quota or into the disk's reserve. Nothing was written.
    #[error("no space for {wanted_bytes} bytes of {subject}: {available_bytes} may be taken")]
    NoSpace {
        /// The id.
        subject: String,
        /// Bytes wanted.
        wanted_bytes: u64,
        /// Bytes there are.
        available_bytes: u64,
    },
    /// It is not written to, since something of it is damaged or could not be made durable.
    #[error("{subject} is read-only: {damage}")]
    ReadOnly {
        /// The id.
        subject: String,
        /// The first thing that is wrong.
        damage: Damage,
    },
    /// What was to be read is lost.
    #[error("{subject} is damaged: {damage}")]
    Damaged {
        /// The id.
        subject: String,
        /// What is wrong.
        damage: Damage,
    },
    /// The disk did not do it.
    #[error("{what} {subject}, {}", path.display())]
    Io {
        /// The id, or the root of the store.
        subject: String,
        /// What was tried, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// What kind of error it is, for those who answer with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for is never possible.
    BadRequest,
    /// Something else has the name or the id.
    Taken,
    /// Whoever asked for it wants it no more.
    Cancelled,
    /// There is no space.
    NoSpace,
    /// It is not written to.
    ReadOnly,
    /// What was to be read is lost.
    Damaged,
    /// There is none.
    NotFound,
    /// Somebody uses it.
    InUse,
    /// The disk did not do it.
    Io,
}

impl VolumeError {
    /// Its kind.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Name { .. }
            | Self::Size { .. }
            | Self::Shrink { .. }
            | Self::Image { .. }
            | Self::Range { .. }
            | Self::Layers { .. } => ErrorKind::BadRequest,
            Self::NameTaken { .. } | Self::Exists { .. } => ErrorKind::Taken,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::InUse { .. } => ErrorKind::InUse,
            Self::NoSpace { .. } | Self::DiskFull { .. } => ErrorKind::NoSpace,
            Self::ReadOnly { .. } => ErrorKind::ReadOnly,
            Self::Damaged { .. } => ErrorKind::Damaged,
            Self::Io { .. } => ErrorKind::Io,
        }
    }

    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self.kind() {
            ErrorKind::BadRequest | ErrorKind::Damaged => Retry::Never,
            ErrorKind::Taken | ErrorKind::NotFound | ErrorKind::NoSpace | ErrorKind::ReadOnly => Retry::WithChange,
            ErrorKind::Cancelled | ErrorKind::InUse | ErrorKind::Io => Retry::Later,
        }
    }

    /// What the system's answer means: a disk that is full is no failure of the disk.
    pub(super) fn io(subject: &str, what: &'static str, path: PathBuf, source: io::Error) -> Self {
        let subject = subject.to_owned();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::DiskFull { subject, what, source };
        }
        Self::Io { subject, what, path, source }
    }
}
