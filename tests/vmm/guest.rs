//! A guest that was booted in a VMM without an agent, and a conversation with the guest's agent.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hearth::sys::fd;
use hearth::wire::control::{Answer, Request, SavedPages};
use hearth::wire::refusal::Refusal;
use hearth_guest_wire::frame::{Decoder, encode};
use hearth_guest_wire::{Exec, Exit, FromGuest, Identity, PORT, ToGuest, VERSION};

use crate::{NONCE, Vmm, ask, command_line, demo};

/// Guest memory, as [`Vmm::launch`] has it.
pub(crate) const MEMORY_BYTES: u64 = 128 << 20;

/// A conversation with the guest's agent.
pub(crate) struct Guest {
    stream: UnixStream,
    decoder: Decoder,
}

impl Guest {
    /// Connects and says Hello; `None` while nobody listens.
    pub(crate) fn connect(vmm: &Vmm) -> Option<Self> {
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

    /// The first 64 bytes of the guest's generator. One process reads them: what several take from the generator as they
    /// start, and in what order, is not the same each time.
    pub(crate) fn random(mut self) -> Vec<u8> {
        let random = self.output(&["head", "-c", "64", "/dev/urandom"]);
        assert_eq!(random.len(), 64, "{random:?}");
        random
    }

    /// What a program that ends well writes.
    pub(crate) fn output(&mut self, argv: &[&str]) -> Vec<u8> {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        let started = self.ask(&ToGuest::Exec(Exec { argv, ..Exec::default() }));
        assert!(matches!(started, FromGuest::Started { .. }), "{started:?}");
        let (mut output, mut complaint) = (Vec::new(), Vec::new());
        loop {
            let message = self.next();
            if let FromGuest::Stdout(bytes) = message {
                output.extend(bytes);
            } else if let FromGuest::Stderr(bytes) = message {
                complaint.extend(bytes);
            } else {
                assert_eq!(message, FromGuest::Exited(Exit::Code(0)), "{}", String::from_utf8_lossy(&complaint));
                return output;
            }
        }
    }

    /// Makes the guest somebody.
    pub(crate) fn identify(&mut self, number: u8) {
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

/// A booted guest whose agent answers.
pub(crate) struct Booted(pub(crate) Vmm);

impl Booted {
    pub(crate) fn boot() -> Self {
        let mut vmm = Vmm::start();
        vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
        let refused = ask(&mut vmm.control, &Request::Save { pages: SavedPages::All }, &[]);
        assert!(matches!(refused, Answer::Refused(Refusal::State { .. })), "{refused:?}");
        let kernel = File::open(demo().join("vmlinux")).unwrap();
        let launched = vmm.launch(&command_line(), &kernel);
        assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Guest::connect(&vmm).is_none() {
            assert!(Instant::now() < deadline, "the guest does not answer; its console:\n{}", crate::console(&vmm));
            std::thread::sleep(Duration::from_millis(50));
        }
        Self(vmm)
    }

    pub(crate) fn guest(&self) -> Guest {
        Guest::connect(&self.0).expect("the guest listens as it did")
    }
}
