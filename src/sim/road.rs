//! The way machines take from one simulated host to another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::guest::Fate;

/// Longest wait for the other end.
const PATIENCE: Duration = Duration::from_secs(15);

/// A machine on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest {
    pub(super) fate: Fate,
    pub(super) memory: u64,
    pub(super) answers: bool,
}

type Sent = (Guest, oneshot::Sender<bool>);

#[derive(Debug, Default)]
struct Places {
    last: u16,
    senders: BTreeMap<u16, oneshot::Sender<Sent>>,
    receivers: BTreeMap<u16, oneshot::Receiver<Sent>>,
}

/// What hosts of one fabric share. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Road(Arc<Mutex<Places>>);

impl Road {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new place to send a machine to.
    pub(super) fn open(&self) -> u16 {
        let mut places = self.places();
        places.last += 1;
        let (port, (sender, receiver)) = (places.last, oneshot::channel());
        places.senders.insert(port, sender);
        places.receivers.insert(port, receiver);
        port
    }

    /// The machine that is sent to a place, with whom to tell whether it came about.
    pub(super) async fn wait(&self, port: u16) -> Option<Sent> {
        let receiver = self.places().receivers.remove(&port)?;
        timeout(PATIENCE, receiver).await.ok()?.ok()
    }

    /// Sends a machine to a place; whether it stands ready there, if that is known.
    pub(super) async fn send(&self, port: u16, guest: Guest) -> Option<bool> {
        let sender = self.places().senders.remove(&port)?;
        let (answer, told) = oneshot::channel();
        sender.send((guest, answer)).ok()?;
        timeout(PATIENCE, told).await.ok()?.ok()
    }
}
