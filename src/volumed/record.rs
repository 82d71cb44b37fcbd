//! Every change of the store's files, written to a file as it is made: from it can be told what a loss of power at any
//! moment may have left. For tests and for finding faults; it is as large as all that was written.
//!
//! A record is a line of JSON; behind that of a write follow its bytes, and nothing between.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::log::say;
use crate::sys::file;
use crate::volume::{Operation, Recorder};

/// Writes records to a file.
#[derive(Debug)]
pub(super) struct FileRecorder {
    file: Mutex<File>,
    failed: AtomicBool,
}

impl FileRecorder {
    /// A new file.
    pub(super) fn create(path: &Path) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { file: Mutex::new(file::create(path)?), failed: AtomicBool::new(false) }))
    }
}

fn head(operation: &Operation<'_>) -> Value {
    match operation {
        Operation::Create { file, path } => json!({ "op": "create", "file": file, "path": path }),
        Operation::Open { file, path } => json!({ "op": "open", "file": file, "path": path }),
        Operation::Write { file, offset, bytes } => {
            json!({ "op": "write", "file": file, "offset": offset, "length": bytes.len() })
        }
        Operation::Punch { file, offset, length } => {
            json!({ "op": "punch", "file": file, "offset": offset, "length": length })
        }
        Operation::Truncate { file, length } => json!({ "op": "truncate", "file": file, "length": length }),
        Operation::Share { from, to } => json!({ "op": "share", "from": from, "to": to }),
        Operation::SyncBegin { file } => json!({ "op": "sync_begin", "file": file }),
        Operation::SyncEnd { file } => json!({ "op": "sync_end", "file": file }),
        Operation::MakeDirectory { path } => json!({ "op": "make_directory", "path": path }),
        Operation::Rename { from, to } => json!({ "op": "rename", "from": from, "to": to }),
        Operation::Remove { path } => json!({ "op": "remove", "path": path }),
        Operation::SyncDirectory { path } => json!({ "op": "sync_directory", "path": path }),
    }
}

impl Recorder for FileRecorder {
    fn record(&self, operation: &Operation<'_>) {
        let mut record = head(operation).to_string().into_bytes();
        record.push(b'\n');
        if let Operation::Write { bytes, .. } = operation {
            record.extend_from_slice(bytes);
        }
        let written = self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&record);
        if let Err(error) = written
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            say(format_args!("the record of what is written has a gap from here on: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_lines_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let recorder = FileRecorder::create(&path).unwrap();
        recorder.record(&Operation::Create { file: 1, path: Path::new("a") });
        recorder.record(&Operation::Write { file: 1, offset: 4096, bytes: b"x\ny" });
        recorder.record(&Operation::SyncEnd { file: 1 });
        let written = std::fs::read_to_string(&path).unwrap();
        let wanted = "{\"file\":1,\"op\":\"create\",\"path\":\"a\"}\n\
                      {\"file\":1,\"length\":3,\"offset\":4096,\"op\":\"write\"}\nx\ny\
                      {\"file\":1,\"op\":\"sync_end\"}\n";
        assert_eq!(written, wanted);
    }
}
