//! The network device on a tap, in a network namespace of the test's own: needs root and /dev/net/tun, and fails
//! without them. The other side of the tap is a packet socket.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, DeviceLoop, NetCounts, VirtioSlot};
use hearth::sys::tap;
use hearth::units::NetLimits;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{CHECKSUM, Driver, MERGE, PLAIN, TSO, USO, ram, run};

pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// An EtherType for experiments (IEEE 802 local experimental 1).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `body` in a network namespace of its own, which goes away with its thread.
pub(crate) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own; are you root?");
        body();
    };
    thread::spawn(run).join().unwrap();
}

pub(crate) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

pub(crate) fn device(ram: &GuestRam, name: &str) -> Arc<VirtioSlot> {
    Arc::new(VirtioSlot::new(Slot::net(0).unwrap(), backend(name, NetLimits::default()), ram).unwrap())
}

pub(crate) fn backend(name: &str, limits: NetLimits) -> Backend {
    Backend::Net { tap: tap::open(name).unwrap(), mac: MAC, mtu: None, limits }
}

/// Brings a tap up. No address autoconfiguration: the fewer frames but the test's, the better.
pub(crate) fn up(name: &str) {
    ip(&format!("link set {name} addrgenmode none"));
    ip(&format!("link set {name} up"));
}

/// A packet socket on the host's side of the tap.
pub(crate) struct Wire {
    pub(crate) file: File,
}

impl Wire {
    pub(crate) fn open(name: &str) -> Self {
        let socket: OwnedFd =
            socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, socket::SockProtocol::EthAll)
                .unwrap();
        socket::setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5)).unwrap();
        let index = nix::net::if_::if_nametoindex(name).unwrap();
        bind(&socket, index);
        Self { file: socket.into() }
    }

    /// The next frame of our EtherType that came from the guest.
    pub(crate) fn read(&mut self) -> Vec<u8> {
        loop {
            let mut frame = vec![0; 70_000];
            let count = self.file.read(&mut frame).expect("no frame came");
            frame.truncate(count);
            // Our own frames are heard as well.
            if frame[12..14] == ETHERTYPE && frame[6..12] == MAC {
                return frame;
            }
        }
    }
}

#[expect(unsafe_code, reason = "nix cannot make a link-layer address to bind to")]
fn bind(socket: &OwnedFd, index: u32) {
    // SAFETY: `sockaddr_ll` is plain data; all zeroes are a value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = 3_u16.to_be();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let size = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the socket is open, and `address` is a socket address of `size` bytes, valid for the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0);
}

pub(crate) fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ETHERTYPE, body].concat()
}

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) devices: DeviceLoop,
    pub(crate) wire: Wire,
    buffers: std::collections::BTreeMap<u16, u64>,
}

impl Guest {
    pub(crate) fn up(features: u64) -> Self {
        Self::limited(features, NetLimits::default())
    }

    pub(crate) fn limited(features: u64, limits: NetLimits) -> Self {
        let ram = ram(16);
        let slot = Arc::new(VirtioSlot::new(Slot::net(0).unwrap(), backend("tap0", limits), &ram).unwrap());
        up("tap0");
        let devices = run(&[&slot]);
        let driver = Driver::up(&ram, slot, features);
        Self { driver, devices, wire: Wire::open("tap0"), buffers: std::collections::BTreeMap::new() }
    }

    pub(crate) fn post(&mut self, count: usize, bytes: u32) {
        for _ in 0..count {
            let buffer = self.driver.allocate(u64::from(bytes));
            let head = self.driver.queues[0].add(&[], &[(buffer, bytes)]);
            self.buffers.insert(head, buffer);
        }
        self.driver.kick(0);
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.put(frame);
        self.driver.wait_used(1);
    }

    /// Gives a frame to the device and does not wait until it is gone.
    pub(crate) fn put(&mut self, frame: &[u8]) {
        let bytes = u32::try_from(frame.len()).unwrap();
        let (header, data) = (self.driver.allocate(12), self.driver.allocate(u64::from(bytes)));
        self.driver.ram.write_slice(&[0; 12], GuestAddress(header)).unwrap();
        self.driver.ram.write_slice(frame, GuestAddress(data)).unwrap();
        self.driver.queues[1].add(&[(header, 12), (data, bytes)], &[]);
        self.driver.kick(1);
    }

    pub(crate) fn part(&mut self) -> Vec<u8> {
        let (head, written) = self.driver.wait_used(0);
        let mut bytes = vec![0; written as usize];
        let buffer = self.buffers.remove(&head).unwrap();
        self.driver.ram.read_slice(&mut bytes, GuestAddress(buffer)).unwrap();
        bytes
    }

    /// The next frame with our EtherType, and how many buffers it took.
    pub(crate) fn hear(&mut self) -> (Vec<u8>, u16) {
        loop {
            let first = self.part();
            let count = u16::from_le_bytes([first[10], first[11]]);
            let mut all = first[12..].to_vec();
            (1..count).for_each(|_| all.extend(self.part()));
            if all[12..14] == ETHERTYPE {
                return (all, count);
            }
        }
    }
}

#[test]
fn frames_pass_both_ways() {
    for features in [PLAIN, PLAIN | MERGE | CHECKSUM | TSO | USO | 1 << 5] {
        in_namespace(move || {
            let mut guest = Guest::up(features);
            let mut mac = [0; 6];
            guest.driver.config(0, &mut mac);
            assert_eq!(mac, MAC);
            guest.post(8, 2048);
            let out = frame([0xff; 6], MAC, b"from the guest, to whom it may concern; with some padding....");
            guest.send(&out);
            assert_eq!(guest.wire.read(), out);
            let back = frame(MAC, [2; 6], &[7; 1500]);
            guest.wire.file.write_all(&back).unwrap();
            assert_eq!(guest.hear(), (back, 1));
            // The longest there are.
            let longest = frame([0xff; 6], MAC, &vec![3; 8 + 65_535]);
            guest.send(&longest);
            assert_eq!(guest.wire.read(), longest);
            let NetCounts { link_up, tx, .. } = guest.driver.slot.net_counts().unwrap();
            assert_eq!((link_up, tx.frames, tx.bytes), (true, 2, (out.len() + longest.len()) as u64));
        });
    }
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | MERGE);
        // Two buffers are too few for the first frame: it waits for more.
        guest.post(2, 600);
        let back = frame(MAC, [2; 6], &(0..1500).map(|at| u8::try_from(at % 256).unwrap()).collect::<Vec<_>>());
        guest.wire.file.write_all(&back).unwrap();
        thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(guest.driver.queues[0].take_used(), None);
        guest.post(6, 600);
        assert_eq!(guest.hear(), (back.clone(), 3));
        guest.wire.file.write_all(&back).unwrap();
        assert_eq!(guest.hear(), (back, 3));
    });
}

#[test]
fn frames_without_room_are_dropped_and_others_are_not() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN);
        guest.post(2, 600);
        guest.wire.file.write_all(&frame(MAC, [2; 6], &[1; 1000])).unwrap();
        let small = frame(MAC, [2; 6], &[2; 100]);
        guest.wire.file.write_all(&small).unwrap();
        assert_eq!(guest.hear(), (small, 1));
        assert!(guest.driver.slot.counts().dropped >= 1);
        // What is no frame at all, or too long for one, is dropped as well.
        let before = guest.driver.slot.counts().dropped;
        guest.send(&[0; 13]);
        guest.send(&vec![0; 66_000]);
        assert_eq!(guest.driver.slot.counts().dropped, before + 2);
        let NetCounts { rx, tx, .. } = guest.driver.slot.net_counts().unwrap();
        assert_eq!(rx.dropped + tx.dropped, guest.driver.slot.counts().dropped);
        assert_eq!((tx.frames, tx.bytes, tx.dropped), (0, 0, 2));
    });
}

#[test]
fn frames_wait_while_paused_and_nothing_is_written() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | MERGE);
        guest.post(16, 2048);
        guest.devices.pause();
        while guest.driver.queues[0].take_used().is_some() {}
        let frames: Vec<_> = (0..10).map(|at| frame(MAC, [2; 6], &[at; 200])).collect();
        frames.iter().for_each(|frame| guest.wire.file.write_all(frame).unwrap());
        thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(guest.driver.queues[0].take_used(), None);
        guest.devices.resume();
        frames.into_iter().for_each(|frame| assert_eq!(guest.hear(), (frame, 1)));
    });
}

#[test]
fn many_frames_keep_their_order() {
    in_namespace(|| {
        let mut guest = Guest::up(PLAIN | MERGE);
        guest.post(200, 2048);
        for round in 0..200_u32 {
            let out = frame([0xff; 6], MAC, &[&round.to_be_bytes()[..], &[0; 60]].concat());
            guest.send(&out);
            assert_eq!(guest.wire.read(), out);
            let back = frame(MAC, [2; 6], &[&round.to_be_bytes()[..], &[1; 60]].concat());
            guest.wire.file.write_all(&back).unwrap();
            assert_eq!(guest.hear().0, back);
            guest.post(1, 2048);
        }
    });
}

#[test]
fn only_a_tap_is_a_tap() {
    let ram = ram(4);
    let (tap, limits) = (tempfile::tempfile().unwrap(), NetLimits::default());
    let backend = Backend::Net { tap, mac: MAC, mtu: None, limits };
    let error = VirtioSlot::new(Slot::net(1).unwrap(), backend, &ram).unwrap_err();
    assert_eq!(error.to_string(), "slot 10: use the tap");
    for name in ["", "a/b", "sixteen-bytes-xx"] {
        assert!(tap::open(name).is_err());
    }
}
