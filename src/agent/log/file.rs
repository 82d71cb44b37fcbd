//! A copy of the log in the state directory, so that its end is there when the agent is not: two files of a bounded size.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

/// Size at which a file is put aside for a new one. Two of them hold days of an agent that launches a VM each minute.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// The file's name, and that of the one before it.
const NAMES: [&str; 2] = ["agent.log", "agent.log.1"];

/// The files of a state directory, older first.
pub fn log_files(state_dir: &Path) -> [PathBuf; 2] {
    [state_dir.join(NAMES[1]), state_dir.join(NAMES[0])]
}

/// A log file that grows up to a bound.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl LogFile {
    fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(NAMES[0]);
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            std::fs::rename(&self.path, self.path.with_file_name(NAMES[1]))?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.bytes = 0;
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

/// Where lines go once the state directory is known; before, nowhere.
static FILE: OnceLock<Mutex<LogFile>> = OnceLock::new();

/// From now on lines go to the state directory as well.
pub fn keep_log(state_dir: &Path) -> io::Result<()> {
    let file = LogFile::open(state_dir)?;
    // A second agent in one process logs to the first one's file: only tests have that.
    let _ = FILE.set(Mutex::new(file));
    Ok(())
}

/// Hands lines to the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct ToFile;

impl MakeWriter<'_> for ToFile {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

impl Write for ToFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(file) = FILE.get() {
            // A disk that is full takes no lines: standard error has them, and there is nobody to tell.
            let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_of_a_bounded_size_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogFile::open(dir.path()).unwrap();
        let line = vec![b'x'; 1 << 20];
        for _ in 0..11 {
            log.write(&line).unwrap();
        }
        let sizes = log_files(dir.path()).map(|path| std::fs::metadata(path).unwrap().len());
        assert_eq!(sizes, [4 << 20, 3 << 20]);
        // The next agent goes on where this one stopped.
        assert_eq!(LogFile::open(dir.path()).unwrap().bytes, 3 << 20);
    }
}
