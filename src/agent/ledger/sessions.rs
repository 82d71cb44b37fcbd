//! Sessions, and the numbers that are handed out one by one: session network ids, local ids and jails. Each is found
//! and taken in the transaction that also writes whose it is, and rests before it is somebody else's.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::rows::{from_json, is_taken, parse_id, steady, to_json};
use super::{LedgerError, Store, Write, finish};
use crate::agent::session_record::{JAILS_MAX, SessionRecord, SessionState};
use crate::clock::Steady;
use crate::ids::{SessionId, VmId};
use crate::net::address::{LocalId, SessionNetworkId};

/// Why the ledger does not take or give up a session, or a VM in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionRefusal {
    /// A session has this name.
    #[error("the session's name is in use")]
    NameTaken,
    /// A session has this network id.
    #[error("the session network id is in use")]
    NumberTaken,
    /// A session had this network id a moment ago.
    #[error("the session network id rests")]
    Resting {
        /// When it may be used again.
        until: Steady,
    },
    /// No network id is free.
    #[error("no session network id is free")]
    NoNumber,
    /// It is not there (any more).
    #[error("there is no such session")]
    Unknown,
    /// It is being removed.
    #[error("the session is being drained")]
    Draining,
    /// Its time has run out.
    #[error("the session has expired")]
    Expired,
    /// It has VMs.
    #[error("the session has {members} VMs")]
    InUse {
        /// How many, ended ones included.
        members: u64,
    },
    /// No local id is free.
    #[error("no local id is free")]
    NoLocal,
    /// No jail is free.
    #[error("no jail is free")]
    NoJail,
}

/// How a new session's network id is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberChoice {
    /// This one.
    Exactly(SessionNetworkId),
    /// The next free one after the last that was chosen like this, from `first` to `last` and from `first` on again.
    Next {
        /// The lowest.
        first: u32,
        /// The highest.
        last: u32,
    },
}

/// A session to write, with what belongs to it.
#[derive(Debug)]
pub struct NewSession {
    /// The session.
    pub record: SessionRecord,
    /// What its members read from the metadata service.
    pub user_data: Option<String>,
    /// Written with it.
    pub writes: Vec<Write>,
}

/// What a VM needs of the numbers that are handed out one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The VM.
    pub vm: VmId,
    /// The session it joins, and the highest local id that fits its addresses.
    pub session: Option<(SessionId, u32)>,
    /// The jail it is to have: one that is ready. `None`: whichever is free.
    pub jail: Option<u16>,
    /// The time.
    pub now: Steady,
}

/// What a VM got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The number of its jail.
    pub jail: u16,
    /// Its session and its number there.
    pub member: Option<(SessionRecord, LocalId)>,
}

/// A local id that is in use or rests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalLease {
    /// The session's network id.
    pub session_network_id: u32,
    /// The local id.
    pub local_id: u32,
    /// Whose it is, or was.
    pub vm: VmId,
    /// When it may be used again; `None` while it is in use.
    pub quarantine_until: Option<Steady>,
}

impl Store {
    /// Finds a network id and writes the session that `make` makes of it. Returns it and the number of the last event.
    pub fn create_session(
        &mut self,
        choice: NumberChoice,
        now: Steady,
        make: impl FnOnce(SessionNetworkId) -> NewSession,
    ) -> Result<(SessionRecord, u64), LedgerError> {
        let transaction = self.connection.transaction()?;
        let number = match choice {
            NumberChoice::Exactly(number) => match resting_until(&transaction, number, now)? {
                Some(until) => return Err(SessionRefusal::Resting { until }.into()),
                None => number,
            },
            NumberChoice::Next { first, last } => next_number(&transaction, first, last, now)?,
        };
        let NewSession { record, user_data, writes } = make(number);
        insert(&transaction, &record, user_data.as_deref())?;
        let last = finish(transaction, &writes)?;
        Ok((record, last))
    }

    /// Finds what a VM claims and writes what `make` makes of it. Returns what else that made, and the number of the
    /// last event.
    pub fn admit_vm<T>(
        &mut self,
        claim: &Claim,
        make: impl FnOnce(Grant) -> (T, Vec<Write>),
    ) -> Result<(T, u64), LedgerError> {
        let transaction = self.connection.transaction()?;
        let jail = claim.jail.map_or_else(|| free_jail(&transaction), Ok)?;
        let member = match &claim.session {
            Some((session, local_max)) => {
                let session = open_session(&transaction, session, claim.now)?;
                let number = session.session_network_id;
                let local = free_local(&transaction, number, *local_max, claim.now)?;
                let take = "INSERT INTO locals(session_network_id, local_id, vm) VALUES (?1, ?2, ?3)";
                transaction.execute(take, params![u32::from(number), u32::from(local), claim.vm.as_str()])?;
                Some((session, local))
            }
            None => None,
        };
        let (made, writes) = make(Grant { jail, member });
        Ok((made, finish(transaction, &writes)?))
    }

    /// Deletes a session without VMs, lets its network id rest, and writes `writes` with it. Returns the number of
    /// the last event.
    pub fn remove_session(
        &mut self,
        id: &SessionId,
        quarantine_until: Steady,
        writes: &[Write],
    ) -> Result<u64, LedgerError> {
        let transaction = self.connection.transaction()?;
        let Some(session) = one(&transaction, "WHERE id = ?1", params![id.as_str()])? else {
            return Err(SessionRefusal::Unknown.into());
        };
        let number = u32::from(session.session_network_id);
        let count = "SELECT count(*) FROM vms WHERE session_network_id = ?1";
        let members: i64 = transaction.query_row(count, [number], |row| row.get(0))?;
        if members > 0 {
            return Err(SessionRefusal::InUse { members: members.cast_unsigned() }.into());
        }
        transaction.execute("DELETE FROM sessions WHERE id = ?1", [id.as_str()])?;
        let rest = "INSERT INTO resting_sessions(session_network_id, quarantine_until) VALUES (?1, ?2)
                    ON CONFLICT(session_network_id) DO UPDATE SET quarantine_until = ?2";
        transaction.execute(rest, params![number, steady(quarantine_until)])?;
        finish(transaction, writes)
    }

    /// All sessions, oldest first.
    pub fn sessions(&self) -> Result<Vec<SessionRecord>, LedgerError> {
        let mut query = self.connection.prepare_cached("SELECT id, record FROM sessions ORDER BY rowid")?;
        let rows = query.query_map([], id_and_record)?;
        rows.map(|row| {
            let (id, record) = row?;
            from_json("sessions", &id, &record)
        })
        .collect()
    }

    /// The session of this id, name or network id.
    pub fn session(&self, word: &str) -> Result<Option<SessionRecord>, LedgerError> {
        // No name is a number: names start with a letter.
        let number = word.parse::<u32>().ok();
        one(&self.connection, "WHERE id = ?1 OR name = ?1 OR session_network_id = ?2", params![word, number])
    }

    /// The sessions whose ids start like this.
    pub fn sessions_by_prefix(&self, prefix: &str) -> Result<Vec<SessionRecord>, LedgerError> {
        let query = "SELECT id, record FROM sessions WHERE id >= ?1 AND id < ?2 ORDER BY id";
        let mut query = self.connection.prepare_cached(query)?;
        let rows = query.query_map([prefix, &format!("{prefix}{}", char::MAX)], id_and_record)?;
        rows.map(|row| {
            let (id, record) = row?;
            from_json("sessions", &id, &record)
        })
        .collect()
    }

    /// What a session's members read from the metadata service; `None` when there is nothing, or no such session.
    pub fn user_data(&self, id: &SessionId) -> Result<Option<String>, LedgerError> {
        let query = "SELECT user_data FROM sessions WHERE id = ?1";
        let found = self.connection.query_row(query, [id.as_str()], |row| row.get::<_, Option<String>>(0));
        Ok(found.optional()?.flatten())
    }

    /// Until when a network id rests, if it does.
    pub fn resting_until(&self, id: SessionNetworkId, now: Steady) -> Result<Option<Steady>, LedgerError> {
        resting_until(&self.connection, id, now)
    }

    /// The local ids that are in use or rest.
    pub fn locals(&self) -> Result<Vec<LocalLease>, LedgerError> {
        let query = "SELECT session_network_id, local_id, vm, quarantine_until FROM locals ORDER BY 1, 2";
        let mut query = self.connection.prepare_cached(query)?;
        let rows = query.query_map([], |row| {
            let until = row.get::<_, Option<i64>>(3)?.map(|until| Steady(until.cast_unsigned()));
            Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?, until))
        })?;
        rows.map(|row| {
            let (session_network_id, local_id, vm, quarantine_until) = row?;
            let vm = parse_id("locals", &format!("{session_network_id}/{local_id}"), &vm)?;
            Ok(LocalLease { session_network_id, local_id, vm, quarantine_until })
        })
        .collect()
    }
}

fn id_and_record(row: &Row<'_>) -> rusqlite::Result<(String, String)> {
    Ok((row.get(0)?, row.get(1)?))
}

/// `clause` is a constant of this file.
fn one(
    from: &Connection,
    clause: &'static str,
    values: impl rusqlite::Params,
) -> Result<Option<SessionRecord>, LedgerError> {
    let mut query = from.prepare_cached(&format!("SELECT id, record FROM sessions {clause}"))?;
    let row = query.query_row(values, id_and_record).optional()?;
    row.map(|(id, record)| from_json("sessions", &id, &record)).transpose()
}

fn insert(to: &Connection, session: &SessionRecord, user_data: Option<&str>) -> Result<(), LedgerError> {
    let put = "INSERT INTO sessions(id, name, session_network_id, state, record, user_data)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    let record = to_json("sessions", session.id.as_str(), session)?;
    let number = u32::from(session.session_network_id);
    let row = params![session.id.as_str(), session.name, number, session.state.name(), record, user_data];
    match to.execute(put, row) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) && error.to_string().contains("sessions.name") => {
            Err(SessionRefusal::NameTaken.into())
        }
        Err(error) if is_taken(&error) => Err(SessionRefusal::NumberTaken.into()),
        Err(error) => Err(error.into()),
    }
}

/// Writes a session that is there.
pub(super) fn update(to: &Connection, session: &SessionRecord) -> Result<(), LedgerError> {
    let record = to_json("sessions", session.id.as_str(), session)?;
    let put = "UPDATE sessions SET state = ?2, record = ?3 WHERE id = ?1";
    to.execute(put, params![session.id.as_str(), session.state.name(), record])?;
    Ok(())
}

/// A VM's local id is not used any more, and may be again from then on.
pub(super) fn release(to: &Connection, vm: &VmId, quarantine_until: Steady) -> Result<(), LedgerError> {
    let release = "UPDATE locals SET quarantine_until = ?2 WHERE vm = ?1 AND quarantine_until IS NULL";
    to.execute(release, params![vm.as_str(), steady(quarantine_until)])?;
    Ok(())
}

/// Drops quarantines that have run out.
pub(super) fn sweep(from: &Connection, now: Steady) -> Result<(), LedgerError> {
    from.execute("DELETE FROM locals WHERE quarantine_until <= ?1", [steady(now)])?;
    from.execute("DELETE FROM resting_sessions WHERE quarantine_until <= ?1", [steady(now)])?;
    Ok(())
}

fn resting_until(from: &Connection, number: SessionNetworkId, now: Steady) -> Result<Option<Steady>, LedgerError> {
    let query = "SELECT quarantine_until FROM resting_sessions
                 WHERE session_network_id = ?1 AND quarantine_until > ?2";
    let found = from.query_row(query, params![u32::from(number), steady(now)], |row| row.get::<_, i64>(0));
    Ok(found.optional()?.map(|until| Steady(until.cast_unsigned())))
}

/// The session, if VMs may join it now.
fn open_session(from: &Connection, id: &SessionId, now: Steady) -> Result<SessionRecord, LedgerError> {
    let session = one(from, "WHERE id = ?1", params![id.as_str()])?.ok_or(SessionRefusal::Unknown)?;
    if session.is_expired(now) {
        return Err(SessionRefusal::Expired.into());
    }
    match session.state {
        SessionState::Active => Ok(session),
        SessionState::Draining => Err(SessionRefusal::Draining.into()),
    }
}

/// Where the search for the next network id goes on.
const NUMBER_CURSOR: &str = "session_network_id";

fn next_number(to: &Connection, first: u32, last: u32, now: Steady) -> Result<SessionNetworkId, LedgerError> {
    sweep(to, now)?;
    let cursor = "SELECT value FROM meta WHERE key = ?1";
    let cursor = to.query_row(cursor, [NUMBER_CURSOR], |row| row.get::<_, i64>(0)).optional()?;
    let cursor = cursor.and_then(|cursor| u32::try_from(cursor).ok());
    let start = cursor.filter(|cursor| (first..last).contains(cursor)).map_or(first, |cursor| cursor + 1);
    let taken = "SELECT session_network_id FROM sessions WHERE session_network_id BETWEEN ?1 AND ?2
                 UNION SELECT session_network_id FROM resting_sessions WHERE session_network_id BETWEEN ?1 AND ?2";
    let mut taken = to.prepare_cached(taken)?;
    let taken: BTreeSet<u32> = taken.query_map([first, last], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let free = (start..=last).chain(first..start).filter(|number| !taken.contains(number));
    // Some numbers are reserved: those do not become ids.
    let number = free.into_iter().find_map(|number| SessionNetworkId::try_from(number).ok());
    let number = number.ok_or(SessionRefusal::NoNumber)?;
    let keep = "INSERT INTO meta(key, value) VALUES (?1, ?2) ON CONFLICT(key) DO UPDATE SET value = ?2";
    to.execute(keep, params![NUMBER_CURSOR, u32::from(number)])?;
    Ok(number)
}

/// The first number from `start` on that is not among `taken`, which ascends.
fn first_gap(start: u32, taken: impl Iterator<Item = rusqlite::Result<u32>>) -> Result<u32, LedgerError> {
    let mut free = start;
    for number in taken {
        if number? != free {
            break;
        }
        free = free.saturating_add(1);
    }
    Ok(free)
}

fn free_local(to: &Connection, session: SessionNetworkId, max: u32, now: Steady) -> Result<LocalId, LedgerError> {
    sweep(to, now)?;
    let taken = "SELECT local_id FROM locals WHERE session_network_id = ?1 ORDER BY local_id";
    let mut taken = to.prepare_cached(taken)?;
    let free = first_gap(1, taken.query_map([u32::from(session)], |row| row.get(0))?)?;
    if free > max {
        return Err(SessionRefusal::NoLocal.into());
    }
    LocalId::try_from(free).map_err(|_| SessionRefusal::NoLocal.into())
}

fn free_jail(from: &Connection) -> Result<u16, LedgerError> {
    let mut taken = from.prepare_cached("SELECT jail FROM vms ORDER BY jail")?;
    let free = first_gap(0, taken.query_map([], |row| row.get(0))?)?;
    match u16::try_from(free) {
        Ok(jail) if jail < JAILS_MAX => Ok(jail),
        Ok(_) | Err(_) => Err(SessionRefusal::NoJail.into()),
    }
}

#[cfg(test)]
mod tests;
