//! The ledger: what the agent knows across its own restarts, in SQLite (WAL, FULL). [`Store`] is the file, used by one
//! thread at a time; [`writer`] is the thread that owns it in a running agent.
//!
//! Whatever changes together is one [`Store::commit`], so an event and the change it tells of are there both or not
//! at all. Intent comes before the act: an operation and its steps are committed before the first step is performed.

pub(super) mod backup;
mod calculations;
mod clusters;
mod pools;
mod rows;
mod schema;
mod sessions;
mod swap;
pub(super) mod writer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};

use super::cluster_record::ClusterRecord;
use super::record::{EventRecord, OperationRecord, OperationState, StepRecord, Subject, VmRecord};
use super::session_record::SessionRecord;
use super::swap::SwapDecision;
use crate::clock::{Steady, UnixNanos, Uptime};
use crate::ids::{BundleId, OperationId, VmId};
use crate::report::Retry;
use crate::wire::control::SealingKey;

pub use backup::{Backup, BackupError, RestoreError, backups, dump, restore};
pub use calculations::CalculationChange;
pub use clusters::ClusterRefusal;
pub use sessions::{Claim, Grant, LocalLease, NewSession, NumberChoice, SessionRefusal};

/// Events that are kept; older ones are dropped. A client that polls once a minute at ten events a second misses none.
pub(super) const EVENTS_KEPT: u64 = 10_000;

/// Ended operations that are kept.
pub(super) const OPERATIONS_KEPT: u64 = 1_000;

/// Most events read at once.
pub const EVENTS_PAGE: u32 = 256;

/// Why the ledger could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file could not be opened.
    #[error("open the ledger {}", path.display())]
    Open {
        /// Where it is.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The file cannot be opened, or not be made its owner's alone.
    #[error("open the ledger {} for its owner alone", path.display())]
    Protect {
        /// Where it is.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a ledger: not SQLite, or another program's.
    #[error("{} is not a ledger of this program, or its head is damaged; {todo}", path.display())]
    Foreign {
        /// Where it is.
        path: PathBuf,
        /// What to do: the newest backup and the command that restores it.
        todo: String,
    },
    /// A newer program wrote it.
    #[error("the ledger {} has version {found}, this program knows up to {known}; use the newer program", path.display())]
    Newer {
        /// Where it is.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest version this program knows.
        known: i64,
    },
    /// The file is damaged.
    #[error("the ledger {} is damaged ({detail}); {todo}", path.display())]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// What the check says.
        detail: String,
        /// What to do: the newest backup and the command that restores it.
        todo: String,
    },
    /// A statement failed.
    #[error("use the ledger")]
    Sql(#[source] rusqlite::Error),
    /// What it is stored on does not take what is written, or does not give back what was.
    #[error("use the ledger: the file system of the state directory is full, read-only or damaged; `dmesg` may tell")]
    Storage(#[source] rusqlite::Error),
    /// A row does not hold what it must.
    #[error("read {table} {id:?} from the ledger")]
    Row {
        /// The table.
        table: &'static str,
        /// The row.
        id: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The name, uid or key is in use.
    #[error("{what} is in use")]
    Taken {
        /// What.
        what: Taken,
    },
    /// A session, or a VM in one, is not taken or given up.
    #[error("use the session")]
    Session(#[from] SessionRefusal),
    /// A cluster, or a calculation for one, is not taken or given up.
    #[error("use the cluster")]
    Cluster(#[from] ClusterRefusal),
    /// The thread that owns the ledger has ended.
    #[error("the ledger is closed")]
    Closed,
}

/// What only one may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A VM's name.
    Name,
    /// A VMM's user id.
    Uid,
    /// A VM's jail.
    Jail,
    /// An executor id among the living members of a cluster.
    Executor,
    /// The one launch anew of a member.
    Relaunch,
    /// An idempotency key.
    Key,
}

impl std::fmt::Display for Taken {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Name => "the name",
            Self::Uid => "the uid",
            Self::Jail => "the jail",
            Self::Executor => "the executor id",
            Self::Relaunch => "the launch anew",
            Self::Key => "the idempotency key",
        })
    }
}

impl From<rusqlite::Error> for LedgerError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::SystemIoFailure | ErrorCode::DiskFull | ErrorCode::ReadOnly) => Self::Storage(error),
            Some(_) | None => Self::Sql(error),
        }
    }
}

impl LedgerError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Foreign { .. }
            | Self::Newer { .. }
            | Self::Damaged { .. }
            | Self::Taken { .. }
            | Self::Session(_)
            | Self::Cluster(_) => Retry::WithChange,
            Self::Open { .. } | Self::Protect { .. } | Self::Sql(_) | Self::Storage(_) | Self::Closed => Retry::Later,
            Self::Row { .. } => Retry::Never,
        }
    }
}

/// One thing to write.
#[derive(Debug, Clone)]
pub enum Write {
    /// A VM, whole.
    Vm(Box<VmRecord>),
    /// A VM's row is deleted.
    NoVm(VmId),
    /// An operation with its steps, whole.
    Operation(Box<OperationRecord>),
    /// One step of an operation.
    Step {
        /// The operation.
        operation: OperationId,
        /// Which step, from 0.
        index: usize,
        /// How it is now.
        step: StepRecord,
    },
    /// Something happened.
    Event(NewEvent),
    /// A uid belongs to a VM; fails when it belongs to another.
    Lease {
        /// The uid.
        uid: u32,
        /// Whose it is.
        vm: VmId,
    },
    /// A VM's uid is not used any more, and may be again from then on.
    Release {
        /// Whose it was.
        vm: VmId,
        /// When it may be used again.
        quarantine_until: Steady,
    },
    /// A VM's local id is not used any more, and may be again from then on. Nothing for a VM without a session.
    ReleaseLocal {
        /// Whose it was.
        vm: VmId,
        /// When it may be used again.
        quarantine_until: Steady,
    },
    /// A session that is there, whole.
    Session(Box<SessionRecord>),
    /// A cluster that was not there; fails when its name is in use.
    NewCluster(Box<ClusterRecord>),
    /// A member that did not register was launched anew as `successor`, or is given up; fails when that was written
    /// before.
    Relaunched {
        /// The one that did not register.
        vm: VmId,
        /// The one launched instead.
        successor: Option<VmId>,
    },
    /// The key of what is sealed of a VM; the one before is forgotten.
    SwapKey {
        /// Whose it is.
        vm: VmId,
        /// The key.
        key: SealingKey,
    },
    /// There is nothing sealed of this VM.
    NoSwapKey(VmId),
    /// So many machines of a bundle are to be kept ready; 0: none.
    Pool {
        /// The bundle.
        bundle: BundleId,
        /// How many.
        size: u32,
    },
    /// Something was decided about idle VMs. Old decisions are dropped.
    SwapDecision(Box<SwapDecision>),
    /// A create with an idempotency key began; fails when the key is known.
    Key(KeyRow),
    /// The answer to a create with an idempotency key.
    Answer {
        /// The client's key.
        key: String,
        /// Method and path.
        route: String,
        /// Status and body.
        answer: StoredAnswer,
    },
}

/// An event before it has its number.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// When.
    pub at: UnixNanos,
    /// What.
    pub kind: &'static str,
    /// What it is about.
    pub subject: Subject,
    /// The operation it belongs to.
    pub operation: Option<OperationId>,
    /// What is worth knowing about it.
    pub body: serde_json::Value,
}

/// A create with an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// The client's key.
    pub key: String,
    /// Method and path.
    pub route: String,
    /// blake3 of the body.
    pub body_hash: [u8; 32],
    /// What it made.
    pub object: String,
    /// When it may be forgotten.
    pub expires: Steady,
    /// What was answered, once it was.
    pub answer: Option<StoredAnswer>,
}

/// An answer that is given again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    /// HTTP status.
    pub status: u16,
    /// JSON body.
    pub body: String,
}

/// What a new agent starts from.
#[derive(Debug, Default)]
pub struct Loaded {
    /// All VMs, oldest first.
    pub vms: Vec<VmRecord>,
    /// The operations that were not ended.
    pub operations: Vec<OperationRecord>,
    /// The number of this agent among those that had this ledger.
    pub epoch: u64,
    /// Number of the last event.
    pub last_event: u64,
}

/// The ledger file.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
}

impl Store {
    /// Opens the ledger, making or migrating it as needed.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        Ok(Self { connection: schema::open(path)? })
    }

    /// A ledger in memory, for simulations.
    pub fn in_memory() -> Result<Self, LedgerError> {
        Ok(Self { connection: schema::open(Path::new(":memory:"))? })
    }

    /// Reads go on, and every write fails from now on, or no more: what a full disk does, for simulations.
    pub fn refuse_writes(&mut self, refuses: bool) -> Result<(), LedgerError> {
        Ok(self.connection.pragma_update(None, "query_only", refuses)?)
    }

    /// Takes the next epoch and reads what there is.
    pub fn begin(&mut self) -> Result<Loaded, LedgerError> {
        let epoch = "INSERT INTO meta(key, value) VALUES ('epoch', 1)
                     ON CONFLICT(key) DO UPDATE SET value = value + 1 RETURNING value";
        let epoch: i64 = self.connection.query_row(epoch, [], |row| row.get(0))?;
        Ok(Loaded {
            vms: rows::vms(&self.connection)?,
            operations: self.unfinished()?,
            epoch: epoch.cast_unsigned(),
            last_event: rows::last_event(&self.connection)?,
        })
    }

    /// The number that sets this ledger apart from others: `first` when it has none yet, the same from then on.
    pub fn instance(&mut self, first: u64) -> Result<u64, LedgerError> {
        let keep = "INSERT INTO meta(key, value) VALUES ('instance', ?1) ON CONFLICT(key) DO NOTHING";
        self.connection.execute(keep, [first.cast_signed()])?;
        let find = "SELECT value FROM meta WHERE key = 'instance'";
        Ok(self.connection.query_row(find, [], |row| row.get::<_, i64>(0))?.cast_unsigned())
    }

    /// The time of what rests and runs out, by a host's uptime. Counted from the wall clock once for each boot; nothing that
    /// was written in an earlier one rests longer than `rest_max` from now.
    pub fn steady(&mut self, up: Uptime, wall: UnixNanos, rest_max: Duration) -> Result<Steady, LedgerError> {
        let transaction = self.connection.transaction()?;
        let known = |key: &str| {
            let find = "SELECT value FROM meta WHERE key = ?1";
            transaction.query_row(find, [key], |row| row.get::<_, i64>(0)).optional()
        };
        let same_boot = known("boot")? == Some(up.boot.cast_signed());
        let began = match known("boot_began")?.filter(|_| same_boot) {
            Some(began) => Steady(began.cast_unsigned()),
            None => {
                let began = Duration::from_nanos(wall.0).saturating_sub(up.since_boot);
                let began = Steady(0).after(began);
                let put = "INSERT INTO meta(key, value) VALUES (?1, ?2) ON CONFLICT(key) DO UPDATE SET value = ?2";
                transaction.execute(put, params!["boot", up.boot.cast_signed()])?;
                transaction.execute(put, params!["boot_began", rows::steady(began)])?;
                let latest = rows::steady(began.after(up.since_boot).after(rest_max));
                for table in ["leases", "locals", "resting_sessions"] {
                    let shorten = format!("UPDATE {table} SET quarantine_until = ?1 WHERE quarantine_until > ?1");
                    transaction.execute(&shorten, [latest])?;
                }
                began
            }
        };
        transaction.commit()?;
        Ok(began.after(up.since_boot))
    }

    /// Counts how often it was tried: fails where any other write would. SQLite would not write what is there already.
    pub fn try_to_write(&mut self) -> Result<(), LedgerError> {
        let count = "INSERT INTO meta(key, value) VALUES ('tried', 1)
                     ON CONFLICT(key) DO UPDATE SET value = value + 1";
        self.connection.execute(count, [])?;
        Ok(())
    }

    /// Writes all or nothing. Returns the number of the last event.
    pub fn commit(&mut self, writes: &[Write]) -> Result<u64, LedgerError> {
        finish(self.connection.transaction()?, writes)
    }

    /// All VMs, oldest first.
    pub fn vms(&self) -> Result<Vec<VmRecord>, LedgerError> {
        rows::vms(&self.connection)
    }

    /// Events after `since`, oldest first, at most [`EVENTS_PAGE`].
    pub fn events(&self, since: u64) -> Result<Vec<EventRecord>, LedgerError> {
        rows::events(&self.connection, since, EVENTS_PAGE)
    }

    /// One operation.
    pub fn operation(&self, id: &str) -> Result<Option<OperationRecord>, LedgerError> {
        // A prefix is compared by range, so that the index serves; ids hold no character above 'z'.
        let found = rows::operations_by_prefix(&self.connection, id)?;
        Ok(match found.len() {
            1 => found.into_iter().next(),
            _ => found.into_iter().find(|operation| operation.id.as_str() == id),
        })
    }

    /// The newest operations, newest first.
    pub fn operations(&self) -> Result<Vec<OperationRecord>, LedgerError> {
        rows::operations(&self.connection, "ORDER BY rowid DESC", 1000)
    }

    /// The operations that are not ended, oldest first.
    pub fn unfinished(&self) -> Result<Vec<OperationRecord>, LedgerError> {
        rows::operations(&self.connection, "WHERE state = 'running' ORDER BY rowid", u32::MAX)
    }

    /// The lowest uid from `base` on that is neither in use nor in quarantine, among `count`.
    pub fn free_uid(&mut self, base: u32, count: u32, now: Steady) -> Result<Option<u32>, LedgerError> {
        let sweep = "DELETE FROM leases WHERE quarantine_until IS NOT NULL AND quarantine_until <= ?1";
        self.connection.execute(sweep, [rows::steady(now)])?;
        let mut taken = self.connection.prepare_cached("SELECT uid FROM leases WHERE uid >= ?1 ORDER BY uid")?;
        let mut free = base;
        for uid in taken.query_map([base], |row| row.get::<_, u32>(0))? {
            if uid? != free {
                break;
            }
            free = free.saturating_add(1);
        }
        Ok((free - base < count).then_some(free))
    }

    /// Drops what has run out: quarantines and idempotency keys.
    pub fn sweep(&mut self, now: Steady, wall: UnixNanos) -> Result<(), LedgerError> {
        sessions::sweep(&self.connection, now)?;
        let nanos = rows::steady(now);
        self.connection.execute("DELETE FROM leases WHERE quarantine_until <= ?1", [nanos])?;
        self.connection.execute("DELETE FROM idempotency WHERE expires <= ?1", [nanos])?;
        rows::drop_events(&self.connection, wall)
    }

    /// How many events are kept from now on, and how long.
    pub fn keep_events(&mut self, count: u32, age: Duration) -> Result<(), LedgerError> {
        rows::keep_events(&self.connection, count, age)
    }

    /// How many events are kept at the moment, and the number of the oldest; 0 when there is none.
    pub fn history(&self) -> Result<(u64, u64), LedgerError> {
        rows::history(&self.connection)
    }

    /// Where the ledger is; `None` in memory.
    pub fn file(&self) -> Option<PathBuf> {
        self.connection.path().filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    /// The last operations that failed, newest first.
    pub fn failures(&self, count: u32) -> Result<Vec<OperationRecord>, LedgerError> {
        rows::operations(&self.connection, "WHERE state = 'failed' ORDER BY rowid DESC", count)
    }

    /// Copies the ledger into a new file, as it is at this moment.
    pub fn back_up(&self, to: &Path) -> Result<(), BackupError> {
        backup::copy(&self.connection, to)
    }

    /// What is known of an idempotency key.
    pub fn key(&self, key: &str, route: &str, now: Steady) -> Result<Option<KeyRow>, LedgerError> {
        rows::key(&self.connection, key, route, now)
    }

    /// The uids in use: by a VM, or in quarantine.
    pub fn leases(&self) -> Result<Vec<(u32, VmId)>, LedgerError> {
        rows::leases(&self.connection)
    }
}

/// Writes the rest of a transaction. Returns the number of the last event.
fn finish(transaction: Transaction<'_>, writes: &[Write]) -> Result<u64, LedgerError> {
    for write in writes {
        apply(&transaction, write)?;
    }
    let last = rows::last_event(&transaction)?;
    transaction.commit()?;
    Ok(last)
}

fn apply(to: &Transaction<'_>, write: &Write) -> Result<(), LedgerError> {
    match write {
        Write::Vm(vm) => rows::put_vm(to, vm),
        Write::NoVm(id) => {
            to.execute("DELETE FROM vms WHERE id = ?1", [id.as_str()])?;
            to.execute("DELETE FROM relaunches WHERE vm = ?1", [id.as_str()])?;
            swap::forget_key(to, id)
        }
        Write::Operation(operation) => rows::put_operation(to, operation),
        Write::Step { operation, index, step } => rows::put_step(to, operation, *index, step),
        Write::Event(event) => rows::put_event(to, event),
        Write::Lease { uid, vm } => lease(to, *uid, vm),
        Write::Release { vm, quarantine_until } => {
            let until = rows::steady(*quarantine_until);
            let release = "UPDATE leases SET quarantine_until = ?2 WHERE vm = ?1 AND quarantine_until IS NULL";
            to.execute(release, params![vm.as_str(), until])?;
            Ok(())
        }
        Write::ReleaseLocal { vm, quarantine_until } => sessions::release(to, vm, *quarantine_until),
        Write::Session(session) => sessions::update(to, session),
        Write::NewCluster(cluster) => clusters::insert(to, cluster),
        Write::Relaunched { vm, successor } => clusters::relaunched(to, vm, successor.as_ref()),
        Write::SwapKey { vm, key } => swap::put_key(to, vm, key),
        Write::NoSwapKey(vm) => swap::forget_key(to, vm),
        Write::Pool { bundle, size } => pools::put(to, bundle, *size),
        Write::SwapDecision(decision) => swap::put_decision(to, decision),
        Write::Key(key) => rows::put_key(to, key),
        Write::Answer { key, route, answer } => {
            let put = "UPDATE idempotency SET status = ?3, answer = ?4 WHERE key = ?1 AND route = ?2";
            to.execute(put, params![key, route, answer.status, answer.body])?;
            Ok(())
        }
    }
}

fn lease(to: &Transaction<'_>, uid: u32, vm: &VmId) -> Result<(), LedgerError> {
    let owner =
        to.query_row("SELECT vm FROM leases WHERE uid = ?1", [uid], |row| row.get::<_, String>(0)).optional()?;
    match owner {
        Some(owner) if owner == vm.as_str() => Ok(()),
        Some(_) => Err(LedgerError::Taken { what: Taken::Uid }),
        None => {
            to.execute("INSERT INTO leases(uid, vm) VALUES (?1, ?2)", params![uid, vm.as_str()])?;
            Ok(())
        }
    }
}

/// The word an operation's state has in its column.
const fn state_word(state: OperationState) -> &'static str {
    state.name()
}

#[cfg(test)]
mod tests;
