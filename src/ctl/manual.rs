//! `hearth completions` and `hearth man`: where the texts go that the command line makes of itself.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::{Page, ShellWord, completions, first_page, pages};

/// Why the manual could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ManualError {
    /// There is no such directory.
    #[error("write manual pages into {}", .dir.display())]
    Directory {
        /// What was named.
        dir: PathBuf,
        /// Why it cannot be used.
        source: io::Error,
    },
    /// A page cannot be written.
    #[error("write the manual page {}", .file.display())]
    Page {
        /// The page.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ManualError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Directory { .. } => Some("name a directory that is there: pages are put into it".to_owned()),
            Self::Page { .. } => None,
        }
    }
}

/// What `completions --json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Completions {
    shell: &'static str,
    pub(super) script: String,
}

impl Completions {
    pub(super) fn of(shell: ShellWord) -> Self {
        Self { shell: shell.as_str(), script: completions(shell) }
    }
}

/// What `man --json` prints.
#[derive(Debug, Serialize)]
pub(super) struct First {
    file: String,
    pub(super) text: String,
}

/// The page of the whole.
pub(super) fn first() -> First {
    let Page { file, text } = first_page();
    First { file, text }
}

/// What `man --dir --json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Written {
    dir: String,
    /// Names of files in it.
    pub(super) pages: Vec<String>,
}

/// Writes all pages into a directory.
pub(super) fn write(dir: &Path) -> Result<Written, ManualError> {
    let usable = |source| ManualError::Directory { dir: dir.to_owned(), source };
    if !dir.metadata().map_err(usable)?.is_dir() {
        return Err(usable(io::ErrorKind::NotADirectory.into()));
    }
    let mut written = Vec::new();
    for page in pages() {
        let file = dir.join(&page.file);
        put(&file, page.text.as_bytes()).map_err(|source| ManualError::Page { file, source })?;
        written.push(page.file);
    }
    Ok(Written { dir: dir.display().to_string(), pages: written })
}

/// A file that everybody may read, as the user's mask has it: pages are for all, and can be made again at any time.
fn put(file: &Path, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(true).open(file)?.write_all(bytes)
}
