//! Saved and restored by hand, without an agent: two machines of one saved state are the same machine until their guests
//! are told who they are. That is what an agent's identity is for, and how one sees that it works.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hearth::sys::{fd, file};
use hearth::wire::control::{Answer, DeviceSpec, Request, RestoreSpec, SavedPages};
use hearth::wire::refusal::Refusal;
use hearth_guest_wire::frame::{Decoder, encode};
use hearth_guest_wire::{Exec, Exit, FromGuest, Identity, PORT, ToGuest, VERSION};

use crate::{NONCE, Vmm, ask, command_line, demo};

/// Guest memory, as [`Vmm::launch`] has it.
const MEMORY_BYTES: u64 = 128 << 20;

/// Pairs of machines that are compared. Between the restore and the reading, a guest's kernel may stir its generator by
/// itself: its timer, or its entropy device.
const PAIRS: usize = 4;

/// A conversation with the guest's agent.
struct Guest {
    stream: UnixStream,
    decoder: Decoder,
}

impl Guest {
    /// Connects and says Hello; `None` while nobody listens.
    fn connect(vmm: &Vmm) -> Option<Self> {
        let mut stream = fd::connect_in_dir(&vmm.dir, "vsock.sock").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let (mut line, mut byte) = (Vec::new(), [0]);
        while !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
            line.extend(byte);
        }
        let mut guest = Self { stream, decoder: Decoder::new() };
        if !line.starts_with(b"OK") {
            return None;
        }
        let hello = guest.ask(&ToGuest::Hello { version: VERSION });
        assert!(matches!(hello, FromGuest::Hello { .. }), "{hello:?}");
        Some(guest)
    }

    fn ask(&mut self, message: &ToGuest) -> FromGuest {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
        self.next()
    }

    fn next(&mut self) -> FromGuest {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next().unwrap() {
                return message;
            }
            let count = self.stream.read(&mut buffer).expect("the guest's answer");
            assert_ne!(count, 0, "the guest hung up");
            self.decoder.push(&buffer[..count]);
        }
    }

    /// The first 64 bytes of the guest's generator, as a digest.
    fn random(mut self) -> String {
        let argv = ["sh", "-c", "head -c 64 /dev/urandom | md5sum"].map(str::to_owned).to_vec();
        let started = self.ask(&ToGuest::Exec(Exec { argv, ..Exec::default() }));
        assert!(matches!(started, FromGuest::Started { .. }), "{started:?}");
        let mut output = Vec::new();
        loop {
            let message = self.next();
            if let FromGuest::Stdout(bytes) = message {
                output.extend(bytes);
            } else {
                assert_eq!(message, FromGuest::Exited(Exit::Code(0)));
                return String::from_utf8(output).unwrap();
            }
        }
    }

    /// Makes the guest somebody.
    fn identify(&mut self, number: u8) {
        let mut entropy = [[0; 32]; 2];
        getrandom::fill(entropy.as_flattened_mut()).unwrap();
        let identity = Identity {
            vm_id: format!("vm-{number}"),
            hostname: format!("restored-{number}"),
            generation: [number; 16],
            entropy,
            unix_ns: 0,
            interfaces: Vec::new(),
        };
        assert_eq!(self.ask(&ToGuest::Identity(identity)), FromGuest::Done);
    }
}

/// State and memory of a guest whose agent answers.
struct Saved {
    state: File,
    memory: File,
}

impl Saved {
    fn of_a_booted_guest() -> Self {
        let mut vmm = Vmm::start();
        vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
        let refused = ask(&mut vmm.control, &Request::Save { pages: SavedPages::All }, &[]);
        assert!(matches!(refused, Answer::Refused(Refusal::State { .. })), "{refused:?}");
        let kernel = File::open(demo().join("vmlinux")).unwrap();
        let launched = vmm.launch(&command_line(), &kernel);
        assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut guest = loop {
            assert!(Instant::now() < deadline, "the guest does not answer; its console:\n{}", crate::console(&vmm));
            match Guest::connect(&vmm) {
                Some(guest) => break guest,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        guest.identify(1);
        assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
        let pagemap = File::open(format!("/proc/{}/pagemap", vmm.spawned.pid)).unwrap();
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let few = ask(&mut vmm.control, &Request::Save { pages: SavedPages::All }, &[pagemap.as_fd(), state.as_fd()]);
        assert!(matches!(few, Answer::Refused(Refusal::BadRequest { .. })), "{few:?}");
        let descriptors = [pagemap.as_fd(), state.as_fd(), memory.as_fd()];
        let saved = ask(&mut vmm.control, &Request::Save { pages: SavedPages::All }, &descriptors);
        let Answer::Saved(phases) = saved else { panic!("{saved:?}\n{}", vmm.log()) };
        assert!(phases.state_bytes > 4096 && phases.memory_bytes > 1 << 20, "{phases:?}");
        assert_eq!(memory.metadata().unwrap().len(), MEMORY_BYTES);
        Self { state, memory }
    }

    /// A machine of it that runs.
    fn restore(&self) -> Vmm {
        let mut vmm = Vmm::start();
        vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let console = file::create(&vmm.directory.path().join("console")).unwrap();
        let console_listener = fd::bind_in_dir(&vmm.dir, "console.sock").unwrap();
        let vsock = fd::bind_in_dir(&vmm.dir, "vsock.sock").unwrap();
        let mut state = tempfile::tempfile().unwrap();
        (&self.state).rewind().unwrap();
        std::io::copy(&mut &self.state, &mut state).unwrap();
        state.rewind().unwrap();
        let descriptors =
            [kvm.as_fd(), state.as_fd(), self.memory.as_fd(), console.as_fd(), console_listener.as_fd(), vsock.as_fd()];
        let spec = RestoreSpec { memory_bytes: MEMORY_BYTES, devices: vec![DeviceSpec::Vsock, DeviceSpec::Rng] };
        let launched = ask(&mut vmm.control, &Request::Restore(spec), &descriptors);
        assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        vmm
    }
}

#[test]
fn restored_machines_are_the_same_until_they_are_told_who_they_are() {
    let saved = Saved::of_a_booted_guest();
    let random = |number: Option<u8>| {
        let vmm = saved.restore();
        let mut guest = Guest::connect(&vmm).expect("the guest listens as it did");
        if let Some(number) = number {
            guest.identify(number);
        }
        let random = guest.random();
        assert_eq!(random.len(), 36, "{random}");
        random
    };
    let untold: Vec<[String; 2]> = (0..PAIRS).map(|_| [random(None), random(None)]).collect();
    assert!(untold.iter().any(|[one, other]| one == other), "nothing is left to tell: {untold:?}");
    let told: BTreeSet<String> = (2..8).map(|number| random(Some(number))).collect();
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(untold.iter().flatten().all(|untold| !told.contains(untold)));
}
