//! The streams of a vsock device: who exists, by ports and by event token, and whose turn it is to say something.
//!
//! Bounded by [`STREAMS_MAX`], greetings and closing streams included; a program that comes when the table is full is
//! refused at once. Turns go round: a stream that has said one packet goes to the end of the line.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Greeted, Greeting, refuse};
use super::packet::{Header, Ports};
use super::stream::{Stage, Stream};
use crate::machine::virtio::model::Watch;

/// Most streams of one device: far above what an agent and a workload need, and with all readers asleep the buffers
/// below hold less than 48 MiB.
pub(crate) const STREAMS_MAX: usize = 1024;

/// Streams that get a large buffer.
const LARGE_BUFFERS: usize = 64;

/// Bytes a stream may hold for a host program that does not read: what Linux uses for its own end (256 KiB), so that one
/// round trip moves as much in both directions.
const LARGE_BUFFER_BYTES: u32 = 256 << 10;

/// The same for streams above [`LARGE_BUFFERS`].
const SMALL_BUFFER_BYTES: u32 = 32 << 10;

/// Most streams that wait for the guest's last word after the host program is gone. The oldest of more is ended with a
/// reset: the guest had the most time to answer.
const CLOSING_MAX: usize = 256;

/// First host port of streams the host asks for; those below are left for services a guest may connect to.
const HOST_PORT_MIN: u32 = 1 << 30;

/// What the table calls a stream: its event token, never used twice.
type Id = u64;

/// The table has no room.
#[derive(Debug)]
pub(crate) struct TableFull;

/// The streams.
#[derive(Debug)]
pub(crate) struct Table {
    watch: Watch,
    greetings: BTreeMap<Id, Greeting>,
    connections: BTreeMap<Id, Connection>,
    by_ports: BTreeMap<Ports, Id>,
    /// Those with something to say, each once.
    turns: VecDeque<Id>,
    /// Those that wait for the guest's last word, oldest first. May name some that have heard it.
    closing: VecDeque<Id>,
    next_id: Id,
    next_host_port: u32,
}

impl Table {
    /// An empty table; host ports start at `next_host_port`.
    pub(crate) fn new(watch: Watch, next_host_port: Option<u32>) -> Self {
        Self {
            watch,
            greetings: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            turns: VecDeque::new(),
            closing: VecDeque::new(),
            next_id: 1,
            next_host_port: next_host_port.unwrap_or(HOST_PORT_MIN).max(HOST_PORT_MIN),
        }
    }

    /// Host port of the next stream the host asks for.
    pub(crate) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// The stream with these ports.
    pub(crate) fn find(&self, ports: Ports) -> Option<Id> {
        self.by_ports.get(&ports).copied()
    }

    /// Whether any stream has something to say.
    pub(crate) fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// The stream whose turn it is; it leaves the line.
    pub(crate) fn next_turn(&mut self) -> Option<Id> {
        while let Some(id) = self.turns.pop_front() {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.queued = false;
                return Some(id);
            }
        }
        None
    }

    fn room(&self) -> Result<(), TableFull> {
        if self.greetings.len() + self.connections.len() < STREAMS_MAX { Ok(()) } else { Err(TableFull) }
    }

    fn buffer_bytes(&self) -> u32 {
        if self.connections.len() < LARGE_BUFFERS { LARGE_BUFFER_BYTES } else { SMALL_BUFFER_BYTES }
    }

    /// A host program has connected; it will name a guest port.
    pub(crate) fn greet(&mut self, socket: UnixStream) -> Result<(), TableFull> {
        if let Err(full) = self.room() {
            refuse(socket, "too many streams");
            return Err(full);
        }
        let id = self.next_id;
        self.next_id += 1;
        if let Err(reason) = self.watch_socket(&socket, id) {
            refuse(socket, reason);
            return Ok(());
        }
        self.greetings.insert(id, Greeting::new(socket));
        self.read_greeting(id);
        Ok(())
    }

    fn watch_socket(&self, socket: &UnixStream, id: Id) -> Result<(), &'static str> {
        let what = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        let watched = socket.set_nonblocking(true).and_then(|()| self.watch.add(socket, id, what));
        watched.map_err(|_| "the host refuses to watch the socket")
    }

    fn read_greeting(&mut self, id: Id) {
        let Some(greeting) = self.greetings.get_mut(&id) else { return };
        let greeted = greeting.read();
        if greeted == Greeted::Waiting {
            return;
        }
        let Some(socket) = self.greetings.remove(&id).map(Greeting::into_socket) else { return };
        match greeted {
            Greeted::Waiting | Greeted::Gone => {}
            Greeted::Nonsense => refuse(socket, "expected CONNECT and a port"),
            Greeted::Port(guest) => {
                let ports = Ports { host: self.take_host_port(guest), guest };
                let stream = Stream::ask(self.buffer_bytes());
                self.insert(id, Connection::new(ports, stream, socket));
            }
        }
    }

    fn take_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(HOST_PORT_MIN);
            // There are more ports than streams, so this ends.
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The guest asked for a stream and the host has this end for it.
    pub(crate) fn accept(&mut self, ports: Ports, request: &Header, socket: UnixStream) -> Result<(), TableFull> {
        self.room()?;
        let id = self.next_id;
        self.next_id += 1;
        self.watch_socket(&socket, id).map_err(|_| TableFull)?;
        let stream = Stream::accept(self.buffer_bytes(), request);
        self.insert(id, Connection::new(ports, stream, socket));
        Ok(())
    }

    fn insert(&mut self, id: Id, connection: Connection) {
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.after(id);
    }

    /// Something happened on a socket.
    pub(crate) fn event(&mut self, id: Id, ready: EventSet) {
        self.read_greeting(id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.event(ready);
            self.after(id);
        }
    }

    /// Changes a stream that exists, and draws the conclusions.
    pub(crate) fn update<T: Default, E>(
        &mut self,
        id: Id,
        change: impl FnOnce(&mut Connection) -> Result<T, E>,
    ) -> Result<T, E> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(T::default()) };
        let changed = change(connection);
        self.after(id);
        changed
    }

    /// A stream has changed: it may be over, have something to say, or wait for the guest's last word.
    fn after(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_finished() {
            self.by_ports.remove(&connection.ports);
            self.connections.remove(&id);
            return;
        }
        if !connection.queued && connection.wants_turn() {
            connection.queued = true;
            self.turns.push_back(id);
        }
        if connection.is_closing() && !self.closing.contains(&id) {
            self.closing.push_back(id);
            if self.closing.len() > CLOSING_MAX {
                self.end_oldest_closing();
            }
        }
    }

    fn end_oldest_closing(&mut self) {
        let alive = &self.connections;
        self.closing.retain(|id| alive.get(id).is_some_and(Connection::is_closing));
        if self.closing.len() > CLOSING_MAX
            && let Some(oldest) = self.closing.pop_front()
            && let Some(connection) = self.connections.get_mut(&oldest)
        {
            connection.stream.abort();
            self.after(oldest);
        }
    }

    /// The guest's driver is gone, and with it every stream it knew of. Programs whose stream it was not told of yet go
    /// on waiting: a driver resets its device before it uses it.
    pub(crate) fn forget_guest(&mut self) {
        let known = |connection: &Connection| connection.stream.stage() != Stage::Asking { sent: false };
        let ids: Vec<Id> = self.connections.iter().filter(|(_, one)| known(one)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(mut connection) = self.connections.remove(&id) {
                self.by_ports.remove(&connection.ports);
                if matches!(connection.stream.stage(), Stage::Asking { .. }) {
                    connection.tell_refused("guest was reset");
                }
            }
        }
        self.closing.clear();
    }
}
