//! A running agent, the host's end of its connections, and ways to wait for what they do.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hearth_guest_wire::frame::{self, Decoder};
use hearth_guest_wire::{Exec, Exit, FromGuest, Identity, STREAM_CHUNK_BYTES, ToGuest, VERSION};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::Timespec;

/// Longest wait for one answer: far more than any test needs on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent.
pub(crate) struct Agent {
    pub(crate) process: Child,
    socket: PathBuf,
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_by(&[env!("CARGO_BIN_EXE_init")], &[])
    }

    /// Starts the agent by this command, with more arguments after the address.
    pub(crate) fn start_by(command: &[&str], arguments: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("agent-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let socket = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_file(&socket);
        let process = Command::new(command[0])
            .args(&command[1..])
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            .env("INHERITED", "yes")
            .spawn()
            .expect("the agent starts");
        let agent = Self { process, socket };
        wait_until("the agent listens", || UnixStream::connect(&agent.socket).is_ok());
        agent
    }

    /// Starts the agent with a guest to itself, as far as this host is concerned: a network, names, `/etc` and `/run`
    /// of its own. `None` without the right to make namespaces.
    pub(crate) fn start_guest() -> Option<Self> {
        Self::start_guest_by(&["--net", "--uts", "--mount"], "")
    }

    /// As [`Agent::start_guest`], with these namespaces of its own and, done before it starts, this.
    pub(crate) fn start_guest_by(namespaces: &[&str], preparation: &str) -> Option<Self> {
        let user = Command::new("id").arg("-u").output().expect("id runs");
        if user.stdout != b"0\n" {
            eprintln!("skipped: namespaces are made by root only");
            return None;
        }
        let mounts = "mount -t tmpfs tmpfs /etc && mount -t tmpfs tmpfs /run && ";
        let script = format!("{mounts}{preparation} exec \"$0\" \"$@\"");
        let command = ["unshare"].iter().chain(namespaces).copied();
        let command: Vec<&str> = command.chain(["sh", "-c", &script, env!("CARGO_BIN_EXE_init")]).collect();
        Some(Self::start_by(&command, &["--guest"]))
    }

    pub(crate) fn connect(&self) -> Host {
        let stream = UnixStream::connect(&self.socket).expect("the agent takes connections");
        stream.set_read_timeout(Some(PATIENCE)).expect("time-outs can be set");
        stream.set_write_timeout(Some(PATIENCE)).expect("time-outs can be set");
        Host { stream, decoder: Decoder::new() }
    }

    /// A connection past its greeting.
    pub(crate) fn greeted(&self) -> Host {
        let mut host = self.connect();
        host.say(&ToGuest::Hello { version: VERSION });
        let answer = host.hear();
        assert!(matches!(answer, FromGuest::Hello { version: VERSION, .. }), "{answer:?}");
        host
    }

    /// A connection with a running program, and its process id.
    pub(crate) fn exec(&self, exec: Exec) -> (Host, u32) {
        let mut host = self.greeted();
        host.say(&ToGuest::Exec(exec));
        match host.hear() {
            FromGuest::Started { pid } => (host, pid),
            other => panic!("expected a started program, heard {other:?}"),
        }
    }

    /// Runs a shell script with empty standard input.
    pub(crate) fn run(&self, script: &str) -> Outcome {
        let (mut host, _) = self.exec(shell(script));
        host.say(&ToGuest::StdinClosed);
        host.outcome()
    }

    /// What a shell script prints that has to succeed.
    pub(crate) fn must(&self, script: &str) -> String {
        let outcome = self.run(script);
        assert_eq!(outcome.exit, Exit::Code(0), "{script}: {}", String::from_utf8_lossy(&outcome.stderr));
        outcome.text().to_owned()
    }

    pub(crate) fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("the agent lives");
        let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the field exists");
        line.trim_start_matches(':').split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
    }

    pub(crate) fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).expect("the agent lives").count()
    }

    /// Waits until neither the agent nor any of `programs` has anything left to do: all wait for somebody else. What
    /// was sent to the agent is read by then, and what could be moved is moved.
    pub(crate) fn wait_for_rest(&self, programs: &[u32]) {
        let all = || std::iter::once(&self.process.id()).chain(programs).all(|pid| sleeps(*pid));
        // Looked at one after the other: the second time shows that none had woken another meanwhile.
        wait_until_busily("all is at rest", || all() && all());
    }

    /// Waits for earlier connections to be gone, and counts what is open then.
    pub(crate) fn settled_descriptors(&self) -> usize {
        let mut count = self.open_descriptors();
        let mut same = 0;
        wait_until("earlier connections are gone", || {
            let now = self.open_descriptors();
            same = if now == count { same + 1 } else { 0 };
            count = now;
            same == 20
        });
        count
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What a program came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Exit,
}

impl Outcome {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }
}

/// The host's end of a connection.
pub(crate) struct Host {
    pub(crate) stream: UnixStream,
    decoder: Decoder,
}

impl Host {
    pub(crate) fn say(&mut self, message: &ToGuest) {
        self.say_bytes(&frame::encode(message).expect("a valid message"));
    }

    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the agent reads");
    }

    /// The next message, or `None` at the end.
    pub(crate) fn try_hear(&mut self) -> Option<FromGuest> {
        let mut buffer = [0; 65536];
        loop {
            if let Some(message) = self.decoder.next().expect("a valid frame") {
                return Some(message);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                // A read that is bounded is interrupted for reasons of the kernel's own, as by a freezer.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("no answer: {error}"),
            }
        }
    }

    pub(crate) fn hear(&mut self) -> FromGuest {
        self.try_hear().expect("an answer")
    }

    /// Asks for something that is done.
    pub(crate) fn has_done(&mut self, message: &ToGuest) {
        self.say(message);
        assert_eq!(self.hear(), FromGuest::Done, "{message:?}");
    }

    /// Asks for something that fails, and goes on.
    pub(crate) fn has_failed(&mut self, message: &ToGuest) -> (i32, String) {
        self.say(message);
        match self.hear() {
            FromGuest::Failed { errno, what } => (errno, what),
            other => panic!("expected a failure, heard {other:?}"),
        }
    }

    /// Hears a failure, and then the end.
    pub(crate) fn hear_failure(&mut self) -> (i32, String) {
        match self.hear() {
            FromGuest::Failed { errno, what } => {
                assert_eq!(self.try_hear(), None, "the connection ends");
                (errno, what)
            }
            other => panic!("expected a failure, heard {other:?}"),
        }
    }

    /// Waits until the agent has said all it has to say, without reading any of it.
    pub(crate) fn wait_until_all_is_said(&self) {
        wait_for(&self.stream, PollFlags::RDHUP, "the agent sends its last");
    }

    /// Everything up to the program's exit, and then the end.
    pub(crate) fn outcome(&mut self) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.hear() {
                FromGuest::Stdout(bytes) => {
                    assert!(!bytes.is_empty() && bytes.len() <= STREAM_CHUNK_BYTES);
                    stdout.extend(bytes);
                }
                FromGuest::Stderr(bytes) => {
                    assert!(!bytes.is_empty() && bytes.len() <= STREAM_CHUNK_BYTES);
                    stderr.extend(bytes);
                }
                FromGuest::Exited(exit) => {
                    assert_eq!(self.try_hear(), None, "the connection ends");
                    return Outcome { stdout, stderr, exit };
                }
                other => panic!("out of place: {other:?}"),
            }
        }
    }
}

/// An identity that leaves the clock, which is the machine's, and interfaces alone.
pub(crate) fn identity(hostname: &str, generation: u8) -> Identity {
    Identity {
        vm_id: String::from("vm-test"),
        hostname: String::from(hostname),
        generation: [generation; 16],
        entropy: [[7; 32]; 2],
        unix_ns: 0,
        interfaces: Vec::new(),
    }
}

pub(crate) fn program(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().copied().map(String::from).collect(),
        env: Vec::new(),
        cwd: String::new(),
        timeout_ms: 0,
        terminal: None,
    }
}

pub(crate) fn shell(script: &str) -> Exec {
    program(&["sh", "-c", script])
}

/// For what has no event: descriptors that are closed, processes that are reaped.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    wait_until_busily(what, || {
        let done = done();
        if !done {
            thread::sleep(Duration::from_millis(10));
        }
        done
    });
}

fn wait_until_busily(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        thread::yield_now();
    }
}

pub(crate) fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Waits for the end of a program: it runs no more, though it may not be reaped yet.
pub(crate) fn wait_for_end(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    // One that is gone altogether cannot be opened any more.
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
        wait_for(&process, PollFlags::IN, "the program ends");
    }
}

fn wait_for(fd: &impl AsFd, event: PollFlags, what: &str) {
    let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let mut fds = [PollFd::new(fd, event)];
    let count = poll(&mut fds, Some(&patience)).expect("poll");
    assert!(count == 1 && fds[0].revents().contains(event), "{what}: not within {PATIENCE:?}");
}

/// Whether a process waits for something, by its state in `/proc`.
fn sleeps(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name is in parentheses and may hold anything.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
}

/// Bytes that repeat nowhere within a stream.
pub(crate) fn pattern(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
