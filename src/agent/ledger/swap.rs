//! Keys of hibernated VMs, and what was decided about idle VMs.

use rusqlite::{Connection, OptionalExtension, params};

use super::rows::{from_json, nanos, to_json};
use super::{LedgerError, Store};
use crate::agent::swap::SwapDecision;
use crate::ids::VmId;
use crate::wire::control::SealingKey;

/// Decisions that are kept: at one in five seconds, the last hour and a half.
const DECISIONS_KEPT: i64 = 1_000;

pub(super) fn put_key(to: &Connection, vm: &VmId, key: &SealingKey) -> Result<(), LedgerError> {
    let put = "INSERT INTO swap_keys(vm, key) VALUES (?1, ?2) ON CONFLICT(vm) DO UPDATE SET key = ?2";
    to.execute(put, params![vm.as_str(), key.0.as_slice()])?;
    Ok(())
}

pub(super) fn forget_key(to: &Connection, vm: &VmId) -> Result<(), LedgerError> {
    to.execute("DELETE FROM swap_keys WHERE vm = ?1", [vm.as_str()])?;
    Ok(())
}

pub(super) fn put_decision(to: &Connection, decision: &SwapDecision) -> Result<(), LedgerError> {
    let text = to_json("swap_decisions", "new", decision)?;
    to.execute("INSERT INTO swap_decisions(at, decision) VALUES (?1, ?2)", params![nanos(decision.at), text])?;
    let old = "DELETE FROM swap_decisions WHERE seq <= (SELECT max(seq) FROM swap_decisions) - ?1";
    to.execute(old, [DECISIONS_KEPT])?;
    Ok(())
}

impl Store {
    /// The key of what is sealed of a VM.
    pub fn swap_key(&self, vm: &VmId) -> Result<Option<SealingKey>, LedgerError> {
        let find = "SELECT key FROM swap_keys WHERE vm = ?1";
        let found: Option<Vec<u8>> = self.connection.query_row(find, [vm.as_str()], |row| row.get(0)).optional()?;
        Ok(found.and_then(|key| key.try_into().ok()).map(SealingKey))
    }

    /// The newest decisions about idle VMs, newest first.
    pub fn swap_decisions(&self, count: u32) -> Result<Vec<SwapDecision>, LedgerError> {
        let mut query =
            self.connection.prepare("SELECT seq, decision FROM swap_decisions ORDER BY seq DESC LIMIT ?1")?;
        let rows = query.query_map([count], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))?;
        rows.map(|row| {
            let (seq, text) = row?;
            from_json("swap_decisions", &seq.to_string(), &text)
        })
        .collect()
    }
}
