//! The socket device (virtio 1.2 section 5.10): streams between host programs and guest programs.
//!
//! Three queues: `RX` to the guest, `TX` from it, `EVENT` for the one event there is. The host's end is a unix socket
//! handed in: a program connects to it, names a guest port, and has a stream ([`connection`]). A guest program that
//! connects to the host gets what [`HostPorts`] has for the port, or a reset. `table` knows the streams and whose turn
//! it is, `stream` what the protocol asks for, `packet` how it looks.
//!
//! Runs on the device loop, under the slot's lock. Streams do not survive a restore: the guest is told by a transport
//! reset, and host programs find their sockets closed because they belonged to another process. Bounded: streams
//! ([`table::STREAMS_MAX`]), bytes held for slow readers (each stream's buffer), answers to packets of streams that do
//! not exist ([`ORPHANS_MAX`]), packets of one turn. Nothing is held for a guest that posts no buffers: sockets are not
//! read then.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::EventSet;

use self::connection::Taken;
use self::packet::{Header, Operation, Ports};
use self::saved::VsockV1;
use self::stream::{Control, Reaction};
use self::table::Table;
use super::chain::Chain;
use super::model::{Counters, Face, Io, Model, Turn, Watch};
use super::queue::{RingError, Waiting};
use super::spec::device_id;
use super::spec::vsock::{EVENT_TRANSPORT_RESET, HEADER_BYTES, HOST_CID, TYPE_STREAM};
use crate::saved::{SaveSectionError, Section};

mod connection;
pub mod packet;
pub mod stream;
mod table;

/// Queue to the guest.
const RX: usize = 0;
/// Queue from the guest.
const TX: usize = 1;
/// Queue for events.
const EVENT: usize = 2;

/// Linux fills the RX queue with buffers of 4 KiB before it says that it is ready; 64 of them hold the 256 KiB that a
/// stream may have under way, and cost little of a small guest's memory and boot time. It posts eight event buffers.
const QUEUE_SIZES: [u16; 3] = [64, 64, 16];

/// The guest's context id; every guest has the same, since each has a device of its own.
const GUEST_CID: u64 = 3;

/// Most data bytes of one packet, as Linux cuts them (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const PACKET_DATA_BYTES_MAX: usize = 64 << 10;

/// Most packets of one turn in each direction: with Linux' 4 KiB buffers 256 KiB, which take about 0.1 ms.
const TURN_PACKETS_MAX: usize = 64;

/// Most resets waiting to be told about streams that do not exist; a guest that causes more without taking any is not
/// told about the rest.
const ORPHANS_MAX: usize = 256;

/// Token of the listener; streams use what the table gives them, from 1.
const LISTENER_TOKEN: u64 = 0;

/// What a guest program reaches when it connects to a port of the host.
pub(crate) trait HostPorts: Send + std::fmt::Debug {
    /// The host's end of a new stream to `port`, or `None` to refuse.
    fn connect(&mut self, port: u32) -> Option<UnixStream>;
}

/// No port of the host is open to the guest.
#[derive(Debug)]
pub(crate) struct NoHostPorts;

impl HostPorts for NoHostPorts {
    fn connect(&mut self, _port: u32) -> Option<UnixStream> {
        None
    }
}

/// Whether streams may be asked for after a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reset {
    /// The guest has to be told that its streams are gone.
    Owed,
    /// It is being told: its event queue had so many buffers added before. When it adds another, it has handled the
    /// event; a stream asked for earlier could be taken down with the old ones.
    Told(u16),
    /// Nothing is outstanding.
    Settled,
}

/// The socket device.
#[derive(Debug)]
pub(crate) struct Vsock {
    face: Face,
    listener: UnixListener,
    /// Whether accepting may give something.
    accepting: bool,
    host_ports: Box<dyn HostPorts>,
    table: Table,
    orphans: VecDeque<Ports>,
    reset: Reset,
}

impl Vsock {
    /// A device, fresh or as it was saved.
    pub(crate) fn new(
        listener: UnixListener,
        host_ports: Box<dyn HostPorts>,
        watch: Watch,
        saved: Option<&VsockV1>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        watch.add(&listener, LISTENER_TOKEN, EventSet::IN)?;
        let config = GUEST_CID.to_le_bytes().to_vec();
        let face = Face { device_id: device_id::VSOCK, features: 0, queue_sizes: &QUEUE_SIZES, config };
        Ok(Self {
            face,
            listener,
            accepting: true,
            host_ports,
            table: Table::new(watch, saved.map(|saved| saved.next_host_port)),
            orphans: VecDeque::new(),
            reset: if saved.is_some() { Reset::Owed } else { Reset::Settled },
        })
    }

    fn accept(&mut self, counters: &Counters) -> Turn {
        for _ in 0..TURN_PACKETS_MAX {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    if self.table.greet(socket).is_err() {
                        Counters::count(&counters.dropped);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of descriptors: the program waits in the listener's queue until the device's next event.
                    self.accepting = error.kind() != io::ErrorKind::WouldBlock;
                    return Turn::Idle;
                }
            }
        }
        Turn::More
    }

    fn tell_reset(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        let events = &mut io.queues[EVENT];
        while self.reset == Reset::Owed {
            let before = events.added_count()?;
            let Some(chain) = events.pop()? else {
                match events.wait_for_buffers()? {
                    Waiting::Told => return Ok(()),
                    Waiting::MoreThere => continue,
                }
            };
            let written = chain.write(io.ram, 0, &EVENT_TRANSPORT_RESET.to_le_bytes())?;
            events.add_used(chain, written)?;
            events.tell_next_added()?;
            self.reset = Reset::Told(before);
        }
        if let Reset::Told(before) = self.reset
            && events.added_count()? != before
        {
            self.reset = Reset::Settled;
        }
        Ok(())
    }

    /// Packets from the guest.
    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        for _ in 0..TURN_PACKETS_MAX {
            let Some(chain) = io.queues[TX].pop()? else {
                match io.queues[TX].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            let done = self.packet(io, &chain)?;
            Counters::count(if done.is_some() { &io.counters.done } else { &io.counters.dropped });
            io.queues[TX].add_used(chain, 0)?;
        }
        Ok(Turn::More)
    }

    /// One packet from the guest; `None` if it is thrown away.
    fn packet(&mut self, io: &Io<'_>, chain: &Chain) -> Result<Option<()>, RingError> {
        let mut header = [0; HEADER_BYTES];
        if chain.read(io.ram, 0, &mut header)? != HEADER_BYTES {
            return Ok(None);
        }
        let header = Header::from_bytes(&header);
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let addressed = header.destination_cid == HOST_CID && header.source_cid == GUEST_CID;
        if !addressed || header.length as usize > chain.readable_bytes() - HEADER_BYTES {
            return Ok(None);
        }
        let Some(operation) = header.operation().filter(|_| header.is_stream()) else {
            self.orphan(ports, io.counters);
            return Ok(None);
        };
        let Some(id) = self.table.find(ports) else {
            if operation == Operation::Request {
                let accepted =
                    self.host_ports.connect(ports.host).map(|socket| self.table.accept(ports, &header, socket));
                if !matches!(accepted, Some(Ok(()))) {
                    self.orphan(ports, io.counters);
                }
            } else if operation != Operation::Reset {
                self.orphan(ports, io.counters);
            }
            return Ok(Some(()));
        };
        self.table.update(id, |connection| {
            match connection.stream.packet(operation, &header) {
                Reaction::None => {}
                Reaction::Accepted => connection.tell_accepted(),
                Reaction::Refused => connection.tell_refused("refused"),
                Reaction::EndsChanged | Reaction::Gone => connection.settle(),
                Reaction::Data(count) => {
                    let slices = chain.readable_slices(io.ram, HEADER_BYTES, count as usize)?;
                    let given = connection.give(&slices);
                    let mut rest = vec![0; (count - given) as usize];
                    chain.read(io.ram, HEADER_BYTES + given as usize, &mut rest)?;
                    connection.hold(&rest);
                }
            }
            Ok(Some(()))
        })
    }

    fn orphan(&mut self, ports: Ports, counters: &Counters) {
        if self.orphans.len() < ORPHANS_MAX {
            self.orphans.push_back(ports);
        } else {
            Counters::count(&counters.dropped);
        }
    }

    /// Packets to the guest: one for each stream that has something, round and round.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        for _ in 0..TURN_PACKETS_MAX {
            let held = self.reset != Reset::Settled;
            if self.orphans.is_empty() && (held || !self.table.has_turns()) {
                return Ok(Turn::Idle);
            }
            let Some(chain) = io.queues[RX].pop()? else {
                match io.queues[RX].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            if chain.writable_bytes() <= HEADER_BYTES {
                // 5.10.6.1.2: a buffer that holds no packet at all.
                return Err(RingError::Chain);
            }
            match self.next_packet(io, &chain)? {
                Some(length) => {
                    io.queues[RX].add_used(chain, HEADER_BYTES + length)?;
                    Counters::count(&io.counters.done);
                }
                None => io.queues[RX].undo_pop(chain),
            }
        }
        Ok(Turn::More)
    }

    /// Writes the next packet to the guest into `chain`, if it turns out that there is one; its data length.
    fn next_packet(&mut self, io: &Io<'_>, chain: &Chain) -> Result<Option<usize>, RingError> {
        if let Some(ports) = self.orphans.pop_front() {
            let reset = Control { operation: Operation::Reset, flags: 0 };
            write_header(io, chain, ports, reset, 0, (0, 0))?;
            return Ok(Some(0));
        }
        let Some(id) = self.table.next_turn() else { return Ok(None) };
        self.table.update(id, |connection| {
            let (control, length) = if let Some(control) = connection.stream.control() {
                (control, 0)
            } else if connection.wants_data() {
                let most = PACKET_DATA_BYTES_MAX.min(connection.stream.sendable() as usize);
                let slices = chain.writable_slices(io.ram, HEADER_BYTES, most)?;
                match connection.take(&slices) {
                    Taken::Bytes(count) => (Control { operation: Operation::Data, flags: 0 }, count),
                    Taken::Nothing | Taken::Ended => return Ok(None),
                }
            } else if let Some(control) = connection.stream.credit_question().filter(|_| connection.wants_credit()) {
                (control, 0)
            } else {
                return Ok(None);
            };
            let credit = connection.stream.said(control, length);
            write_header(io, chain, connection.ports, control, length, credit)?;
            Ok(Some(length as usize))
        })
    }
}

fn write_header(
    io: &Io<'_>,
    chain: &Chain,
    ports: Ports,
    control: Control,
    length: u32,
    (buffer, forwarded): (u32, u32),
) -> Result<(), RingError> {
    let header = Header {
        source_cid: HOST_CID,
        destination_cid: GUEST_CID,
        source_port: ports.host,
        destination_port: ports.guest,
        length,
        kind: TYPE_STREAM,
        operation: control.operation as u16,
        flags: control.flags,
        buffer,
        forwarded,
    };
    chain.write(io.ram, 0, &header.to_bytes()).map(|_| ())
}

impl Model for Vsock {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, token: u64, ready: EventSet) {
        if token == LISTENER_TOKEN {
            self.accepting = true;
        } else {
            self.table.event(token, ready);
        }
    }

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        // Programs may connect before the guest is up; they wait for it.
        let accepted = if self.accepting { self.accept(io.counters) } else { Turn::Idle };
        if !io.live {
            return Ok(accepted);
        }
        self.tell_reset(io)?;
        let turns = [accepted, self.transmit(io)?, self.receive(io)?];
        Ok(if turns.contains(&Turn::More) { Turn::More } else { Turn::Idle })
    }

    fn drain(&mut self, _io: &mut Io<'_>) -> Result<(), RingError> {
        // Every packet is finished in the turn it was begun in.
        Ok(())
    }

    fn reset(&mut self) {
        self.table.forget_guest();
        self.orphans.clear();
        self.reset = Reset::Settled;
    }

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        Section::new(instance, &VsockV1 { guest_cid: GUEST_CID, next_host_port: self.table.next_host_port() })
    }
}

mod saved {
    use crate::saved::{Saved, SectionKind};
    use serde::{Deserialize, Serialize};

    /// The socket device. Streams end with the machine they were made in.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub(crate) struct VsockV1 {
        /// The guest's context id.
        pub(crate) guest_cid: u64,
        /// Host port of the next stream the host asks for: the guest may still know the ports before it.
        pub(crate) next_host_port: u32,
    }

    impl Saved for VsockV1 {
        const KIND: SectionKind = SectionKind::Vsock;
        const VERSION: u16 = 1;
    }
}
