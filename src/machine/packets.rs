//! Packets for a guest that has left, or is on its way here: taken from the taps of the host it left, and given to it
//! before those of its new taps. See `net/forwarded` and the migration's stream.

use std::io;
use std::sync::Arc;

use super::virtio::VirtioSlot;

/// The packets of a machine's interfaces. Any thread may have one.
#[derive(Debug, Clone)]
pub struct PacketDoor {
    /// Interfaces by index.
    interfaces: Vec<(u8, Arc<VirtioSlot>)>,
}

impl PacketDoor {
    /// The door of these devices.
    pub(super) fn new(slots: &[Arc<VirtioSlot>]) -> Self {
        let interface = |slot: &Arc<VirtioSlot>| Some((slot.slot().net_index()?, Arc::clone(slot)));
        Self { interfaces: slots.iter().filter_map(interface).collect() }
    }

    /// Indices of the interfaces.
    pub fn interfaces(&self) -> impl Iterator<Item = u8> {
        self.interfaces.iter().map(|(index, _)| *index)
    }

    /// Takes the next packet that waits for the guest, with its virtio header, in the order they came. Only of a machine
    /// that stands still. `None`: none waits, for now.
    pub fn take(&self, index: u8) -> io::Result<Option<Box<[u8]>>> {
        self.interface(index).map_or(Ok(None), |slot| slot.take_packet())
    }

    /// Has the guest's taps wait for packets that are forwarded. Before the machine goes on.
    pub fn expect(&self) {
        self.interfaces.iter().for_each(|(_, slot)| slot.expect_packets(true));
    }

    /// Adds a packet, with its virtio header, behind those that were added before. False: there is no such interface, or
    /// no room; it is counted as dropped.
    pub fn add(&self, index: u8, packet: &[u8]) -> bool {
        self.interface(index).is_some_and(|slot| slot.add_packet(packet))
    }

    /// No more are forwarded: the taps come next.
    pub fn end(&self) {
        self.interfaces.iter().for_each(|(_, slot)| slot.expect_packets(false));
    }

    fn interface(&self, index: u8) -> Option<&VirtioSlot> {
        self.interfaces.iter().find(|(other, _)| *other == index).map(|(_, slot)| &**slot)
    }
}
