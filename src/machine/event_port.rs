//! The event port: a guest writes one byte to tell what happened to it. Other values are ignored, reads are 0xff. No
//! volatile state, nothing saved.
//!
//! | byte | meaning |
//! |---|---|
//! | 1 | the kernel panicked |
//! | 2 | power off |
//! | 3 | reboot |
//! | 4 | halt |

use super::bus::BusDevice;
use super::events::{EventSender, MachineEvent, RebootRequest};

/// The guest's kernel panicked.
pub const PANIC: u8 = 1;

/// The guest wants to be powered off.
pub const POWER_OFF: u8 = 2;

/// The guest wants a reboot.
pub const REBOOT: u8 = 3;

/// The guest stops for good without asking for power off; a virtual machine has no one to switch it off by hand.
pub const HALT: u8 = 4;

/// The port.
#[derive(Debug)]
pub struct EventPort {
    events: EventSender,
}

impl EventPort {
    /// A port that tells `events`.
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl BusDevice for EventPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(&PANIC) => self.events.send(MachineEvent::GuestPanic),
            Some(&(POWER_OFF | HALT)) => self.events.send(MachineEvent::PowerOff),
            Some(&REBOOT) => self.events.send(MachineEvent::Reboot(RebootRequest::EventPort)),
            Some(_) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::events;

    #[test]
    fn some_bytes_mean_something() {
        let (sender, told) = events::channel().unwrap();
        let mut port = EventPort::new(sender);
        for byte in 0..=u8::MAX {
            port.write(0, &[byte]);
        }
        let reboot = MachineEvent::Reboot(RebootRequest::EventPort);
        for expected in [MachineEvent::GuestPanic, MachineEvent::PowerOff, reboot, MachineEvent::PowerOff] {
            assert_eq!(told.take(), Some(expected));
        }
        assert_eq!(told.take(), None);
    }
}
