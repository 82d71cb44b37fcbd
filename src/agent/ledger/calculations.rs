//! Calculations: the record as JSON, what goes in and comes out as bytes beside it, so that a list reads no output.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::rows::{from_json, to_json};
use super::{ClusterRefusal, LedgerError, Store, Write, finish};
use crate::agent::calculation_record::{CalculationOutput, CalculationRecord};
use crate::ids::{CalculationId, ClusterId};

/// Calculations of one cluster that may wait for a member.
const WAITING_MAX: i64 = 256;

/// Calculations of one cluster that are kept after their end.
const ENDED_KEPT: i64 = 256;

/// States of calculations that go on, for SQL.
const UNDER_WAY: &str = "('queued', 'running')";

/// A calculation's next state.
#[derive(Debug)]
pub struct CalculationChange {
    /// The name of the state it has to be in: otherwise somebody else was faster, and nothing is written.
    pub from: &'static str,
    /// How it is from now on.
    pub record: CalculationRecord,
    /// What it wrote, at its end.
    pub output: Option<CalculationOutput>,
    /// Written with it.
    pub writes: Vec<Write>,
}

impl Store {
    /// Writes a calculation that was not there, and `writes` with it. Returns the number of the last event.
    pub fn queue_calculation(
        &mut self,
        record: &CalculationRecord,
        stdin: &[u8],
        writes: &[Write],
    ) -> Result<u64, LedgerError> {
        let transaction = self.connection.transaction()?;
        let cluster = record.cluster.as_str();
        let known = "SELECT count(*) FROM clusters WHERE id = ?1";
        let known: i64 = transaction.query_row(known, [cluster], |row| row.get(0))?;
        if known == 0 {
            return Err(ClusterRefusal::Unknown.into());
        }
        let waiting = "SELECT count(*) FROM calculations WHERE cluster = ?1 AND state = 'queued'";
        let waiting: i64 = transaction.query_row(waiting, [cluster], |row| row.get(0))?;
        if waiting >= WAITING_MAX {
            return Err(ClusterRefusal::TooManyCalculations { waiting: waiting.cast_unsigned() }.into());
        }
        let json = to_json("calculations", record.id.as_str(), record)?;
        let put = "INSERT INTO calculations(id, cluster, state, record, stdin) VALUES (?1, ?2, ?3, ?4, ?5)";
        transaction.execute(put, params![record.id.as_str(), cluster, record.state.name(), json, stdin])?;
        let old = format!(
            "SELECT rowid FROM calculations WHERE cluster = ?1 AND state NOT IN {UNDER_WAY}
             ORDER BY rowid DESC LIMIT -1 OFFSET ?2"
        );
        let drop = format!("DELETE FROM calculations WHERE rowid IN ({old})");
        transaction.execute(&drop, params![cluster, ENDED_KEPT])?;
        finish(transaction, writes)
    }

    /// Takes a calculation to its next state. Returns the number of the last event, or nothing when it was not in the
    /// state it had to be in.
    pub fn change_calculation(&mut self, change: &CalculationChange) -> Result<Option<u64>, LedgerError> {
        let CalculationChange { from, record, output, writes } = change;
        let transaction = self.connection.transaction()?;
        let json = to_json("calculations", record.id.as_str(), record)?;
        let (stdout, stderr) = match output {
            Some(output) => (Some(output.stdout.as_slice()), Some(output.stderr.as_slice())),
            None => (None, None),
        };
        // Input is of no use to one that is over.
        let put = "UPDATE calculations SET state = ?3, record = ?4, stdout = ?5, stderr = ?6,
                   stdin = CASE WHEN ?7 THEN NULL ELSE stdin END WHERE id = ?1 AND state = ?2";
        let row = params![record.id.as_str(), from, record.state.name(), json, stdout, stderr, record.state.is_over()];
        if transaction.execute(put, row)? == 0 {
            return Ok(None);
        }
        finish(transaction, writes).map(Some)
    }

    /// A cluster's calculations that are kept, newest first.
    pub fn calculations(&self, cluster: &ClusterId) -> Result<Vec<CalculationRecord>, LedgerError> {
        many(&self.connection, "WHERE cluster = ?1 ORDER BY rowid DESC".to_owned(), [cluster.as_str()])
    }

    /// The calculations of all clusters that are not over, oldest first.
    pub fn calculations_under_way(&self) -> Result<Vec<CalculationRecord>, LedgerError> {
        many(&self.connection, format!("WHERE state IN {UNDER_WAY} ORDER BY rowid"), [])
    }

    /// The calculations of a cluster whose ids start like this.
    pub fn calculations_by_prefix(
        &self,
        cluster: &ClusterId,
        prefix: &str,
    ) -> Result<Vec<CalculationRecord>, LedgerError> {
        let clause = "WHERE cluster = ?1 AND id >= ?2 AND id < ?3 ORDER BY id LIMIT 2";
        let above = format!("{prefix}{}", char::MAX);
        many(&self.connection, clause.to_owned(), [cluster.as_str(), prefix, &above])
    }

    /// What a calculation reads from its standard input.
    pub fn calculation_input(&self, id: &CalculationId) -> Result<Vec<u8>, LedgerError> {
        let query = "SELECT stdin FROM calculations WHERE id = ?1";
        let found = self.connection.query_row(query, [id.as_str()], |row| row.get::<_, Option<Vec<u8>>>(0));
        Ok(found.optional()?.flatten().unwrap_or_default())
    }

    /// What a calculation wrote.
    pub fn calculation_output(&self, id: &CalculationId) -> Result<CalculationOutput, LedgerError> {
        let query = "SELECT coalesce(stdout, x''), coalesce(stderr, x'') FROM calculations WHERE id = ?1";
        let read = |row: &Row<'_>| Ok(CalculationOutput { stdout: row.get(0)?, stderr: row.get(1)? });
        Ok(self.connection.query_row(query, [id.as_str()], read).optional()?.unwrap_or_default())
    }
}

/// `clause` is made of constants of this file.
fn many(
    from: &Connection,
    clause: String,
    values: impl rusqlite::Params,
) -> Result<Vec<CalculationRecord>, LedgerError> {
    let mut query = from.prepare_cached(&format!("SELECT id, record FROM calculations {clause}"))?;
    let rows = query.query_map(values, |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (id, record) = row?;
        from_json("calculations", &id, &record)
    })
    .collect()
}
