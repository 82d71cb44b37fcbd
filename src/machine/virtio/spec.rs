//! Numbers of the virtio 1.2 specification ("Virtual I/O Device (VIRTIO) Version 1.2", OASIS, July 2022), each with
//! its section. Nothing here is a choice of ours; choices stand beside the code that makes them.

/// MagicValue register: "virt" in little-endian ASCII (4.2.2).
pub const MMIO_MAGIC: u32 = 0x7472_6976;
/// Version register of devices that are not legacy (4.2.2).
pub const MMIO_VERSION: u32 = 2;

/// Register offsets of the MMIO transport (4.2.2, table 4.1).
pub mod register {
    /// Read: [`super::MMIO_MAGIC`].
    pub const MAGIC: u64 = 0x000;
    /// Read: [`super::MMIO_VERSION`].
    pub const VERSION: u64 = 0x004;
    /// Read: the kind of device (section 5).
    pub const DEVICE_ID: u64 = 0x008;
    /// Read: who made it.
    pub const VENDOR_ID: u64 = 0x00c;
    /// Read: 32 offered feature bits, chosen by [`DEVICE_FEATURES_SEL`].
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Write: which 32 bits [`DEVICE_FEATURES`] shows.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// Write: 32 accepted feature bits, chosen by [`DRIVER_FEATURES_SEL`].
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Write: which 32 bits [`DRIVER_FEATURES`] sets.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Write: which queue the queue registers are about.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Read: largest size of the selected queue, 0 if there is no such queue.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// Write: size of the selected queue.
    pub const QUEUE_NUM: u64 = 0x038;
    /// Read and write: 1 while the selected queue is in use.
    pub const QUEUE_READY: u64 = 0x044;
    /// Write: index of a queue with new buffers.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Read: why the interrupt was raised.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// Write: reasons that have been handled.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Read and write: the device status field; writing 0 resets the device.
    pub const STATUS: u64 = 0x070;
    /// Write: descriptor table of the selected queue, low half.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// High half of it.
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    /// Write: available ring of the selected queue, low half.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// High half of it.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    /// Write: used ring of the selected queue, low half.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// High half of it.
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// Read: length of the selected shared memory region, all ones if there is none; low half.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// High half of it.
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    /// Read: address of that region, all ones if there is none; low half.
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    /// High half of it.
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    /// Read: changes whenever the configuration space does.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// Start of the device's configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the device status field (2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver works.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is over.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on without a reset.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The guest has given up on the device.
    pub const FAILED: u32 = 128;
}

/// Bits of InterruptStatus (4.2.2).
pub mod interrupt {
    /// A used ring has new entries.
    pub const USED_RING: u32 = 1;
    /// The configuration space or the status has changed.
    pub const CONFIG: u32 = 2;
}

/// Feature bits that belong to no device (section 6).
pub mod feature {
    /// Descriptors may refer to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Rings carry the index from which on an event is wanted.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Version 1 of the specification; a driver without it is refused.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device kinds (section 5).
pub mod device_id {
    /// Network card (5.1).
    pub const NET: u32 = 1;
    /// Block device (5.2).
    pub const BLOCK: u32 = 2;
    /// Entropy device (5.4).
    pub const RNG: u32 = 4;
    /// Memory balloon (5.5).
    pub const BALLOON: u32 = 5;
    /// Socket device (5.10).
    pub const VSOCK: u32 = 19;
}

/// Network device (5.1).
pub mod net {
    /// The device takes packets with partial checksums (5.1.3).
    pub const F_CSUM: u64 = 1 << 0;
    /// The driver takes packets with partial checksums.
    pub const F_GUEST_CSUM: u64 = 1 << 1;
    /// The configuration space has the longest packet that can be sent.
    pub const F_MTU: u64 = 1 << 3;
    /// The configuration space has the hardware address.
    pub const F_MAC: u64 = 1 << 5;
    /// The driver takes TCP/IPv4 segments to be cut.
    pub const F_GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP/IPv6 segments to be cut.
    pub const F_GUEST_TSO6: u64 = 1 << 8;
    /// The device takes TCP/IPv4 segments to be cut.
    pub const F_HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP/IPv6 segments to be cut.
    pub const F_HOST_TSO6: u64 = 1 << 12;
    /// A received packet may span several buffers.
    pub const F_MRG_RXBUF: u64 = 1 << 15;
    /// The configuration space has the state of the link.
    pub const F_STATUS: u64 = 1 << 16;
    /// The driver takes UDP/IPv4 datagrams to be cut.
    pub const F_GUEST_USO4: u64 = 1 << 54;
    /// The driver takes UDP/IPv6 datagrams to be cut.
    pub const F_GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP datagrams to be cut.
    pub const F_HOST_USO: u64 = 1 << 56;
    /// Where in the configuration space the link's state stands (5.1.4).
    pub const CONFIG_STATUS: usize = 6;
    /// Where in it the MTU stands.
    pub const CONFIG_MTU: usize = 10;
    /// Bytes of it as far as it is used here.
    pub const CONFIG_BYTES: usize = 12;
    /// Bit of the link's state: it is up.
    pub const S_LINK_UP: u16 = 1;
    /// Smallest MTU a device may name (5.1.4.1).
    pub const MTU_MIN: u16 = 68;
    /// Bytes of the header before each packet (5.1.6).
    pub const HEADER_BYTES: usize = 12;
    /// Where in that header the number of merged buffers stands.
    pub const NUM_BUFFERS_OFFSET: usize = 10;
}

/// Block device (5.2).
pub mod block {
    /// The configuration space has the most segments of a request (5.2.3).
    pub const F_SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const F_RO: u64 = 1 << 5;
    /// The configuration space has the block size.
    pub const F_BLK_SIZE: u64 = 1 << 6;
    /// The device can flush.
    pub const F_FLUSH: u64 = 1 << 9;
    /// The device can discard.
    pub const F_DISCARD: u64 = 1 << 13;
    /// The device can write zeroes.
    pub const F_WRITE_ZEROES: u64 = 1 << 14;
    /// Bytes of a sector, whatever the block size (5.2.4).
    pub const SECTOR_BYTES: u64 = 512;
    /// Bytes of a request's header: type, reserved, sector (5.2.6).
    pub const HEADER_BYTES: usize = 16;
    /// Bytes of one range of a discard or write-zeroes request (5.2.6).
    pub const RANGE_BYTES: usize = 16;
    /// Bytes of the answer to GET_ID (5.2.6).
    pub const ID_BYTES: usize = 20;
    /// Request types (5.2.6).
    pub const T_IN: u32 = 0;
    /// Write.
    pub const T_OUT: u32 = 1;
    /// Flush.
    pub const T_FLUSH: u32 = 4;
    /// Ask for the device's id.
    pub const T_GET_ID: u32 = 8;
    /// Discard ranges.
    pub const T_DISCARD: u32 = 11;
    /// Write zeroes to ranges.
    pub const T_WRITE_ZEROES: u32 = 13;
    /// The request was carried out (5.2.6).
    pub const S_OK: u8 = 0;
    /// It failed.
    pub const S_IOERR: u8 = 1;
    /// The device has no such request.
    pub const S_UNSUPP: u8 = 2;
    /// Range flag: the blocks may be deallocated.
    pub const RANGE_UNMAP: u32 = 1;
}

/// Memory balloon (5.5).
pub mod balloon {
    /// The device has a queue for the driver's statistics (5.5.3).
    pub const F_STATS_VQ: u64 = 1 << 1;
    /// The driver may take pages back when the guest runs out of memory.
    pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The device has a queue for pages that are free.
    pub const F_PAGE_REPORTING: u64 = 1 << 5;
    /// Bytes of a page of the balloon, whatever the guest's pages are (5.5.6).
    pub const PAGE_BYTES: u64 = 4096;
    /// Bytes of a page's number in the inflate and deflate queues.
    pub const PAGE_NUMBER_BYTES: usize = 4;
    /// Where in the configuration space the number of pages stands that the device wants (5.5.4).
    pub const CONFIG_NUM_PAGES: usize = 0;
    /// Where in it the driver writes how many it has given.
    pub const CONFIG_ACTUAL: usize = 4;
    /// Bytes of it, as far as it is used here.
    pub const CONFIG_BYTES: usize = 8;
    /// Bytes of one entry of the statistics: tag and value, packed (5.5.6.3).
    pub const STAT_BYTES: usize = 10;
    /// Tags of the statistics (5.5.6.4): bytes swapped in.
    pub const S_SWAP_IN: u16 = 0;
    /// Bytes swapped out.
    pub const S_SWAP_OUT: u16 = 1;
    /// Major page faults.
    pub const S_MAJFLT: u16 = 2;
    /// Minor page faults.
    pub const S_MINFLT: u16 = 3;
    /// Bytes not used for anything.
    pub const S_MEMFREE: u16 = 4;
    /// Bytes in all.
    pub const S_MEMTOT: u16 = 5;
    /// Bytes that can be had without swapping.
    pub const S_AVAIL: u16 = 6;
    /// Bytes of files in memory that can be had.
    pub const S_CACHES: u16 = 7;
}

/// Socket device (5.10).
pub mod vsock {
    /// Bytes of a packet's header (5.10.6).
    pub const HEADER_BYTES: usize = 44;
    /// The host's context id (5.10.4).
    pub const HOST_CID: u64 = 2;
    /// Packet type of stream sockets (5.10.6).
    pub const TYPE_STREAM: u16 = 1;
    /// SHUTDOWN flag: the sender will receive no more (5.10.6.5).
    pub const SHUTDOWN_RECEIVE: u32 = 1;
    /// SHUTDOWN flag: the sender will send no more.
    pub const SHUTDOWN_SEND: u32 = 2;
    /// Event: all connections are gone (5.10.6.7).
    pub const EVENT_TRANSPORT_RESET: u32 = 0;
    /// Bytes of an event.
    pub const EVENT_BYTES: usize = 4;
}
