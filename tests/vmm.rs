//! VMM processes without an agent: started as an agent starts them, spoken to over their sockets. Needs root, /dev/kvm
//! and `HEARTH_IMAGES` with the demo image; runs `HEARTH_BINARY`, or what was built for the tests.

#![expect(clippy::disallowed_methods, reason = "it looks from outside, by the host's own clock and files")]

#[path = "vmm/copied.rs"]
mod copied;
#[path = "vmm/disks.rs"]
mod disks;
#[path = "vmm/filled.rs"]
mod filled;
#[path = "vmm/guest.rs"]
mod guest;
#[path = "vmm/moved.rs"]
mod moved;
#[path = "vmm/restored.rs"]
mod restored;
#[path = "vmm/throughput.rs"]
mod throughput;
#[path = "virtio/volume_server.rs"]
mod volume_server;
#[path = "vmm/volumes.rs"]
mod volumes;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hearth::ids::VmId;
use hearth::sys::process::{self, SpawnNetwork, SpawnVmm, Spawned};
use hearth::sys::{fd, file, netns, tap};
use hearth::units::NetLimits;
use hearth::wire::control::{Answer, DeviceSpec, InterfaceStatus, LaunchSpec, Nonce, Request, StartMessage};
use hearth::wire::frame::{self, HEADER_BYTES};
use hearth::wire::last_words::LastWords;
use hearth::wire::refusal::Refusal;

const NONCE: Nonce = Nonce([9; 16]);
const UID: u32 = 150_000;

/// More than glibc makes arenas for without counting processors: 8.
const VCPUS: u8 = 12;

struct Vmm {
    directory: tempfile::TempDir,
    dir: File,
    spawned: Spawned,
    control: UnixStream,
}

impl Vmm {
    fn start() -> Self {
        Self::start_with_log(None)
    }

    /// With a log of its own, or another one.
    fn start_with_log(log: Option<File>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let dir = File::open(directory.path()).unwrap();
        let listener = OwnedFd::from(fd::bind_in_dir(&dir, "control.sock").unwrap());
        let last_words = file::create(&directory.path().join("last-words")).unwrap();
        let own = file::create(&directory.path().join("vmm.log")).unwrap();
        let log = log.unwrap_or(own);
        let exe = File::open(program()).unwrap();
        let start = StartMessage { vm_id: VmId::from_random([1; 10]), nonce: NONCE, uid: UID, file_bytes_max: 1 << 40 };
        let spawned = process::spawn_vmm(&SpawnVmm {
            exe: exe.as_fd(),
            arguments: &["vmm", start.vm_id.as_str()],
            start_message: &start.to_bytes(),
            control: listener.as_fd(),
            last_words: last_words.as_fd(),
            log: log.as_fd(),
            network: SpawnNetwork::New,
            group: None,
        })
        .expect("start a VMM");
        let control = fd::connect_in_dir(&dir, "control.sock").unwrap();
        Self { directory, dir, spawned, control }
    }

    fn ask(&mut self, request: &Request) -> Answer {
        ask(&mut self.control, request, &[])
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("vmm.log")).unwrap()
    }

    fn last_words(&self) -> Option<LastWords> {
        LastWords::parse(&std::fs::read(self.directory.path().join("last-words")).unwrap())
    }

    fn launch(&mut self, command_line: &str, kernel: &File) -> Answer {
        self.launch_with(command_line, kernel, None)
    }

    /// With an interface on `tap` as well.
    fn launch_with(&mut self, command_line: &str, kernel: &File, tap: Option<&File>) -> Answer {
        let limits = NetLimits::default();
        let interface = |tap| (DeviceSpec::Net { index: 3, mac: [2, 0, 0, 0, 0, 1], mtu: Some(1400), limits }, tap);
        let more: Vec<_> = tap.into_iter().map(|tap| interface(tap.as_fd())).collect();
        self.launch_shaped((1, 128 << 20), command_line, kernel, &more)
    }

    /// With this many vCPUs and bytes of memory, and more devices than every machine has.
    fn launch_shaped(
        &mut self,
        (vcpus, memory_bytes): (u8, u64),
        command_line: &str,
        kernel: &File,
        more: &[(DeviceSpec, BorrowedFd<'_>)],
    ) -> Answer {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let initrd = File::open(demo().join("initrd.cpio")).unwrap();
        let console = file::create(&self.directory.path().join("console")).unwrap();
        let console_listener = fd::bind_in_dir(&self.dir, "console.sock").unwrap();
        let vsock = fd::bind_in_dir(&self.dir, "vsock.sock").unwrap();
        let mut spec = LaunchSpec {
            vcpus,
            memory_bytes,
            command_line: command_line.to_owned(),
            initrd: true,
            devices: vec![DeviceSpec::Vsock, DeviceSpec::Rng],
        };
        let mut descriptors =
            vec![kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), console.as_fd(), console_listener.as_fd(), vsock.as_fd()];
        for (device, descriptor) in more {
            spec.devices.push(*device);
            descriptors.push(*descriptor);
        }
        ask(&mut self.control, &Request::Launch(spec), &descriptors)
    }

    fn wait_for_end(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !process::has_ended(&self.spawned.pidfd).unwrap() {
            assert!(Instant::now() < deadline, "the VMM goes on; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = process::kill(&self.spawned.pidfd);
        self.wait_for_end();
        let _ = process::reap(&self.spawned.pidfd);
    }
}

fn demo() -> PathBuf {
    let images = std::env::var_os("HEARTH_IMAGES").expect("HEARTH_IMAGES is not set: run this by scripts/test kvm");
    PathBuf::from(images).join("demo")
}

/// The program as it ships, if there is one: its allocator and its system calls are what its filters have to fit.
fn program() -> PathBuf {
    std::env::var_os("HEARTH_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_hearth").into(), PathBuf::from)
}

fn ask(control: &mut UnixStream, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Answer {
    begin(control, request, descriptors);
    answer(control)
}

/// Asks, and does not wait.
fn begin(control: &UnixStream, request: &Request, descriptors: &[BorrowedFd<'_>]) {
    fd::send_with_fds(control, &frame::encode(request).unwrap(), descriptors).unwrap();
}

fn answer(control: &mut UnixStream) -> Answer {
    let mut header = [0; HEADER_BYTES];
    control.read_exact(&mut header).expect("an answer");
    let mut body = vec![0; frame::body_length::<Answer>(header).unwrap()];
    control.read_exact(&mut body).unwrap();
    frame::decode(&body).unwrap()
}

fn command_line() -> String {
    let probe = std::process::Command::new(program()).args(["vmm", "--probe"]).output().unwrap();
    let facts: serde_json::Value = serde_json::from_slice(&probe.stdout).expect("facts");
    assert_eq!(facts["usable"], true, "{facts:#}");
    let image: serde_json::Value = serde_json::from_slice(&std::fs::read(demo().join("image.json")).unwrap()).unwrap();
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    format!("console=ttyS0 {} {}", word(&facts["command_line_additions"]), word(&image["command_line"]))
}

#[test]
fn only_the_right_agent_is_served_and_stop_ends_it() {
    let mut vmm = Vmm::start();
    assert_eq!(vmm.ask(&Request::Status), Answer::Refused(Refusal::HelloFirst));
    let mut vmm_again = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    let wrong = Request::Hello { nonce: Nonce([0; 16]), epoch: 1 };
    assert_eq!(ask(&mut vmm_again, &wrong, &[]), Answer::Refused(Refusal::WrongNonce));

    vmm.control = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    assert!(matches!(vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 }), Answer::Welcome(_)));
    let mut older = std::mem::replace(&mut vmm.control, fd::connect_in_dir(&vmm.dir, "control.sock").unwrap());
    assert!(matches!(vmm.ask(&Request::Hello { nonce: NONCE, epoch: 2 }), Answer::Welcome(_)));
    let mut byte = [0];
    assert_eq!(older.read(&mut byte).unwrap_or(0), 0, "the older agent is hung up on");

    // An agent that asks two things at once has two connections.
    let mut second = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    assert!(matches!(ask(&mut second, &Request::Hello { nonce: NONCE, epoch: 2 }, &[]), Answer::Welcome(_)));
    assert!(matches!(vmm.ask(&Request::Status), Answer::Status(_)));
    assert_eq!(ask(&mut second, &Request::Network, &[]), Answer::Network(Vec::new()));
    drop(second);

    // An agent of the version before is served, and answered in its version.
    let mut before = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    for request in [Request::Hello { nonce: NONCE, epoch: 2 }, Request::Status, Request::Network] {
        let bytes = frame::encode_in(frame::VERSION - 1, &request).unwrap();
        fd::send_with_fds(&before, &bytes, &[]).unwrap();
        let mut header = [0; HEADER_BYTES];
        before.read_exact(&mut header).unwrap();
        assert_eq!(frame::version_of(header), frame::VERSION - 1, "{request:?}");
        let mut body = vec![0; frame::body_length::<Answer>(header).unwrap()];
        before.read_exact(&mut body).unwrap();
        assert!(!matches!(frame::decode(&body).unwrap(), Answer::Refused(_)), "{request:?}");
    }
    drop(before);

    // Garbage ends a connection, not the VMM.
    let mut stranger = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    stranger.write_all(&[0xff; 64]).unwrap();
    assert_eq!(stranger.read(&mut byte).unwrap_or(0), 0);
    assert!(matches!(vmm.ask(&Request::Status), Answer::Status(_)));
    assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
    vmm.wait_for_end();
    assert_eq!(vmm.last_words(), Some(LastWords::Stopped), "{}", vmm.log());
    assert!(process::reap(&vmm.spawned.pidfd).unwrap().unwrap().success());
}

#[test]
fn a_kernel_that_is_none_is_refused_and_a_real_one_boots() {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let mut garbage = tempfile::tempfile().unwrap();
    garbage.write_all(&[0x5a; 8192]).unwrap();
    let refused = vmm.launch("console=ttyS0", &garbage);
    assert!(
        matches!(&refused, Answer::Refused(Refusal::BadImage { reason }) if reason.contains("kernel")),
        "{refused:?}"
    );

    let kernel = File::open(demo().join("vmlinux")).unwrap();
    let launched = vmm.launch(&command_line(), &kernel);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    let again =
        LaunchSpec { vcpus: 1, memory_bytes: 1 << 20, command_line: String::new(), initrd: false, devices: vec![] };
    assert!(matches!(vmm.ask(&Request::Launch(again)), Answer::Refused(Refusal::State { .. })));
    let started = Instant::now();
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    let deadline = started + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "the guest does not answer; its console:\n{}", console(&vmm));
        assert!(
            !process::has_ended(&vmm.spawned.pidfd).unwrap(),
            "{:?}\n{}\n{}",
            vmm.last_words(),
            vmm.log(),
            console(&vmm)
        );
        let mut guest = fd::connect_in_dir(&vmm.dir, "vsock.sock").unwrap();
        guest.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        guest.write_all(format!("CONNECT {}\n", hearth_guest_wire::PORT).as_bytes()).unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") && guest.read(&mut byte).is_ok_and(|count| count == 1) {
            line.extend(byte);
        }
        if line.starts_with(b"OK") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the guest answered {:.1} s after its first resume", started.elapsed().as_secs_f64());
}

/// A tap in a network namespace that nobody else is in; it goes away with the file.
/// With an arena of its own for each thread, the allocator opens files: at the ninth, and when a thread frees a large
/// block. A thread of a VMM would be ended for it.
#[test]
fn many_threads_share_one_arena() {
    let mut vmm = Vmm::start();
    assert!(matches!(vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 }), Answer::Welcome(_)));
    let kernel = File::open(demo().join("vmlinux")).unwrap();
    let launched = vmm.launch_shaped((VCPUS, 128 << 20), &command_line(), &kernel, &[]);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}; its log:\n{}", vmm.log());
    let pid = vmm.spawned.pid;
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    assert_eq!(threads, 3 + usize::from(VCPUS), "the first, devices, vCPUs, the one that could send it elsewhere");
    // An arena reserves 64 MiB (HEAP_MAX_SIZE in glibc's malloc/arena.c) that nobody may touch yet.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let reserved = |line: &&str| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-')).unwrap();
        let [from, to] = [range.0, range.1].map(|number| u64::from_str_radix(number, 16).unwrap());
        line.contains(" ---p ") && to - from > 32 << 20
    };
    assert_eq!(maps.lines().filter(reserved).count(), 0, "{maps}");
    assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
    vmm.wait_for_end();
    assert_eq!(vmm.last_words(), Some(LastWords::Stopped));
}

fn tap() -> File {
    netns::in_new(|| tap::open("tap3")).unwrap().unwrap()
}

#[test]
fn an_interface_gets_another_tap() {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let replace = |vmm: &mut Vmm, index, descriptors: &[BorrowedFd<'_>]| {
        ask(&mut vmm.control, &Request::ReplaceTap { index }, descriptors)
    };
    let first = tap();
    let refused = replace(&mut vmm, 3, &[first.as_fd()]);
    assert!(matches!(refused, Answer::Refused(Refusal::State { .. })), "{refused:?}");
    let kernel = File::open(demo().join("vmlinux")).unwrap();
    let launched = vmm.launch_with("console=ttyS0", &kernel, Some(&first));
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    let interface = InterfaceStatus { index: 3, link_up: true, ..InterfaceStatus::default() };
    assert_eq!(vmm.ask(&Request::Network), Answer::Network(vec![interface]));
    let (second, file) = (tap(), tempfile::tempfile().unwrap());
    for (index, descriptors) in
        [(3, vec![]), (3, vec![second.as_fd(), second.as_fd()]), (0, vec![second.as_fd()]), (200, vec![second.as_fd()])]
    {
        let refused = replace(&mut vmm, index, &descriptors);
        assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
    }
    let refused = replace(&mut vmm, 3, &[file.as_fd()]);
    assert!(matches!(refused, Answer::Refused(Refusal::Host { .. })), "{refused:?}");
    assert_eq!(replace(&mut vmm, 3, &[second.as_fd()]), Answer::Done);
    assert_eq!(vmm.ask(&Request::Network), Answer::Network(vec![interface]));
}

fn console(vmm: &Vmm) -> String {
    let bytes = std::fs::read(vmm.directory.path().join("console")).unwrap_or_default();
    String::from_utf8_lossy(&hearth::wire::console_ring::history(&bytes).unwrap_or_default()).into_owned()
}

/// A line that does not fit on a full disk is lost, and nothing else is.
#[test]
fn a_log_that_cannot_be_written_ends_nobody() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut vmm = Vmm::start_with_log(Some(full));
    for bytes in [&[0_u8; HEADER_BYTES][..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stranger = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
        stranger.write_all(bytes).unwrap();
        // It is hung up on, which the VMM has something to say of before.
        assert_eq!(stranger.read(&mut [0]).unwrap_or(0), 0);
        drop(stranger);
    }
    assert!(matches!(vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 }), Answer::Welcome(_)));
    assert_eq!(vmm.last_words(), None);
}
