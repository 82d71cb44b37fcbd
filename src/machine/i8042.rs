//! A keyboard controller that only knows how to reset the machine: a guest that writes 0xFE to the command port (its
//! usual way to reboot) is told to its owner. It has no volatile state, so nothing of it is saved.

use super::bus::BusDevice;
use super::events::{EventSender, MachineEvent, RebootRequest};

/// Pulse the processor's reset line (8042 command set, as in Linux `drivers/platform/x86` and `reboot=k`).
const COMMAND_RESET: u8 = 0xFE;

/// Status: input buffer empty, so that a guest which waits for it goes on; output buffer empty: no key was pressed.
const STATUS_IDLE: u8 = 0;

/// The command and status port (0x64).
#[derive(Debug)]
pub struct I8042Command {
    events: EventSender,
}

impl I8042Command {
    /// A controller that tells `events` about a reset.
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042Command {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(STATUS_IDLE);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&COMMAND_RESET) {
            self.events.send(MachineEvent::Reboot(RebootRequest::KeyboardController));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::events;

    #[test]
    fn only_the_reset_command_reboots() {
        let (sender, told) = events::channel().unwrap();
        let mut port = I8042Command::new(sender);
        for command in 0..=u8::MAX {
            port.write(0, &[command]);
        }
        assert_eq!(told.take(), Some(MachineEvent::Reboot(RebootRequest::KeyboardController)));
        assert_eq!(told.take(), None);
        let mut status = [0xff];
        port.read(0, &mut status);
        assert_eq!(status, [STATUS_IDLE]);
    }
}
