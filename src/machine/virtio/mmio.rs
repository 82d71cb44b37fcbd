//! The registers of a virtio-mmio slot, version 2 (virtio 1.2 section 4.2): what a guest reads and writes between
//! discovering a device and notifying its queues.
//!
//! [`Registers`] sits on the MMIO bus and is called by vCPU threads. Notifications and the interrupt registers, the
//! only ones used while a driver runs, take no lock; the rest takes the slot's lock and changes [`RegisterFile`] and
//! the queues. Whatever the guest writes here, at worst it breaks its own device until it resets it.

use std::sync::Arc;

use super::model::{Counters, Face};
use super::queue::Queue;
use super::saved::TransportV1;
use super::slot::{Cell, Shared};
use super::spec::{self, feature, register};
use super::status::{Phase, Status, StatusWrite};
use crate::machine::bus::BusDevice;

/// VendorID: "HRTH" in little-endian ASCII. Drivers only print it.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"HRTH");

/// Features of the transport itself, offered by every device.
pub(crate) const TRANSPORT_FEATURES: u64 = feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

/// A slot's registers on the bus.
#[derive(Debug)]
pub(crate) struct Registers {
    shared: Arc<Shared>,
}

impl Registers {
    /// The registers of this slot.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        if offset == register::INTERRUPT_STATUS {
            return Some(self.shared.interrupt.status());
        }
        let cell = self.shared.lock();
        cell.registers.read(offset, cell.model.face(), &cell.queues)
    }

    fn write_register(&self, offset: u64, value: u32) -> Option<()> {
        match offset {
            register::QUEUE_NOTIFY => {
                let notify = self.shared.notify.get(usize::try_from(value).ok()?)?;
                notify.write(1).ok()
            }
            register::INTERRUPT_ACK => {
                self.shared.interrupt.acknowledge(value);
                Some(())
            }
            register::STATUS => write_status(&self.shared, &mut self.shared.lock(), value),
            register::QUEUE_READY => write_queue_ready(&self.shared, &mut self.shared.lock(), value),
            _ => {
                let mut cell = self.shared.lock();
                let Cell { registers, queues, .. } = &mut *cell;
                registers.write(offset, value, queues)
            }
        }
    }
}

impl BusDevice for Registers {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= register::CONFIG {
            let cell = self.shared.lock();
            let rest =
                usize::try_from(offset - register::CONFIG).ok().and_then(|at| cell.model.face().config.get(at..));
            for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
                *to = *from;
            }
            return;
        }
        // 4.2.2.2: registers are read and written 32 bits at a time, aligned.
        let value = if data.len() == 4 && offset.is_multiple_of(4) { self.read_register(offset) } else { None };
        match value {
            Some(value) => data.copy_from_slice(&value.to_le_bytes()),
            None => Counters::count(&self.shared.counters.refused),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            let written = usize::try_from(at).is_ok_and(|at| self.shared.lock().model.write_config(at, data));
            if !written {
                Counters::count(&self.shared.counters.refused);
            }
            return;
        }
        let done = match <[u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => self.write_register(offset, u32::from_le_bytes(data)),
            Ok(_) | Err(_) => None,
        };
        if done.is_none() {
            Counters::count(&self.shared.counters.refused);
        }
    }
}

fn write_status(shared: &Shared, cell: &mut Cell, value: u32) -> Option<()> {
    let before = cell.registers.status;
    match before.write(value, cell.registers.features_acceptable()) {
        StatusWrite::Reset => cell.reset(shared),
        StatusWrite::Moved(status) => {
            cell.registers.status = status;
            if status.is_live() && !before.is_live() {
                // Anything may have become possible: have the loop look at the device.
                shared.poke();
            }
        }
        StatusWrite::Refused => return None,
    }
    Some(())
}

fn write_queue_ready(shared: &Shared, cell: &mut Cell, value: u32) -> Option<()> {
    let at = cell.registers.selected(&cell.queues)?;
    match value {
        1 if cell.registers.status.phase() == Phase::FeaturesOk || cell.registers.status.is_live() => {
            let event_idx = cell.registers.accepted & feature::RING_EVENT_IDX != 0;
            if cell.queues[at].enable(event_idx).is_err() {
                cell.give_up(shared);
            } else if cell.registers.status.is_live() {
                shared.poke();
            }
            Some(())
        }
        0 => {
            if cell.queues[at].is_ready() {
                cell.drain(shared);
                cell.queues[at].disable();
            }
            Some(())
        }
        _ => None,
    }
}

/// The registers that hold a value.
#[derive(Debug)]
pub(crate) struct RegisterFile {
    /// Offered features, the transport's and the device's.
    pub(crate) offered: u64,
    /// Features the driver accepted so far.
    pub(crate) accepted: u64,
    /// The device status field.
    pub(crate) status: Status,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    config_generation: u32,
}

impl RegisterFile {
    /// As after reset.
    pub(crate) fn new(offered: u64) -> Self {
        Self {
            offered,
            accepted: 0,
            status: Status::RESET,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            config_generation: 0,
        }
    }

    /// The configuration space is another (2.5.1, 4.2.2.1).
    pub(crate) fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & feature::VERSION_1 != 0 && self.accepted & !self.offered == 0
    }

    fn selected(&self, queues: &[Queue]) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|at| *at < queues.len())
    }

    fn read(&self, offset: u64, face: &Face, queues: &[Queue]) -> Option<u32> {
        let queue = self.selected(queues).map(|at| &queues[at]);
        Some(match offset {
            register::MAGIC => spec::MMIO_MAGIC,
            register::VERSION => spec::MMIO_VERSION,
            register::DEVICE_ID => face.device_id,
            register::VENDOR_ID => VENDOR_ID,
            register::DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.size_max())),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.is_ready())),
            register::STATUS => self.status.bits(),
            register::CONFIG_GENERATION => self.config_generation,
            register::SHM_LEN_LOW | register::SHM_LEN_HIGH | register::SHM_BASE_LOW | register::SHM_BASE_HIGH => {
                u32::MAX
            }
            _ => return None,
        })
    }

    fn write(&mut self, offset: u64, value: u32, queues: &mut [Queue]) -> Option<()> {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            register::DRIVER_FEATURES => {
                if self.status.phase() != Phase::DriverFound {
                    return None;
                }
                set_half(&mut self.accepted, self.driver_features_sel, value)?;
            }
            _ => {
                let at = self.selected(queues)?;
                let setup = queues[at].setup_mut()?;
                match offset {
                    // A size above the maximum or not a power of two is found when the queue is enabled.
                    register::QUEUE_NUM => setup.size = u16::try_from(value).unwrap_or(0),
                    register::QUEUE_DESC_LOW => set_half(&mut setup.descriptors, 0, value)?,
                    register::QUEUE_DESC_HIGH => set_half(&mut setup.descriptors, 1, value)?,
                    register::QUEUE_DRIVER_LOW => set_half(&mut setup.available, 0, value)?,
                    register::QUEUE_DRIVER_HIGH => set_half(&mut setup.available, 1, value)?,
                    register::QUEUE_DEVICE_LOW => set_half(&mut setup.used, 0, value)?,
                    register::QUEUE_DEVICE_HIGH => set_half(&mut setup.used, 1, value)?,
                    _ => return None,
                }
            }
        }
        Some(())
    }

    /// What must survive; the queues and InterruptStatus come from where they live.
    pub(crate) fn save(&self, device_id: u32, interrupt_status: u32, queues: &[Queue]) -> TransportV1 {
        let &Self { offered, accepted, status, device_features_sel, driver_features_sel, queue_sel, config_generation } =
            self;
        TransportV1 {
            device_id,
            offered,
            accepted,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            status: status.bits(),
            interrupt_status,
            config_generation,
            queues: queues.iter().map(Queue::save).collect(),
        }
    }

    /// As it was saved, or why that cannot be. `offered` is what this device has.
    pub(crate) fn from_saved(saved: &TransportV1, offered: u64) -> Result<Self, &'static str> {
        if saved.offered & !offered != 0 {
            return Err("the guest was offered features that this device does not have");
        }
        let status = Status::from_bits(saved.status).ok_or("impossible device status")?;
        let file = Self {
            // Not what this device has: the guest keeps what it was shown until it asks again.
            offered: saved.offered,
            accepted: saved.accepted,
            status,
            device_features_sel: saved.device_features_sel,
            driver_features_sel: saved.driver_features_sel,
            queue_sel: saved.queue_sel,
            config_generation: saved.config_generation,
        };
        if matches!(status.phase(), Phase::FeaturesOk | Phase::DriverOk) && !file.features_acceptable() {
            return Err("the driver is past negotiation with features it cannot have");
        }
        Ok(file)
    }
}

/// The low (0) or high (1) 32 bits; nothing is above.
fn half(value: u64, which: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match which {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Sets the low (0) or high (1) 32 bits; above, only zeroes can be set.
fn set_half(value: &mut u64, which: u32, bits: u32) -> Option<()> {
    match which {
        0 => *value = (*value & !0xffff_ffff) | u64::from(bits),
        1 => *value = (*value & 0xffff_ffff) | (u64::from(bits) << 32),
        _ if bits == 0 => {}
        _ => return None,
    }
    Some(())
}
