//! Whole devices that are up, with whatever a guest may put into its rings. They work, or ask for a reset; nothing
//! panics and every step ends.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::{Backend, VirtioSlot};
use hearth::sys::uring::Ring;
use hearth::sys::{netns, tap};
use hearth::units::{FlowLimits, NetLimits, Rate};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// A listener for every run's vsock device, and a disk for every run's block device.
fn host() -> &'static (tempfile::TempDir, UnixListener, File) {
    static HOST: OnceLock<(tempfile::TempDir, UnixListener, File)> = OnceLock::new();
    HOST.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        (directory, listener, disk)
    })
}

/// A tap of a network namespace that nobody else is in, behind a bridge that sends back what comes from it: what the
/// guest transmits it receives. Without the right to make one, the network device is left out.
fn tap() -> Option<&'static File> {
    static TAP: OnceLock<Option<File>> = OnceLock::new();
    let make = || {
        let tap = tap::open("fuzz0").ok()?;
        for words in [
            "link add mirror type bridge",
            "link set fuzz0 master mirror",
            "link set fuzz0 type bridge_slave hairpin on",
            "link set mirror up",
            "link set fuzz0 up",
        ] {
            let done = Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status();
            if !done.is_ok_and(|status| status.success()) {
                // It still takes what is sent, or refuses it.
                break;
            }
        }
        Some(tap)
    };
    TAP.get_or_init(|| netns::in_new(make).ok().flatten()).as_ref()
}

/// Slow enough that waiting for a limit is met, and quick enough that it ends.
fn limits(kind: u8) -> NetLimits {
    let flow = FlowLimits {
        bytes: Some(Rate { per_s: 50_000_000, burst: 500 }),
        frames: Some(Rate { per_s: 100_000, burst: 2 }),
    };
    if kind & 0x20 != 0 { NetLimits { rx: flow, tx: flow } } else { NetLimits::default() }
}

/// What the driver puts into memory: descriptors (queue, index, address, bytes, flags, next) and raw bytes.
type Input = (u8, Vec<(u8, u8, u16, u16, u8, u8)>, Vec<(u8, u8)>, Vec<(u16, Vec<u8>)>);

fuzz_target!(|input: Input| {
    let (kind, descriptors, heads, raw) = input;
    let (directory, listener, disk) = host();
    let (slot, backend) = match (kind % 5, tap()) {
        (3, Some(tap)) => {
            let (tap, limits) = (tap.try_clone().unwrap(), limits(kind));
            (Slot::net(0).unwrap(), Backend::Net { tap, mac: [2; 6], mtu: Some(1400), limits })
        }
        (0, _) => (Slot::VSOCK, Backend::Vsock { listener: listener.try_clone().unwrap() }),
        (1, _) => (Slot::RNG, Backend::Rng),
        (4, _) => (Slot::BALLOON, Backend::Balloon),
        _ => {
            let (file, read_only) = (disk.try_clone().unwrap(), kind & 0x80 != 0);
            // Half of the disks have a thread, as all have where there is no io_uring.
            let ring = if kind & 0x20 != 0 { Ring::make(1).ok().and_then(|mut made| made.pop()) } else { None };
            (Slot::block(0).unwrap(), Backend::Block { file, read_only, ring })
        }
    };
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let device = VirtioSlot::new(slot, backend, &memory).unwrap();
    let registers = device.registers();
    let write = |offset: u64, value: u32| registers.lock().unwrap().write(offset, &value.to_le_bytes());
    let is_net = slot == Slot::net(0).unwrap();
    // With a network device also merged buffers, checksums and segments.
    let kinds_own = if is_net && kind & 0x10 != 0 { 1 << 15 | 0x1983 } else { 0 };
    // With a balloon also free pages, whose queue is the third where there are no statistics.
    let kinds_own = if slot == Slot::BALLOON { u32::from(kind & 0x10 != 0) << 1 | 1 << 5 } else { kinds_own };
    let features = u32::from(kind & 0x40 != 0) << 29 | kinds_own;
    for (register, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11)] {
        write(register, value);
    }
    // Queue i has its rings of 8 entries at 0x100 * i: descriptors, available at + 0x80, used at + 0xa0.
    for queue in 0..3 {
        let base = 0x100 * (queue + 1);
        for (register, value) in [(0x30, queue), (0x38, 8), (0x80, base), (0x90, base + 0x80), (0xa0, base + 0xa0)] {
            write(register, value);
        }
        write(0x44, 1);
    }
    write(0x70, 15);
    for (at, bytes) in &raw {
        let _ = memory.write(bytes, GuestAddress(0x400 + u64::from(*at % 0x1000)));
    }
    for (queue, index, address, bytes, flags, next) in &descriptors {
        let at = 0x100 * (u64::from(queue % 3) + 1) + 16 * u64::from(index % 8);
        let mut descriptor = [0; 16];
        descriptor[..2].copy_from_slice(&(0x400 + address % 0x1000).to_le_bytes());
        descriptor[8..10].copy_from_slice(&(bytes % 0x1800).to_le_bytes());
        descriptor[12] = flags % 8;
        descriptor[14] = next % 9;
        memory.write_slice(&descriptor, GuestAddress(at)).unwrap();
    }
    let program = (slot == Slot::VSOCK).then(|| {
        let mut program = UnixStream::connect(directory.path().join("vsock")).unwrap();
        program.write_all(b"CONNECT 5\nhello").unwrap();
        program
    });
    let mut added = [0_u16; 3];
    for (queue, head) in &heads {
        let queue = usize::from(queue % 3);
        let available = 0x100 * (queue as u64 + 1) + 0x80;
        let at = available + 4 + 2 * u64::from(added[queue] % 8);
        memory.write_obj(u16::from(head % 9), GuestAddress(at)).unwrap();
        added[queue] = added[queue].wrapping_add(1);
        memory.write_obj(added[queue], GuestAddress(available + 2)).unwrap();
        if head & 0x80 != 0 {
            device.step();
        }
    }
    for _ in 0..4 {
        device.step();
    }
    drop(program);
    device.step();
});
