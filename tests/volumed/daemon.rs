//! A daemon in directories of its own, and an agent's end of its control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hearth::ids::{LeaseId, VolumeId};
use hearth::lease::{Lease, LeaseMode, LeaseSecret};
use hearth::wire::volumed::{
    Answer, Ask, Attachment, Hello, Origin, Refusal, StartMessage, VERSION, VolumeReport, Welcome, body_bytes, decode,
    encode,
};

/// How long anything may take that should be there at once.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A volume daemon. It ends with the test.
pub(crate) struct Daemon {
    pub(crate) dir: tempfile::TempDir,
    child: Child,
    start: StartMessage,
}

impl Daemon {
    pub(crate) fn new() -> Self {
        Self::with_quota(None)
    }

    pub(crate) fn with_quota(quota_bytes: Option<u64>) -> Self {
        Self::with(|start| start.quota_bytes = quota_bytes)
    }

    pub(crate) fn with(change: impl FnOnce(&mut StartMessage)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut start = start_message(dir.path());
        change(&mut start);
        let child = spawn(dir.path(), &start);
        let daemon = Self { dir, child, start };
        daemon.wait_until_there();
        daemon
    }

    fn wait_until_there(&self) {
        eventually("the daemon answers", || UnixStream::connect(self.path("run/control.sock")).is_ok());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.path("run/nbd.sock")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// The URI of an export, as real clients take it.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd_socket().display())
    }

    /// Kills it as the kernel does when memory is short.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill");
        let status = self.child.wait().expect("wait");
        assert_eq!(status.signal(), Some(9), "{}", self.log());
    }

    /// Starts another one in the same directories.
    pub(crate) fn start_again(&mut self) {
        self.child = spawn(self.dir.path(), &self.start);
        self.wait_until_there();
    }

    /// Asks it to end and waits for it.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        self.child.wait().expect("wait")
    }

    /// Lets whatever waits for a lock or a full queue come to it.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("look").is_none()
    }

    pub(crate) fn control(&self) -> Control {
        Control::connect(&self.path("run/control.sock"))
    }

    pub(crate) fn ask(&self, ask: Ask) -> Answer {
        self.control().ask(ask).expect("an answer")
    }

    /// A new empty volume.
    pub(crate) fn volume(&self, bytes: u64) -> VolumeId {
        let id = VolumeId::from_random(random());
        let ask = Ask::Create { id: id.clone(), name: None, bytes: Some(bytes), origin: Origin::Empty, now_ms: 1 };
        assert!(matches!(self.ask(ask), Answer::Volume { .. }));
        id
    }

    pub(crate) fn show(&self, id: &VolumeId) -> VolumeReport {
        match self.ask(Ask::Show { id: id.clone() }) {
            Answer::Volume { volume } => *volume,
            other => panic!("{other:?}"),
        }
    }

    /// A new lease.
    pub(crate) fn lease(&self, volume: &VolumeId, mode: LeaseMode) -> Lease {
        match self.ask(acquire(volume, mode)) {
            Answer::Lease { lease } => lease,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn convert(&self, volume: &VolumeId, from: &Lease, to: &Lease) -> Result<Lease, Refusal> {
        let ask = Ask::Convert { volume: volume.clone(), from: from.id.clone(), to: to.id.clone(), epoch: from.epoch };
        match self.control().ask(ask).expect("an answer") {
            Answer::Lease { lease } => Ok(lease),
            Answer::Refused { refusal } => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// A volume with an active lease, and the export that writes it.
    pub(crate) fn writable(&self, bytes: u64) -> (VolumeId, Lease, String) {
        let volume = self.volume(bytes);
        let lease = self.lease(&volume, LeaseMode::Active);
        let export = export_of(&volume, &lease);
        (volume, lease, export)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
    }
}

pub(crate) fn export_of(volume: &VolumeId, lease: &Lease) -> String {
    format!("{volume}:{}:{}", lease.id, lease.epoch)
}

pub(crate) fn acquire(volume: &VolumeId, mode: LeaseMode) -> Ask {
    Ask::Acquire {
        volume: volume.clone(),
        id: LeaseId::from_random(random()),
        mode,
        holder: "test".to_owned(),
        vm: None,
        host: None,
        ttl_s: None,
        secret: LeaseSecret::from_random(random()),
        break_others: false,
    }
}

pub(crate) fn attachment(socket: &Path, volume: &VolumeId, lease: &Lease) -> Attachment {
    Attachment {
        socket: socket.to_owned(),
        volume: volume.clone(),
        lease: lease.id.clone(),
        epoch: lease.epoch,
        read_only: false,
        lines: 2,
        upstream: None,
    }
}

/// Random bytes.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    hearth::sys::entropy::fill(&mut bytes).expect("random bytes");
    bytes
}

/// Waits until something is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < SOON, "{what}: not after {} s", SOON.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The start message of a daemon below a directory.
pub(crate) fn start_message(dir: &Path) -> StartMessage {
    StartMessage {
        store: dir.join("store"),
        runtime: dir.join("run"),
        quota_bytes: None,
        reserve_bytes: 0,
        record: None,
    }
}

pub(crate) fn spawn_with(start: &StartMessage, log: Stdio) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_hearth"))
        .arg("volumed")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("start hearth volumed");
    let mut stdin = child.stdin.take().expect("standard input");
    stdin.write_all(&serde_json::to_vec(start).expect("a start message")).expect("write the start message");
    child
}

fn spawn(dir: &Path, start: &StartMessage) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("a log");
    spawn_with(start, log.into())
}

/// An agent's connection.
pub(crate) struct Control {
    socket: UnixStream,
}

impl Control {
    fn connect(path: &Path) -> Self {
        let mut control = Self { socket: UnixStream::connect(path).expect("control.sock") };
        control.send(&Hello { version: VERSION });
        let welcome: Welcome = control.receive().expect("a welcome");
        assert_eq!(welcome.version, VERSION);
        control
    }

    pub(crate) fn send<M: serde::Serialize>(&mut self, message: &M) {
        self.socket.write_all(&encode(message).expect("a frame")).expect("send");
    }

    pub(crate) fn receive<M: for<'de> serde::Deserialize<'de>>(&mut self) -> std::io::Result<M> {
        let mut head = [0; 4];
        self.socket.read_exact(&mut head)?;
        let mut body = vec![0; body_bytes(head).expect("a length")];
        self.socket.read_exact(&mut body)?;
        Ok(decode(&body).expect("a message"))
    }

    /// Asks, and waits for the answer behind all progress.
    pub(crate) fn ask(&mut self, ask: Ask) -> std::io::Result<Answer> {
        self.send(&ask);
        loop {
            match self.receive()? {
                Answer::Progress { done, total } => assert!(done <= total),
                answer => return Ok(answer),
            }
        }
    }
}
