//! Restored while its memory image is not here: the guest goes on and gets each chunk as it reaches it, whatever becomes of
//! the connection meanwhile; and in the end it is the machine that it would have been.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hearth::sys::{fd, file, process};
use hearth::wire::control::{
    Answer, CopySpec, DeviceSpec, MachineState, PAGE_RUN_BYTES, PrefaultSpec, Request, RestoreFillingSpec, RestoreSpec,
    SavedPages, SealingKey,
};
use hearth::wire::filling::{FRAME_BYTES, ToAgent, ToVmm};
use hearth::wire::last_words::LastWords;
use hearth::wire::refusal::Refusal;

use crate::copied::{content, differing, memory, pagemap};
use crate::guest::{Booted, Guest, MEMORY_BYTES};
use crate::moved::{self, check, loaded, second};
use crate::restored::Saved;
use crate::{NONCE, Vmm, answer, ask, begin, console};

const CHUNK_BYTES: u32 = 256 << 10;
const CHUNKS: u32 = (MEMORY_BYTES / CHUNK_BYTES as u64) as u32;

/// How long something may take that is to happen at once.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A guest that was saved, and what is here of its memory.
#[derive(Clone)]
struct Image {
    saved: Arc<Saved>,
    here: Arc<File>,
}

impl Image {
    /// Nothing of it is here.
    fn of(saved: Saved) -> Self {
        let here = tempfile::tempfile().unwrap();
        here.set_len(MEMORY_BYTES).unwrap();
        Self { saved: Arc::new(saved), here: Arc::new(here) }
    }

    /// Fetches chunks.
    fn fetch(&self, first: u32, count: u32) {
        let mut bytes = vec![0; CHUNK_BYTES as usize];
        for chunk in first..first + count {
            let offset = u64::from(chunk) * u64::from(CHUNK_BYTES);
            self.saved.memory.read_exact_at(&mut bytes, offset).unwrap();
            // Holes stay holes.
            if bytes.iter().any(|byte| *byte != 0) {
                self.here.write_all_at(&bytes, offset).unwrap();
            }
        }
    }

    /// Has a new VMM asked to make a machine of it; the answer comes when chunks are served.
    fn begin(&self, line: &UnixStream, chunk_bytes: u32) -> Vmm {
        let mut vmm = Vmm::start();
        vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
        self.begin_in(&vmm, line, chunk_bytes, "/dev/userfaultfd");
        vmm
    }

    fn begin_in(&self, vmm: &Vmm, line: &UnixStream, chunk_bytes: u32, device: &str) {
        let open = |path| File::options().read(true).write(true).open(path).unwrap();
        let (kvm, userfaultfd) = (open("/dev/kvm"), open(device));
        let console = file::create(&vmm.directory.path().join("console")).unwrap();
        let console_listener = fd::bind_in_dir(&vmm.dir, "console.sock").unwrap();
        let vsock = fd::bind_in_dir(&vmm.dir, "vsock.sock").unwrap();
        let mut state = tempfile::tempfile().unwrap();
        (&self.saved.state).rewind().unwrap();
        std::io::copy(&mut &self.saved.state, &mut state).unwrap();
        state.rewind().unwrap();
        let descriptors = [
            kvm.as_fd(),
            state.as_fd(),
            self.here.as_fd(),
            console.as_fd(),
            console_listener.as_fd(),
            vsock.as_fd(),
            userfaultfd.as_fd(),
            line.as_fd(),
        ];
        let restore = RestoreSpec { memory_bytes: MEMORY_BYTES, devices: vec![DeviceSpec::Vsock, DeviceSpec::Rng] };
        begin(&vmm.control, &Request::RestoreFilling(RestoreFillingSpec { restore, chunk_bytes }), &descriptors);
    }
}

/// The agent's end of a filling connection.
struct Line(UnixStream);

impl Line {
    /// One, and the end that a VMM gets.
    fn new() -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (Self(ours), theirs)
    }

    /// What the VMM says next; `None` when it hung up.
    fn said(&mut self) -> Option<ToAgent> {
        let mut frame = [0; FRAME_BYTES];
        self.0.read_exact(&mut frame).ok()?;
        Some(ToAgent::from_bytes(frame).unwrap())
    }

    fn say(&mut self, first: u32, count: u32) {
        // Somebody who hung up meanwhile is not told.
        let _ = self.0.write_all(&ToVmm::Present { first, count }.to_bytes());
    }

    /// Waits until a chunk is wanted, and does not serve it.
    fn wanted(&mut self) -> u32 {
        loop {
            match self.said().expect("the VMM has not hung up") {
                ToAgent::Wanted { chunk } => return chunk,
                ToAgent::Mapped { .. } => {}
            }
        }
    }
}

/// An agent that serves what is wanted, by a thread, as long as its connection is there.
struct Serving {
    line: UnixStream,
    wanted: Arc<Mutex<Vec<u32>>>,
    thread: JoinHandle<Option<u32>>,
}

impl Serving {
    fn begin(image: &Image, mut line: Line) -> Self {
        let (image, wanted) = (image.clone(), Arc::<Mutex<Vec<u32>>>::default());
        let (socket, noted) = (line.0.try_clone().unwrap(), Arc::clone(&wanted));
        let thread = std::thread::spawn(move || {
            let mut mapped = None;
            while let Some(said) = line.said() {
                match said {
                    ToAgent::Wanted { chunk } => {
                        noted.lock().unwrap().push(chunk);
                        image.fetch(chunk, 1);
                        line.say(chunk, 1);
                    }
                    ToAgent::Mapped { chunks } => mapped = Some(chunks),
                }
            }
            mapped
        });
        Self { line: socket, wanted, thread }
    }

    fn wanted(&self) -> Vec<u32> {
        self.wanted.lock().unwrap().clone()
    }

    /// Says more than was asked for.
    fn say(&self, first: u32, count: u32) {
        Line(self.line.try_clone().unwrap()).say(first, count);
    }

    /// The connection ends in the middle of it.
    fn cut(self) -> Vec<u32> {
        self.line.shutdown(Shutdown::Both).unwrap();
        self.thread.join().unwrap();
        self.wanted.lock().unwrap().clone()
    }

    /// Waits for the VMM to hang up; how many chunks it said it had.
    fn end(self) -> Option<u32> {
        self.thread.join().unwrap()
    }
}

/// A machine whose memory is not here, paused, and its agent.
fn filling(image: &Image) -> (Vmm, Serving) {
    let (ours, theirs) = Line::new();
    let mut vmm = image.begin(&theirs, CHUNK_BYTES);
    let serving = Serving::begin(image, ours);
    let launched = answer(&mut vmm.control);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    (vmm, serving)
}

fn fill(vmm: &mut Vmm) -> Line {
    let (ours, theirs) = Line::new();
    let filled = ask(&mut vmm.control, &Request::Fill, &[theirs.as_fd()]);
    assert_eq!(filled, Answer::Done, "{}", vmm.log());
    ours
}

/// Whatever looks at all of memory is refused: of a guest that runs, and of one that is held.
fn refuses_to_look_at_all(vmm: &mut Vmm) {
    let (some, page_map) = (tempfile::tempfile().unwrap(), pagemap(vmm));
    let pages = SavedPages::All;
    let copy = CopySpec { pages, pause_ms_max: 8, rounds_max: 16, deadline_ms: 60_000 };
    let descriptors = [page_map.as_fd(), some.as_fd(), some.as_fd()];
    let mut refused = |request: Request, count: usize| {
        let answer = ask(&mut vmm.control, &request, &descriptors[..count]);
        assert_eq!(answer, Answer::Refused(Refusal::Filling), "{request:?}");
    };
    refused(Request::CopyMemory(copy), 2);
    refused(Request::Send(moved::SPEC), 2);
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    let mut refused = |request: Request, count: usize| {
        let answer = ask(&mut vmm.control, &request, &descriptors[..count]);
        assert_eq!(answer, Answer::Refused(Refusal::Filling), "{request:?}");
    };
    refused(Request::Save { pages }, 3);
    refused(Request::Seal { pages, key: SealingKey([3; 32]) }, 2);
    refused(Request::Send(moved::SPEC), 2);
    refused(Request::SaveRest, 1);
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
}

#[test]
fn a_guest_runs_while_its_memory_comes_and_is_the_same_in_the_end() {
    let (vmm, told) = loaded();
    let image = Image::of(Booted(vmm).save());
    let (mut vmm, serving) = filling(&image);
    let as_built = serving.wanted().len();
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    let started = Instant::now();
    let mut last = check(&vmm, &told, 0);
    let wanted = serving.wanted();
    println!("{as_built} chunks as it was built, {} until it answered, {:?}", wanted.len(), started.elapsed());
    assert!(as_built > 0 && wanted.len() > as_built && wanted.len() < CHUNKS as usize / 2, "{}", wanted.len());
    assert_eq!(wanted.iter().collect::<BTreeSet<_>>().len(), wanted.len(), "each is asked for once");
    refuses_to_look_at_all(&mut vmm);
    last = check(&vmm, &told, last);

    // The rest, unasked; what the guest wrote meanwhile stays.
    image.fetch(0, CHUNKS);
    serving.say(0, CHUNKS / 2);
    serving.say(0, CHUNKS);
    assert_eq!(serving.end(), Some(CHUNKS));
    last = check(&vmm, &told, last);
    let mut line = fill(&mut vmm);
    assert_eq!([line.said(), line.said()], [Some(ToAgent::Mapped { chunks: CHUNKS }), None]);

    // It is saved as any other.
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    let [state, all, changed, list] = [(); 4].map(|()| tempfile::tempfile().unwrap());
    let page_map = pagemap(&vmm);
    let saved = ask(
        &mut vmm.control,
        &Request::Save { pages: SavedPages::All },
        &[page_map.as_fd(), state.as_fd(), all.as_fd()],
    );
    assert!(matches!(saved, Answer::Saved(_)), "{saved:?}\n{}", vmm.log());
    let held = memory(&mut vmm);
    assert_eq!(differing(&content(&all), &held), [0; 0]);
    let again = tempfile::tempfile().unwrap();
    let descriptors = [page_map.as_fd(), again.as_fd(), changed.as_fd(), list.as_fd()];
    let saved = ask(&mut vmm.control, &Request::Save { pages: SavedPages::Changed }, &descriptors);
    let Answer::Saved(phases) = saved else { panic!("{saved:?}\n{}", vmm.log()) };
    assert!(phases.memory_bytes < content(&image.here).len() as u64 / 4, "{phases:?}");
    assert_eq!(differing(&composed(&image.saved.memory, &changed, &list), &held), [0; 0]);
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    check(&vmm, &told, last);
    let clone = Saved { state, memory: all }.restore();
    check(&clone, &told, 0);
}

/// A difference put upon its image.
fn composed(image: &File, changed: &File, list: &File) -> Vec<u8> {
    let (mut composed, held, runs) = (content(image), content(changed), content(list));
    for run in runs.as_chunks::<PAGE_RUN_BYTES>().0 {
        let number = |bytes: &[u8]| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap();
        let (first, count) = (number(&run[..8]), number(&run[8..]));
        let bytes = first * 4096..(first + count) * 4096;
        composed[bytes.clone()].copy_from_slice(&held[bytes]);
    }
    composed
}

#[test]
fn memory_that_was_filled_is_the_image() {
    let image = Image::of(Booted::boot().save());
    let (mut vmm, serving) = filling(&image);
    image.fetch(0, CHUNKS);
    // In an order of its own, and some twice.
    for first in (0..CHUNKS).step_by(7).rev() {
        serving.say(first, 9.min(CHUNKS - first));
    }
    assert_eq!(serving.end(), Some(CHUNKS));
    let (filled, mut whole) = (memory(&mut vmm), image.saved.restore());
    assert_eq!(whole.ask(&Request::Pause), Answer::Done);
    assert_eq!(differing(&filled, &content(&image.saved.memory)), [0; 0]);
    // Nothing of it is the process's own but what the machine wrote as it was built.
    let status = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.spawned.pid)).unwrap();
    assert!(status.contains("Rss"), "{status}");
}

#[test]
fn a_connection_that_breaks_is_replaced_and_the_guest_notices_nothing() {
    let (vmm, told) = loaded();
    let image = Image::of(Booted(vmm).save());
    let (mut vmm, serving) = filling(&image);
    let before = serving.cut();
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    // It waits for what nobody brings, and its VMM is there.
    let mut line = fill(&mut vmm);
    let wanted = line.wanted();
    assert!(!before.contains(&wanted), "{wanted} was served before");
    assert!(matches!(vmm.ask(&Request::Status), Answer::Status(_)));
    // Another one in its place, to which it is said again; nonsense ends that one, too.
    let mut newer = fill(&mut vmm);
    assert!(line.said().is_none_or(|said| matches!(said, ToAgent::Wanted { .. })));
    assert_eq!(newer.said(), Some(ToAgent::Mapped { chunks: u32::try_from(before.len()).unwrap() }));
    newer.wanted();
    newer.0.write_all(&[0x5a; 64]).unwrap();
    while newer.said().is_some() {}
    let mut beyond = fill(&mut vmm);
    beyond.say(CHUNKS - 1, 2);
    while beyond.said().is_some() {}
    let kinds = [(Request::Fill, 0), (Request::Fill, 2)];
    for (request, count) in kinds {
        let some = tempfile::tempfile().unwrap();
        let refused = ask(&mut vmm.control, &request, &[some.as_fd(), some.as_fd()][..count]);
        assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
    }
    // An agent that came after it.
    let mut control = second(&vmm);
    assert!(matches!(ask(&mut control, &Request::Hello { nonce: NONCE, epoch: 2 }, &[]), Answer::Welcome(_)));
    vmm.control = control;
    let serving = Serving::begin(&image, fill(&mut vmm));
    let last = check(&vmm, &told, 0);
    let wanted = serving.wanted();
    assert!(wanted.iter().all(|chunk| !before.contains(chunk)), "{before:?} {wanted:?}");
    // In the middle of its work.
    serving.cut();
    let serving = Serving::begin(&image, fill(&mut vmm));
    check(&vmm, &told, last);
    image.fetch(0, CHUNKS);
    serving.say(0, CHUNKS);
    assert_eq!(serving.end(), Some(CHUNKS));
    check(&vmm, &told, last);
}

/// A machine whose guest waits for a chunk that does not come.
fn waiting(image: &Image) -> (Vmm, Line) {
    let (mut vmm, serving) = filling(image);
    serving.cut();
    let mut line = fill(&mut vmm);
    // Mapping ahead waits for nothing, and asks for nothing.
    let all = PrefaultSpec { read: vec![(0, 1 << 15), (u32::MAX, u32::MAX)], written: vec![(1 << 14, 1)] };
    assert_eq!(vmm.ask(&Request::Prefault(all)), Answer::Done);
    line.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(matches!(line.said(), Some(ToAgent::Mapped { .. })));
    assert_eq!(line.said(), None, "nobody waits yet");
    line.0.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    line.wanted();
    // All that runs of the guest waits by now.
    std::thread::sleep(Duration::from_millis(200));
    (vmm, line)
}

fn ends_at_once(vmm: &Vmm) {
    let begun = Instant::now();
    vmm.wait_for_end();
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
}

#[test]
fn a_guest_that_waits_for_memory_is_ended_at_once() {
    let image = Image::of(Booted::boot().save());
    let (vmm, line) = waiting(&image);
    process::kill(&vmm.spawned.pidfd).unwrap();
    ends_at_once(&vmm);
    drop(line);
    // With nobody at the other end.
    let (vmm, line) = waiting(&image);
    drop(line);
    process::kill(&vmm.spawned.pidfd).unwrap();
    ends_at_once(&vmm);
    let (mut vmm, _line) = waiting(&image);
    assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
    ends_at_once(&vmm);
    assert_eq!(vmm.last_words(), Some(LastWords::Stopped), "{}", vmm.log());
}

#[test]
fn what_cannot_be_filled_is_refused_and_leaves_an_empty_vmm() {
    let image = Image::of(Booted::boot().save());
    let (mut ours, theirs) = Line::new();
    // 32,768 chunks; sizes that are none; a device that is another.
    let mut vmm = image.begin(&theirs, 4096);
    let many = answer(&mut vmm.control);
    assert!(matches!(&many, Answer::Refused(Refusal::BadRequest { reason }) if reason.contains("30000")), "{many:?}");
    for chunk_bytes in [0, 5000, 1 << 31] {
        image.begin_in(&vmm, &theirs, chunk_bytes, "/dev/userfaultfd");
        let refused = answer(&mut vmm.control);
        assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
    }
    image.begin_in(&vmm, &theirs, CHUNK_BYTES, "/dev/null");
    let refused = answer(&mut vmm.control);
    assert!(matches!(refused, Answer::Refused(Refusal::Host { .. })), "{refused:?}");
    let empty = Answer::Refused(Refusal::State { state: MachineState::Empty });
    assert_eq!(ask(&mut vmm.control, &Request::Fill, &[theirs.as_fd()]), empty);
    // The same VMM makes a machine of it all the same.
    image.begin_in(&vmm, &theirs, CHUNK_BYTES, "/dev/userfaultfd");
    drop(theirs);
    assert_eq!(ours.said(), Some(ToAgent::Mapped { chunks: 0 }));
    let serving = Serving::begin(&image, ours);
    let launched = answer(&mut vmm.control);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    assert!(Guest::connect(&vmm).is_some(), "{}", console(&vmm));
    drop(serving);
    // One whose memory was here from the beginning has nothing to be filled.
    let mut whole = image.saved.restore();
    let (_ours, theirs) = Line::new();
    let refused = ask(&mut whole.control, &Request::Fill, &[theirs.as_fd()]);
    assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
}
