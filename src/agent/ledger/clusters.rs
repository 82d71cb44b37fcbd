//! Clusters, and which members were launched anew. What is decided by a cluster as it is (a registration, a state) is
//! decided in the transaction that writes what it leads to.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::rows::{from_json, is_taken, parse_id, to_json};
use super::{LedgerError, Store, Taken, Write, finish};
use crate::agent::cluster_record::ClusterRecord;
use crate::ids::{ClusterId, VmId};

/// Why the ledger does not take or give up a cluster, or a calculation for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClusterRefusal {
    /// A cluster has this name.
    #[error("the cluster's name is in use")]
    NameTaken,
    /// It is not there (any more).
    #[error("there is no such cluster")]
    Unknown,
    /// It has VMs that live.
    #[error("the cluster has {members} living VMs")]
    InUse {
        /// How many.
        members: u64,
    },
    /// As many calculations wait as can.
    #[error("{waiting} calculations wait for the cluster's members")]
    TooManyCalculations {
        /// How many.
        waiting: u64,
    },
}

/// States of VMs that hold nothing any more, for SQL.
const ENDED: &str = "('stopped', 'failed', 'gone')";

impl Store {
    /// Changes a cluster and writes what else `change` makes of that. Returns what it returns, and the number of the
    /// last event.
    pub fn change_cluster<T>(
        &mut self,
        id: &ClusterId,
        change: impl FnOnce(&mut ClusterRecord) -> (T, Vec<Write>),
    ) -> Result<(T, u64), LedgerError> {
        let transaction = self.connection.transaction()?;
        let found = one(&transaction, "WHERE id = ?1", params![id.as_str()])?;
        let before = found.ok_or(ClusterRefusal::Unknown)?;
        let mut cluster = before.clone();
        let (made, writes) = change(&mut cluster);
        if cluster != before {
            cluster.revision += 1;
            let record = to_json("clusters", id.as_str(), &cluster)?;
            let put = "UPDATE clusters SET state = ?2, record = ?3 WHERE id = ?1";
            transaction.execute(put, params![id.as_str(), cluster.state.name(), record])?;
        }
        Ok((made, finish(transaction, &writes)?))
    }

    /// Deletes a cluster without living VMs, and its calculations, and writes `writes` with it. Returns the number of
    /// the last event.
    pub fn remove_cluster(&mut self, id: &ClusterId, writes: &[Write]) -> Result<u64, LedgerError> {
        let transaction = self.connection.transaction()?;
        let count = format!("SELECT count(*) FROM vms WHERE cluster = ?1 AND state NOT IN {ENDED}");
        let members: i64 = transaction.query_row(&count, [id.as_str()], |row| row.get(0))?;
        if members > 0 {
            return Err(ClusterRefusal::InUse { members: members.cast_unsigned() }.into());
        }
        if transaction.execute("DELETE FROM clusters WHERE id = ?1", [id.as_str()])? == 0 {
            return Err(ClusterRefusal::Unknown.into());
        }
        finish(transaction, writes)
    }

    /// All clusters, oldest first.
    pub fn clusters(&self) -> Result<Vec<ClusterRecord>, LedgerError> {
        many(&self.connection, "ORDER BY rowid", [])
    }

    /// The cluster of this id or name.
    pub fn cluster(&self, word: &str) -> Result<Option<ClusterRecord>, LedgerError> {
        one(&self.connection, "WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC LIMIT 1", params![word])
    }

    /// The clusters whose ids start like this.
    pub fn clusters_by_prefix(&self, prefix: &str) -> Result<Vec<ClusterRecord>, LedgerError> {
        let above = format!("{prefix}{}", char::MAX);
        many(&self.connection, "WHERE id >= ?1 AND id < ?2 ORDER BY id", [prefix, &above])
    }

    /// The members that were launched anew or given up.
    pub fn relaunched(&self) -> Result<BTreeSet<VmId>, LedgerError> {
        let mut query = self.connection.prepare_cached("SELECT vm FROM relaunches")?;
        let rows = query.query_map([], |row| row.get::<_, String>(0))?;
        rows.map(|row| {
            let vm = row?;
            parse_id("relaunches", &vm, &vm)
        })
        .collect()
    }
}

fn id_and_record(row: &Row<'_>) -> rusqlite::Result<(String, String)> {
    Ok((row.get(0)?, row.get(1)?))
}

/// `clause` is a constant of this file.
fn many(
    from: &Connection,
    clause: &'static str,
    values: impl rusqlite::Params,
) -> Result<Vec<ClusterRecord>, LedgerError> {
    let mut query = from.prepare_cached(&format!("SELECT id, record FROM clusters {clause}"))?;
    let rows = query.query_map(values, id_and_record)?;
    rows.map(|row| {
        let (id, record) = row?;
        from_json("clusters", &id, &record)
    })
    .collect()
}

/// `clause` is a constant of this file.
fn one(
    from: &Connection,
    clause: &'static str,
    values: impl rusqlite::Params,
) -> Result<Option<ClusterRecord>, LedgerError> {
    let mut query = from.prepare_cached(&format!("SELECT id, record FROM clusters {clause}"))?;
    let row = query.query_row(values, id_and_record).optional()?;
    row.map(|(id, record)| from_json("clusters", &id, &record)).transpose()
}

/// Writes a cluster that was not there.
pub(super) fn insert(to: &Connection, cluster: &ClusterRecord) -> Result<(), LedgerError> {
    let record = to_json("clusters", cluster.id.as_str(), cluster)?;
    let put = "INSERT INTO clusters(id, name, state, record) VALUES (?1, ?2, ?3, ?4)";
    match to.execute(put, params![cluster.id.as_str(), cluster.name, cluster.state.name(), record]) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) => Err(ClusterRefusal::NameTaken.into()),
        Err(error) => Err(error.into()),
    }
}

/// Writes that a member was launched anew, or is given up.
pub(super) fn relaunched(to: &Connection, vm: &VmId, successor: Option<&VmId>) -> Result<(), LedgerError> {
    let put = "INSERT INTO relaunches(vm, successor) VALUES (?1, ?2)";
    match to.execute(put, params![vm.as_str(), successor.map(VmId::as_str)]) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) => Err(LedgerError::Taken { what: Taken::Relaunch }),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
