//! The thread alone: memory whose chunks a test serves, over connections that break and say nonsense.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;
use std::time::Duration;

use super::*;
use crate::machine::{GuestRam, PageRun, image, pages};
use crate::sys::fill::fill;
use crate::sys::ram::memfd;
use crate::units::{Bytes, MIB, PAGE_BYTES, PageCount, PageIndex};

const CHUNK: u64 = 64 << 10;
const CHUNKS: u32 = 64;

/// The word at the beginning of a chunk.
fn word(ram: &GuestRam, chunk: u32) -> u32 {
    let first = PageIndex(u64::from(chunk) * CHUNK / PAGE_BYTES);
    let mut page = Vec::new();
    pages::read(ram, PageRun { first, count: PageCount(1) }, &mut page).unwrap();
    u32::from_le_bytes(*page.first_chunk().unwrap())
}

/// The guest writes it.
fn write_word(ram: &GuestRam, chunk: u32, word: u32) {
    let (at, _) = image::in_guest(ram, u64::from(chunk) * CHUNK, 4).next().unwrap();
    fill(ram, at, &word.to_le_bytes()).unwrap();
}

/// Memory that says at the beginning of each chunk which one it is, once that is in the file.
struct Scene {
    directory: tempfile::TempDir,
    file: File,
    ram: GuestRam,
    thread: FillThread,
}

impl Scene {
    fn begin() -> (Self, UnixStream) {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd");
        let device = device.expect("needs root and Linux 6.1");
        let file = memfd(Bytes(4 * MIB)).unwrap();
        let filling = FillingRam::make(file.try_clone().unwrap(), Bytes(4 * MIB), Bytes(CHUNK), &device).unwrap();
        let ram = filling.ram().clone();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("fill.sock")).unwrap();
        let thread = FillThread::start(filling, listener).unwrap();
        let this = Self { directory, file, ram, thread };
        let line = this.connect();
        (this, line)
    }

    /// Another agent.
    fn connect(&self) -> UnixStream {
        let line = UnixStream::connect(self.directory.path().join("fill.sock")).unwrap();
        line.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        line
    }

    /// Writes chunks to the file and says that they are there.
    fn provide(&self, line: &mut UnixStream, first: u32, count: u32) {
        for chunk in first..first + count {
            self.file.write_all_at(&chunk.to_le_bytes(), u64::from(chunk) * CHUNK).unwrap();
        }
        line.write_all(&ToVmm::Present { first, count }.to_bytes()).unwrap();
    }

    /// Somebody who looks at chunks, one after the other.
    fn look(&self, chunks: &'static [u32]) -> JoinHandle<Vec<u32>> {
        let ram = self.ram.clone();
        std::thread::spawn(move || chunks.iter().map(|chunk| word(&ram, *chunk)).collect())
    }
}

fn said(line: &mut UnixStream) -> ToAgent {
    let mut frame = [0; FRAME_BYTES];
    line.read_exact(&mut frame).expect("a frame");
    ToAgent::from_bytes(frame).unwrap()
}

fn is_hung_up(line: &mut UnixStream) -> bool {
    match line.read(&mut [0; FRAME_BYTES]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn what_is_reached_is_asked_for_once_and_filled() {
    let (scene, mut line) = Scene::begin();
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 0 });
    let first = scene.look(&[5, 6]);
    assert_eq!(said(&mut line), ToAgent::Wanted { chunk: 5 });
    // Another one who waits for the same does not ask again.
    let second = scene.look(&[5, 9]);
    // What comes unasked is mapped as well.
    scene.provide(&mut line, 5, 3);
    assert_eq!(first.join().unwrap(), [5, 6]);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 3 });
    assert_eq!(said(&mut line), ToAgent::Wanted { chunk: 9 });
    write_word(&scene.ram, 5, 77);
    scene.provide(&mut line, 0, CHUNKS);
    assert_eq!(second.join().unwrap(), [5, 9]);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: CHUNKS });
    assert!(is_hung_up(&mut line));
    assert_eq!(scene.thread.presence().missing(), 0);
    assert_eq!(scene.look(&[4, 5, 63]).join().unwrap(), [4, 77, 63]);
    // Whoever asks again is told, and no more.
    let mut again = scene.connect();
    assert_eq!(said(&mut again), ToAgent::Mapped { chunks: CHUNKS });
    assert!(is_hung_up(&mut again));
}

#[test]
fn on_another_connection_all_that_is_wanted_is_said_again() {
    let (scene, mut line) = Scene::begin();
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 0 });
    scene.provide(&mut line, 2, 1);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 1 });
    let one = scene.look(&[7]);
    assert_eq!(said(&mut line), ToAgent::Wanted { chunk: 7 });
    drop(line);
    // Nobody is there to be told.
    let other = scene.look(&[3, 4]);
    std::thread::sleep(Duration::from_millis(50));
    let mut line = scene.connect();
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 1 });
    let both = |mut said: [ToAgent; 2]| {
        said.sort_by_key(|said| *said == ToAgent::Wanted { chunk: 7 });
        assert_eq!(said, [3, 7].map(|chunk| ToAgent::Wanted { chunk }));
    };
    both([said(&mut line), said(&mut line)]);
    // One that takes the place of another one, which is there.
    let mut newer = scene.connect();
    assert!(is_hung_up(&mut line));
    assert_eq!(said(&mut newer), ToAgent::Mapped { chunks: 1 });
    both([said(&mut newer), said(&mut newer)]);
    scene.provide(&mut newer, 0, CHUNKS);
    assert_eq!((one.join().unwrap(), other.join().unwrap()), (vec![7], vec![3, 4]));
}

#[test]
fn nonsense_ends_the_connection_and_changes_nothing() {
    let (scene, mut line) = Scene::begin();
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 0 });
    scene.provide(&mut line, 1, 1);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 1 });
    write_word(&scene.ram, 1, 50);
    let waits = scene.look(&[8]);
    assert_eq!(said(&mut line), ToAgent::Wanted { chunk: 8 });
    for nonsense in [
        [0xff; FRAME_BYTES],
        [0; FRAME_BYTES],
        ToAgent::Wanted { chunk: 8 }.to_bytes(),
        ToVmm::Present { first: CHUNKS, count: 1 }.to_bytes(),
        ToVmm::Present { first: 8, count: u32::MAX }.to_bytes(),
        ToVmm::Present { first: 8, count: 0 }.to_bytes(),
    ] {
        line.write_all(&nonsense).unwrap();
        assert!(is_hung_up(&mut line), "{nonsense:?}");
        line = scene.connect();
        assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 1 });
        assert_eq!(said(&mut line), ToAgent::Wanted { chunk: 8 });
    }
    assert!(!waits.is_finished());
    // A frame in pieces is a frame.
    scene.file.write_all_at(&8_u32.to_le_bytes(), 8 * CHUNK).unwrap();
    let frame = ToVmm::Present { first: 0, count: 9 }.to_bytes();
    for byte in frame {
        line.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(waits.join().unwrap(), [8]);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 9 });
    assert_eq!(scene.look(&[1]).join().unwrap(), [50]);
    scene.provide(&mut line, 0, CHUNKS);
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: CHUNKS });
}

#[test]
fn a_thread_without_a_machine_ends() {
    let (scene, mut line) = Scene::begin();
    assert_eq!(said(&mut line), ToAgent::Mapped { chunks: 0 });
    let Scene { ram, thread, .. } = scene;
    drop(ram);
    drop(thread);
    assert!(is_hung_up(&mut line));
}

/// A connection whose other end takes nothing holds nobody: what is to be said waits, and what is heard is done.
#[test]
fn an_agent_that_does_not_read_is_heard_all_the_same() {
    let (scene, mut line) = Scene::begin();
    // More frames than a socket's buffer takes: each run is answered.
    for round in 0..20_000_u32 {
        line.write_all(&ToVmm::Present { first: round % 32, count: 1 }.to_bytes()).unwrap();
    }
    scene.provide(&mut line, 32, 32);
    for _ in 0..10_000 {
        if scene.thread.presence().missing() == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(scene.thread.presence().missing(), 0);
}
