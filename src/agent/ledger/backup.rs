//! Copies of the ledger: made while an agent runs, kept beside it up to a number, put back while none runs. A copy that
//! is put back has been read whole before, and what it replaces is kept aside.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::backup::{Backup as Copying, StepResult};
use rusqlite::{Connection, OpenFlags, types::ValueRef};
use serde_json::{Map, Value};

use super::{LedgerError, schema};
use crate::clock::UnixNanos;
use crate::sys::file;

/// The directory of automatic backups, beside the ledger.
const DIRECTORY: &str = "backups";

/// Pages copied at once. The ledger's thread does nothing else meanwhile: 4 MiB take milliseconds.
const PAGES: i32 = 1024;

/// Time between two looks whether another process lets a copy go on, which no event tells of.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Most such looks in a row: five seconds. The agent records nothing meanwhile.
const BUSY_LOOKS_MAX: u32 = 100;

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// SQLite refused.
    #[error("copy the ledger to {}", path.display())]
    Copy {
        /// Where to.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The system refused.
    #[error("make the backup {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is something of that name: a backup is never written over.
    #[error("{} is there already: give another name", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
}

/// Why a backup is not put back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It cannot be used.
    #[error("use the backup {}", path.display())]
    Backup {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: LedgerError,
    },
    /// It is empty, or no ledger.
    #[error("{} is not a backup of a ledger", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
    },
    /// An agent uses the state directory.
    #[error("an agent uses the state directory {}: stop it first (its VMs go on)", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// The system refused.
    #[error("put the backup at {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The copy failed.
    #[error(transparent)]
    Copy(#[from] BackupError),
}

/// A backup that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Where.
    pub path: PathBuf,
    /// When it was made.
    pub at: UnixNanos,
    /// Its size.
    pub bytes: u64,
}

/// Copies a ledger into a new file, as it is at this moment.
pub(super) fn copy(from: &Connection, to: &Path) -> Result<(), BackupError> {
    let failed = |source| BackupError::Copy { path: to.to_owned(), source };
    let refused = |source| BackupError::File { path: to.to_owned(), source };
    if std::fs::symlink_metadata(to).is_ok() {
        return Err(BackupError::Exists { path: to.to_owned() });
    }
    // Whole or not at all: copied under another name first.
    let mut staging = to.as_os_str().to_owned();
    staging.push(".part");
    let staging = PathBuf::from(staging);
    drop(file::create(&staging).map_err(refused)?);
    let copied = (|| {
        let mut into = Connection::open(&staging).map_err(failed)?;
        {
            let copying = Copying::new(from, &mut into).map_err(failed)?;
            // A step that does not go on waits for another process: the ledger's thread is the only writer of an agent.
            let mut busy = 0;
            loop {
                match copying.step(PAGES).map_err(failed)? {
                    StepResult::Done => break,
                    StepResult::More => busy = 0,
                    StepResult::Busy | StepResult::Locked | _ if busy < BUSY_LOOKS_MAX => {
                        busy += 1;
                        std::thread::sleep(BUSY_PAUSE);
                    }
                    StepResult::Busy | StepResult::Locked | _ => {
                        let held = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
                        let what = "another process holds the ledger".to_owned();
                        return Err(failed(rusqlite::Error::SqliteFailure(held, Some(what))));
                    }
                }
            }
        }
        // A backup is one file: it has no log beside it.
        into.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get::<_, String>(0)).map_err(failed)?;
        drop(into);
        std::fs::File::open(&staging).and_then(|file| file.sync_all()).map_err(refused)?;
        std::fs::rename(&staging, to).map_err(refused)?;
        file::sync_parent(to).map_err(refused)
    })();
    if copied.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(&staging);
    }
    copied
}

/// The directory of automatic backups of a ledger.
fn directory(ledger: &Path) -> PathBuf {
    ledger.with_file_name(DIRECTORY)
}

/// The automatic backups of a ledger, newest first.
pub fn backups(ledger: &Path) -> Vec<Backup> {
    let entries = std::fs::read_dir(directory(ledger)).into_iter().flatten().flatten();
    let mut found: Vec<Backup> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let at = path.file_name()?.to_str()?.strip_prefix("ledger-")?.strip_suffix(".db")?.parse().ok()?;
            Some(Backup { bytes: entry.metadata().ok()?.len(), path, at: UnixNanos(at) })
        })
        .collect();
    found.sort_by_key(|backup| std::cmp::Reverse(backup.at));
    found
}

/// Where the next automatic backup goes; makes the directory.
pub(in crate::agent) fn next(ledger: &Path, now: UnixNanos) -> Result<PathBuf, BackupError> {
    let dir = directory(ledger);
    file::make_directories(&dir).map_err(|source| BackupError::File { path: dir.clone(), source })?;
    Ok(dir.join(format!("ledger-{}.db", now.0)))
}

/// Removes all automatic backups but the newest `kept`.
pub(in crate::agent) fn drop_old(ledger: &Path, kept: usize) -> io::Result<()> {
    backups(ledger).into_iter().skip(kept).try_for_each(|old| std::fs::remove_file(old.path))
}

/// What to do about a ledger that cannot be read.
pub(super) fn todo(ledger: &Path) -> String {
    let state = ledger.parent().unwrap_or(Path::new("."));
    match backups(ledger).first() {
        Some(newest) => format!(
            "put the newest backup back: `hearth ledger restore --state-dir {} {}`",
            state.display(),
            newest.path.display()
        ),
        None => format!(
            "there is no backup in {}: restore one with `hearth ledger restore`, or move the file away to begin with \
             an empty ledger; VMs that run are then ended",
            directory(ledger).display()
        ),
    }
}

fn open_read_only(path: &Path) -> Result<Connection, LedgerError> {
    let opening = |source| LedgerError::Open { path: path.to_owned(), source };
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(opening)
}

/// Puts a backup in the place of the ledger in `state_dir`, which no agent may use. Gives where the old one is now, if
/// there was one.
pub fn restore(state_dir: &Path, backup: &Path, now: UnixNanos) -> Result<Option<PathBuf>, RestoreError> {
    let lock = file::try_lock(&state_dir.join("lock"));
    let lock = lock.map_err(|source| RestoreError::File { path: state_dir.to_owned(), source })?;
    let Some(_lock) = lock else { return Err(RestoreError::InUse { path: state_dir.to_owned() }) };
    let unusable = |source| RestoreError::Backup { path: backup.to_owned(), source };
    let connection = open_read_only(backup).map_err(unusable)?;
    // A file without a version is an empty one: it would be taken for a ledger that has nothing in it.
    if schema::check(&connection, backup).map_err(unusable)? == 0 {
        return Err(RestoreError::Foreign { path: backup.to_owned() });
    }
    let ledger = state_dir.join("ledger.db");
    let fresh = state_dir.join(format!("ledger-restored-{}.db", now.0));
    copy(&connection, &fresh)?;
    let moving = |path: &Path| {
        let path = path.to_owned();
        move |source| RestoreError::File { path, source }
    };
    let aside = state_dir.join(format!("ledger-before-restore-{}.db", now.0));
    let mut kept = None;
    // The log belongs to the file it lies beside: both go, or the log would be played into the restored one.
    for suffix in ["-wal", "-shm", ""] {
        let (from, to) = (with_suffix(&ledger, suffix), with_suffix(&aside, suffix));
        match std::fs::rename(&from, &to) {
            Ok(()) => kept = Some(aside.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(moving(&from)(error)),
        }
    }
    std::fs::rename(&fresh, &ledger).map_err(moving(&ledger))?;
    file::sync_parent(&ledger).map_err(moving(&ledger))?;
    Ok(kept)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut whole = path.as_os_str().to_owned();
    whole.push(suffix);
    whole.into()
}

/// Columns that a dump shows. Whatever is not in this list is left out, so that a column that comes later and holds a
/// key is not shown by accident. Of records, which are JSON, [`FIELDS`] says what is shown.
const COLUMNS: &[(&str, &[&str])] = &[
    ("vms", &["id", "name", "state", "revision", "jail", "session_network_id", "cluster", "executor", "record"]),
    ("operations", &["id", "vm", "state", "record"]),
    ("steps", &["op", "seq", "effect", "done"]),
    ("events", &["seq", "at", "kind", "vm", "operation"]),
    ("leases", &["uid", "vm", "session_network_id", "quarantine_until"]),
    ("sessions", &["id", "name", "session_network_id", "state"]),
    ("resting_sessions", &["session_network_id", "quarantine_until"]),
    ("locals", &["session_network_id", "local_id", "vm", "quarantine_until"]),
    ("clusters", &["id", "name", "state"]),
    ("calculations", &["id", "cluster", "state"]),
    ("relaunches", &["vm", "successor"]),
    ("idempotency", &["route", "object", "status", "expires"]),
];

/// Fields of records that a dump shows.
const FIELDS: &[&str] = &[
    "schema_version",
    "goal",
    "revision",
    "uid",
    "jail",
    "created_at",
    "finished_at",
    "timings",
    "process",
    "operation",
    "guest_protocol",
];

/// Settings that a dump shows.
const SETTINGS: &[&str] = &["epoch", "events_kept", "events_kept_ns"];

/// The tables of a ledger as JSON, without what may be secret; the file is only read.
pub fn dump(ledger: &Path) -> Result<Value, LedgerError> {
    let connection = open_read_only(ledger)?;
    let word = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
    let mut tables = Map::new();
    for (table, columns) in COLUMNS {
        let there = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?1";
        if connection.query_row(there, [table], |row| row.get::<_, i64>(0))? == 0 {
            continue;
        }
        tables.insert((*table).to_owned(), rows(&connection, table, columns)?);
    }
    let mut meta = BTreeMap::new();
    for key in SETTINGS {
        let value = connection.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get::<_, i64>(0));
        if let Ok(value) = value {
            meta.insert(*key, value);
        }
    }
    let version = word("user_version")?;
    let check: String = connection.query_row("PRAGMA quick_check(10)", [], |row| row.get(0))?;
    Ok(serde_json::json!({ "user_version": version, "quick_check": check, "meta": meta, "tables": tables }))
}

fn rows(connection: &Connection, table: &str, columns: &[&str]) -> Result<Value, LedgerError> {
    let mut query = connection.prepare(&format!("SELECT {} FROM {table}", columns.join(", ")))?;
    let mut found = query.query([])?;
    let mut all = Vec::new();
    while let Some(row) = found.next()? {
        let mut shown = Map::new();
        for (index, column) in columns.iter().enumerate() {
            let value = match row.get_ref(index)? {
                ValueRef::Integer(number) => number.into(),
                ValueRef::Text(text) if *column == "record" => fields(text),
                ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned().into(),
                ValueRef::Null | ValueRef::Real(_) | ValueRef::Blob(_) => Value::Null,
            };
            shown.insert((*column).to_owned(), value);
        }
        all.push(Value::Object(shown));
    }
    Ok(Value::Array(all))
}

/// What of a record is shown.
fn fields(record: &[u8]) -> Value {
    let Ok(Value::Object(mut record)) = serde_json::from_slice(record) else { return Value::Null };
    record.retain(|key, _| FIELDS.contains(&key.as_str()));
    Value::Object(record)
}
