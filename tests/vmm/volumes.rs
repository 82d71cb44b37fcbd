//! Volumes of a real guest, with every filter in force: served by this test, attached, grown and detached while the guest
//! runs, and asked again after a restore.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hearth::sys::{fd, file};
use hearth::wire::control::{Answer, AttachVolumeSpec, DeviceSpec, Request, RestoreSpec, SavedPages, VolumeStatus};
use hearth::wire::refusal::Refusal;

use crate::guest::{Guest, MEMORY_BYTES};
use crate::volume_server::{Content, Dialled, FLAGS, wait_for};
use crate::{NONCE, Vmm, ask, command_line, demo};

const BYTES: u64 = 4 << 20;
const CONNECTIONS: usize = 3;

/// A volume's server: it keeps connections to a VMM's socket, and makes them again.
struct Server {
    content: Content,
    ends: Arc<AtomicBool>,
    sockets: Arc<Mutex<BTreeMap<usize, UnixStream>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    fn start(path: PathBuf, content: &Content) -> Self {
        let (ends, sockets) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
        let threads = (0..CONNECTIONS).map(|number| {
            let (path, content, ends) = (path.clone(), Arc::clone(content), Arc::clone(&ends));
            let sockets: Arc<Mutex<BTreeMap<usize, UnixStream>>> = Arc::clone(&sockets);
            std::thread::spawn(move || {
                while !ends.load(Ordering::SeqCst) {
                    let bytes = content.lock().unwrap().len() as u64;
                    if let Ok(mut dialled) = Dialled::exporting(&path, bytes, FLAGS, None) {
                        dialled.0.set_read_timeout(None).unwrap();
                        sockets.lock().unwrap().insert(number, dialled.0.try_clone().unwrap());
                        while let Some(asked) = dialled.asked() {
                            if dialled.carry_out(&asked, &content).is_err() {
                                break;
                            }
                        }
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            })
        });
        let threads = threads.collect();
        Self { content: Arc::clone(content), ends, sockets, threads }
    }

    /// Ends the connections there are, in the middle of whatever they do.
    fn hang_up(&self) {
        self.sockets.lock().unwrap().values().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }

    /// Ends one of them.
    fn hang_up_one(&self, number: usize) {
        let sockets = self.sockets.lock().unwrap();
        sockets.get(&(number % CONNECTIONS)).into_iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }

    fn stop(mut self) -> Content {
        self.ends.store(true, Ordering::SeqCst);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.hang_up();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        Arc::clone(&self.content)
    }
}

fn content(bytes: u64, byte: u8) -> Content {
    Arc::new(Mutex::new(vec![byte; usize::try_from(bytes).unwrap()]))
}

/// Two slots for volumes of these sizes.
fn slots(first: u64, second: u64) -> [DeviceSpec; 2] {
    let slot = |index, bytes| DeviceSpec::Volume { index, bytes, read_only: false, reconnect_ms: 20_000 };
    [slot(0, first), slot(1, second)]
}

/// A socket for each of them.
fn slot_listeners(vmm: &Vmm) -> [UnixListener; 2] {
    ["volume-0.sock", "volume-1.sock"].map(|name| fd::bind_in_dir(&vmm.dir, name).unwrap())
}

fn path(vmm: &Vmm, index: u8) -> PathBuf {
    vmm.directory.path().join(format!("volume-{index}.sock"))
}

fn launch() -> Vmm {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    assert_eq!(vmm.ask(&Request::Volumes), Answer::Volumes(Vec::new()));
    let none = Request::DetachVolume { index: 0, force: true };
    assert!(matches!(vmm.ask(&none), Answer::Refused(Refusal::State { .. })));
    let kernel = File::open(demo().join("vmlinux")).unwrap();
    let [first, second] = slot_listeners(&vmm);
    let [slot, spare] = slots(BYTES, 0);
    let more = [(slot, first.as_fd()), (spare, second.as_fd())];
    let launched = vmm.launch_shaped((2, MEMORY_BYTES), &command_line(), &kernel, &more);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    vmm
}

/// What a program of the guest's says, as soon as the guest answers. Each has a conversation of its own.
pub(crate) fn sh(vmm: &Vmm, script: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut guest = loop {
        if let Some(guest) = Guest::connect(vmm) {
            break guest;
        }
        assert!(Instant::now() < deadline, "no answer; console:\n{}\n{}", crate::console(vmm), vmm.log());
        std::thread::sleep(Duration::from_millis(50));
    };
    String::from_utf8(guest.output(&["sh", "-c", script])).unwrap().trim().to_owned()
}

fn volumes(vmm: &mut Vmm) -> Vec<VolumeStatus> {
    let answer = vmm.ask(&Request::Volumes);
    let Answer::Volumes(volumes) = answer else { panic!("{answer:?}\n{}", vmm.log()) };
    volumes
}

/// A file of 1 MiB that is another for each number. (The generator of random bytes takes its time in a guest of a guest.)
const MAKE: &str = "make() { seq ${1}000000 ${1}149999 > /tmp/q; dd if=/tmp/q of=/tmp/p bs=64k count=16 2>/dev/null; }";

/// Writes the whole disk in pieces, each made durable, and tells the sum of what is read back.
const FILL: &str = "for i in 1 2 3 4; do make $i; \
     dd if=/tmp/p of=/dev/vda bs=256k seek=$((i * 4 - 4)) conv=notrunc,fsync 2>/dev/null || exit 1; done; \
     echo 3 > /proc/sys/vm/drop_caches; md5sum < /dev/vda";

fn md5(content: &Content) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &content.lock().unwrap()).unwrap();
    let sum = std::process::Command::new("md5sum").arg(file.path()).output().unwrap();
    String::from_utf8(sum.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_uses_volumes_whatever_becomes_of_the_connections() {
    let mut vmm = launch();
    let first = Server::start(path(&vmm, 0), &content(BYTES, 0));
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    assert_eq!(sh(&vmm, "cat /sys/block/vda/size /sys/block/vdb/size"), format!("{}\n0", BYTES / 512));
    // Connections end while it writes.
    let sum = std::thread::scope(|scope| {
        let vmm = &vmm;
        let writing = scope.spawn(move || sh(vmm, &format!("{MAKE}; {FILL}")));
        // Not all at once, so that it gets on also where this takes long.
        for number in 0.. {
            if writing.is_finished() {
                break;
            }
            first.hang_up_one(number);
            std::thread::sleep(Duration::from_millis(100));
        }
        writing.join().unwrap()
    });
    assert_eq!(sum.split_whitespace().next(), Some(md5(&first.content).as_str()), "{}", vmm.log());
    let status = volumes(&mut vmm);
    assert_eq!((status[0].bytes, status[0].errors, status[1].bytes), (BYTES, 0, 0), "{status:?}");
    assert!(status[0].reconnects > 0 && status[0].write.bytes >= BYTES && status[0].flush.requests > 0, "{status:?}");

    // Another one comes, grows and goes.
    let spec = AttachVolumeSpec { index: 1, bytes: 1 << 20, read_only: false, reconnect_ms: 20_000 };
    assert_eq!(vmm.ask(&Request::AttachVolume(spec)), Answer::Done);
    for spec in [spec, AttachVolumeSpec { index: 2, ..spec }] {
        assert!(matches!(vmm.ask(&Request::AttachVolume(spec)), Answer::Refused(Refusal::BadRequest { .. })));
    }
    let second = Server::start(path(&vmm, 1), &content(1 << 20, b'x'));
    assert_eq!(sh(&vmm, "cat /sys/block/vdb/size; head -c 5 /dev/vdb"), "2048\nxxxxx");
    second.content.lock().unwrap().resize(2 << 20, b'y');
    assert_eq!(vmm.ask(&Request::ResizeVolume { index: 1, bytes: 2 << 20 }), Answer::Done);
    assert_eq!(sh(&vmm, "cat /sys/block/vdb/size; tail -c 5 /dev/vdb"), "4096\nyyyyy");
    let limits = Request::LimitVolume { index: 1, iops: Some(1000), bytes_per_s: None };
    assert_eq!(vmm.ask(&limits), Answer::Done);
    assert_eq!(vmm.ask(&Request::DetachVolume { index: 1, force: false }), Answer::Done);
    assert_eq!(sh(&vmm, "cat /sys/block/vdb/size"), "0");
    drop(second.stop());
    assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
    vmm.wait_for_end();
    drop(first.stop());
}

#[test]
fn what_a_guest_waits_for_is_asked_again_where_it_is_restored() {
    let mut vmm = launch();
    let server = Server::start(path(&vmm, 0), &content(BYTES, 0));
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    sh(&vmm, &format!("{MAKE}; make 1; md5sum < /tmp/p > /tmp/sum"));
    // From here on nobody answers; the guest writes, and waits.
    let content = server.stop();
    sh(
        &vmm,
        "(dd if=/tmp/p of=/dev/vda bs=1M conv=notrunc 2>/tmp/errors; sync; echo $? > /tmp/done) > /dev/null 2>&1 &",
    );
    wait_for("requests wait", || volumes(&mut vmm)[0].waiting > 0);
    let in_use = vmm.ask(&Request::DetachVolume { index: 0, force: false });
    assert_eq!(in_use, Answer::Refused(Refusal::VolumeInUse { index: 0 }));
    let since = Instant::now();
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    assert!(since.elapsed() < Duration::from_secs(3), "a pause waits for no server");
    let pagemap = File::open(format!("/proc/{}/pagemap", vmm.spawned.pid)).unwrap();
    let (mut state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let descriptors = [pagemap.as_fd(), state.as_fd(), memory.as_fd()];
    let saved = ask(&mut vmm.control, &Request::Save { pages: SavedPages::All }, &descriptors);
    assert!(matches!(saved, Answer::Saved(_)), "{saved:?}\n{}", vmm.log());
    drop(vmm);

    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    std::io::Seek::rewind(&mut state).unwrap();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let console = file::create(&vmm.directory.path().join("console")).unwrap();
    let [console_socket, vsock] = ["console.sock", "vsock.sock"].map(|name| fd::bind_in_dir(&vmm.dir, name).unwrap());
    let [first, second] = slot_listeners(&vmm);
    let descriptors = [
        kvm.as_fd(),
        state.as_fd(),
        memory.as_fd(),
        console.as_fd(),
        console_socket.as_fd(),
        vsock.as_fd(),
        first.as_fd(),
        second.as_fd(),
    ];
    let devices = [DeviceSpec::Vsock, DeviceSpec::Rng].into_iter().chain(slots(BYTES, 0)).collect();
    let spec = RestoreSpec { memory_bytes: MEMORY_BYTES, devices };
    let launched = ask(&mut vmm.control, &Request::Restore(spec), &descriptors);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    let server = Server::start(path(&vmm, 0), &content);
    let script = "while [ ! -e /tmp/done ]; do sleep 0.05; done; cat /tmp/done /tmp/errors >&2; \
         dd if=/dev/vda bs=64k count=16 2>/dev/null | md5sum | cmp - /tmp/sum && cat /tmp/sum";
    let sum = sh(&vmm, script);
    let written = Arc::new(Mutex::new(content.lock().unwrap()[..1 << 20].to_vec()));
    assert_eq!(sum.split_whitespace().next(), Some(md5(&written).as_str()), "{}", vmm.log());
    assert_eq!(volumes(&mut vmm)[0].errors, 0);
    drop(vmm);
    drop(server.stop());
}
