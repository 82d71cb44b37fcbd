//! Rows to records and back. What is searched for has a column of its own; the rest is JSON.

use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{EVENTS_KEPT, KeyRow, LedgerError, NewEvent, OPERATIONS_KEPT, StoredAnswer, Taken, state_word};
use crate::agent::effect::Effect;
use crate::agent::record::{EventRecord, OperationRecord, OperationState, StepRecord, StepState, VmRecord};
use crate::clock::{Steady, UnixNanos};
use crate::ids::{OperationId, VmId};

/// As [`nanos`].
pub(super) fn steady(time: Steady) -> i64 {
    nanos(UnixNanos(time.0))
}

/// SQLite's integers are signed; time runs until the year 2262.
pub(super) fn nanos(time: UnixNanos) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn to_json<T: Serialize>(table: &'static str, id: &str, value: &T) -> Result<String, LedgerError> {
    serde_json::to_string(value).map_err(|source| LedgerError::Row { table, id: id.to_owned(), source })
}

pub(super) fn from_json<T: DeserializeOwned>(table: &'static str, id: &str, text: &str) -> Result<T, LedgerError> {
    serde_json::from_str(text).map_err(|source| LedgerError::Row { table, id: id.to_owned(), source })
}

pub(super) fn is_taken(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation)
}

pub(super) fn put_vm(to: &Connection, vm: &VmRecord) -> Result<(), LedgerError> {
    let put = "INSERT INTO vms(id, name, state, revision, record, jail, session_network_id, cluster, executor)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
               ON CONFLICT(id) DO UPDATE SET state = ?3, revision = ?4, record = ?5";
    let record = to_json("vms", vm.id.as_str(), vm)?;
    let session = vm.network.as_ref().map(|network| u32::from(network.session_network_id));
    let member = vm.spec.cluster.as_ref();
    let row = params![
        vm.id.as_str(),
        vm.name,
        vm.state.name(),
        signed(vm.revision),
        record,
        vm.jail,
        session,
        member.map(|member| member.cluster.as_str()),
        member.map(|member| member.executor_id.as_str()),
    ];
    match to.prepare_cached(put)?.execute(row) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) && error.to_string().contains("vms.jail") => {
            Err(LedgerError::Taken { what: Taken::Jail })
        }
        Err(error) if is_taken(&error) && error.to_string().contains("vms.executor") => {
            Err(LedgerError::Taken { what: Taken::Executor })
        }
        Err(error) if is_taken(&error) => Err(LedgerError::Taken { what: Taken::Name }),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn vms(from: &Connection) -> Result<Vec<VmRecord>, LedgerError> {
    let mut query = from.prepare("SELECT id, record FROM vms ORDER BY rowid")?;
    let rows = query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (id, record) = row?;
        from_json("vms", &id, &record)
    })
    .collect()
}

pub(super) fn put_operation(to: &Connection, operation: &OperationRecord) -> Result<(), LedgerError> {
    let id = operation.id.as_str();
    let put = "INSERT INTO operations(id, vm, state, record) VALUES (?1, ?2, ?3, ?4)
               ON CONFLICT(id) DO UPDATE SET state = ?3, record = ?4";
    let whole = OperationRecord { steps: Vec::new(), ..operation.clone() };
    let record = to_json("operations", id, &whole)?;
    to.prepare_cached(put)?.execute(params![id, operation.vm.as_str(), state_word(operation.state), record])?;
    for (index, step) in operation.steps.iter().enumerate() {
        put_step(to, &operation.id, index, step)?;
    }
    if operation.state != OperationState::Running {
        let drop = "DELETE FROM operations WHERE state <> 'running'
                    AND rowid <= (SELECT max(rowid) FROM operations) - ?1";
        to.prepare_cached(drop)?.execute([signed(OPERATIONS_KEPT)])?;
    }
    Ok(())
}

/// What of a step has no column.
#[derive(serde::Serialize, serde::Deserialize)]
struct StepArgs {
    state: StepState,
    took_us: Option<u64>,
    note: Option<String>,
}

pub(super) fn put_step(
    to: &Connection,
    operation: &OperationId,
    index: usize,
    step: &StepRecord,
) -> Result<(), LedgerError> {
    let put = "INSERT INTO steps(op, seq, effect, args, done) VALUES (?1, ?2, ?3, ?4, ?5)
               ON CONFLICT(op, seq) DO UPDATE SET effect = ?3, args = ?4, done = ?5";
    let args = StepArgs { state: step.state, took_us: step.took_us, note: step.note.clone() };
    let args = to_json("steps", operation.as_str(), &args)?;
    let done = step.state == StepState::Done;
    let row = params![operation.as_str(), signed(index as u64), step.effect.name(), args, done];
    to.prepare_cached(put)?.execute(row)?;
    Ok(())
}

fn steps(from: &Connection, operation: &str) -> Result<Vec<StepRecord>, LedgerError> {
    let mut query = from.prepare_cached("SELECT effect, args FROM steps WHERE op = ?1 ORDER BY seq")?;
    let rows = query.query_map([operation], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (effect, args) = row?;
        let effect: Effect = from_json("steps", operation, &format!("\"{effect}\""))?;
        let StepArgs { state, took_us, note } = from_json("steps", operation, &args)?;
        Ok(StepRecord { effect, state, took_us, note })
    })
    .collect()
}

fn with_steps(from: &Connection, id: &str, record: &str) -> Result<OperationRecord, LedgerError> {
    let mut operation: OperationRecord = from_json("operations", id, record)?;
    operation.steps = steps(from, id)?;
    Ok(operation)
}

fn id_and_record(row: &Row<'_>) -> rusqlite::Result<(String, String)> {
    Ok((row.get(0)?, row.get(1)?))
}

/// `clause` is one of this module's callers' constants, never outside text.
pub(super) fn operations(
    from: &Connection,
    clause: &'static str,
    limit: u32,
) -> Result<Vec<OperationRecord>, LedgerError> {
    let mut query = from.prepare(&format!("SELECT id, record FROM operations {clause} LIMIT ?1"))?;
    let rows: Vec<(String, String)> = query.query_map([limit], id_and_record)?.collect::<Result<_, _>>()?;
    rows.iter().map(|(id, record)| with_steps(from, id, record)).collect()
}

pub(super) fn operations_by_prefix(from: &Connection, prefix: &str) -> Result<Vec<OperationRecord>, LedgerError> {
    let mut query = from.prepare("SELECT id, record FROM operations WHERE id >= ?1 AND id < ?2 LIMIT 2")?;
    let above = format!("{prefix}{}", char::MAX);
    let rows: Vec<(String, String)> = query.query_map([prefix, &above], id_and_record)?.collect::<Result<_, _>>()?;
    rows.iter().map(|(id, record)| with_steps(from, id, record)).collect()
}

pub(super) fn put_event(to: &Connection, event: &NewEvent) -> Result<(), LedgerError> {
    let put = "INSERT INTO events(at, kind, vm, operation, body) VALUES (?1, ?2, ?3, ?4, ?5)";
    let body = to_json("events", event.kind, &event.body)?;
    let operation = event.operation.as_ref().map(OperationId::as_str);
    let row = params![nanos(event.at), event.kind, event.subject.to_string(), operation, body];
    to.prepare_cached(put)?.execute(row)?;
    let last = to.last_insert_rowid().cast_unsigned();
    if last.is_multiple_of(64) {
        drop_events(to, event.at)?;
    }
    Ok(())
}

/// Drops events that are more than are kept, and those that are older: both as the ledger's own settings say.
pub(super) fn drop_events(to: &Connection, now: UnixNanos) -> Result<(), LedgerError> {
    let kept = "SELECT value FROM meta WHERE key = ?1";
    let setting = |key: &str| to.prepare_cached(kept)?.query_row([key], |row| row.get::<_, i64>(0)).optional();
    let count = setting("events_kept")?.unwrap_or(signed(EVENTS_KEPT));
    let oldest = signed(last_event(to)?).saturating_sub(count);
    to.prepare_cached("DELETE FROM events WHERE seq <= ?1")?.execute([oldest])?;
    if let Some(age) = setting("events_kept_ns")? {
        // Only from the start of the history, so that it has no holes: a clock may have been set back.
        let drop = "DELETE FROM events WHERE seq < (SELECT coalesce(min(seq), 0) FROM events WHERE at >= ?1)";
        to.prepare_cached(drop)?.execute([nanos(now).saturating_sub(age)])?;
    }
    Ok(())
}

/// How many events are kept from now on, and how long.
pub(super) fn keep_events(to: &Connection, count: u32, age: Duration) -> Result<(), LedgerError> {
    let put = "INSERT INTO meta(key, value) VALUES (?1, ?2) ON CONFLICT(key) DO UPDATE SET value = ?2";
    let age = i64::try_from(age.as_nanos()).unwrap_or(i64::MAX);
    to.execute(put, params!["events_kept", i64::from(count)])?;
    to.execute(put, params!["events_kept_ns", age])?;
    Ok(())
}

/// How many events are kept at the moment, and the number of the oldest; 0 when there is none.
pub(super) fn history(from: &Connection) -> Result<(u64, u64), LedgerError> {
    let query = "SELECT count(*), coalesce(min(seq), 0) FROM events";
    let history =
        from.prepare_cached(query)?.query_row([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?;
    Ok((history.0.cast_unsigned(), history.1.cast_unsigned()))
}

pub(super) fn last_event(from: &Connection) -> Result<u64, LedgerError> {
    let last = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0)";
    let last: i64 = from.prepare_cached(last)?.query_row([], |row| row.get(0))?;
    Ok(last.cast_unsigned())
}

pub(super) fn events(from: &Connection, since: u64, limit: u32) -> Result<Vec<EventRecord>, LedgerError> {
    let query = "SELECT seq, at, kind, vm, operation, body FROM events WHERE seq > ?1 ORDER BY seq LIMIT ?2";
    let mut query = from.prepare_cached(query)?;
    let rows = query.query_map(params![signed(since), limit], |row| {
        Ok((
            row.get::<_, i64>(0)?.cast_unsigned(),
            UnixNanos(row.get::<_, i64>(1)?.cast_unsigned()),
            row.get::<_, String>(2)?,
            row.get::<_, String>(3)?,
            row.get::<_, Option<String>>(4)?,
            row.get::<_, String>(5)?,
        ))
    })?;
    rows.map(|row| {
        let (seq, at, kind, subject, operation, body) = row?;
        let id = seq.to_string();
        Ok(EventRecord {
            seq,
            at,
            kind,
            subject: parse_id("events", &id, &subject)?,
            operation: operation.map(|operation| parse_id("events", &id, &operation)).transpose()?,
            body: from_json("events", &id, &body)?,
        })
    })
    .collect()
}

pub(super) fn parse_id<T: DeserializeOwned>(table: &'static str, row: &str, text: &str) -> Result<T, LedgerError> {
    let value = serde_json::Value::String(text.to_owned());
    serde_json::from_value(value).map_err(|source| LedgerError::Row { table, id: row.to_owned(), source })
}

pub(super) fn put_key(to: &Connection, key: &KeyRow) -> Result<(), LedgerError> {
    to.execute(
        "DELETE FROM idempotency WHERE key = ?1 AND route = ?2 AND expires <= ?3",
        params![key.key, key.route, steady(key.expires) - signed(crate::agent::KEY_LIFETIME_NS)],
    )?;
    let put = "INSERT INTO idempotency(key, route, body_hash, object, status, answer, expires)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    let (status, answer) = match &key.answer {
        Some(StoredAnswer { status, body }) => (Some(*status), Some(body)),
        None => (None, None),
    };
    let row = params![key.key, key.route, key.body_hash, key.object, status, answer, steady(key.expires)];
    match to.prepare_cached(put)?.execute(row) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) => Err(LedgerError::Taken { what: Taken::Key }),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn key(from: &Connection, key: &str, route: &str, now: Steady) -> Result<Option<KeyRow>, LedgerError> {
    let query = "SELECT body_hash, object, status, answer, expires FROM idempotency
                 WHERE key = ?1 AND route = ?2 AND expires > ?3";
    let row = from.query_row(query, params![key, route, steady(now)], |row| {
        let status: Option<u16> = row.get(2)?;
        let body: Option<String> = row.get(3)?;
        Ok(KeyRow {
            key: key.to_owned(),
            route: route.to_owned(),
            body_hash: row.get(0)?,
            object: row.get(1)?,
            answer: status.zip(body).map(|(status, body)| StoredAnswer { status, body }),
            expires: Steady(row.get::<_, i64>(4)?.cast_unsigned()),
        })
    });
    Ok(row.optional()?)
}

pub(super) fn leases(from: &Connection) -> Result<Vec<(u32, VmId)>, LedgerError> {
    let mut query = from.prepare("SELECT uid, vm FROM leases ORDER BY uid")?;
    let rows = query.query_map([], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (uid, vm) = row?;
        Ok((uid, parse_id("leases", &uid.to_string(), &vm)?))
    })
    .collect()
}
