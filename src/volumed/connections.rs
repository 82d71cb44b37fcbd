//! The connections that there are: counted, so that there are not too many, and found again to be ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::line::Socket;
use crate::ids::{LeaseId, VolumeId};

/// Most connections that are accepted, of all sockets together.
pub(super) const ACCEPTED_MAX: usize = 512;

/// Most connections of other hosts that have opened nothing yet: anybody can make those, and they are not to keep out
/// whoever has a lease.
const STRANGERS_MAX: usize = 64;

/// How long a client has to take its answers when its connection ends.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// All connections.
#[derive(Debug, Clone)]
pub(super) struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    fewer: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    entries: BTreeMap<u64, Entry>,
    /// None is taken any more.
    ending: bool,
}

#[derive(Debug)]
struct Entry {
    socket: Socket,
    /// Somebody connected to a socket of ours.
    accepted: bool,
    /// The VMM's socket, if it was dialed.
    attachment: Option<PathBuf>,
    volume: Option<VolumeId>,
    lease: Option<LeaseId>,
}

/// A connection is in the table for as long as this is there.
#[derive(Debug)]
pub(super) struct Connected {
    shared: Arc<Shared>,
    number: u64,
}

impl Connections {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared { table: Mutex::default(), fewer: Condvar::new() }))
    }

    /// Counts a connection that was accepted. `None`: there are too many, or the end is near.
    pub(super) fn accepted(&self, socket: Socket) -> Option<Connected> {
        let table = self.0.table();
        let accepted = table.entries.values().filter(|entry| entry.accepted).count();
        let is_stranger = |entry: &&Entry| matches!(entry.socket, Socket::Tcp(_)) && entry.volume.is_none();
        let strangers = table.entries.values().filter(is_stranger).count();
        if accepted >= ACCEPTED_MAX || (matches!(socket, Socket::Tcp(_)) && strangers >= STRANGERS_MAX) {
            return None;
        }
        self.enter(table, Entry { socket, accepted: true, attachment: None, volume: None, lease: None })
    }

    /// Counts a connection to a VMM. `None`: the end is near.
    pub(super) fn dialed(&self, socket: Socket, attachment: &Path) -> Option<Connected> {
        let attachment = Some(attachment.to_owned());
        self.enter(self.0.table(), Entry { socket, accepted: false, attachment, volume: None, lease: None })
    }

    fn enter(&self, mut table: MutexGuard<'_, Table>, entry: Entry) -> Option<Connected> {
        if table.ending {
            return None;
        }
        let number = table.next;
        table.next += 1;
        table.entries.insert(number, entry);
        Some(Connected { shared: Arc::clone(&self.0), number })
    }

    /// Connections bound to a lease.
    pub(super) fn of_lease(&self, lease: &LeaseId) -> usize {
        self.count(|entry| entry.lease.as_ref() == Some(lease))
    }

    /// Connections bound to a volume.
    pub(super) fn of_volume(&self, volume: &VolumeId) -> usize {
        self.count(|entry| entry.volume.as_ref() == Some(volume))
    }

    /// All connections.
    pub(super) fn count_all(&self) -> usize {
        self.count(|_| true)
    }

    fn count(&self, is_it: impl Fn(&Entry) -> bool) -> usize {
        self.0.table().entries.values().filter(|entry| is_it(entry)).count()
    }

    /// Ends the connections of an attachment, without waiting for them.
    pub(super) fn hang_up(&self, attachment: &Path) {
        let table = self.0.table();
        let of_it = table.entries.values().filter(|entry| entry.attachment.as_deref() == Some(attachment));
        of_it.for_each(|entry| entry.socket.end());
    }

    /// Ends the connections of an attachment and waits until none is left, for `limit` at most; whether none is.
    pub(super) fn end_attachment(&self, attachment: &Path, limit: Duration) -> bool {
        self.end(limit, |entry| entry.attachment.as_deref() == Some(attachment))
    }

    /// Takes no more, ends all, and waits for them, for `limit` at most; whether none is left.
    pub(super) fn end_all(&self, limit: Duration) -> bool {
        self.0.table().ending = true;
        self.end(limit, |_| true)
    }

    fn end(&self, limit: Duration, is_it: impl Fn(&Entry) -> bool) -> bool {
        // What was asked for already is still answered; who does not take the answer is not waited for.
        let polite = limit.min(ANSWER_PATIENCE);
        self.end_by(polite, Socket::end_requests, &is_it) || self.end_by(limit - polite, Socket::end, &is_it)
    }

    fn end_by(&self, limit: Duration, how: fn(&Socket), is_it: &impl Fn(&Entry) -> bool) -> bool {
        let table = self.0.table();
        for entry in table.entries.values().filter(|entry| is_it(entry)) {
            how(&entry.socket);
        }
        let is_any = |table: &mut Table| table.entries.values().any(is_it);
        let waited = self.0.fewer.wait_timeout_while(table, limit, is_any);
        let (_table, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connected {
    /// Notes what it is bound to.
    pub(super) fn bind(&self, volume: Option<&VolumeId>, lease: Option<&LeaseId>) {
        if let Some(entry) = self.shared.table().entries.get_mut(&self.number) {
            entry.volume = volume.cloned();
            entry.lease = lease.cloned();
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.shared.table().entries.remove(&self.number);
        self.shared.fewer.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn connections_are_bounded_found_and_ended() {
        let connections = Connections::new();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let entered = |socket: &UnixStream| Socket::Unix(socket.try_clone().unwrap());
        let mut held: Vec<_> = (0..ACCEPTED_MAX).map(|_| connections.accepted(entered(&theirs)).unwrap()).collect();
        assert!(connections.accepted(entered(&theirs)).is_none());
        held.clear();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stranger = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let entered_tcp = || connections.accepted(Socket::Tcp(stranger.try_clone().unwrap()));
        held.extend((0..STRANGERS_MAX).map(|_| entered_tcp().unwrap()));
        assert!(entered_tcp().is_none() && connections.accepted(entered(&theirs)).is_some());
        held[0].bind(Some(&VolumeId::from_random([2; 10])), None);
        assert!(entered_tcp().is_some(), "one of them opened something");
        held.clear();
        let (lease, volume) = (LeaseId::from_random([1; 10]), VolumeId::from_random([1; 10]));
        let dialed = connections.dialed(entered(&theirs), Path::new("/run/a")).unwrap();
        dialed.bind(Some(&volume), Some(&lease));
        assert_eq!((connections.of_lease(&lease), connections.of_volume(&volume)), (1, 1));
        assert!(!connections.end_attachment(Path::new("/run/a"), Duration::ZERO), "it is still there");
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0, "but it hears that it ended");
        drop(dialed);
        assert!(connections.end_attachment(Path::new("/run/a"), Duration::ZERO));
        assert!(connections.end_all(Duration::ZERO));
        assert!(connections.accepted(entered(&theirs)).is_none());
    }
}
