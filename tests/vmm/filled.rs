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
const CHUNKS: u32 = 512;

const USERFAULTFD: &str = "/dev/userfaultfd";

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

    /// Asks a VMM to make a machine of it; the answer comes when chunks are served.
    fn begin(&self, vmm: &Vmm, chunk_bytes: u32, device: &str) {
        let open = |path| File::options().read(true).write(true).open(path).unwrap();
        let (kvm, userfaultfd) = (open("/dev/kvm"), open(device));
        let console = file::create(&vmm.directory.path().join("console")).unwrap();
        let console_listener = fd::bind_in_dir(&vmm.dir, "console.sock").unwrap();
        let vsock = fd::bind_in_dir(&vmm.dir, "vsock.sock").unwrap();
        let listener = fd::bind_in_dir(&vmm.dir, "fill.sock").unwrap();
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
            listener.as_fd(),
        ];
        let restore = RestoreSpec { memory_bytes: MEMORY_BYTES, devices: vec![DeviceSpec::Vsock, DeviceSpec::Rng] };
        begin(&vmm.control, &Request::RestoreFilling(RestoreFillingSpec { restore, chunk_bytes }), &descriptors);
    }
}

/// The agent's end of a filling connection.
struct Line(UnixStream);

impl Line {
    fn connect(vmm: &Vmm) -> Self {
        let line = fd::connect_in_dir(&vmm.dir, "fill.sock").unwrap();
        line.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(line)
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
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    image.begin(&vmm, CHUNK_BYTES, USERFAULTFD);
    let serving = Serving::begin(image, Line::connect(&vmm));
    let launched = answer(&mut vmm.control);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    (vmm, serving)
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
    let mut line = Line::connect(&vmm);
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
    let filled = memory(&mut vmm);
    // It is one mapping of the file again, and nothing of it is the process's own but what its devices wrote as they were
    // made.
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vmm.spawned.pid)).unwrap();
    let Answer::Status(status) = vmm.ask(&Request::Status) else { panic!("no status") };
    let start = status.guest_memory_host_address;
    let whole = format!("{:x}-{:x} rw-p ", start, start + MEMORY_BYTES);
    assert!(maps.contains(&whole), "{whole}\n{maps}");
    let [state, changed, list] = [(); 3].map(|()| tempfile::tempfile().unwrap());
    let page_map = pagemap(&vmm);
    let descriptors = [page_map.as_fd(), state.as_fd(), changed.as_fd(), list.as_fd()];
    let saved = ask(&mut vmm.control, &Request::Save { pages: SavedPages::Changed }, &descriptors);
    assert!(matches!(&saved, Answer::Saved(phases) if phases.memory_bytes <= 8 * 4096), "{saved:?}");
    assert_eq!(differing(&composed(&image.saved.memory, &changed, &list), &filled), [0; 0]);
    assert!(differing(&content(&image.saved.memory), &filled).len() <= 8);
}

#[test]
fn a_connection_that_breaks_is_replaced_and_the_guest_notices_nothing() {
    let (vmm, told) = loaded();
    let image = Image::of(Booted(vmm).save());
    let (mut vmm, serving) = filling(&image);
    let before = serving.cut();
    // It waits for what nobody brings, and so does the answer: for a device that looks at its queues.
    begin(&vmm.control, &Request::Resume, &[]);
    let mut line = Line::connect(&vmm);
    let wanted = line.wanted();
    assert!(!before.contains(&wanted), "{wanted} was served before");
    // Another one in its place, to which it is said again; nonsense ends that one, too.
    let mut newer = Line::connect(&vmm);
    while line.said().is_some() {}
    assert_eq!(newer.said(), Some(ToAgent::Mapped { chunks: u32::try_from(before.len()).unwrap() }));
    newer.wanted();
    newer.0.write_all(&[0x5a; 64]).unwrap();
    while newer.said().is_some() {}
    let mut beyond = Line::connect(&vmm);
    beyond.say(CHUNKS - 1, 2);
    while beyond.said().is_some() {}
    // One that serves.
    let serving = Serving::begin(&image, Line::connect(&vmm));
    assert_eq!(answer(&mut vmm.control), Answer::Done);
    let last = check(&vmm, &told, 0);
    let wanted = serving.wanted();
    assert!(wanted.iter().all(|chunk| !before.contains(chunk)), "{before:?} {wanted:?}");
    // In the middle of its work; and an agent that comes after it.
    serving.cut();
    let serving = Serving::begin(&image, Line::connect(&vmm));
    let mut control = second(&vmm);
    assert!(matches!(ask(&mut control, &Request::Hello { nonce: NONCE, epoch: 2 }, &[]), Answer::Welcome(_)));
    vmm.control = control;
    check(&vmm, &told, last);
    image.fetch(0, CHUNKS);
    serving.say(0, CHUNKS);
    assert_eq!(serving.end(), Some(CHUNKS));
    check(&vmm, &told, last);
}

/// A machine whose memory is not here, and an agent that serves nothing any more. Nobody waits yet.
fn abandoned(image: &Image) -> (Vmm, Line) {
    let (mut vmm, serving) = filling(image);
    serving.cut();
    let mut line = Line::connect(&vmm);
    // Mapping ahead waits for nothing, and asks for nothing.
    let all = PrefaultSpec { read: vec![(0, 1 << 15), (u32::MAX, u32::MAX)], written: vec![(1 << 14, 1)] };
    assert_eq!(vmm.ask(&Request::Prefault(all)), Answer::Done);
    line.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(matches!(line.said(), Some(ToAgent::Mapped { .. })));
    assert_eq!(line.said(), None, "nobody waits yet");
    line.0.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    (vmm, line)
}

/// A moment later all that runs of the guest waits.
fn waits(line: &mut Line) {
    line.wanted();
    std::thread::sleep(Duration::from_millis(300));
}

fn ends_at_once(vmm: &Vmm) {
    let begun = Instant::now();
    vmm.wait_for_end();
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
}

#[test]
fn a_guest_that_waits_for_memory_is_ended_at_once() {
    let image = Image::of(Booted::boot().save());
    for is_there in [true, false] {
        let (vmm, mut line) = abandoned(&image);
        begin(&vmm.control, &Request::Resume, &[]);
        waits(&mut line);
        let line = Some(line).filter(|_| is_there);
        process::kill(&vmm.spawned.pidfd).unwrap();
        ends_at_once(&vmm);
        drop(line);
    }
    // A vCPU waits, and the first thread is there to be asked.
    for is_asked in [false, true] {
        let (mut vmm, serving) = filling(&image);
        assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
        serving.cut();
        let mut line = Line::connect(&vmm);
        let mut guest = fd::connect_in_dir(&vmm.dir, "vsock.sock").unwrap();
        guest.write_all(format!("CONNECT {}\n", hearth_guest_wire::PORT).as_bytes()).unwrap();
        waits(&mut line);
        if is_asked {
            assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
        } else {
            process::kill(&vmm.spawned.pidfd).unwrap();
        }
        ends_at_once(&vmm);
        assert_eq!(vmm.last_words(), is_asked.then_some(LastWords::Stopped), "{}", vmm.log());
    }
}

#[test]
fn what_cannot_be_filled_is_refused_and_leaves_an_empty_vmm() {
    let image = Image::of(Booted::boot().save());
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let mut refused = |chunk_bytes, device| {
        image.begin(&vmm, chunk_bytes, device);
        let refused = answer(&mut vmm.control);
        let Answer::Refused(refusal) = refused else { panic!("{refused:?}") };
        refusal
    };
    // 32,768 chunks; sizes that are none; a device that is another.
    let many = refused(4096, USERFAULTFD);
    assert!(matches!(&many, Refusal::BadRequest { reason } if reason.contains("30000")), "{many:?}");
    for chunk_bytes in [0, 5000, 1 << 31] {
        assert!(matches!(refused(chunk_bytes, USERFAULTFD), Refusal::BadRequest { .. }));
    }
    assert!(matches!(refused(CHUNK_BYTES, "/dev/null"), Refusal::Host { .. }));
    assert!(matches!(vmm.ask(&Request::Status), Answer::Status(status) if status.state == MachineState::Empty));
    // A state that is none, after the thread was there: the thread ends.
    let whole = image.saved.state.metadata().unwrap().len();
    let state = content(&image.saved.state);
    image.saved.state.set_len(whole / 2).unwrap();
    image.begin(&vmm, CHUNK_BYTES, USERFAULTFD);
    let line = fd::connect_in_dir(&vmm.dir, "fill.sock");
    let refused = answer(&mut vmm.control);
    assert!(matches!(refused, Answer::Refused(Refusal::BadState { .. })), "{refused:?}");
    // Hung up on, if it came early enough to be taken.
    let _ = line.map(|mut line| line.read_to_end(&mut Vec::new()));
    image.saved.state.write_all_at(&state, 0).unwrap();
    // The same VMM makes a machine of it all the same.
    image.begin(&vmm, CHUNK_BYTES, USERFAULTFD);
    let mut line = Line::connect(&vmm);
    assert_eq!(line.said(), Some(ToAgent::Mapped { chunks: 0 }));
    let _serving = Serving::begin(&image, line);
    let launched = answer(&mut vmm.control);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    assert!(Guest::connect(&vmm).is_some(), "{}", console(&vmm));
}
