//! Why a container's file system is not imported.

use std::io;
use std::path::PathBuf;

use crate::report::Retry;
use crate::units::Bytes;

use super::cpio::INITRAMFS_BYTES_MAX;
use super::tree::{DEPTH_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX};

/// Longest part of a name that is repeated.
const SHOWN_BYTES_MAX: usize = 200;

/// Why a container's file system is not imported.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Something else has this name.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// A document of an OCI layout is not what it should be.
    #[error("{document}: {reason}")]
    Layout {
        /// Which.
        document: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such image in the layout, or more than one.
    #[error("{reason}; it has {}", if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") })]
    Reference {
        /// What is wrong.
        reason: String,
        /// What is there.
        names: Vec<String>,
    },
    /// A layer is packed in a way that is not read here.
    #[error("{layer} is packed by {packer}, and only gzip or nothing is read: convert it first")]
    Packed {
        /// Which layer.
        layer: String,
        /// By what.
        packer: String,
    },
    /// The archive cannot be read to its end.
    #[error("{layer} is damaged")]
    Damaged {
        /// Which layer.
        layer: String,
        /// What its reader says.
        #[source]
        source: io::Error,
    },
    /// An entry is not taken.
    #[error("{layer}, entry \"{entry}\"")]
    Entry {
        /// Which layer.
        layer: String,
        /// Its path, printable.
        entry: String,
        /// Why.
        #[source]
        fault: Fault,
    },
    /// There is more in it than may be.
    #[error("{layer} goes beyond the {limit} that all layers may have once they are unpacked")]
    TooLarge {
        /// In which layer the bound was reached.
        layer: String,
        /// The bound.
        limit: Bytes,
    },
    /// No kernel could unpack it.
    #[error("the file system takes more than {}, the most that an initramfs may have", Bytes(INITRAMFS_BYTES_MAX))]
    DoesNotFit,
    /// The disk has too little left.
    #[error("unpacking takes more than the {left} that the disk of the images has left")]
    NoSpace {
        /// What is left for it.
        left: Bytes,
    },
    /// The image's files cannot be written.
    #[error("write the image's files")]
    Write {
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no guest agent to put in.
    #[error("the initrd has no guest agent that could be put in: {reason}")]
    Agent {
        /// What is wrong.
        reason: String,
    },
}

impl ContainerError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoSpace { .. } | Self::Write { .. } => Retry::Later,
            Self::Read { .. }
            | Self::NotAFile { .. }
            | Self::Layout { .. }
            | Self::Reference { .. }
            | Self::Packed { .. }
            | Self::Damaged { .. }
            | Self::Entry { .. }
            | Self::TooLarge { .. }
            | Self::DoesNotFit
            | Self::Agent { .. } => Retry::WithChange,
        }
    }
}

/// Why an entry of an archive is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It has no name.
    #[error("it has no name")]
    NoName,
    /// Its path begins at the root of whoever unpacks it.
    #[error("its path is absolute")]
    Absolute,
    /// Its path leads up.
    #[error("its path has a \"..\"")]
    Upwards,
    /// Its path has what no path has.
    #[error("its path has a null byte")]
    NullByte,
    /// Longer than any path.
    #[error("its path or link is longer than {PATH_BYTES_MAX} bytes")]
    PathTooLong,
    /// A part of its path is longer than any name.
    #[error("a name in its path is longer than {NAME_BYTES_MAX} bytes")]
    NameTooLong,
    /// Deeper than anything real.
    #[error("its path has more than {DEPTH_MAX} directories")]
    TooDeep,
    /// It is to be put where a link leads.
    #[error("its path goes through the symbolic link \"{link}\"")]
    ThroughLink {
        /// The link, printable.
        link: String,
    },
    /// It is to be put into something that is no directory.
    #[error("its path goes through \"{file}\", which is not a directory")]
    ThroughFile {
        /// The file, printable.
        file: String,
    },
    /// Which of two is meant is not known.
    #[error("it is there twice in one layer")]
    Twice,
    /// A hard link to nothing.
    #[error("it is a hard link to \"{target}\", which is not there")]
    NoTarget {
        /// Where it leads, printable.
        target: String,
    },
    /// A hard link to a directory.
    #[error("it is a hard link to the directory \"{target}\"")]
    LinkToDirectory {
        /// Where it leads, printable.
        target: String,
    },
    /// A link without an end.
    #[error("it is a link that leads nowhere")]
    EmptyLink,
    /// A whiteout of nothing.
    #[error("it hides nothing that has a name")]
    Whiteout,
    /// A name that is ours, or the format's.
    #[error("this name is not free: /.hearth is the guest agent's, and TRAILER!!! ends an archive")]
    Reserved,
    /// A sparse file: what it says it is has nothing to do with what is there.
    #[error("sparse files are not read: make the archive without --sparse")]
    Sparse,
    /// A kind that is not known.
    #[error("entries of type {kind:?} are not read")]
    Kind {
        /// Its letter.
        kind: char,
    },
    /// It says it is larger than what may be.
    #[error("it says it has {says}, and {left} are left of what all layers may have")]
    Size {
        /// What its header says.
        says: Bytes,
        /// What is left.
        left: Bytes,
    },
    /// No initramfs has files of this size.
    #[error("it has {says}, and a file of an initramfs is smaller than 4 GiB")]
    FileTooLarge {
        /// What its header says.
        says: Bytes,
    },
    /// Its extended header does not say the same as its header.
    #[error("its two headers disagree about its size")]
    Disagreement,
    /// Its extended header is wrong.
    #[error("its extended header {reason}")]
    Extension {
        /// How.
        reason: &'static str,
    },
    /// A number of its header cannot be read.
    #[error("its {field} is not a number that can be")]
    Number {
        /// Which.
        field: &'static str,
    },
    /// The archive ends within it.
    #[error("the archive ends in the middle of it")]
    CutOff,
    /// More entries than anything real has.
    #[error("with it there are more entries, or longer names, than are read")]
    TooMany,
}

/// Bytes of an archive for people: printable, and not endless.
pub(super) fn shown(bytes: &[u8]) -> String {
    let end = bytes.len().min(SHOWN_BYTES_MAX);
    let more = if end < bytes.len() { "..." } else { "" };
    format!("{}{more}", bytes.get(..end).unwrap_or_default().escape_ascii())
}
