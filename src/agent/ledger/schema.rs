//! The ledger's tables and how an older file becomes a newer one.

use std::fs::{OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};

use super::{LedgerError, backup};

/// "HRTH" in SQLite's application_id: tells a ledger from any other SQLite file.
const APPLICATION_ID: i64 = 0x4852_5448;

/// Each migration brings a file from the version of its index to the next one. Never changed once shipped: appended.
const MIGRATIONS: [&str; 4] = [V1, V2, V3, V4];

const V1: &str = "
CREATE TABLE meta(
    key TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
CREATE TABLE vms(
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT UNIQUE,
    state TEXT NOT NULL,
    revision INTEGER NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE operations(
    id TEXT NOT NULL PRIMARY KEY,
    vm TEXT NOT NULL,
    state TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE INDEX operations_by_state ON operations(state);
CREATE TABLE steps(
    op TEXT NOT NULL REFERENCES operations(id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    effect TEXT NOT NULL,
    args TEXT NOT NULL,
    done INTEGER NOT NULL,
    PRIMARY KEY(op, seq)
) STRICT;
CREATE TABLE events(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    vm TEXT NOT NULL,
    operation TEXT,
    body TEXT NOT NULL
) STRICT;
CREATE TABLE idempotency(
    key TEXT NOT NULL,
    route TEXT NOT NULL,
    body_hash BLOB NOT NULL,
    object TEXT NOT NULL,
    status INTEGER,
    answer TEXT,
    expires INTEGER NOT NULL,
    PRIMARY KEY(key, route)
) STRICT;
CREATE TABLE leases(
    uid INTEGER NOT NULL PRIMARY KEY,
    vm TEXT NOT NULL,
    session_network_id INTEGER,
    quarantine_until INTEGER
) STRICT;
";

/// Sessions. VMs that were there before get jails in the order they were made; they are in no session.
const V2: &str = "
CREATE TABLE sessions(
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT UNIQUE,
    session_network_id INTEGER NOT NULL UNIQUE,
    state TEXT NOT NULL,
    record TEXT NOT NULL,
    user_data TEXT
) STRICT;
CREATE TABLE resting_sessions(
    session_network_id INTEGER NOT NULL PRIMARY KEY,
    quarantine_until INTEGER NOT NULL
) STRICT;
CREATE TABLE locals(
    session_network_id INTEGER NOT NULL,
    local_id INTEGER NOT NULL,
    vm TEXT NOT NULL,
    quarantine_until INTEGER,
    PRIMARY KEY(session_network_id, local_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX locals_by_vm ON locals(vm);
ALTER TABLE vms ADD COLUMN jail INTEGER;
ALTER TABLE vms ADD COLUMN session_network_id INTEGER;
UPDATE vms SET jail = (SELECT count(*) FROM vms AS earlier WHERE earlier.rowid < vms.rowid);
UPDATE vms SET record = json_set(record, '$.jail', jail);
CREATE UNIQUE INDEX vms_by_jail ON vms(jail);
CREATE INDEX vms_by_session ON vms(session_network_id);
";

/// Clusters. Of their members, those that live have executor ids of their own; what a VM was launched anew as is kept
/// beside it, so that it is launched anew once.
const V3: &str = "
CREATE TABLE clusters(
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT UNIQUE,
    state TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE calculations(
    id TEXT NOT NULL PRIMARY KEY,
    cluster TEXT NOT NULL REFERENCES clusters(id) ON DELETE CASCADE,
    state TEXT NOT NULL,
    record TEXT NOT NULL,
    stdin BLOB,
    stdout BLOB,
    stderr BLOB
) STRICT;
CREATE INDEX calculations_by_cluster ON calculations(cluster);
CREATE INDEX calculations_by_state ON calculations(state);
CREATE TABLE relaunches(
    vm TEXT NOT NULL PRIMARY KEY,
    successor TEXT
) STRICT;
ALTER TABLE vms ADD COLUMN cluster TEXT;
ALTER TABLE vms ADD COLUMN executor TEXT;
CREATE UNIQUE INDEX vms_by_executor ON vms(cluster, executor)
    WHERE cluster IS NOT NULL AND state NOT IN ('stopped', 'failed', 'gone');
";

/// Swap-out: the keys of hibernated VMs, which are nowhere else, and what was decided about idle VMs.
const V4: &str = "
CREATE TABLE swap_keys(
    vm TEXT NOT NULL PRIMARY KEY,
    key BLOB NOT NULL
) STRICT;
CREATE TABLE swap_decisions(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    decision TEXT NOT NULL
) STRICT;
";

/// Version of a ledger this program writes.
const VERSION: i64 = 4;
const _: () = assert!(MIGRATIONS.len() == 4, "VERSION is the number of migrations");

/// Opens, checks and migrates.
pub(super) fn open(path: &Path) -> Result<Connection, LedgerError> {
    let opening = |source| refused(path, source);
    for_owner_only(path).map_err(|source| LedgerError::Protect { path: path.to_owned(), source })?;
    let mut connection = Connection::open(path).map_err(opening)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(opening)?;
    let version = check(&connection, path)?;
    configure(&connection).map_err(opening)?;
    migrate(&mut connection, version).map_err(opening)?;
    Ok(connection)
}

/// What SQLite's refusal of a file means.
fn refused(path: &Path, source: rusqlite::Error) -> LedgerError {
    match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => LedgerError::Foreign { path: path.to_owned(), todo: backup::todo(path) },
        Some(ErrorCode::DatabaseCorrupt) => {
            LedgerError::Damaged { path: path.to_owned(), detail: source.to_string(), todo: backup::todo(path) }
        }
        Some(_) | None => LedgerError::Open { path: path.to_owned(), source },
    }
}

/// Whether a file is a whole ledger that this program understands; gives its version.
pub(super) fn check(connection: &Connection, path: &Path) -> Result<i64, LedgerError> {
    let opening = |source| refused(path, source);
    let word = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
    let id = word("application_id").map_err(opening)?;
    let version = word("user_version").map_err(opening)?;
    let tables = "SELECT count(*) FROM sqlite_schema";
    let tables: i64 = connection.query_row(tables, [], |row| row.get(0)).map_err(opening)?;
    if id != APPLICATION_ID && (id != 0 || tables != 0) {
        return Err(LedgerError::Foreign { path: path.to_owned(), todo: backup::todo(path) });
    }
    if version > VERSION {
        return Err(LedgerError::Newer { path: path.to_owned(), found: version, known: VERSION });
    }
    // A file of ours has had a version from its first transaction on.
    if version < 0 || (version == 0 && tables != 0) {
        let detail = format!("its version is {version}");
        return Err(LedgerError::Damaged { path: path.to_owned(), detail, todo: backup::todo(path) });
    }
    let check: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(opening)?;
    if check != "ok" {
        return Err(LedgerError::Damaged { path: path.to_owned(), detail: check, todo: backup::todo(path) });
    }
    Ok(version)
}

/// Keys and tokens lie in it: nobody else reads it, whatever directory it is in. What SQLite keeps beside it gets the same
/// mode.
fn for_owner_only(path: &Path) -> io::Result<()> {
    if path == Path::new(":memory:") {
        return Ok(());
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    // Answers "memory" for a ledger in memory, which has no journal file.
    connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // What is deleted is overwritten: a key that is thrown away opens nothing any more.
    connection.query_row("PRAGMA secure_delete = ON", [], |row| row.get::<_, i64>(0))?;
    // Records are small: a page cache of 1 MiB (negative: KiB) holds what is used.
    connection.pragma_update(None, "cache_size", -1024)
}

fn migrate(connection: &mut Connection, from: i64) -> rusqlite::Result<()> {
    let from = usize::try_from(from).unwrap_or(0);
    if from >= MIGRATIONS.len() {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    for migration in &MIGRATIONS[from..] {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}

/// A ledger as the first version of this program made it.
#[cfg(test)]
pub(super) fn make_version_1(path: &Path) -> Connection {
    let connection = Connection::open(path).expect("a file");
    connection.execute_batch(V1).expect("the first schema");
    connection.pragma_update(None, "application_id", APPLICATION_ID).expect("a pragma");
    connection.pragma_update(None, "user_version", 1).expect("a pragma");
    connection
}

/// A ledger as the program before this one made it.
#[cfg(test)]
pub(super) fn make_version_2(path: &Path) -> Connection {
    let connection = make_version_1(path);
    connection.execute_batch(V2).expect("the second schema");
    connection.pragma_update(None, "user_version", 2).expect("a pragma");
    connection
}
