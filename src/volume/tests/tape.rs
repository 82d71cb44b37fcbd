//! Changes of a store's files, kept as they are made.

use std::sync::Mutex;

use super::replayed::Kept;
use crate::volume::{Operation, Recorder};

/// Keeps all changes.
#[derive(Debug, Default)]
pub(super) struct Tape(Mutex<Vec<Kept>>);

impl Tape {
    /// How many there are.
    pub(super) fn length(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    pub(super) fn kept(&self) -> Vec<Kept> {
        self.0.lock().unwrap().clone()
    }
}

impl Recorder for Tape {
    fn record(&self, operation: &Operation<'_>) {
        let kept = match *operation {
            Operation::Create { file, path } => Kept::Create(file, path.to_owned()),
            Operation::Open { file, path } => Kept::Open(file, path.to_owned()),
            Operation::Write { file, offset, bytes } => Kept::Write(file, offset, bytes.to_vec()),
            Operation::Punch { file, offset, length } => Kept::Punch(file, offset, length),
            Operation::Truncate { file, length } => Kept::Truncate(file, length),
            Operation::Share { from, to } => Kept::Share(from, to),
            Operation::SyncBegin { file } => Kept::SyncBegin(file),
            Operation::SyncEnd { file } => Kept::SyncEnd(file),
            Operation::MakeDirectory { path } => Kept::MakeDirectory(path.to_owned()),
            Operation::Rename { from, to } => Kept::Rename(from.to_owned(), to.to_owned()),
            Operation::Remove { path } => Kept::Remove(path.to_owned()),
            Operation::SyncDirectory { path } => Kept::SyncDirectory(path.to_owned()),
        };
        self.0.lock().unwrap().push(kept);
    }
}
