//! One slot as its threads share it: the lock-free part (interrupt, notifications, counters) and the [`Cell`] under
//! the slot's only lock.
//!
//! Who takes the lock: the device loop for each turn, a vCPU thread for register accesses that set the device up, the
//! machine's thread for save. Nobody holds two slots' locks. A turn is bounded, so nobody waits long; the exception is a
//! reset or a pause of a disk, which waits for the host's disk, or up to a second for a volume's server.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::BalloonCounts;
use super::block::Block;
use super::interrupt::Interrupt;
use super::mmio::RegisterFile;
use super::model::{Counters, Io, Model, QUEUE_TOKENS, Turn};
use super::net::traffic::Traffic;
use super::queue::{Queue, RingError};
use super::saved::TransportV1;
use super::spec::feature;
use crate::machine::layout::Slot;
use crate::machine::ram::GuestRam;
use crate::saved::{SaveSectionError, Section};
use crate::units::PageCount;

/// Most events taken from the kernel in one turn of one device. What is left is reported again.
const EVENTS_PER_TURN: usize = 32;

/// A slot, shared by the loop and the vCPU threads.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Which slot.
    pub(crate) slot: Slot,
    /// Interrupt line and register.
    pub(crate) interrupt: Interrupt,
    /// One event per queue: the guest has added buffers.
    pub(crate) notify: Vec<EventFd>,
    /// What happened, and how often.
    pub(crate) counters: Counters,
    /// What passed, if it is a network device.
    pub(crate) traffic: Option<Arc<Traffic>>,
    /// The queues' events and whatever the model watches.
    pub(crate) epoll: Arc<Epoll>,
    cell: Mutex<Cell>,
}

/// What is under the slot's lock.
#[derive(Debug)]
pub(crate) struct Cell {
    /// Registers that hold a value.
    pub(crate) registers: RegisterFile,
    /// The queues.
    pub(crate) queues: Vec<Queue>,
    /// The device behind them.
    pub(crate) model: Box<dyn Model>,
    ram: GuestRam,
    paused: bool,
}

impl Cell {
    /// A paused cell.
    pub(crate) fn new(registers: RegisterFile, queues: Vec<Queue>, model: Box<dyn Model>, ram: GuestRam) -> Self {
        Self { registers, queues, model, ram, paused: true }
    }

    /// Lets the model work for a turn.
    fn serve(&mut self, shared: &Shared) -> Turn {
        let Self { registers, queues, model, ram, .. } = self;
        let (live, features) = (registers.status.is_live(), registers.accepted);
        let served = model.serve(&mut Io { queues, ram, live, features, counters: &shared.counters });
        self.tell_config_change(shared);
        match served {
            Ok(turn) => {
                self.interrupt_if_owed(shared);
                turn
            }
            Err(_) => {
                self.give_up(shared);
                Turn::Idle
            }
        }
    }

    /// Finishes what was begun.
    pub(crate) fn drain(&mut self, shared: &Shared) {
        self.stop_with(shared, |model, io| model.drain(io));
    }

    fn stop_with(&mut self, shared: &Shared, stop: impl FnOnce(&mut dyn Model, &mut Io<'_>) -> Result<(), RingError>) {
        let Self { registers, queues, model, ram, .. } = self;
        let (live, features) = (registers.status.is_live(), registers.accepted);
        let stopped = stop(model.as_mut(), &mut Io { queues, ram, live, features, counters: &shared.counters });
        match stopped {
            Ok(()) => self.interrupt_if_owed(shared),
            Err(_) => self.give_up(shared),
        }
    }

    /// Tells a driver that is up of a configuration space that is another; one that is not reads it anyway.
    fn tell_config_change(&mut self, shared: &Shared) {
        if self.model.take_config_change() {
            self.registers.config_changed();
            if self.registers.status.is_live() {
                shared.interrupt.raise_config();
            }
        }
    }

    fn interrupt_if_owed(&mut self, shared: &Shared) {
        if !self.registers.status.is_live() {
            return;
        }
        let mut owed = false;
        for queue in &mut self.queues {
            match queue.owes_interrupt() {
                Ok(one) => owed |= one,
                Err(_) => return self.give_up(shared),
            }
        }
        if owed {
            shared.interrupt.raise_used();
        }
    }

    /// The driver broke the rules: stop, and tell it (2.1.2). It can reset the device.
    pub(crate) fn give_up(&mut self, shared: &Shared) {
        Counters::count(&shared.counters.broken);
        self.model.reset();
        let was_live = self.registers.status.is_live();
        self.registers.status = self.registers.status.broken();
        if was_live {
            shared.interrupt.raise_config();
        }
    }

    /// The guest resets the device. When this returns, nothing writes to its memory any more (2.4.1).
    pub(crate) fn reset(&mut self, shared: &Shared) {
        self.model.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.registers = RegisterFile::new(self.registers.offered);
        shared.interrupt.set_status(0);
    }
}

impl Shared {
    /// Puts a slot together.
    pub(crate) fn new(slot: Slot, interrupt: Interrupt, notify: Vec<EventFd>, epoll: Arc<Epoll>, cell: Cell) -> Self {
        let (counters, traffic) = (Counters::default(), cell.model.traffic());
        Self { slot, interrupt, notify, counters, traffic, epoll, cell: Mutex::new(cell) }
    }

    /// The cell. A thread that panicked ends the process, so a poisoned lock is only met in tests.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Cell> {
        self.cell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the loop look at the device.
    pub(crate) fn poke(&self) {
        if let Some(first) = self.notify.first() {
            // It can only fail when 2^64 - 2 events are pending already.
            let _ = first.write(1);
        }
    }

    /// One turn of the device: takes its events and works for a bounded time.
    pub(crate) fn turn(&self) -> Turn {
        let mut events = [EpollEvent::default(); EVENTS_PER_TURN];
        // EINTR is the one error left to a wait on an epoll instance of our own; the outer loop comes again.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        let mut cell = self.lock();
        for event in &events[..count] {
            if event.data() < QUEUE_TOKENS {
                cell.model.event(event.data(), event.event_set());
            }
        }
        if cell.paused { Turn::Idle } else { cell.serve(self) }
    }

    /// Nothing is written to guest memory after this, until [`Shared::resume`].
    pub(crate) fn pause(&self) {
        let mut cell = self.lock();
        if !cell.paused {
            cell.stop_with(self, |model, io| model.pause(io));
            cell.paused = true;
        }
    }

    /// Work again: look at every queue, and raise the interrupt in case it was lost on the way.
    pub(crate) fn resume(&self) -> Turn {
        let mut cell = self.lock();
        cell.paused = false;
        let turn = cell.serve(self);
        if cell.registers.status.is_live() {
            self.interrupt.raise_used();
        }
        turn
    }

    /// Gives a network device another tap. The guest learns of it in the device's next turn: a paused one when it goes
    /// on.
    pub(crate) fn replace_tap(&self, tap: File) -> io::Result<()> {
        self.lock().model.replace_tap(tap)?;
        self.poke();
        Ok(())
    }

    /// Takes the next packet that waits for the guest; only while paused.
    pub(crate) fn take_packet(&self) -> io::Result<Option<Box<[u8]>>> {
        let mut cell = self.lock();
        assert!(cell.paused, "packets are taken from a paused device only");
        cell.model.take_packet()
    }

    /// Gives a network device a packet that goes before those of its tap.
    pub(crate) fn add_packet(&self, packet: &[u8]) -> bool {
        let added = self.lock().model.add_packet(packet);
        self.poke();
        added
    }

    /// Whether the tap of a network device has to wait for such packets.
    pub(crate) fn expect_packets(&self, more: bool) {
        self.lock().model.expect_packets(more);
        self.poke();
    }

    /// Asks or changes something of a block device; `None` if it is none.
    pub(crate) fn block<T>(&self, ask: impl FnOnce(&mut Block) -> T) -> Option<T> {
        let answer = self.lock().model.block().map(ask);
        self.poke();
        answer
    }

    /// Sets the balloon's target, if there is one to set, and asks the guest for fresh statistics. `None`: it is no
    /// balloon. A paused device does both when it goes on.
    pub(crate) fn balloon(&self, target: Option<PageCount>) -> Option<BalloonCounts> {
        let counts = {
            let mut cell = self.lock();
            let balloon = cell.model.balloon()?;
            if let Some(target) = target {
                balloon.set_target(target);
            }
            balloon.want_statistics();
            balloon.counts()
        };
        self.poke();
        Some(counts)
    }

    /// The slot's sections; only while paused.
    pub(crate) fn save(&self) -> Result<[Section; 2], SaveSectionError> {
        let cell = self.lock();
        assert!(cell.paused, "a device is saved only while it is paused");
        let instance = u16::from(self.slot.number());
        let device_id = cell.model.face().device_id;
        let transport: TransportV1 = cell.registers.save(device_id, self.interrupt.status(), &cell.queues);
        Ok([Section::new(instance, &transport)?, cell.model.save(instance)?])
    }
}

/// The queues of a saved transport, if this device can have them.
pub(crate) fn queues_from_saved(
    ram: &GuestRam,
    saved: &TransportV1,
    sizes: &[u16],
) -> Result<Vec<Queue>, &'static str> {
    if saved.queues.iter().map(|queue| queue.size_max).ne(sizes.iter().copied()) {
        return Err("number or largest size of the queues differs");
    }
    let event_idx = saved.accepted & feature::RING_EVENT_IDX != 0;
    let queue = |one| Queue::from_saved(ram.clone(), one, event_idx).map_err(|_| "a queue's rings are impossible");
    saved.queues.iter().map(queue).collect()
}
