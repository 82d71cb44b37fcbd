//! How many machines are kept ready of a bundle, and uids that belong to nobody.

use rusqlite::{Connection, params};

use super::rows;
use super::{LedgerError, Store};
use crate::clock::Steady;
use crate::ids::BundleId;

/// What a pool's row begins with in the table of single numbers, before its bundle's id.
const PREFIX: &str = "pool:";

pub(super) fn put(to: &Connection, bundle: &BundleId, size: u32) -> Result<(), LedgerError> {
    let key = format!("{PREFIX}{bundle}");
    if size == 0 {
        to.execute("DELETE FROM meta WHERE key = ?1", [key])?;
    } else {
        let put = "INSERT INTO meta(key, value) VALUES (?1, ?2) ON CONFLICT(key) DO UPDATE SET value = ?2";
        to.execute(put, params![key, size])?;
    }
    Ok(())
}

impl Store {
    /// The pools, by bundle.
    pub fn pools(&self) -> Result<Vec<(BundleId, u32)>, LedgerError> {
        let mut query = self.connection.prepare("SELECT key, value FROM meta WHERE key GLOB ?1 ORDER BY key")?;
        let rows =
            query.query_map([format!("{PREFIX}*")], |row| Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?)))?;
        let mut pools = Vec::new();
        for row in rows {
            let (key, size) = row?;
            // Only a ledger that somebody edited holds another id.
            let bundle = key.strip_prefix(PREFIX).and_then(|id| id.parse().ok());
            pools.extend(bundle.map(|bundle| (bundle, size)));
        }
        Ok(pools)
    }

    /// Uids that were lent to what never became a VM, such as a machine that was kept ready, are not used any more. Before
    /// anything is lent.
    pub fn release_strays(&mut self, quarantine_until: Steady) -> Result<usize, LedgerError> {
        let release = "UPDATE leases SET quarantine_until = ?1 \
                       WHERE quarantine_until IS NULL AND vm NOT IN (SELECT id FROM vms)";
        Ok(self.connection.execute(release, [rows::steady(quarantine_until)])?)
    }
}
