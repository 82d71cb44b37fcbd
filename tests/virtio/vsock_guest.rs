//! A guest's vsock: packets over the rings, streams with credit. Slow and strict: it checks what the device may say.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, DeviceLoop, VirtioSlot};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, EVENT_IDX, INDIRECT, PATIENCE_MS, VERSION_1, ram, run};

pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RST: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const RW: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;

/// What the guest says it has room for in a stream.
pub(crate) const GUEST_BUFFER: u32 = 256 << 10;
/// Bytes of an RX buffer, as Linux posts them.
pub(crate) const RX_BYTES: u32 = 4096;
const TX_BYTES: u32 = 44 + 65536;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) host: u32,
    pub(crate) guest: u32,
    pub(crate) operation: u16,
    pub(crate) flags: u32,
    pub(crate) buffer: u32,
    pub(crate) forwarded: u32,
    pub(crate) data: Vec<u8>,
}

/// One stream's counts: what the device may send, what we may.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Credit {
    pub(crate) received: u32,
    pub(crate) forwarded: u32,
    pub(crate) sent: u32,
    pub(crate) host_buffer: u32,
    pub(crate) host_forwarded: u32,
}

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) devices: Option<DeviceLoop>,
    rx: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_used: BTreeMap<u16, u64>,
    pub(crate) credits: BTreeMap<(u32, u32), Credit>,
    pub(crate) inbox: VecDeque<Packet>,
    /// Whether received data counts as taken at once.
    pub(crate) takes: bool,
}

pub(crate) fn listen(directory: &Path) -> UnixListener {
    UnixListener::bind(directory.join("vsock")).unwrap()
}

pub(crate) fn connect(directory: &Path, port: u32) -> UnixStream {
    let mut host = UnixStream::connect(directory.join("vsock")).unwrap();
    host.set_read_timeout(Some(std::time::Duration::from_millis(u64::from(PATIENCE_MS)))).unwrap();
    writeln!(host, "CONNECT {port}").unwrap();
    host
}

pub(crate) fn read_line(host: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while host.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(char::from(byte[0]));
    }
    line
}

pub(crate) fn device(ram: &GuestRam, directory: &Path) -> Arc<VirtioSlot> {
    let listener = listen(directory);
    Arc::new(VirtioSlot::new(Slot::VSOCK, Backend::Vsock { listener }, ram).unwrap())
}

impl Guest {
    /// A guest whose driver is up.
    pub(crate) fn up(directory: &Path) -> Self {
        let ram = ram(16);
        let slot = device(&ram, directory);
        let devices = run(&[&slot]);
        let mut guest = Self::new(Driver::up(&ram, slot, VERSION_1 | EVENT_IDX | INDIRECT));
        guest.devices = Some(devices);
        guest.fill();
        guest
    }

    pub(crate) fn new(driver: Driver) -> Self {
        Self {
            driver,
            devices: None,
            rx: BTreeMap::new(),
            tx_free: Vec::new(),
            tx_used: BTreeMap::new(),
            credits: BTreeMap::new(),
            inbox: VecDeque::new(),
            takes: true,
        }
    }

    /// Posts every RX buffer and four event buffers.
    pub(crate) fn fill(&mut self) {
        self.post(usize::MAX);
        for _ in 0..4 {
            let buffer = self.driver.allocate(4);
            self.driver.queues[2].add(&[], &[(buffer, 4)]);
        }
        self.driver.kick(2);
        self.tx_free = (0..16).map(|_| self.driver.allocate(u64::from(TX_BYTES))).collect();
    }

    pub(crate) fn post(&mut self, most: usize) {
        for _ in 0..most.min(self.driver.queues[0].free()) {
            let buffer = self.driver.allocate(u64::from(RX_BYTES));
            self.post_one(buffer);
        }
        self.driver.kick(0);
    }

    fn post_one(&mut self, buffer: u64) {
        let head = self.driver.queues[0].add(&[], &[(buffer, RX_BYTES)]);
        self.rx.insert(head, buffer);
    }

    /// Sends a packet, whatever it says; waits while the TX queue is full.
    pub(crate) fn send_raw(&mut self, bytes: &[u8], split: Option<u32>) {
        while self.tx_free.is_empty() {
            let (head, _) = self.driver.wait_used(1);
            self.tx_free.extend(self.tx_used.remove(&head));
        }
        while let Some((head, _)) = self.driver.queues[1].take_used() {
            self.tx_free.extend(self.tx_used.remove(&head));
        }
        let buffer = self.tx_free.pop().unwrap();
        self.driver.ram.write_slice(bytes, GuestAddress(buffer)).unwrap();
        let all = u32::try_from(bytes.len()).unwrap();
        let head = match split {
            Some(at) if at < all => {
                let parts = [(buffer, at), (buffer + u64::from(at), all - at)];
                self.driver.queues[1].add(&parts, &[])
            }
            _ => self.driver.queues[1].add(&[(buffer, all)], &[]),
        };
        self.tx_used.insert(head, buffer);
        self.driver.kick(1);
    }

    pub(crate) fn say(&mut self, host: u32, guest: u32, operation: u16, flags: u32, data: &[u8]) {
        let credit = self.credits.entry((host, guest)).or_default();
        credit.sent = credit.sent.wrapping_add(u32::try_from(data.len()).unwrap());
        let forwarded = credit.forwarded;
        let packet = Packet { host, guest, operation, flags, buffer: GUEST_BUFFER, forwarded, data: data.to_vec() };
        // Header and data in one buffer or in two: Linux does both.
        self.send_raw(&encode(&packet), (guest.is_multiple_of(2)).then_some(44));
    }

    /// The next packet from the host, if one comes.
    pub(crate) fn hear(&mut self) -> Packet {
        let (head, written) = self.driver.wait_used(0);
        self.took(head, written)
    }

    /// The next packet if it is there by now, or comes within some milliseconds.
    pub(crate) fn hear_within(&mut self, milliseconds: u16) -> Option<Packet> {
        if self.driver.queues[0].wait_wanted() {
            self.driver.interrupt_within(milliseconds);
        }
        let (head, written) = self.driver.queues[0].take_used()?;
        Some(self.took(head, written))
    }

    fn took(&mut self, head: u16, written: u32) -> Packet {
        let buffer = self.rx.remove(&head).unwrap();
        let mut bytes = vec![0; written as usize];
        self.driver.ram.read_slice(&mut bytes, GuestAddress(buffer)).unwrap();
        self.post_one(buffer);
        self.driver.kick(0);
        let packet = decode(&bytes);
        let credit = self.credits.entry((packet.host, packet.guest)).or_default();
        (credit.host_buffer, credit.host_forwarded) = (packet.buffer, packet.forwarded);
        credit.received = credit.received.wrapping_add(u32::try_from(packet.data.len()).unwrap());
        assert!(credit.received.wrapping_sub(credit.forwarded) <= GUEST_BUFFER, "the device overran our buffer");
        if self.takes {
            credit.forwarded = credit.received;
        }
        packet
    }

    /// Hears a REQUEST and accepts it.
    pub(crate) fn accept(&mut self, guest_port: u32) -> u32 {
        let request = self.hear();
        assert_eq!((request.operation, request.guest), (REQUEST, guest_port));
        self.say(request.host, guest_port, RESPONSE, 0, &[]);
        request.host
    }

    /// Sends data within the host's credit; what arrives meanwhile goes to the inbox.
    pub(crate) fn write(&mut self, host: u32, guest: u32, mut data: &[u8]) {
        while !data.is_empty() {
            let credit = self.credits[&(host, guest)];
            let room = credit.host_buffer.saturating_sub(credit.sent.wrapping_sub(credit.host_forwarded)) as usize;
            if room == 0 {
                let packet = self.hear();
                if packet.operation != CREDIT_UPDATE {
                    self.inbox.push_back(packet);
                }
                continue;
            }
            let (now, later) = data.split_at(data.len().min(room).min(65536));
            self.say(host, guest, RW, 0, now);
            data = later;
        }
    }

    /// A pair: the host's socket and the host port, connected to `guest_port`.
    pub(crate) fn pair(&mut self, directory: &Path, guest_port: u32) -> (UnixStream, u32) {
        let mut host = connect(directory, guest_port);
        let port = self.accept(guest_port);
        assert_eq!(read_line(&mut host), format!("OK {port}"));
        (host, port)
    }
}

pub(crate) fn encode(packet: &Packet) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3_u64.to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    bytes.extend(packet.guest.to_le_bytes());
    bytes.extend(packet.host.to_le_bytes());
    bytes.extend(u32::try_from(packet.data.len()).unwrap().to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(packet.operation.to_le_bytes());
    bytes.extend(packet.flags.to_le_bytes());
    bytes.extend(packet.buffer.to_le_bytes());
    bytes.extend(packet.forwarded.to_le_bytes());
    bytes.extend(&packet.data);
    bytes
}

fn decode(bytes: &[u8]) -> Packet {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12)), (2, 0, 3, 0), "context ids");
    assert_eq!(half(28), 1, "stream packets only");
    assert_eq!(word(24) as usize, bytes.len() - 44, "the length is that of the data");
    Packet {
        host: word(16),
        guest: word(20),
        operation: half(30),
        flags: word(32),
        buffer: word(36),
        forwarded: word(40),
        data: bytes[44..].to_vec(),
    }
}
