//! Memory copied while the guest runs: what lies in the image afterwards is what the guest had in memory when it was held,
//! byte by byte, whatever it wrote meanwhile; and giving it up leaves the guest as it was.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use hearth::wire::control::{
    Answer, CopyPhases, CopySpec, MachineState, PAGE_RUN_BYTES, Request, SavePhases, SavedPages, SendPhase,
};
use hearth::wire::refusal::Refusal;

use crate::guest::{Booted, MEMORY_BYTES};
use crate::moved::{check, loaded, look, second, shell};
use crate::restored::Saved;
use crate::{Vmm, answer, ask, begin};

const SPEC: CopySpec = CopySpec { pages: SavedPages::All, pause_ms_max: 8, rounds_max: 16, deadline_ms: 60_000 };

const PAGE: usize = 4096;

/// Copies that are begun to have one given up.
const TRIES: u32 = 200;

pub(super) fn pagemap(vmm: &Vmm) -> File {
    File::open(format!("/proc/{}/pagemap", vmm.spawned.pid)).unwrap()
}

fn image() -> File {
    let image = tempfile::tempfile().unwrap();
    image.set_len(MEMORY_BYTES).unwrap();
    image
}

fn begin_copy(vmm: &Vmm, spec: CopySpec, image: &File) {
    begin(&vmm.control, &Request::CopyMemory(spec), &[pagemap(vmm).as_fd(), image.as_fd()]);
}

/// Copies while the guest runs.
fn copied(vmm: &mut Vmm, spec: CopySpec, image: &File) -> CopyPhases {
    begin_copy(vmm, spec, image);
    let copied = answer(&mut vmm.control);
    let Answer::Copied(phases) = copied else { panic!("{copied:?}\n{}", vmm.log()) };
    phases
}

/// Writes what was left of a guest that is held now.
fn rest(vmm: &mut Vmm, descriptors: &[&File]) -> SavePhases {
    let descriptors: Vec<_> = descriptors.iter().map(|file| file.as_fd()).collect();
    let saved = ask(&mut vmm.control, &Request::SaveRest, &descriptors);
    let Answer::Saved(phases) = saved else { panic!("{saved:?}\n{}", vmm.log()) };
    phases
}

/// What the guest has in memory, read from its process.
pub(super) fn memory(vmm: &mut Vmm) -> Vec<u8> {
    let Answer::Status(status) = vmm.ask(&Request::Status) else { panic!("no status") };
    let process = File::open(format!("/proc/{}/mem", vmm.spawned.pid)).unwrap();
    let mut bytes = vec![0; usize::try_from(status.memory_bytes).unwrap()];
    process.read_exact_at(&mut bytes, status.guest_memory_host_address).unwrap();
    bytes
}

pub(super) fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The pages in which two memories differ.
pub(super) fn differing(one: &[u8], other: &[u8]) -> Vec<usize> {
    assert_eq!(one.len(), other.len());
    let pages = one.as_chunks::<PAGE>().0.iter().zip(other.as_chunks::<PAGE>().0);
    pages.enumerate().filter(|(_, (one, other))| one != other).map(|(index, _)| index).collect()
}

fn is_copying(vmm: &Vmm) -> bool {
    let progress = ask(&mut second(vmm), &Request::SendProgress, &[]);
    let Answer::Sending(progress) = progress else { panic!("{progress:?}") };
    progress.phase == SendPhase::Copying
}

#[test]
fn an_image_that_was_copied_live_is_the_memory_of_the_moment_it_was_held() {
    let (mut vmm, told) = loaded();
    let (_, mut last) = look(&vmm);
    for _ in 0..3 {
        let (image, state) = (image(), tempfile::tempfile().unwrap());
        let phases = copied(&mut vmm, SPEC, &image);
        println!("{phases:?}");
        assert!(phases.rounds >= 1 && phases.memory_bytes > 4 << 20, "{phases:?}");
        // Neither of these is possible yet, or any more.
        let early = ask(&mut vmm.control, &Request::SaveRest, &[state.as_fd()]);
        assert_eq!(early, Answer::Refused(Refusal::State { state: MachineState::Running }));
        // It writes on: this is what the rest is for.
        last = check(&vmm, &told, last);
        assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
        let few = ask(&mut vmm.control, &Request::SaveRest, &[state.as_fd(), state.as_fd()]);
        assert!(matches!(few, Answer::Refused(Refusal::BadRequest { .. })), "{few:?}");
        let saved = rest(&mut vmm, &[&state]);
        println!("{saved:?}");
        assert!(saved.state_bytes > 4096 && saved.memory_bytes > 0, "{saved:?}");
        assert_eq!(differing(&content(&image), &memory(&mut vmm)), [0; 0], "{phases:?} {saved:?}");
        let again = ask(&mut vmm.control, &Request::SaveRest, &[state.as_fd()]);
        assert!(matches!(again, Answer::Refused(Refusal::BadRequest { .. })), "{again:?}");
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        last = check(&vmm, &told, last);
        let clone = Saved { state, memory: image }.restore();
        check(&clone, &told, 0);
    }
}

#[test]
fn a_difference_that_was_copied_live_is_all_that_differs() {
    let mut booted = Booted::boot();
    let saved = booted.save();
    let mut vmm = saved.restore();
    shell(&vmm, "cd /tmp; (while :; do dd if=/dev/urandom of=some bs=64k count=4; done) >/dev/null 2>&1 &");
    let (image, state, list) = (image(), tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let phases = copied(&mut vmm, CopySpec { pages: SavedPages::Changed, ..SPEC }, &image);
    shell(&vmm, "cd /tmp; dd if=/dev/zero of=other bs=64k count=4 2>/dev/null");
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    let rested = rest(&mut vmm, &[&state, &list]);
    println!("{phases:?} {rested:?}");
    let mut runs = Vec::new();
    std::io::Seek::rewind(&mut &list).unwrap();
    (&list).read_to_end(&mut runs).unwrap();
    let mut composed = content(&saved.memory);
    let (held, mut pages) = (content(&image), 0);
    for run in runs.as_chunks::<PAGE_RUN_BYTES>().0 {
        let number = |bytes: &[u8]| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
        let (first, count) = (number(&run[..8]), number(&run[8..]));
        let bytes = first * PAGE..(first + count) * PAGE;
        composed[bytes.clone()].copy_from_slice(&held[bytes]);
        pages += count;
    }
    // The whole guest has more than three thousand pages that are not zero.
    assert!((64..2500).contains(&pages), "{pages} pages");
    assert_eq!(differing(&composed, &memory(&mut vmm)), [0; 0]);
    // A machine of no image differs from none.
    let mut whole = booted.0;
    let refused = {
        begin_copy(&whole, CopySpec { pages: SavedPages::Changed, ..SPEC }, &image);
        answer(&mut whole.control)
    };
    assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
}

#[test]
fn a_copy_that_is_given_up_leaves_the_guest_as_it_was() {
    let (mut vmm, told) = loaded();
    let (_, mut last) = look(&vmm);
    // A round takes milliseconds: what is asked at once mostly comes in the midst of the first.
    let mut beside = second(&vmm);
    let given_up = (0..TRIES).any(|_| {
        begin_copy(&vmm, SPEC, &image());
        let again = [Request::Save { pages: SavedPages::All }, Request::CopyMemory(SPEC), Request::Pause];
        let refused = again.map(|request| ask(&mut beside, &request, &[]));
        assert_eq!(ask(&mut beside, &Request::CancelSend, &[]), Answer::Done);
        let end = answer(&mut vmm.control);
        assert_eq!(ask(&mut beside, &Request::Resume, &[]), Answer::Done);
        assert!(matches!(end, Answer::Copied(_) | Answer::Refused(Refusal::Cancelled)), "{end:?}");
        refused.iter().all(|answer| *answer == Answer::Refused(Refusal::Sending))
            && end == Answer::Refused(Refusal::Cancelled)
    });
    assert!(given_up, "none of {TRIES} copies was given up");
    assert!(!is_copying(&vmm));
    last = check(&vmm, &told, last);
    // The image cannot be written: the kernel has the disk full.
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    begin_copy(&vmm, SPEC, &full);
    let refused = answer(&mut vmm.control);
    assert!(matches!(refused, Answer::Refused(Refusal::Host { .. })), "{refused:?}");
    last = check(&vmm, &told, last);
    // One that is complete, and not wanted any more.
    copied(&mut vmm, SPEC, &image());
    assert_eq!(vmm.ask(&Request::CancelSend), Answer::Done);
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    let state = tempfile::tempfile().unwrap();
    let rest = ask(&mut vmm.control, &Request::SaveRest, &[state.as_fd()]);
    assert!(matches!(rest, Answer::Refused(Refusal::BadRequest { .. })), "{rest:?}");
    assert_eq!(begin_on_held(&mut vmm), Answer::Refused(Refusal::State { state: MachineState::Paused }));
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    last = check(&vmm, &told, last);
    // Who asked is gone in the middle of it, and another agent comes.
    begin_copy(&vmm, SPEC, &image());
    vmm.control = second(&vmm);
    while is_copying(&vmm) {}
    copied(&mut vmm, SPEC, &image());
    check(&vmm, &told, last);
}

/// Asks for a copy of a guest that stands still.
fn begin_on_held(vmm: &mut Vmm) -> Answer {
    begin_copy(vmm, SPEC, &image());
    answer(&mut vmm.control)
}
