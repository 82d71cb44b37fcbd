//! The block device on a volume, whose server is this test: what it does well, and what it can do wrong.

#![expect(clippy::disallowed_methods, reason = "waits are measured by the host's own clock")]

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::block::VolumeError;
use hearth::machine::virtio::block::volume::{Attachment, VolumeCounts, VolumeLimits};
use hearth::machine::virtio::{Backend, BuildDeviceError, DeviceLoop, VirtioSlot};
use hearth::report::chain;
use hearth::saved::{Section, Sections};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, EVENT_IDX, INDIRECT, VERSION_1, ram, run};
use crate::volume_server::{Content, Dialled, FLAGS, FLUSH, READ, TRIM, WRITE, ZEROES, wait_for};

const READ_ONLY: u64 = 1 << 5;
const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT | 1 << 13 | 1 << 14 | 1 << 9 | 1 << 2 | 1 << 6 | READ_ONLY;
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const OK: u8 = 0;
const FAILED: u8 = 1;
const NOT_YET: u8 = 0xee;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 4 * MIB;
const RECONNECT: Duration = Duration::from_secs(10);

const ATTACHED: Attachment = Attachment { bytes: BYTES, read_only: false, reconnect: RECONNECT };

/// A flush on one connection says nothing of others.
const FLAGS_ALONE: u16 = FLAGS & !(1 << 8);

impl Dialled {
    /// Connects, and says nothing yet.
    pub(crate) fn to(path: &std::path::Path) -> Self {
        let socket = std::os::unix::net::UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(socket)
    }

    /// Serves on a thread of its own until it is hung up on; gives what was asked, by command.
    pub(crate) fn serve(mut self, content: &Content) -> JoinHandle<Vec<u16>> {
        let content = Arc::clone(content);
        std::thread::spawn(move || {
            let mut commands = Vec::new();
            while let Some(asked) = self.asked() {
                commands.push(asked.command);
                if self.carry_out(&asked, &content).is_err() {
                    break;
                }
            }
            commands
        })
    }

    /// Whether the client hung up, at once or soon.
    pub(crate) fn is_hung_up_on(&mut self) -> bool {
        match std::io::Read::read(&mut self.0, &mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn quiet(_: std::fmt::Arguments<'_>) {}

/// A request of the guest: where its status byte and its data are.
#[derive(Debug, Clone, Copy)]
struct Posted {
    status: u64,
    data: u64,
    bytes: u32,
}

/// A guest with a volume slot, and where servers connect.
struct Guest {
    directory: TempDir,
    driver: Driver,
    devices: Option<DeviceLoop>,
    waited: BTreeMap<u16, ()>,
}

fn backend(directory: &TempDir, attached: Option<Attachment>, read_only: bool) -> Backend {
    let path = directory.path().join("volume-0.sock");
    let _ = std::fs::remove_file(&path);
    Backend::Volume { listener: UnixListener::bind(path).unwrap(), attached, read_only, tell: quiet }
}

fn slot() -> Slot {
    Slot::block(0).unwrap()
}

impl Guest {
    fn up(attached: Option<Attachment>, read_only: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ram = ram(64);
        let device = VirtioSlot::new(slot(), backend(&directory, attached, read_only), &ram).unwrap();
        let device = Arc::new(device);
        let devices = Some(run(&[&device]));
        let driver = Driver::up(&ram, device, ALL);
        Self { directory, driver, devices, waited: BTreeMap::new() }
    }

    fn with_volume() -> Self {
        Self::up(Some(ATTACHED), false)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("volume-0.sock")
    }

    fn dial(&self) -> Dialled {
        Dialled::exporting(&self.socket(), BYTES, FLAGS, None).unwrap()
    }

    fn counts(&self) -> VolumeCounts {
        self.driver.slot.volume_counts().unwrap()
    }

    fn wait_connections(&self, number: u8) {
        wait_for(&format!("{number} connections"), || self.counts().connections == number);
    }

    fn put(&self, posted: Posted, byte: u8) {
        self.driver.ram.write_slice(&vec![byte; posted.bytes as usize], GuestAddress(posted.data)).unwrap();
    }

    fn data(&self, posted: Posted) -> Vec<u8> {
        let mut data = vec![0; posted.bytes as usize];
        self.driver.ram.read_slice(&mut data, GuestAddress(posted.data)).unwrap();
        data
    }

    fn status(&self, posted: Posted) -> u8 {
        self.driver.ram.read_obj(GuestAddress(posted.status)).unwrap()
    }

    /// A request that the device is not told of yet. Data is filled with `byte`.
    fn prepare(&mut self, kind: u32, sector: u64, bytes: u32, byte: u8) -> (u16, Posted) {
        let (header, status) = (self.driver.allocate(16), self.driver.allocate(1));
        let data = self.driver.allocate(u64::from(bytes).max(1));
        let posted = Posted { status, data, bytes };
        self.driver.ram.write_obj(kind, GuestAddress(header)).unwrap();
        self.driver.ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.driver.ram.write_obj(NOT_YET, GuestAddress(status)).unwrap();
        self.put(posted, byte);
        let (head, end) = ((header, 16), (status, 1));
        let head = match (kind, bytes) {
            (_, 0) => self.driver.queues[0].add(&[head], &[end]),
            (IN, _) => self.driver.queues[0].add(&[head], &[(data, bytes), end]),
            _ => self.driver.queues[0].add(&[head, (data, bytes)], &[end]),
        };
        (head, posted)
    }

    fn post(&mut self, kind: u32, sector: u64, bytes: u32, byte: u8) -> (u16, Posted) {
        let posted = self.prepare(kind, sector, bytes, byte);
        self.driver.kick(0);
        posted
    }

    /// Waits until this request is finished; its status.
    fn finish(&mut self, (head, posted): (u16, Posted)) -> u8 {
        while self.waited.remove(&head).is_none() {
            let (used, _) = self.driver.wait_used(0);
            self.waited.insert(used, ());
        }
        self.status(posted)
    }

    fn ask(&mut self, kind: u32, sector: u64, bytes: u32, byte: u8) -> (u8, Vec<u8>) {
        let posted = self.post(kind, sector, bytes, byte);
        (self.finish(posted), self.data(posted.1))
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let prepared = self.prepare_range(kind, sector, sectors, flags);
        self.driver.kick(0);
        self.finish(prepared)
    }

    fn prepare_range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> (u16, Posted) {
        let (head, posted) = self.prepare(kind, 0, 16, 0);
        let raw = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.driver.ram.write_slice(&raw, GuestAddress(posted.data)).unwrap();
        (head, posted)
    }

    fn sectors(&self) -> u64 {
        let mut config = [0; 8];
        self.driver.config(0, &mut config);
        u64::from_le_bytes(config)
    }

    /// Saves the paused device and goes on with what was saved, on another socket.
    fn restored(mut self, attached: Option<Attachment>, read_only: bool) -> Result<Self, BuildDeviceError> {
        let devices = self.devices.take().unwrap();
        devices.pause();
        let sections = devices.save().unwrap();
        assert_eq!(devices.save().unwrap(), sections, "saving twice");
        devices.stop();
        let ram = self.driver.ram.clone();
        let device = restore(&self.directory, &ram, attached, read_only, sections.clone())?;
        let device = Arc::new(device);
        let devices = DeviceLoop::start(vec![device.clone()]).unwrap();
        assert_eq!(devices.save().unwrap(), sections, "save, restore, save");
        self.driver.move_to(device);
        devices.resume();
        self.devices = Some(devices);
        Ok(self)
    }
}

fn restore(
    directory: &TempDir,
    ram: &GuestRam,
    attached: Option<Attachment>,
    read_only: bool,
    sections: Vec<Section>,
) -> Result<VirtioSlot, BuildDeviceError> {
    let mut all = Sections::new();
    sections.into_iter().for_each(|section| all.push(section).unwrap());
    let restored = VirtioSlot::from_saved(slot(), backend(directory, attached, read_only), ram, &mut all)?;
    all.finish().unwrap();
    Ok(restored)
}

fn content() -> Content {
    let bytes = (0..BYTES).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    Arc::new(Mutex::new(bytes))
}

#[test]
fn what_is_written_is_there_and_what_is_there_is_read() {
    let mut guest = Guest::with_volume();
    let content = content();
    let servers: Vec<_> = (0..4).map(|_| guest.dial().serve(&content)).collect();
    guest.wait_connections(4);
    assert_eq!(guest.sectors(), BYTES / 512);
    let (status, data) = guest.ask(IN, 7, 1024, 0xff);
    assert_eq!((status, data), (OK, [[7; 512], [8; 512]].concat()));
    assert_eq!(guest.ask(OUT, 100, 4096, 0x77).0, OK);
    assert_eq!(content.lock().unwrap()[100 * 512 - 1..][..4098], [&[99][..], &[0x77; 4096], &[108]].concat());
    // Larger than a part: cut, and each byte in its place.
    let (status, data) = guest.ask(IN, 0, 4 << 20, 0);
    assert_eq!(status, OK);
    assert!(data == *content.lock().unwrap());
    assert_eq!(guest.ask(OUT, 0, 4 << 20, 0x11).0, OK);
    assert!(content.lock().unwrap().iter().all(|byte| *byte == 0x11));
    assert_eq!(guest.ask(SYNC, 0, 0, 0).0, OK);
    assert_eq!(guest.range(11, 8, 8, 0), OK);
    assert_eq!(guest.range(13, 24, 8, 0), OK);
    assert_eq!(guest.range(13, 40, 8, 1), OK);
    let zero = |sector: usize| content.lock().unwrap()[sector * 512] == 0;
    assert_eq!(
        [7, 8, 15, 16, 23, 24, 31, 32, 40, 47, 48].map(zero),
        [false, true, true, false, false, true, true, false, true, true, false]
    );
    // Its name, and what is outside.
    let (status, id) = guest.ask(8, 0, 20, 0);
    assert_eq!(status, FAILED, "{id:?}: its buffer is not for writing");
    assert_eq!(guest.ask(IN, BYTES / 512, 512, 0).0, FAILED);
    let counts = guest.counts();
    assert_eq!((counts.bytes, counts.waiting, counts.errors, counts.fenced), (BYTES, 0, 0, false));
    assert_eq!((counts.read.requests, counts.read.bytes), (2, BYTES + 1024));
    assert_eq!((counts.write.requests, counts.write.bytes), (2, BYTES + 4096));
    assert_eq!(counts.flush.requests, 1);
    assert_eq!(counts.read.latency_us.iter().sum::<u64>(), 2);
    drop(guest);
    let mut commands: Vec<u16> = servers.into_iter().flat_map(|server| server.join().unwrap()).collect();
    commands.sort_unstable();
    commands.dedup();
    assert_eq!(commands, [READ, WRITE, FLUSH, TRIM, ZEROES]);
}

#[test]
fn a_server_that_can_little_is_asked_for_little() {
    let mut guest = Guest::with_volume();
    let content = content();
    // Flush, and nothing else; 64 KiB at a time.
    let server = Dialled::exporting(&guest.socket(), BYTES, 1 | 1 << 2, Some([512, 4096, 64 << 10])).unwrap();
    let server = server.serve(&content);
    guest.wait_connections(1);
    // A second one could not see what was written on the first. It waits to be taken.
    let second = Dialled::to(&guest.socket());
    assert_eq!(guest.ask(OUT, 0, 1 << 20, 0x22).0, OK);
    assert_eq!(guest.range(11, 0, 8, 0), OK);
    assert_eq!(content.lock().unwrap()[0], 0x22, "a discard is a hint");
    assert_eq!(guest.range(13, 8, 256, 0), OK);
    assert_eq!(content.lock().unwrap()[8 * 512..264 * 512], [0; 256 * 512]);
    assert_eq!(guest.ask(SYNC, 0, 0, 0).0, OK);
    assert_eq!(guest.counts().connections, 1);
    drop((second, guest));
    let commands = server.join().unwrap();
    assert_eq!(commands, [&[WRITE; 18][..], &[FLUSH]].concat());
}

#[test]
fn requests_are_under_way_together_and_answered_in_any_order() {
    let mut guest = Guest::with_volume();
    let content = content();
    let mut server = guest.dial();
    let posted: Vec<_> = (0..8).map(|at| guest.post(IN, at * 8, 4096, 0xff)).collect();
    let mut asked: Vec<_> = (0..8).map(|_| server.asked().unwrap()).collect();
    assert_eq!(guest.counts().waiting, 8);
    asked.reverse();
    for (asked, posted) in asked.iter().zip(posted.iter().rev()) {
        server.carry_out(asked, &content).unwrap();
        assert_eq!(guest.finish(*posted), OK);
        let from = usize::try_from(asked.offset).unwrap();
        assert!(guest.data(posted.1) == content.lock().unwrap()[from..from + 4096]);
    }
    // Zeroes that are to keep their space say so.
    for (unmap, flags) in [(0, 2), (1, 0)] {
        let (head, posted) = guest.prepare_range(13, 40, 8, unmap);
        guest.driver.kick(0);
        let asked = server.asked().unwrap();
        assert_eq!((asked.command, asked.flags, asked.offset, asked.bytes), (ZEROES, flags, 40 * 512, 4096));
        server.carry_out(&asked, &content).unwrap();
        assert_eq!(guest.finish((head, posted)), OK);
    }
    // No more than some at a time on one connection; the rest follows.
    let posted: Vec<_> = (0..20).map(|at| guest.post(OUT, at * 8, 4096, 0x33)).collect();
    let first: Vec<_> = (0..16).map(|_| server.asked().unwrap()).collect();
    server.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(server.asked().is_none());
    server.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    first.iter().for_each(|asked| server.carry_out(asked, &content).unwrap());
    for _ in 16..20 {
        let asked = server.asked().unwrap();
        server.carry_out(&asked, &content).unwrap();
    }
    posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
}

#[test]
fn a_connection_that_breaks_costs_nothing() {
    let mut guest = Guest::with_volume();
    let content = content();
    type Harm = fn(&mut Dialled, u64);
    let harms: [(&str, Harm); 7] = [
        ("hangs up", |_, _| {}),
        ("half a head", |server, _| drop(std::io::Write::write_all(&mut server.0, b"\x67\x44\x66"))),
        ("half the data", |server, handle| server.reply(handle, 0, &[0xbb; 2000]).unwrap()),
        ("nonsense", |server, _| drop(std::io::Write::write_all(&mut server.0, &[0xaa; 64]))),
        ("unknown handle", |server, handle| server.reply(handle ^ 1 << 40, 0, &[]).unwrap()),
        ("goes away", |server, handle| server.reply(handle, 108, &[]).unwrap()),
        ("says more than was asked", |server, handle| {
            server.reply(handle, 0, &[0xcc; 4096]).unwrap();
            let _ = server.reply(handle, 0, &[0xcc; 4096]);
        }),
    ];
    for (round, (what, harm)) in (0_u64..).zip(harms) {
        let mut bad = guest.dial();
        guest.wait_connections(1);
        let posted = guest.post(IN, 40, 4096, 0xff);
        let asked = bad.asked().unwrap();
        harm(&mut bad, asked.handle);
        if what == "hangs up" || what.starts_with("half") {
            drop(bad);
        } else if what.starts_with("says more") {
            assert_eq!(guest.finish(posted), OK);
            wait_for(what, || guest.counts().reconnects == 2 * round + 1);
            continue;
        } else {
            wait_for(what, || guest.counts().reconnects == 2 * round + 1);
        }
        let mut good = guest.dial();
        let again = good.asked().unwrap();
        assert_eq!((again.command, again.offset, again.bytes), (READ, 40 * 512, 4096), "{what}");
        good.carry_out(&again, &content).unwrap();
        assert_eq!(guest.finish(posted), OK, "{what}");
        assert!(guest.data(posted.1) == content.lock().unwrap()[40 * 512..48 * 512], "{what}");
        drop(good);
        wait_for("the end of it", || guest.counts().connections == 0);
    }
    assert_eq!(guest.counts().errors, 0);
}

#[test]
fn what_one_connection_did_not_answer_another_is_asked() {
    let mut guest = Guest::with_volume();
    let content = content();
    let (mut first, second) = (guest.dial(), guest.dial());
    guest.wait_connections(2);
    let posted: Vec<_> = (0..10).map(|at| guest.post(OUT, at * 8, 4096, 0x44)).collect();
    first.asked().unwrap();
    drop(first);
    let second = second.serve(&content);
    posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
    assert!(content.lock().unwrap()[..10 * 4096].iter().all(|byte| *byte == 0x44));
    drop(guest);
    assert_eq!(second.join().unwrap(), [WRITE; 10]);
}

#[test]
fn without_a_server_for_too_long_requests_fail_until_there_is_one() {
    let attached = Attachment { reconnect: Duration::from_millis(300), ..ATTACHED };
    let mut guest = Guest::up(Some(attached), false);
    let content = content();
    let begun = Instant::now();
    let posted = guest.post(OUT, 0, 4096, 0x55);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.status(posted.1), NOT_YET);
    let server = guest.dial().serve(&content);
    assert_eq!(guest.finish(posted), OK, "back within the bound");
    drop((server, guest));
    let mut guest = Guest::up(Some(attached), false);
    let server = guest.dial();
    guest.wait_connections(1);
    drop(server);
    guest.wait_connections(0);
    let since = Instant::now();
    assert_eq!(guest.ask(IN, 0, 4096, 0).0, FAILED);
    assert!(since.elapsed() >= Duration::from_millis(290), "{:?}", since.elapsed());
    let since = Instant::now();
    assert_eq!(guest.ask(OUT, 0, 4096, 0).0, FAILED);
    assert!(since.elapsed() < Duration::from_millis(250), "at once: {:?}", since.elapsed());
    assert_eq!(guest.counts().errors, 2);
    let _server = guest.dial().serve(&content);
    guest.wait_connections(1);
    assert_eq!(guest.ask(IN, 0, 4096, 0).0, OK);
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[test]
fn errors_of_the_server_are_errors_of_the_request() {
    let mut guest = Guest::with_volume();
    let content = content();
    let mut server = guest.dial();
    for (error, fenced) in [(5, false), (28, false), (1, true), (22, false), (1, true)] {
        let posted = guest.post(OUT, 0, 4096, 1);
        let asked = server.asked().unwrap();
        server.reply(asked.handle, error, &[]).unwrap();
        assert_eq!(guest.finish(posted), FAILED);
        assert_eq!(guest.counts().fenced, fenced, "error {error}");
    }
    // One part of several that fails.
    let posted = guest.post(IN, 0, 4 << 20, 1);
    for at in 0..4 {
        let asked = server.asked().unwrap();
        if at == 2 {
            server.reply(asked.handle, 1, &[]).unwrap();
        } else {
            server.carry_out(&asked, &content).unwrap();
        }
    }
    assert_eq!(guest.finish(posted), FAILED);
    assert_eq!(guest.counts().errors, 6);
    let posted = guest.post(IN, 8, 4096, 1);
    let asked = server.asked().unwrap();
    server.carry_out(&asked, &content).unwrap();
    assert_eq!((guest.finish(posted), guest.counts().fenced), (OK, false));
}

#[test]
fn servers_of_something_else_are_refused() {
    let mut guest = Guest::with_volume();
    let path = guest.socket();
    let refused = |bytes, flags, blocks| {
        let mut dialled = Dialled::exporting(&path, bytes, flags, blocks).unwrap();
        assert!(dialled.is_hung_up_on(), "{bytes} {flags} {blocks:?}");
        wait_for("the reason", || guest.counts().trouble.is_some());
        guest.counts().trouble.unwrap()
    };
    assert_eq!(refused(BYTES - 4096, FLAGS, None), "the server exports 4190208 bytes, the volume has 4194304");
    wait_for("ro", || refused(BYTES, FLAGS | 2, None) == "the server exports the volume read-only");
    wait_for("flush", || refused(BYTES, 1, None) == "the server takes no flush");
    wait_for("blocks", || {
        refused(BYTES, FLAGS, Some([4096, 4096, 1 << 20])).starts_with("the server takes requests in blocks")
    });
    let mut dialled = Dialled::to(&path);
    std::io::Write::write_all(&mut dialled.0, &[0x5a; 100]).unwrap();
    assert!(dialled.is_hung_up_on());
    // Ones that say nothing take no place for ever; and one that is right is taken, also of a volume that was made larger
    // before the guest is told.
    let silent: Vec<_> = (0..7).map(|_| Dialled::to(&path)).collect();
    let content = content();
    let _server = Dialled::exporting(&path, BYTES + 4096, FLAGS, None).unwrap().serve(&content);
    assert_eq!(guest.ask(IN, 3, 512, 0), (OK, vec![3; 512]));
    let counts = guest.counts();
    assert_eq!((counts.connections, counts.trouble, counts.reconnects), (1, None, 0));
    drop(silent);
}

#[test]
fn an_answer_that_comes_in_a_pause_is_read_after_it() {
    let mut guest = Guest::with_volume();
    let content = content();
    let mut server = guest.dial();
    guest.wait_connections(1);
    let posted = guest.post(IN, 16, 8192, 0xff);
    let asked = server.asked().unwrap();
    let since = Instant::now();
    guest.devices.as_ref().unwrap().pause();
    assert!(since.elapsed() < Duration::from_secs(3), "bounded");
    server.carry_out(&asked, &content).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!((guest.status(posted.1), guest.data(posted.1)), (NOT_YET, vec![0xff; 8192]));
    guest.devices.as_ref().unwrap().resume();
    assert_eq!(guest.finish(posted), OK);
    assert!(guest.data(posted.1) == content.lock().unwrap()[8192..16384]);
    // Nothing under way, or answered soon: a pause takes no time.
    let _server = server.serve(&content);
    for _ in 0..20 {
        let posted: Vec<_> = (0..16).map(|at| guest.post(OUT, at * 8, 4096, 0x66)).collect();
        let since = Instant::now();
        guest.devices.as_ref().unwrap().pause();
        assert!(since.elapsed() < Duration::from_millis(900), "{:?}", since.elapsed());
        guest.devices.as_ref().unwrap().resume();
        posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
    }
}

#[test]
fn what_was_under_way_is_asked_again_after_a_restore() {
    let mut guest = Guest::with_volume();
    let content = content();
    let mut server = guest.dial();
    guest.wait_connections(1);
    let write = guest.post(OUT, 0, 4096, 0x71);
    let read = guest.post(IN, 8, 4096, 0xff);
    let flush = guest.post(SYNC, 0, 0, 0);
    let asked: Vec<_> = (0..3).map(|_| server.asked().unwrap()).collect();
    // The write is carried out, and nobody hears of it.
    let unheard = content.clone();
    unheard.lock().unwrap()[..4096].copy_from_slice(&asked[0].data);
    let mut guest = guest.restored(Some(ATTACHED), false).unwrap();
    assert!(server.asked().is_none(), "the old device is gone");
    // Saved again before a server is there, and gone on from again.
    let mut guest = {
        wait_for("all three", || guest.counts().waiting == 3);
        let after = guest.post(OUT, 16, 512, 0x72);
        wait_for("all four", || guest.counts().waiting == 4);
        let mut guest = guest.restored(Some(ATTACHED), false).unwrap();
        let mut server = guest.dial();
        let asked: Vec<_> = (0..4).map(|_| server.asked().unwrap()).collect();
        assert_eq!(asked.iter().map(|asked| asked.command).collect::<Vec<_>>(), [WRITE, READ, FLUSH, WRITE]);
        assert_eq!((asked[0].offset, &asked[0].data), (0, &vec![0x71; 4096]));
        asked.iter().for_each(|asked| server.carry_out(asked, &content).unwrap());
        let statuses = [write, read, flush, after].map(|posted| guest.finish(posted));
        assert_eq!(statuses, [OK; 4]);
        assert!(guest.data(read.1) == content.lock().unwrap()[4096..8192]);
        let _server = server.serve(&content);
        assert_eq!(guest.ask(IN, 0, 512, 0), (OK, vec![0x71; 512]));
        guest
    };
    assert_eq!(guest.ask(IN, 0, 0, 0).0, OK);
}

#[test]
fn a_device_goes_on_only_with_its_volume() {
    let other = Attachment { bytes: BYTES * 2, ..ATTACHED };
    let read_only = Attachment { read_only: true, ..ATTACHED };
    for (before, told, after, told_after) in [
        (Some(ATTACHED), false, Some(other), false),
        (Some(ATTACHED), false, Some(read_only), true),
        (Some(ATTACHED), false, None, false),
        (None, false, Some(ATTACHED), false),
        (None, false, None, true),
    ] {
        let error = Guest::up(before, told).restored(after, told_after).err().unwrap();
        assert_eq!(chain(&error), "slot 3: section Block/3: the disk has another size or access");
    }
    assert_eq!(Guest::up(None, false).restored(None, false).unwrap().sectors(), 0);
    assert_eq!(Guest::up(Some(read_only), true).restored(Some(read_only), true).unwrap().sectors(), BYTES / 512);
}

#[test]
fn volumes_come_grow_and_go() {
    let mut guest = Guest::up(None, false);
    let (path, content) = (guest.socket(), content());
    let device = guest.driver.slot.clone();
    assert_eq!((guest.sectors(), guest.ask(SYNC, 0, 0, 0).0, guest.ask(IN, 0, 512, 0).0), (0, FAILED, FAILED));
    assert!(Dialled::to(&path).is_hung_up_on(), "nothing is attached");
    assert_eq!(device.resize_volume(4096), Err(VolumeError::NotAttached));
    assert_eq!(device.detach_volume(true), Err(VolumeError::NotAttached));
    for found in [0, 4095, u64::MAX - 4095] {
        let odd = Attachment { bytes: found, ..ATTACHED };
        assert_eq!(device.attach_volume(odd), Err(VolumeError::Bytes { found }));
    }
    let generation = guest.driver.read(0x0fc);
    while guest.driver.interrupt_within(10).is_some() {}
    device.attach_volume(ATTACHED).unwrap();
    assert_eq!(device.attach_volume(ATTACHED), Err(VolumeError::Attached));
    assert_eq!(guest.driver.interrupt().unwrap() & 2, 2, "the configuration changed");
    assert_eq!((guest.sectors(), guest.driver.read(0x0fc)), (BYTES / 512, generation + 1));
    let server = guest.dial().serve(&content);
    assert_eq!(guest.ask(IN, 9, 512, 0), (OK, vec![9; 512]));

    assert_eq!(device.resize_volume(BYTES - 4096), Err(VolumeError::Shrinks { has: BYTES, wanted: BYTES - 4096 }));
    content.lock().unwrap().resize(usize::try_from(2 * BYTES).unwrap(), 0x91);
    device.resize_volume(2 * BYTES).unwrap();
    assert_eq!(server.join().unwrap(), [READ], "its size was agreed upon before");
    assert_eq!(guest.sectors(), 2 * BYTES / 512);
    let _server = Dialled::exporting(&path, 2 * BYTES, FLAGS_ALONE, None).unwrap().serve(&content);
    assert_eq!(guest.ask(IN, BYTES / 512, 512, 0), (OK, vec![0x91; 512]));
    device.detach_volume(false).unwrap();
    assert_eq!((guest.sectors(), guest.ask(IN, 0, 512, 0).0, guest.counts().bytes), (0, FAILED, 0));

    // With something under way only by force, and then it fails.
    device.attach_volume(ATTACHED).unwrap();
    let mut server = guest.dial();
    let posted = guest.post(IN, 0, 4096, 0xff);
    server.asked().unwrap();
    assert_eq!(device.detach_volume(false), Err(VolumeError::InUse { requests: 1 }));
    device.detach_volume(true).unwrap();
    assert!(server.is_hung_up_on());
    assert_eq!(guest.finish(posted), FAILED);
    // While it stands still: it is told when it goes on, also elsewhere.
    guest.devices.as_ref().unwrap().pause();
    device.attach_volume(ATTACHED).unwrap();
    while guest.driver.interrupt_within(10).is_some() {}
    drop(device);
    let guest = guest.restored(Some(ATTACHED), false).unwrap();
    let mut reasons = 0;
    while reasons & 2 == 0 {
        reasons |= guest.driver.interrupt().expect("it is told of the size");
    }
    assert_eq!(guest.sectors(), BYTES / 512);
}

#[test]
fn read_only_volumes_refuse_writes_whatever_the_guest_knows() {
    let attached = Attachment { read_only: true, ..ATTACHED };
    let content = content();
    let mut guest = Guest::up(None, false);
    guest.driver.slot.attach_volume(attached).unwrap();
    let _server = Dialled::exporting(&guest.socket(), BYTES, 3, None).unwrap().serve(&content);
    assert_eq!(guest.driver.accepted & READ_ONLY, 0);
    assert_eq!(guest.ask(OUT, 0, 512, 1).0, FAILED);
    assert_eq!(guest.range(13, 0, 8, 0), FAILED);
    assert_eq!(guest.ask(IN, 4, 512, 0), (OK, vec![4; 512]));
    assert_eq!(guest.ask(SYNC, 0, 0, 0).0, OK);
    // What it was told holds on, whatever it goes on with.
    let guest = guest.restored(Some(attached), true).unwrap();
    assert_eq!(guest.driver.offered() & READ_ONLY, 0);
    let mut told = Guest::up(None, true);
    assert_eq!(told.driver.accepted & READ_ONLY, READ_ONLY);
    assert_eq!(told.driver.slot.attach_volume(ATTACHED), Err(VolumeError::ReadOnlySlot));
    told.driver.slot.attach_volume(attached).unwrap();
    assert_eq!(told.ask(OUT, 0, 512, 1).0, FAILED);
}

#[test]
fn limits_make_requests_wait_and_none_fail() {
    let mut guest = Guest::with_volume();
    let _server = guest.dial().serve(&content());
    guest.wait_connections(1);
    let device = guest.driver.slot.clone();
    assert_eq!(device.limit_volume(VolumeLimits { iops: Some(0), bytes_per_s: None }), Err(VolumeError::Limit));
    device.limit_volume(VolumeLimits { iops: Some(100), bytes_per_s: None }).unwrap();
    let since = Instant::now();
    // Ten at once, then one each 10 ms.
    let posted: Vec<_> = (0..20).map(|_| guest.post(IN, 0, 512, 0)).collect();
    posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
    assert!(since.elapsed() >= Duration::from_millis(80), "{:?}", since.elapsed());
    device.limit_volume(VolumeLimits { iops: None, bytes_per_s: Some(10 * MIB) }).unwrap();
    let since = Instant::now();
    let posted: Vec<_> = (0..3).map(|_| guest.post(IN, 0, 1 << 20, 0)).collect();
    posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
    assert!(since.elapsed() >= Duration::from_millis(180), "{:?}", since.elapsed());
    // A pause does not wait for them, and lifting a limit lets go.
    device.limit_volume(VolumeLimits { iops: Some(1), bytes_per_s: None }).unwrap();
    let posted: Vec<_> = (0..5).map(|_| guest.post(IN, 0, 512, 0)).collect();
    let since = Instant::now();
    guest.devices.as_ref().unwrap().pause();
    guest.devices.as_ref().unwrap().resume();
    assert!(since.elapsed() < Duration::from_millis(900));
    device.limit_volume(VolumeLimits::default()).unwrap();
    posted.into_iter().for_each(|posted| assert_eq!(guest.finish(posted), OK));
    assert_eq!(guest.counts().errors, 0);
}

#[test]
fn a_reset_leaves_nothing_under_way() {
    let mut guest = Guest::with_volume();
    let content = content();
    let mut server = guest.dial();
    guest.wait_connections(1);
    let (_, posted) = guest.post(IN, 0, 4096, 0xff);
    server.asked().unwrap();
    let since = Instant::now();
    guest.driver.bring_up(ALL);
    assert!(since.elapsed() < Duration::from_secs(3));
    assert!(server.is_hung_up_on(), "its answer would be written to memory of others");
    assert_eq!(guest.data(posted), [0xff; 4096]);
    assert_eq!((guest.status(posted), guest.counts().waiting), (NOT_YET, 0));
    let _server = guest.dial().serve(&content);
    assert_eq!(guest.ask(IN, 5, 512, 0), (OK, vec![5; 512]));
}

/// As the device on a file has it in `saved.rs`: what was shipped is read, and written as it was.
#[test]
fn a_saved_volume_is_as_in_the_golden_file() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/virtio_block_v2.txt");
    let mut guest = Guest::with_volume();
    guest.post(OUT, 3, 512, 0x77);
    guest.post(SYNC, 0, 0, 0);
    wait_for("both", || guest.counts().waiting == 2);
    let devices = guest.devices.take().unwrap();
    devices.pause();
    let text: String = devices
        .save()
        .unwrap()
        .iter()
        .map(|section| {
            let bytes: String = section.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{} version {}: {bytes}\n", section.name, section.version)
        })
        .collect();
    if std::env::var_os("HEARTH_BLESS").is_some() {
        crate::saved::bless(&path, &text);
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(golden, text, "not as in {}; if it should be: HEARTH_BLESS=1", path.display());
}

/// A disk that was saved on a file goes on on a volume, and one that was saved on a volume on a file.
#[test]
fn a_disk_moves_between_file_and_volume() {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(BYTES).unwrap();
    let ram = ram(16);
    let on_file = || Backend::Block { file: disk.try_clone().unwrap(), read_only: false, ring: None };
    let saved = |slot: VirtioSlot| DeviceLoop::start(vec![Arc::new(slot)]).unwrap().save().unwrap();
    let of_file = saved(VirtioSlot::new(slot(), on_file(), &ram).unwrap());
    assert_eq!(of_file[1].version, 1);
    let directory = tempfile::tempdir().unwrap();
    let of_volume = saved(restore(&directory, &ram, Some(ATTACHED), false, of_file).unwrap());
    assert_eq!(of_volume[1].version, 2);
    let mut all = Sections::new();
    of_volume.into_iter().for_each(|section| all.push(section).unwrap());
    let again = saved(VirtioSlot::from_saved(slot(), on_file(), &ram, &mut all).unwrap());
    assert_eq!(again[1].version, 1);
}

/// What is said to be under way is looked at before it is believed.
#[test]
fn impossible_requests_under_way_are_refused() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct BlockV2(u64, bool, bool, bool, Vec<u16>);
    impl hearth::saved::Saved for BlockV2 {
        const KIND: hearth::saved::SectionKind = hearth::saved::SectionKind::Block;
        const VERSION: u16 = 2;
    }
    let mut guest = Guest::with_volume();
    let devices = guest.devices.take().unwrap();
    devices.pause();
    let sections = devices.save().unwrap();
    let ram = guest.driver.ram.clone();
    let with = |under_way: Vec<u16>| {
        let block = BlockV2(BYTES / 512, false, false, false, under_way);
        let sections = vec![sections[0].clone(), Section::new(3, &block).unwrap()];
        restore(&guest.directory, &ram, Some(ATTACHED), false, sections)
    };
    for impossible in [vec![1, 1], (0..65).collect()] {
        let error = with(impossible).err().unwrap();
        assert!(chain(&error).contains("its requests under way are impossible"), "{}", chain(&error));
    }
    // A head that is no descriptor breaks the ring, which the guest is told of.
    let device = Arc::new(with(vec![7_000]).unwrap());
    let _devices = run(&[&device]);
    let driver = Driver::new(&ram, device);
    assert_eq!(driver.read(0x070) & 64, 64, "it asks for a reset");
}

/// The server of qemu-utils, to which a go-between connects on one side and dials on the other.
#[test]
fn a_server_of_others_serves() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("qemu.sock"));
    std::fs::File::options().create_new(true).write(true).open(&disk).unwrap().set_len(BYTES).unwrap();
    let mut qemu = std::process::Command::new("qemu-nbd")
        .args(["--format=raw", "--persistent", "--shared=8", "--discard=unmap", "--socket"])
        .args([&socket, &disk])
        .spawn()
        .unwrap();
    wait_for("qemu-nbd", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let mut guest = Guest::with_volume();
    for _ in 0..4 {
        let near = std::os::unix::net::UnixStream::connect(guest.socket()).unwrap();
        let far = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        for (mut from, mut to) in [
            (near.try_clone().unwrap(), far.try_clone().unwrap()),
            (far.try_clone().unwrap(), near.try_clone().unwrap()),
        ] {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
        }
    }
    wait_for("connections", || guest.counts().connections > 0);
    println!("{:?}", guest.counts());
    for round in 1..20_u8 {
        assert_eq!(guest.ask(OUT, u64::from(round) * 100, 1 << 16, round).0, OK);
        assert_eq!(guest.ask(IN, u64::from(round) * 100, 1 << 16, 0), (OK, vec![round; 1 << 16]));
    }
    assert_eq!(guest.ask(SYNC, 0, 0, 0).0, OK);
    assert_eq!(guest.range(11, 0, 8, 0), OK);
    for unmap in [0, 1] {
        assert_eq!(guest.range(13, 1000 + 8 * u64::from(unmap), 8, unmap), OK);
    }
    assert_eq!(guest.ask(IN, 1000, 8192, 1), (OK, vec![0; 8192]));
    assert_eq!(guest.counts().errors, 0);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}
