//! Saved and restored by hand, without an agent: two machines of one saved state are the same machine until their guests
//! are told who they are. That is what an agent's identity is for, and how one sees that it works.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Seek;
use std::os::fd::AsFd;

use hearth::sys::{fd, file};
use hearth::wire::control::{Answer, DeviceSpec, Request, RestoreSpec, SavedPages};
use hearth::wire::refusal::Refusal;

use crate::guest::{Booted, Guest, MEMORY_BYTES};
use crate::{NONCE, Vmm, ask};

/// States that are tried. A guest's kernel stirs its generator by itself, about as often as half its uptime goes by:
/// where that is due just after a state was saved, no two machines of the state read the same.
const STATES: usize = 8;

impl Booted {
    /// Its state at a moment in which it has just been told who it is; it goes on, without its connections.
    pub(crate) fn save(&mut self) -> Saved {
        self.guest().identify(1);
        let Self(vmm) = self;
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
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        Saved { state, memory }
    }
}

/// State and memory of a guest.
pub(crate) struct Saved {
    pub(crate) state: File,
    pub(crate) memory: File,
}

impl Saved {
    /// A machine of it that runs.
    pub(crate) fn restore(&self) -> Vmm {
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

    /// What a machine of it reads from its generator: after it was told that it is `number`, or untold.
    fn random(&self, number: Option<u8>) -> Vec<u8> {
        let vmm = self.restore();
        let mut guest = Guest::connect(&vmm).expect("the guest listens as it did");
        if let Some(number) = number {
            guest.identify(number);
        }
        guest.random()
    }
}

#[test]
fn restored_machines_are_the_same_until_they_are_told_who_they_are() {
    let mut booted = Booted::boot();
    let (saved, untold) = (0..STATES)
        .find_map(|_| {
            let saved = booted.save();
            let untold = saved.random(None);
            if saved.random(None) == untold {
                return Some((saved, untold));
            }
            booted.guest().output(&["sleep", "0.7"]);
            None
        })
        .expect("two machines of one state that read the same");
    let told: BTreeSet<Vec<u8>> = (2..8).map(|number| saved.random(Some(number))).collect();
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(!told.contains(&untold));
}
