//! What is known of bundles that came from another store by themselves, in `.fetched/<id>.json`: from where, when they were
//! last used, and whether somebody wants to keep them. It decides what gives way when the disk fills, and nothing else: a
//! note that is damaged says no more than that the bundle was fetched.

use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::eviction::Candidate;
use super::stage::is_no_space;
use super::store::{Store, StoreError};
use crate::clock::UnixNanos;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

/// Version of the file.
const FORMAT: u32 = 1;

/// Longest file: a source of the longest kind, each byte written as six.
const FILE_BYTES_MAX: u64 = 32 << 10;

/// What is known of a bundle that was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Where it came from; empty when that is not known any more.
    pub from: String,
    /// When it began to come.
    pub fetched_at: UnixNanos,
    /// When something was last launched from it.
    pub last_used: UnixNanos,
    /// Whether it stays however little it is used.
    pub pinned: bool,
}

/// A bundle that was fetched, all of it or in part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedBundle {
    /// Its id.
    pub id: BundleId,
    /// What is known of it.
    pub note: Fetched,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
    /// Whether all of it is here.
    pub is_whole: bool,
    /// Whether others build on it, or it is being exported: it cannot be removed.
    pub is_held: bool,
}

impl FetchedBundle {
    /// The same for who decides what gives way. `in_use`: something runs from it, or waits for it.
    pub fn candidate(&self, in_use: bool) -> Candidate {
        let Self { id, note, disk_bytes, is_held, .. } = self;
        let (last_used, pinned) = (note.last_used, note.pinned);
        Candidate { id: id.clone(), disk_bytes: *disk_bytes, last_used, pinned, in_use: in_use || *is_held }
    }
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    from: String,
    fetched_at: UnixNanos,
    last_used: UnixNanos,
    pinned: bool,
}

/// Why a note of a bundle was not kept.
#[derive(Debug, thiserror::Error)]
pub enum FetchedError {
    /// There is no such bundle, or it was not fetched.
    #[error("bundle {bundle} was not fetched from elsewhere, and never gives way")]
    NotFetched {
        /// The bundle.
        bundle: BundleId,
    },
    /// The disk is full.
    #[error("no space left for {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
    },
    /// The disk did not answer.
    #[error("note of a fetched bundle: {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl FetchedError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NotFetched { .. } => Retry::WithChange,
            Self::NoSpace { .. } | Self::File { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Notes that a bundle, of which a part is here at least, came from elsewhere. One that is noted already keeps whether
    /// it stays.
    pub fn note_fetched(&self, id: &BundleId, from: &str, at: UnixNanos) -> Result<(), FetchedError> {
        let _changes = self.lock_changes();
        if !self.places().has_any_of(id) {
            return Err(FetchedError::NotFetched { bundle: id.clone() });
        }
        let pinned = self.fetched_note(id)?.is_some_and(|note| note.pinned);
        self.write_note(id, Fetched { from: from.to_owned(), fetched_at: at, last_used: at, pinned })
    }

    /// Notes that a bundle is used. Of one that was not fetched there is nothing to note.
    pub fn touch_fetched(&self, id: &BundleId, at: UnixNanos) -> Result<(), FetchedError> {
        let _changes = self.lock_changes();
        match self.fetched_note(id)? {
            Some(note) => self.write_note(id, Fetched { last_used: note.last_used.max(at), ..note }),
            None => Ok(()),
        }
    }

    /// Has a fetched bundle stay, or give way again.
    pub fn set_pinned(&self, id: &BundleId, pinned: bool) -> Result<(), FetchedError> {
        let _changes = self.lock_changes();
        match self.fetched_note(id)? {
            Some(note) => self.write_note(id, Fetched { pinned, ..note }),
            None => Err(FetchedError::NotFetched { bundle: id.clone() }),
        }
    }

    /// What is known of a fetched bundle; `None`: it was not fetched.
    pub fn fetched(&self, id: &BundleId) -> Result<Option<Fetched>, FetchedError> {
        self.fetched_note(id)
    }

    /// The bundles that were fetched, by id.
    pub fn fetched_list(&self) -> Result<Vec<FetchedBundle>, StoreError> {
        let directory = self.places().fetched();
        if !directory.is_dir() {
            return Ok(Vec::new());
        }
        let mut list = Vec::new();
        let built_on = self.built_on()?;
        for id in self.names(&directory)?.into_iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()) {
            let note = self.fetched_note(&id).map_err(|error| match error {
                FetchedError::File { path, source } => StoreError { path, source },
                FetchedError::NotFetched { .. } | FetchedError::NoSpace { .. } => {
                    StoreError { path: directory.clone(), source: io::ErrorKind::NotFound.into() }
                }
            })?;
            let Some(note) = note.filter(|_| self.places().has_any_of(&id)) else { continue };
            let (place, partial) = (self.places().bundle(&id), self.places().partial(&id));
            let disk_bytes = allocated_bytes(&place).saturating_add(allocated_bytes(&partial));
            let is_held = built_on.contains(&id) || self.lock_exported().contains_key(&id);
            list.push(FetchedBundle { note, disk_bytes, is_whole: place.is_dir(), is_held, id });
        }
        Ok(list)
    }

    fn fetched_note(&self, id: &BundleId) -> Result<Option<Fetched>, FetchedError> {
        let path = self.places().fetched_note(id);
        let file = match file::open_regular(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FetchedError::File { path, source }),
        };
        let mut bytes = Vec::new();
        if let Some(file) = file {
            let read = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
            read.map_err(|source| FetchedError::File { path, source })?;
        }
        Ok(Some(parse(&bytes)))
    }

    fn write_note(&self, id: &BundleId, note: Fetched) -> Result<(), FetchedError> {
        let path = self.places().fetched_note(id);
        let Fetched { from, fetched_at, last_used, pinned } = note;
        let written = serde_json::to_vec(&Written { format: FORMAT, from, fetched_at, last_used, pinned });
        // The store's disk may have been mounted since it was opened.
        let kept = file::make_directories(&self.places().fetched())
            .and_then(|()| file::replace(&path, &written.map_err(io::Error::from)?));
        kept.map_err(|source| {
            if is_no_space(&source) { FetchedError::NoSpace { path } } else { FetchedError::File { path, source } }
        })
    }
}

/// What is noted; of a damaged note only that the bundle was fetched at some time.
fn parse(bytes: &[u8]) -> Fetched {
    match serde_json::from_slice(bytes) {
        Ok(Written { format: FORMAT, from, fetched_at, last_used, pinned }) => {
            Fetched { from, fetched_at, last_used, pinned }
        }
        Ok(_) | Err(_) => {
            Fetched { from: String::new(), fetched_at: UnixNanos(0), last_used: UnixNanos(0), pinned: false }
        }
    }
}

/// Bytes that the files in a directory take on disk.
fn allocated_bytes(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    // 512: what the system counts blocks in, whatever the file system's are.
    files.filter_map(|file| Some(file.metadata().ok()?.blocks() * 512)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::samples::{Rig, names};

    const FROM: &str = "peer:b";

    #[test]
    fn notes_are_kept_and_go_with_the_bundle() {
        let rig = Rig::new(1 << 20);
        let id = rig.full("one", &[(0, b"x")]).id;
        let other = rig.full("two", &[(0, b"y")]).id;
        assert!(rig.store.fetched_list().unwrap().is_empty());
        rig.store.touch_fetched(&id, UnixNanos(1)).unwrap();
        assert!(matches!(rig.store.set_pinned(&id, true), Err(FetchedError::NotFetched { .. })));
        rig.store.note_fetched(&id, FROM, UnixNanos(5)).unwrap();
        rig.store.touch_fetched(&id, UnixNanos(9)).unwrap();
        rig.store.touch_fetched(&id, UnixNanos(8)).unwrap();
        rig.store.set_pinned(&id, true).unwrap();
        let list = rig.restarted().fetched_list().unwrap();
        let [FetchedBundle { id: found, note, disk_bytes: 1.., is_whole: true, is_held: false }] = &list[..] else {
            panic!("{list:?}")
        };
        let wanted = Fetched { from: FROM.to_owned(), fetched_at: UnixNanos(5), last_used: UnixNanos(9), pinned: true };
        assert_eq!((found, note), (&id, &wanted));
        assert!(!list[0].candidate(false).in_use && list[0].candidate(true).in_use);
        // What others build on does not give way before they do.
        let child = rig.diff("three", &id, &[(4, 1)], &[(4 << 12, b"z")]).id;
        assert!(rig.store.fetched_list().unwrap()[0].candidate(false).in_use);
        rig.store.remove(&child).unwrap();
        assert!(!rig.store.fetched_list().unwrap()[0].candidate(false).in_use);
        // Fetched again, it stays pinned.
        rig.store.note_fetched(&id, "/srv", UnixNanos(20)).unwrap();
        assert!(rig.store.fetched(&id).unwrap().unwrap().pinned);
        rig.store.remove(&id).unwrap();
        assert!(matches!(rig.store.note_fetched(&id, FROM, UnixNanos(5)), Err(FetchedError::NotFetched { .. })));
        assert!(names(&rig.root.join(".fetched")).is_empty());
        rig.store.note_fetched(&other, FROM, UnixNanos(5)).unwrap();
        let left = rig.root.join(".fetched/b-77777777777777777777777774.json");
        file::replace(&left, b"{}").unwrap();
        assert_eq!(rig.store.fetched_list().unwrap().len(), 1);
        rig.restarted().sweep(&[]).unwrap();
        assert_eq!(names(&rig.root.join(".fetched")), [format!("{other}.json")]);
    }

    #[test]
    fn a_damaged_note_says_that_the_bundle_was_fetched() {
        let rig = Rig::new(1 << 20);
        let id = rig.full("one", &[(0, b"x")]).id;
        rig.store.note_fetched(&id, FROM, UnixNanos(5)).unwrap();
        for bytes in [&b""[..], b"{", b"{}", b"\xff", &[b' '; 70_000]] {
            file::replace(&rig.root.join(format!(".fetched/{id}.json")), bytes).unwrap();
            let found = rig.store.fetched(&id).unwrap().unwrap();
            assert_eq!((found.from.as_str(), found.last_used, found.pinned), ("", UnixNanos(0), false));
        }
        rig.store.set_pinned(&id, true).unwrap();
        assert!(rig.store.fetched(&id).unwrap().unwrap().pinned);
    }
}
