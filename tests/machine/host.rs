//! The host's side of a tiny guest: a machine, its console, and patience with a bound.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth::clock::{Clock, SystemClock};
use hearth::machine::layout::Slot;
use hearth::machine::virtio::Backend;
use hearth::machine::{BuildError, ConsoleSink, Entry, Machine, MachineEvent, MachineSpec, RamBacking, RestoreSpec};
use hearth::saved::Sections;
use hearth::units::{Bytes, MIB};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// How long a guest of a few instructions may take on a loaded host.
const PATIENCE: Duration = Duration::from_secs(30);

/// /dev/kvm. Its absence is a failure: these tests mean nothing without it.
pub(crate) fn kvm() -> File {
    File::options().read(true).write(true).open("/dev/kvm").expect("these tests need /dev/kvm")
}

/// What a guest printed.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    pub(crate) fn sink(&self) -> ConsoleSink {
        Box::new(self.clone())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    /// Waits until the console shows `text`.
    pub(crate) fn expect(&self, text: &str) {
        wait_until(|| self.text().contains(text), || format!("console shows {:?}, not {text:?}", self.text()));
    }
}

/// Waits for a condition, or fails with `otherwise`.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool, otherwise: impl Fn() -> String) {
    let clock = SystemClock::new();
    let start = clock.monotonic();
    while !condition() {
        assert!(clock.monotonic().since(start) < PATIENCE, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A machine for a tiny guest: 16 MiB, no devices but the built-in ones.
pub(crate) fn spec(vcpus: u8, kernel: File, console: &Console) -> MachineSpec {
    MachineSpec {
        vcpus,
        memory: Bytes(16 * MIB),
        backing: RamBacking::SharedMemfd,
        kernel,
        initrd: None,
        command_line: String::new(),
        entry: Entry::Linux64,
        devices: Vec::new(),
        console: console.sink(),
        clock: Arc::new(SystemClock::new()),
    }
}

/// A tiny guest, running.
pub(crate) fn boot(vcpus: u8, kernel: File) -> (Machine, Console) {
    let console = Console::default();
    let mut machine = Machine::build(kvm(), spec(vcpus, kernel, &console)).unwrap();
    machine.resume().unwrap();
    (machine, console)
}

/// The memory of a paused machine, as a file.
pub(crate) fn memory_image(machine: &Machine) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for region in machine.ram().iter() {
        let size = usize::try_from(region.len()).unwrap();
        machine.ram().write_all_volatile_to(GuestAddress(region.start_addr().0), &mut file, size).unwrap();
    }
    file
}

/// Restores `sections` on `memory`.
pub(crate) fn restore(memory: File, sections: Sections, console: &Console) -> Result<Machine, BuildError> {
    restore_with(memory, sections, console, Vec::new())
}

/// Restores `sections` on `memory` with these devices.
pub(crate) fn restore_with(
    memory: File,
    sections: Sections,
    console: &Console,
    devices: Vec<(Slot, Backend)>,
) -> Result<Machine, BuildError> {
    let spec = RestoreSpec {
        backing: RamBacking::PrivateFile(memory),
        sealed: None,
        devices,
        console: console.sink(),
        clock: Arc::new(SystemClock::new()),
    };
    Machine::restore(kvm(), spec, sections)
}

/// Waits for the machine's next event.
pub(crate) fn event(machine: &Machine) -> MachineEvent {
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::new(machine.events().as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, patience).unwrap(), 1, "no event came");
    machine.events().take().unwrap()
}

/// A number in guest memory.
pub(crate) fn number(machine: &Machine, address: u32) -> u64 {
    machine.ram().read_obj(GuestAddress(u64::from(address))).unwrap()
}
