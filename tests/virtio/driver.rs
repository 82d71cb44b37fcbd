//! A guest's half of virtio-mmio: enough of a driver to bring a device up, post buffers, honour and test notification
//! suppression in both directions, and wait for interrupts. Written from the specification, not from the device.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hearth::machine::bus::SharedBusDevice;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{DeviceLoop, VirtioSlot};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
/// What every driver of today accepts of the transport.
pub(crate) const PLAIN: u64 = VERSION_1 | EVENT_IDX | INDIRECT;

// Network device.
pub(crate) const MERGE: u64 = 1 << 15;
pub(crate) const CHECKSUM: u64 = 0b11;
pub(crate) const USO: u64 = 0b111 << 54;
pub(crate) const MTU: u64 = 1 << 3;
pub(crate) const LINK: u64 = 1 << 16;
pub(crate) const TSO: u64 = 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;

/// How long any wait may take before the test fails.
pub(crate) const PATIENCE_MS: u16 = 20_000;

pub(crate) fn ram(mib: usize) -> GuestRam {
    // Two regions, so that buffers and rings may cross from one to the other.
    let half = mib << 19;
    GuestRam::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

/// One device with its driver.
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) slot: Arc<VirtioSlot>,
    pub(crate) registers: SharedBusDevice,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) accepted: u64,
    next_free: u64,
    line: Epoll,
}

impl Driver {
    /// A driver that has not touched the device yet.
    pub(crate) fn new(ram: &GuestRam, slot: Arc<VirtioSlot>) -> Self {
        let (registers, line) = (slot.registers(), Epoll::new().unwrap());
        let event = EpollEvent::new(EventSet::IN, 0);
        line.ctl(ControlOperation::Add, slot.interrupt().as_raw_fd(), event).unwrap();
        Self { ram: ram.clone(), slot, registers, queues: Vec::new(), accepted: 0, next_free: 0x1000, line }
    }

    /// Brings the device up with all features of `wanted` that it offers.
    pub(crate) fn up(ram: &GuestRam, slot: Arc<VirtioSlot>, wanted: u64) -> Self {
        let mut driver = Self::new(ram, slot);
        driver.bring_up(wanted);
        driver
    }

    /// The same with its rings and buffers from `first` on: another driver has what is below.
    pub(crate) fn up_from(ram: &GuestRam, slot: Arc<VirtioSlot>, wanted: u64, first: u64) -> Self {
        let mut driver = Self::new(ram, slot);
        driver.next_free = first;
        driver.bring_up(wanted);
        driver
    }

    pub(crate) fn bring_up(&mut self, wanted: u64) {
        assert_eq!((self.read(0x000), self.read(0x004)), (0x7472_6976, 2));
        self.write(0x070, 0);
        self.write(0x070, 1);
        self.write(0x070, 3);
        self.accepted = self.offered() & wanted;
        for half in 0..2 {
            self.write(0x024, half);
            self.write(0x020, u32::try_from(self.accepted >> (32 * half) & 0xffff_ffff).unwrap());
        }
        self.write(0x070, 11);
        assert_eq!(self.read(0x070), 11, "features were refused");
        self.queues.clear();
        for index in 0.. {
            self.write(0x030, index);
            let size = self.read(0x034);
            if size == 0 {
                break;
            }
            self.set_up_queue(index, u16::try_from(size).unwrap());
        }
        self.write(0x070, 15);
        assert_eq!(self.read(0x070), 15);
    }

    /// Goes on with another device in the old one's place, as after a restore.
    pub(crate) fn move_to(&mut self, slot: Arc<VirtioSlot>) {
        (self.registers, self.line) = (slot.registers(), Epoll::new().unwrap());
        let event = EpollEvent::new(EventSet::IN, 0);
        self.line.ctl(ControlOperation::Add, slot.interrupt().as_raw_fd(), event).unwrap();
        self.slot = slot;
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |which| {
            self.write(0x014, which);
            u64::from(self.read(0x010))
        };
        half(0) | half(1) << 32
    }

    fn set_up_queue(&mut self, index: u32, size: u16) {
        let entries = u64::from(size);
        let descriptors = self.allocate(16 * entries);
        let available = self.allocate(6 + 2 * entries);
        let used = self.allocate(6 + 8 * entries);
        self.ram.write_slice(&vec![0; 6 + 2 * usize::from(size)], GuestAddress(available)).unwrap();
        self.ram.write_slice(&vec![0; 6 + 8 * usize::from(size)], GuestAddress(used)).unwrap();
        self.write(0x038, u32::from(size));
        for (register, address) in [(0x080, descriptors), (0x090, available), (0x0a0, used)] {
            self.write(register, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(0x044, 1);
        assert_eq!(self.read(0x044), 1, "queue {index} was refused");
        let event_idx = self.accepted & EVENT_IDX != 0;
        self.queues.push(DriverQueue::new(self.ram.clone(), size, [descriptors, available, used], event_idx));
    }

    /// Guest memory nobody else uses, aligned to 16.
    pub(crate) fn allocate(&mut self, bytes: u64) -> u64 {
        let at = self.next_free;
        self.next_free = (at + bytes).next_multiple_of(16);
        at
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.registers.lock().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.registers.lock().unwrap().write(offset, &value.to_le_bytes());
    }

    pub(crate) fn config(&self, offset: u64, data: &mut [u8]) {
        self.registers.lock().unwrap().read(0x100 + offset, data);
    }

    /// Tells the device about new buffers, if it wants to be told.
    pub(crate) fn kick(&mut self, queue: usize) -> bool {
        let wanted = self.queues[queue].kick_wanted();
        if wanted {
            self.slot.queue_notify()[queue].write(1).unwrap();
        }
        wanted
    }

    /// Waits for an interrupt, reads and acknowledges its reasons.
    pub(crate) fn interrupt(&self) -> Option<u32> {
        self.interrupt_within(PATIENCE_MS)
    }

    pub(crate) fn interrupt_within(&self, milliseconds: u16) -> Option<u32> {
        let event = self.slot.interrupt();
        // A ring that was closed interrupts whoever used it, some time later.
        let count = loop {
            match self.line.wait(i32::from(milliseconds), &mut [EpollEvent::default()]) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                count => break count.unwrap(),
            }
        };
        if count == 0 {
            return None;
        }
        event.read().unwrap();
        let reasons = self.read(0x060);
        self.write(0x064, reasons);
        Some(reasons)
    }

    /// The next used chain of a queue, waiting for interrupts: chain's head and bytes written.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.queues[queue].take_used() {
                return used;
            }
            if self.queues[queue].wait_wanted() {
                assert!(self.interrupt().is_some(), "no interrupt for queue {queue}");
            }
        }
    }
}

/// A loop that runs these slots, already resumed.
pub(crate) fn run(slots: &[&Arc<VirtioSlot>]) -> DeviceLoop {
    let devices = DeviceLoop::start(slots.iter().map(|slot| Arc::clone(slot)).collect()).unwrap();
    devices.resume();
    devices
}

/// The driver's end of a virtqueue.
pub(crate) struct DriverQueue {
    ram: GuestRam,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    added: u16,
    kicked: u16,
    taken: u16,
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const TABLE: u16 = 4;

impl DriverQueue {
    fn new(ram: GuestRam, size: u16, [descriptors, available, used]: [u64; 3], event_idx: bool) -> Self {
        let free = (0..size).rev().collect();
        let chains = BTreeMap::new();
        Self { ram, size, descriptors, available, used, event_idx, free, chains, added: 0, kicked: 0, taken: 0 }
    }

    fn get(&self, address: u64) -> u16 {
        self.ram.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn put(&self, value: u16, address: u64) {
        self.ram.store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Writes one descriptor, whatever it says.
    pub(crate) fn descriptor(&self, table: u64, index: u16, address: u64, bytes: u32, (flags, next): (u16, u16)) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&bytes.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write_slice(&raw, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Announces a chain, whatever it is.
    pub(crate) fn announce(&mut self, head: u16) {
        self.put(head, self.available + 4 + 2 * u64::from(self.added % self.size));
        self.added = self.added.wrapping_add(1);
        self.put(self.added, self.available + 2);
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Posts buffers: (address, bytes) the device reads, then those it writes.
    pub(crate) fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let all = readable.len() + writable.len();
        let indexes: Vec<u16> = (0..all).map(|_| self.free.pop().expect("ring full")).collect();
        let buffers = readable.iter().map(|one| (one, 0)).chain(writable.iter().map(|one| (one, WRITE)));
        for (at, ((address, bytes), flags)) in buffers.enumerate() {
            let next = indexes.get(at + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.descriptor(self.descriptors, indexes[at], *address, *bytes, (flags, next.unwrap_or(0)));
        }
        let head = indexes[0];
        self.chains.insert(head, indexes);
        self.announce(head);
        head
    }

    /// The same through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let all = readable.len() + writable.len();
        let buffers = readable.iter().map(|one| (one, 0)).chain(writable.iter().map(|one| (one, WRITE)));
        for (at, ((address, bytes), flags)) in buffers.enumerate() {
            let at = u16::try_from(at).unwrap();
            let last = usize::from(at) + 1 == all;
            self.descriptor(table, at, *address, *bytes, (flags | if last { 0 } else { NEXT }, at + 1));
        }
        let head = self.free.pop().expect("ring full");
        self.descriptor(self.descriptors, head, table, u32::try_from(16 * all).unwrap(), (TABLE, 0));
        self.chains.insert(head, vec![head]);
        self.announce(head);
        head
    }

    /// Whether the device wants to be told of what was added since it was last considered (2.7.10).
    pub(crate) fn kick_wanted(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.kicked, self.added);
        if self.event_idx {
            let event = self.get(self.used + 4 + 8 * u64::from(self.size));
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(before)
        } else {
            before != self.added && self.get(self.used) & 1 == 0
        }
    }

    /// The next used chain.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.get(self.used + 2) == self.taken {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.taken % self.size);
        let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        let written: u32 = self.ram.read_obj(GuestAddress(at + 4)).unwrap();
        self.taken = self.taken.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free.extend(self.chains.remove(&head).expect("the device used a chain it was not given"));
        Some((head, written))
    }

    /// Asks for an interrupt at the next used chain; false if there is one already.
    pub(crate) fn wait_wanted(&self) -> bool {
        self.put(self.taken, self.available + 4 + 2 * u64::from(self.size));
        fence(Ordering::SeqCst);
        self.get(self.used + 2) == self.taken
    }
}
