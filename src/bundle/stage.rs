//! A bundle that is coming to be: a directory under a name of its own, which no list shows. A VMM gets its two files as
//! descriptors and fills them; [`Staging::commit`] makes a bundle of it. By then nobody should hold a descriptor for
//! writing any more: modes do not stop one that is open. What it would change is noticed by the next launch, but not by
//! clones that map the image already.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::places::{MEMORY, STATE};
use super::store::Store;
use crate::report::Retry;
use crate::sys::file;

/// A staging directory. Dropping it leaves the directory, as a crash would: [`Staging::discard`] it, or
/// [`Store::reopen`] it later. The next [`Store::sweep`] removes it.
#[derive(Debug)]
#[must_use = "commit or discard it"]
pub struct Staging {
    pub(super) store: Store,
    pub(super) token: String,
    pub(super) directory: PathBuf,
}

/// Why something could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// Tokens are labels, as they become part of a directory's name.
    #[error("{token:?} is no token: 1 to 63 of a-z, 0-9 and -")]
    Token {
        /// What was given.
        token: String,
    },
    /// The token is in use.
    #[error("something is staged as {token} already")]
    Exists {
        /// The token.
        token: String,
    },
    /// The disk is full.
    #[error("staging {token}: no space left for {}", path.display())]
    NoSpace {
        /// The token.
        token: String,
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("staging {token}: {}", path.display())]
    File {
        /// The token.
        token: String,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl StageError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Token { .. } | Self::Exists { .. } => Retry::WithChange,
            Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }
}

/// Whether the system said that there is no space.
pub(super) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Store {
    /// Starts a bundle: an empty state file and a memory file of `memory_bytes` without data. The token is the caller's,
    /// to find it again; an operation's id will do.
    pub fn stage(&self, token: &str, memory_bytes: u64) -> Result<Staging, StageError> {
        let staging = self.staging(token)?;
        match std::fs::create_dir(&staging.directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StageError::Exists { token: token.to_owned() });
            }
            Err(source) => return Err(staging.unstaged(&staging.directory, source)),
        }
        match staging.make_files(memory_bytes) {
            Ok(()) => Ok(staging),
            Err(error) => {
                // The first error is the one to tell; the next sweep tries again.
                let _ = staging.discard();
                Err(error)
            }
        }
    }

    /// What an earlier run staged under this token; `None` if there is nothing.
    pub fn reopen(&self, token: &str) -> Result<Option<Staging>, StageError> {
        let staging = self.staging(token)?;
        Ok(staging.directory.is_dir().then_some(staging))
    }

    fn staging(&self, token: &str) -> Result<Staging, StageError> {
        let directory = self
            .places()
            .staging(token)
            .ok_or_else(|| StageError::Token { token: token.chars().take(80).collect() })?;
        Ok(Staging { store: self.clone(), token: token.to_owned(), directory })
    }
}

impl Staging {
    /// The token it was staged under.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// `state.bin`, for reading and writing: the VMM writes [`crate::saved::codec::to_bytes`] of its sections.
    pub fn state_file(&self) -> Result<File, StageError> {
        self.open(STATE).map_err(|source| self.unstaged(&self.directory.join(STATE), source))
    }

    /// `memory.img`, for reading and writing, as long as guest memory: the VMM writes what is not zero.
    pub fn memory_file(&self) -> Result<File, StageError> {
        self.open(MEMORY).map_err(|source| self.unstaged(&self.directory.join(MEMORY), source))
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), StageError> {
        file::remove_tree(&self.directory).map_err(|source| self.unstaged(&self.directory, source))
    }

    fn make_files(&self, memory_bytes: u64) -> Result<(), StageError> {
        let make = |name: &str| {
            let path = self.directory.join(name);
            file::create(&path).map_err(|source| self.unstaged(&path, source))
        };
        make(STATE)?;
        make(MEMORY)?.set_len(memory_bytes).map_err(|source| self.unstaged(&self.directory.join(MEMORY), source))
    }

    pub(super) fn open(&self, name: &str) -> io::Result<File> {
        // The directory is this program's own; a VMM sees descriptors only, and cannot put a link here.
        OpenOptions::new().read(true).write(true).open(self.directory.join(name))
    }

    fn unstaged(&self, path: &Path, source: io::Error) -> StageError {
        let (token, path) = (self.token.clone(), path.to_owned());
        if is_no_space(&source) {
            StageError::NoSpace { token, path }
        } else {
            StageError::File { token, path, source }
        }
    }
}
