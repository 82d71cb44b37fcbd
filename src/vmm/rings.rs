//! The rings of disks on files (`sys/uring`). A VMM makes them first of all, one for each disk that a machine can have:
//! later its filters know no call that makes one, and its user has no right to. Which it needs, it hears later; the
//! others are closed then.

use super::log;
use crate::machine::layout::Slot;
use crate::machine::virtio::Backend;
use crate::sys::thread;
use crate::sys::uring::Ring;

/// The rings that no disk has yet. None where the host has no io_uring for it: then each disk has a thread.
#[derive(Debug, Default)]
pub(super) struct Rings(Vec<Ring>);

impl Rings {
    /// Makes them. Call before the jail is closed. Says so if there can be none.
    pub(super) fn make() -> Self {
        let disks = (0..=u8::MAX).map_while(Slot::block).count();
        // A thread makes them: the first, so the allocator is told before it of what holds for all.
        let made = thread::share_arena().and_then(|()| Ring::make(disks));
        made.map(Self).unwrap_or_else(|error| {
            log::say(format_args!("each disk has a thread, as there is no io_uring: {error}"));
            Self::default()
        })
    }

    /// Gives each disk on a file its ring, and closes those that are left. A machine that could not be built takes its
    /// rings with it: the disks of the next one have threads.
    pub(super) fn hand_out(&mut self, devices: &mut [(Slot, Backend)]) {
        let mut left = std::mem::take(&mut self.0);
        for (_, device) in devices {
            if let Backend::Block { ring, .. } = device {
                *ring = left.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_on_a_file_gets_a_ring() {
        let disk = |index| {
            let backend = Backend::Block { file: tempfile::tempfile().unwrap(), read_only: true, ring: None };
            (Slot::block(index).unwrap(), backend)
        };
        let mut rings = Rings::make();
        let made = rings.0.len();
        let mut devices: Vec<_> = (0..6).map(disk).collect();
        devices.push((Slot::RNG, Backend::Rng));
        rings.hand_out(&mut devices);
        let given = |devices: &[(Slot, Backend)]| {
            devices.iter().filter(|(_, device)| matches!(device, Backend::Block { ring: Some(_), .. })).count()
        };
        assert_eq!((given(&devices), rings.0.len()), (made, 0));
        assert!(made == 6 || (made == 0 && Ring::make(1).is_err()), "{made} rings");
        let mut again = [disk(0)];
        rings.hand_out(&mut again);
        assert_eq!(given(&again), 0);
    }
}
