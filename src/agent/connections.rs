//! Connections of clients: how many there are, in all and of each process, so that one client that takes them all does
//! not keep the others out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections of clients.
#[derive(Debug, Default)]
pub struct Connections {
    /// How many each process has.
    open: Mutex<BTreeMap<i32, usize>>,
    refused: AtomicU64,
    stalled: AtomicU64,
}

/// A connection's place among them, until it is dropped.
#[derive(Debug)]
pub struct Place {
    among: Arc<Connections>,
    pid: i32,
}

impl Connections {
    fn open(&self) -> MutexGuard<'_, BTreeMap<i32, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection of `pid`, if there are fewer than `max`, and of this process fewer than half of that.
    pub fn take(self: &Arc<Self>, pid: i32, max: usize) -> Option<Place> {
        let mut open = self.open();
        let (all, own) = (open.values().sum::<usize>(), open.get(&pid).copied().unwrap_or(0));
        if all >= max || own >= max / 2 {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        open.insert(pid, own + 1);
        Some(Place { among: Arc::clone(self), pid })
    }

    /// A client did not take what it was sent, and was left.
    pub fn count_stalled(&self) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
    }

    /// How many are open, were refused, and were left because their client did not read.
    pub fn counts(&self) -> (usize, u64, u64) {
        (self.open().values().sum(), self.refused.load(Ordering::Relaxed), self.stalled.load(Ordering::Relaxed))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.among.open();
        if let Some(own) = open.get_mut(&self.pid) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.pid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_gets_half_and_all_get_no_more_than_there_are() {
        let connections = Arc::new(Connections::default());
        let mut held: Vec<_> = (0..5).map(|_| connections.take(1, 10).expect("up to the half")).collect();
        assert!(connections.take(1, 10).is_none());
        held.extend((0..5).map(|_| connections.take(2, 10).expect("the other half")));
        assert!(connections.take(3, 10).is_none());
        assert_eq!(connections.counts(), (10, 2, 0));
        held.remove(0);
        assert!(connections.take(3, 10).is_some());
        held.clear();
        assert_eq!(connections.counts(), (0, 2, 0));
    }
}
