//! What every device promises of its saved state, asked of each of them: save, restore, save gives the same; sections
//! that are truncated, oversized, another slot's or another device's are refused; a paused device writes no guest
//! memory; a restored one works.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use hearth::machine::layout::Slot;
use hearth::machine::ram::GuestRam;
use hearth::machine::virtio::saved::TransportV1;
use hearth::machine::virtio::{Backend, BuildDeviceError, DeviceLoop, VirtioSlot};
use hearth::report::chain;
use hearth::saved::{Section, SectionKind, SectionName, Sections};
use hearth::sys::tap;
use hearth::units::NetLimits;
use tempfile::TempDir;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::driver::{Driver, EVENT_IDX, INDIRECT, VERSION_1, ram, run};
use crate::net::in_namespace;
use crate::vsock_guest::{self, Guest, REQUEST, RST};

const FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT;

/// Where backends come from: the same disk and directory for both lives of a device.
struct Host {
    directory: TempDir,
    disk: File,
}

impl Host {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), disk: crate::block::disk() }
    }

    fn backend(&self, slot: Slot) -> Backend {
        let path = self.directory.path().join("vsock");
        match slot.number() {
            0 => {
                let _ = std::fs::remove_file(&path);
                Backend::Vsock { listener: UnixListener::bind(path).unwrap() }
            }
            1 => Backend::Rng,
            2 => Backend::Balloon,
            3 => Backend::Block { file: self.disk.try_clone().unwrap(), read_only: false, ring: crate::block::ring() },
            9 => {
                let (tap, mac) = (tap::open("tap%d").unwrap(), [2, 0, 0, 0, 0, 1]);
                Backend::Net { tap, mac, mtu: Some(1280), limits: NetLimits::default() }
            }
            other => panic!("slot {other}"),
        }
    }

    fn restore(&self, slot: Slot, ram: &GuestRam, sections: Vec<Section>) -> Result<VirtioSlot, BuildDeviceError> {
        let mut all = Sections::new();
        sections.into_iter().for_each(|section| all.push(section).unwrap());
        let restored = VirtioSlot::from_saved(slot, self.backend(slot), ram, &mut all)?;
        all.finish().unwrap();
        Ok(restored)
    }
}

fn every_slot() -> [Slot; 5] {
    [Slot::VSOCK, Slot::RNG, Slot::BALLOON, Slot::block(0).unwrap(), Slot::net(0).unwrap()]
}

/// A device that was used a little, always the same, and its sections.
fn used(host: &Host, slot: Slot, ram: &GuestRam) -> Vec<Section> {
    let device = Arc::new(VirtioSlot::new(slot, host.backend(slot), ram).unwrap());
    let mut driver = Driver::up(ram, device.clone(), FEATURES);
    for index in 0..driver.queues.len() {
        let buffer = driver.allocate(2048);
        driver.queues[index].add(&[(buffer, 64)], &[(buffer + 64, 1000)]);
    }
    device.step();
    let devices = DeviceLoop::start(vec![device]).unwrap();
    devices.pause();
    let sections = devices.save().unwrap();
    assert_eq!(devices.save().unwrap(), sections, "saving twice");
    sections
}

#[test]
fn save_restore_save_is_equal() {
    in_namespace(|| {
        let host = Host::new();
        for slot in every_slot() {
            let fresh = ram(4);
            let device = Arc::new(VirtioSlot::new(slot, host.backend(slot), &fresh).unwrap());
            let untouched = DeviceLoop::start(vec![device]).unwrap().save().unwrap();
            for (sections, ram) in [(untouched, fresh), {
                let ram = ram(4);
                (used(&host, slot, &ram), ram)
            }] {
                let restored = host.restore(slot, &ram, sections.clone()).unwrap();
                let devices = DeviceLoop::start(vec![Arc::new(restored)]).unwrap();
                assert_eq!(devices.save().unwrap(), sections, "slot {}", slot.number());
            }
        }
    });
}

#[test]
fn truncated_oversized_and_foreign_sections_are_refused() {
    in_namespace(|| {
        let host = Host::new();
        for slot in every_slot() {
            let ram = ram(4);
            let sections = used(&host, slot, &ram);
            for at in 0..sections.len() {
                let changed = |change: &dyn Fn(&mut Section)| {
                    let mut sections = sections.clone();
                    change(&mut sections[at]);
                    host.restore(slot, &ram, sections).unwrap_err()
                };
                for error in [
                    changed(&|section| section.bytes.truncate(section.bytes.len() - 1)),
                    changed(&|section| section.bytes.clear()),
                    changed(&|section| section.bytes.push(0)),
                    changed(&|section| section.bytes.resize(1 << 21, 0)),
                    changed(&|section| section.version += 1),
                    changed(&|section| section.name.instance += 1),
                ] {
                    assert!(matches!(error, BuildDeviceError::Saved { .. }), "{error}");
                }
                let mut missing = sections.clone();
                missing.remove(at);
                host.restore(slot, &ram, missing).unwrap_err();
            }
            // The transport of every other kind of device.
            for other in every_slot().into_iter().filter(|other| *other != slot) {
                let mut foreign = used(&host, other, &ram);
                foreign.iter_mut().for_each(|section| section.name.instance = slot.number().into());
                foreign[1] = sections[1].clone();
                let error = host.restore(slot, &ram, foreign).unwrap_err();
                assert!(chain(&error).contains("another kind of device"), "{}", chain(&error));
            }
        }
    });
}

type Change = &'static dyn Fn(&mut TransportV1);

#[test]
fn impossible_transports_are_refused() {
    let host = Host::new();
    let ram = ram(4);
    let sections = used(&host, Slot::RNG, &ram);
    let mut decoder = Sections::new();
    decoder.push(sections[0].clone()).unwrap();
    let good: TransportV1 = decoder.take(1).unwrap();
    let changes: [(&str, Change); 11] = [
        ("does not have", &|saved| saved.offered |= 1 << 40),
        ("cannot have", &|saved| saved.accepted &= !VERSION_1),
        ("cannot have", &|saved| saved.accepted |= 1 << 5),
        ("device status", &|saved| saved.status = 4),
        ("number or largest size", &|saved| saved.queues.clear()),
        ("number or largest size", &|saved| saved.queues[0].size_max = 16),
        ("impossible", &|saved| saved.queues[0].size = 3),
        ("impossible", &|saved| saved.queues[0].descriptors = 4 << 20),
        ("impossible", &|saved| saved.queues[0].used += 1),
        ("impossible", &|saved| saved.queues[0].available = u64::MAX - 1),
        ("impossible", &|saved| saved.queues[0].size = 0),
    ];
    for (reason, change) in changes {
        let mut changed = good.clone();
        change(&mut changed);
        let error =
            host.restore(Slot::RNG, &ram, vec![Section::new(1, &changed).unwrap(), sections[1].clone()]).unwrap_err();
        assert!(chain(&error).contains(reason), "{}", chain(&error));
    }
    // An older device that offered less is taken, and goes on offering that.
    let mut less = good.clone();
    (less.offered, less.accepted) = (VERSION_1, VERSION_1);
    let device = host.restore(Slot::RNG, &ram, vec![Section::new(1, &less).unwrap(), sections[1].clone()]).unwrap();
    assert_eq!(Driver::new(&ram, Arc::new(device)).offered(), VERSION_1);
}

#[test]
fn another_disk_is_refused() {
    let host = Host::new();
    let ram = ram(4);
    let slot = Slot::block(0).unwrap();
    let sections = used(&host, slot, &ram);
    host.disk.set_len(1 << 19).unwrap();
    let error = host.restore(slot, &ram, sections).unwrap_err();
    assert_eq!(chain(&error), "slot 3: section Block/3: the disk has another size or access");
}

/// Sections that were shipped are read by today's code and written as they were. A changed `...V1` fails here: it needs a
/// `...V2`, and this file stays.
#[test]
fn sections_are_as_in_the_golden_file() {
    in_namespace(|| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/virtio_sections_v1.txt");
        let host = Host::new();
        let mut text = String::new();
        for slot in every_slot() {
            for section in used(&host, slot, &ram(4)) {
                let bytes: String = section.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                text.push_str(&format!("{} version {}: {bytes}\n", section.name, section.version));
            }
        }
        if std::env::var_os("HEARTH_BLESS").is_some() {
            bless(&path, &text);
        }
        let golden = std::fs::read_to_string(&path).unwrap();
        assert!(golden == text, "not as in {}; if it should be: HEARTH_BLESS=1\n{text}", path.display());
        for slot in every_slot() {
            let section = |line: &str| -> Option<Section> {
                let (name, rest) = line.split_once(" version ").unwrap();
                let (version, hex) = rest.split_once(": ").unwrap();
                let (kind, instance) = name.split_once('/').unwrap();
                let kind = (0..64).filter_map(SectionKind::from_number).find(|one| format!("{one:?}") == kind).unwrap();
                let instance = instance.parse().unwrap();
                let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
                let bytes = (0..hex.len()).step_by(2).map(byte).collect();
                let name = SectionName { kind, instance };
                let version = version.parse().unwrap();
                (instance == u16::from(slot.number())).then_some(Section { name, version, bytes })
            };
            let sections: Vec<_> = golden.lines().filter_map(section).collect();
            assert_eq!(sections.len(), 2);
            host.restore(slot, &ram(4), sections).unwrap();
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "a file of the source tree, kept by its version control")]
pub(crate) fn bless(path: &std::path::Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

fn dirty_pages(ram: &GuestRam) -> usize {
    let pages = |region: &vm_memory::GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>| {
        (0..usize::try_from(region.len()).unwrap()).step_by(4096).filter(|at| region.bitmap().dirty_at(*at)).count()
    };
    ram.iter().map(pages).sum()
}

fn forget_dirty(ram: &GuestRam) {
    ram.iter().for_each(|region| (**region).bitmap().reset());
}

/// Buffers everywhere and something to say on every backend: nothing is written while paused, everything after.
#[test]
fn a_paused_device_writes_no_guest_memory() {
    in_namespace(|| {
        let host = Host::new();
        for slot in every_slot() {
            let ram = ram(4);
            let device = Arc::new(VirtioSlot::new(slot, host.backend(slot), &ram).unwrap());
            let devices = run(&[&device]);
            let mut driver = Driver::up(&ram, device.clone(), FEATURES);
            devices.pause();
            let asking = (slot == Slot::VSOCK).then(|| vsock_guest::connect(host.directory.path(), 5));
            for index in 0..driver.queues.len() {
                let buffer = driver.allocate(2048);
                driver.queues[index].add(&[], &[(buffer, 1000)]);
                device.queue_notify()[index].write(1).unwrap();
            }
            forget_dirty(&ram);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert_eq!(dirty_pages(&ram), 0, "slot {}", slot.number());
            assert!(device.interrupt().read().is_err());
            devices.resume();
            assert_ne!(dirty_pages(&ram), 0, "slot {}", slot.number());
            drop(asking);
        }
    });
}

/// A guest whose vsock was restored: old streams are reset by the event, new ones wait until it has handled it.
#[test]
fn a_restored_vsock_resets_old_streams_and_serves_new_ones() {
    let host = Host::new();
    let slot = Slot::VSOCK;
    let ram = ram(16);
    let device = Arc::new(VirtioSlot::new(slot, host.backend(slot), &ram).unwrap());
    let devices = run(&[&device]);
    let mut guest = Guest::new(Driver::up(&ram, device, FEATURES));
    guest.fill();
    for _ in 0..3 {
        let (old, port) = guest.pair(host.directory.path(), 1024);
        // Something under way in both directions: the guest's is not looked at before the restore.
        let devices = guest.devices.take().unwrap_or_else(|| run(&[&guest.driver.slot]));
        devices.pause();
        guest.say(port, 1024, 5, 0, b"too late");
        let sections = devices.save().unwrap();
        let registers = guest.driver.slot.clone();
        devices.stop();
        drop((old, registers));
        let restored = Arc::new(host.restore(slot, &ram, sections).unwrap());
        guest.driver.move_to(restored.clone());
        guest.devices = Some(run(&[&restored]));
        // Every interrupt is raised once, and every queue was looked at.
        assert!(guest.driver.interrupt().is_some());
        let mut host_end = vsock_guest::connect(host.directory.path(), 1024);
        let answer = guest.hear();
        assert_eq!((answer.operation, answer.host), (RST, port), "the old stream is unknown");
        assert_eq!(guest.hear_within(50), None, "the new stream waits for the event");
        let (_, written) = guest.driver.wait_used(2);
        assert_eq!(written, 4);
        let buffer = guest.driver.allocate(4);
        guest.driver.queues[2].add(&[], &[(buffer, 4)]);
        assert!(guest.driver.kick(2), "the device wants to know of this one");
        let request = guest.hear();
        assert_eq!(request.operation, REQUEST);
        assert!(request.host > port, "old ports are not used again");
        guest.say(request.host, 1024, 2, 0, &[]);
        assert_eq!(vsock_guest::read_line(&mut host_end), format!("OK {}", request.host));
        guest.say(request.host, 1024, RST, 0, &[]);
    }
    drop(devices);
}
