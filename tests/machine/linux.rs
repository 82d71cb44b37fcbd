//! The demo image's Linux as guest: boots by both entries, with one and two vCPUs, and goes on after it was saved in the
//! middle of its boot or while its agent serves. Needs `HEARTH_IMAGES` with the demo image, and its kernel as
//! `HEARTH_BZIMAGE`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hearth::clock::{Clock, SystemClock};
use hearth::machine::layout::Slot;
use hearth::machine::virtio::Backend;
use hearth::machine::{Entry, Machine};
use hearth::units::{Bytes, MIB};
use hearth_guest_wire::frame::{Decoder, encode};
use hearth_guest_wire::{FromGuest, PORT, Stats, ToGuest, VERSION};

use crate::host::{Console, kvm, memory_image, restore_with, spec};

/// What the guest's agent prints when it listens.
const READY: &str = "hearth-init: ready";

/// Longest wait for a boot or an answer: a loaded host that emulates the guest's kernel takes a third of it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A Linux guest and the host's ends of its devices.
struct Linux {
    machine: Machine,
    console: Console,
    folder: tempfile::TempDir,
}

fn image() -> PathBuf {
    let images = std::env::var_os("HEARTH_IMAGES").expect("HEARTH_IMAGES is not set: run this by scripts/test kvm");
    PathBuf::from(images).join("demo")
}

fn command_line(image: &Path) -> String {
    let probe = std::process::Command::new(env!("CARGO_BIN_EXE_hearth")).args(["vmm", "--probe"]).output().unwrap();
    let facts: serde_json::Value = serde_json::from_slice(&probe.stdout).expect("facts");
    let about: serde_json::Value = serde_json::from_slice(&std::fs::read(image.join("image.json")).unwrap()).unwrap();
    let words = [&facts["command_line_additions"], &about["command_line"]].map(|value| value.as_str().unwrap_or(""));
    format!("console=ttyS0 {}", words.join(" "))
}

fn devices(folder: &tempfile::TempDir) -> Vec<(Slot, Backend)> {
    let path = folder.path().join("vsock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    vec![(Slot::VSOCK, Backend::Vsock { listener }), (Slot::RNG, Backend::Rng)]
}

impl Linux {
    fn boot(vcpus: u8, entry: Entry) -> Self {
        Self::boot_kernel(vcpus, entry, &image().join("vmlinux"))
    }

    fn boot_kernel(vcpus: u8, entry: Entry, kernel: &Path) -> Self {
        let image = image();
        let console = Console::default();
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(vcpus, File::open(kernel).unwrap(), &console);
        spec.memory = Bytes(128 * MIB);
        spec.initrd = Some(File::open(image.join("initrd.cpio")).unwrap());
        spec.command_line = command_line(&image);
        spec.entry = entry;
        spec.devices = devices(&folder);
        let mut machine = Machine::build(kvm(), spec).unwrap();
        machine.resume().unwrap();
        Self { machine, console, folder }
    }

    /// Waits for the guest's agent.
    fn expect_ready(&self) {
        let clock = SystemClock::new();
        let start = clock.monotonic();
        while !self.console.text().contains(READY) {
            let waited = clock.monotonic().since(start);
            let told = self.machine.events().take();
            assert!(told.is_none() && waited < PATIENCE, "{told:?} after {waited:?}; console: {}", self.console.text());
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("ready after {:?}, {:?}", clock.monotonic().since(start), self.machine.counters());
    }

    /// Saves the guest, ends the machine and goes on in another one after a while.
    fn move_on(self, pause: Duration) -> Self {
        let Self { mut machine, console, folder } = self;
        let clock = SystemClock::new();
        let start = clock.monotonic();
        machine.pause().unwrap();
        let paused = clock.monotonic();
        let sections = machine.save().unwrap();
        let saved = clock.monotonic();
        let memory = memory_image(&machine);
        assert_eq!(machine.events().take(), None);
        machine.stop();
        std::thread::sleep(pause);
        let devices = devices(&folder);
        let begun = clock.monotonic();
        let mut machine = restore_with(memory, sections.clone(), &console, devices).unwrap();
        let restored = clock.monotonic();
        let again = machine.save().unwrap();
        for (before, after) in sections.iter().zip(again.iter()) {
            assert_eq!(before, after, "section {} after the restore", before.name);
        }
        let compared = clock.monotonic();
        machine.resume().unwrap();
        let resumed = clock.monotonic();
        eprintln!(
            "paused in {:?}, saved in {:?}, restored in {:?}, resumed in {:?}",
            paused.since(start),
            saved.since(paused),
            restored.since(begun),
            resumed.since(compared)
        );
        Self { machine, console, folder }
    }

    /// Asks the guest's agent, over a new connection.
    fn stats(&self) -> Stats {
        let mut socket = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            line.extend(byte);
        }
        socket.write_all(&encode(&ToGuest::Hello { version: VERSION }).unwrap()).unwrap();
        socket.write_all(&encode(&ToGuest::Stats).unwrap()).unwrap();
        let mut decoder = Decoder::new();
        let mut bytes = [0; 4096];
        loop {
            match decoder.next().unwrap() {
                Some(FromGuest::Stats(stats)) => return stats,
                Some(FromGuest::Hello { version, .. }) => assert_eq!(version, VERSION),
                Some(other) => panic!("{other:?}"),
                None => match socket.read(&mut bytes).unwrap() {
                    0 => panic!("the guest closed the connection"),
                    count => decoder.push(&bytes[..count]),
                },
            }
        }
    }

    fn uptime(&self) -> Duration {
        Duration::from_nanos(self.stats().uptime_ns)
    }
}

#[test]
fn linux_boots_with_one_vcpu() {
    let linux = Linux::boot(1, Entry::Linux64);
    linux.expect_ready();
    assert!(linux.stats().memory_total_bytes > 64 * MIB);
}

#[test]
fn linux_boots_by_pvh() {
    let linux = Linux::boot(1, Entry::Pvh);
    linux.expect_ready();
}

#[test]
fn linux_boots_from_a_bzimage_that_unpacks_itself() {
    let kernel = std::env::var_os("HEARTH_BZIMAGE").expect("HEARTH_BZIMAGE is not set: run this by scripts/test kvm");
    let linux = Linux::boot_kernel(1, Entry::Linux64, Path::new(&kernel));
    linux.expect_ready();
    assert!(linux.stats().memory_total_bytes > 64 * MIB);
}

#[test]
fn linux_goes_on_after_restores_in_the_middle_of_its_boot() {
    for vcpus in [1, 2] {
        let mut linux = Linux::boot(vcpus, Entry::Linux64);
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(1200));
            linux = linux.move_on(Duration::ZERO);
        }
        linux.expect_ready();
    }
}

#[test]
fn a_guest_that_serves_goes_on_after_restores_and_its_clock_stood_still() {
    const AWAY: Duration = Duration::from_secs(5);
    let mut linux = Linux::boot(2, Entry::Linux64);
    linux.expect_ready();
    let clock = SystemClock::new();
    let mut before = (clock.monotonic(), linux.uptime());
    for round in 0..6 {
        if round % 2 == 0 {
            linux.machine.pause().unwrap();
            std::thread::sleep(AWAY);
            linux.machine.resume().unwrap();
        } else {
            linux = linux.move_on(AWAY);
        }
        let asked = clock.monotonic();
        let uptime = linux.uptime();
        let ran = clock.monotonic().since(before.0) - AWAY;
        assert!(
            uptime > before.1 && uptime - before.1 <= ran,
            "round {round}: {uptime:?} after {before:?} and {ran:?}"
        );
        before = (asked, uptime);
    }
    let before = linux.machine.counters().exits;
    std::thread::sleep(Duration::from_secs(1));
    let exits = linux.machine.counters().exits - before;
    assert!(exits < 1000, "an idle guest left guest mode {exits} times in a second");
}
