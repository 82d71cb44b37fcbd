//! Looks at the ledger after each job, as somebody who does not believe it: no address is two VMs', and no address or
//! session number comes back before it has rested. Time is the host's, not what the ledger says it was.

use std::collections::{BTreeMap, BTreeSet};

use crate::agent::Store;
use crate::ids::{SessionId, VmId};

/// Who has, or last had, a number.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder<T> {
    who: T,
    /// When it was given back, in nanoseconds of the host's time.
    given_back: Option<u64>,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// How long numbers have to rest.
    rest_ns: u64,
    locals: BTreeMap<(u32, u32), Holder<VmId>>,
    sessions: BTreeMap<u32, Holder<SessionId>>,
}

impl Leases {
    /// Numbers have to rest for that long.
    pub(super) fn resting_for(rest_ns: u64) -> Self {
        Self { rest_ns, ..Self::default() }
    }

    /// Looks at the ledger at a time; what is wrong, if anything.
    pub(super) fn look(&mut self, store: &Store, now_ns: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        let (Ok(locals), Ok(sessions), Ok(vms)) = (store.locals(), store.sessions(), store.vms()) else {
            return vec!["the ledger cannot be read".to_owned()];
        };
        let used = locals.into_iter().filter(|local| local.quarantine_until.is_none());
        let used: BTreeMap<_, _> = used.map(|local| ((local.session_network_id, local.local_id), local.vm)).collect();
        for vm in used.values().filter(|vm| !vms.iter().any(|record| record.id == **vm)) {
            wrong.push(format!("{vm} has an address and no record"));
        }
        follow(&mut self.locals, used, now_ns, self.rest_ns, &mut wrong);
        let numbers = sessions.into_iter().map(|session| (u32::from(session.session_network_id), session.id)).collect();
        follow(&mut self.sessions, numbers, now_ns, self.rest_ns, &mut wrong);
        let (mut addresses, mut jails) = (BTreeSet::new(), BTreeSet::new());
        for vm in &vms {
            if !jails.insert(vm.jail) {
                wrong.push(format!("{} has jail {}, which another has", vm.id, vm.jail));
            }
            let Some(network) = vm.network.as_ref().filter(|_| vm.state.holds_resources()) else { continue };
            let v4 = network.ipv4.map(|address| address.to_string());
            for address in std::iter::once(network.ipv6.to_string()).chain(v4) {
                if !addresses.insert(address.clone()) {
                    wrong.push(format!("{} has the address {address}, which another has", vm.id));
                }
            }
            let holder = self.sessions.get(&network.session_network_id.into());
            let there = holder.is_some_and(|holder| holder.who == network.session && holder.given_back.is_none());
            if !there {
                wrong.push(format!("{} is in session {}, which is not there", vm.id, network.session));
            }
        }
        wrong
    }
}

/// Compares who had what with who has it now.
fn follow<K: Ord + Copy + std::fmt::Debug, T: PartialEq + Clone + std::fmt::Display>(
    known: &mut BTreeMap<K, Holder<T>>,
    now: BTreeMap<K, T>,
    now_ns: u64,
    rest_ns: u64,
    wrong: &mut Vec<String>,
) {
    for (key, holder) in known.iter_mut() {
        if now.get(key) != Some(&holder.who) && holder.given_back.is_none() {
            holder.given_back = Some(now_ns);
        }
    }
    for (key, who) in now {
        let before = known.insert(key, Holder { who: who.clone(), given_back: None });
        let Some(before) = before else { continue };
        let rested = before.given_back.is_some_and(|given_back| now_ns >= given_back.saturating_add(rest_ns));
        let same = before.who == who && before.given_back.is_none();
        if !same && !rested {
            wrong.push(format!("{who} has {key:?}, which {} had a moment ago", before.who));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn see(known: &mut BTreeMap<u32, Holder<String>>, who: &[(u32, &str)], now_ns: u64) -> usize {
        let mut wrong = Vec::new();
        let now = who.iter().map(|(key, who)| (*key, (*who).to_owned())).collect();
        follow(known, now, now_ns, 10, &mut wrong);
        wrong.len()
    }

    #[test]
    fn what_comes_back_too_early_is_seen() {
        let known = &mut BTreeMap::new();
        assert_eq!(see(known, &[(1, "a")], 0), 0);
        assert_eq!(see(known, &[(1, "a")], 1), 0);
        assert_eq!(see(known, &[], 2), 0);
        assert_eq!(see(known, &[(1, "b")], 11), 1);
        assert_eq!(see(known, &[], 20), 0);
        assert_eq!(see(known, &[(1, "c")], 30), 0);
        assert_eq!(see(known, &[(1, "d")], 50), 1, "from one to the next without a rest");
        assert_eq!(see(known, &[], 60), 0);
        assert_eq!(see(known, &[(1, "d")], 61), 1, "its own again");
    }
}
