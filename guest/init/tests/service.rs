//! The agent as a service on the host: everything that needs no guest of its own.
//!
//! Each test starts the built program on a unix socket and speaks the protocol to it as the host's agent does.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test refuses every other answer")]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use hearth_guest_wire::frame::{self, Decoder};
use hearth_guest_wire::{
    Address, EXEC_WORDS_MAX, Exec, Exit, FRAME_BYTES_MAX, FromGuest, Identity, Interface, STREAM_CHUNK_BYTES, Shutdown,
    TerminalSize, ToGuest, VERSION,
};

/// Longest wait for one answer: far more than any test needs on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent.
struct Agent {
    process: Child,
    socket: PathBuf,
}

impl Agent {
    fn start() -> Self {
        Self::start_by(&[env!("CARGO_BIN_EXE_init")], &[])
    }

    /// Starts the agent by this command, with more arguments after the address.
    fn start_by(command: &[&str], arguments: &[&str]) -> Self {
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

    fn connect(&self) -> Host {
        let stream = UnixStream::connect(&self.socket).expect("the agent takes connections");
        stream.set_read_timeout(Some(PATIENCE)).expect("time-outs can be set");
        stream.set_write_timeout(Some(PATIENCE)).expect("time-outs can be set");
        Host { stream, decoder: Decoder::new() }
    }

    /// A connection past its greeting.
    fn greeted(&self) -> Host {
        let mut host = self.connect();
        host.say(&ToGuest::Hello { version: VERSION });
        let answer = host.hear();
        assert!(matches!(answer, FromGuest::Hello { version: VERSION, .. }), "{answer:?}");
        host
    }

    /// A connection with a running program, and its process id.
    fn exec(&self, exec: Exec) -> (Host, u32) {
        let mut host = self.greeted();
        host.say(&ToGuest::Exec(exec));
        match host.hear() {
            FromGuest::Started { pid } => (host, pid),
            other => panic!("expected a started program, heard {other:?}"),
        }
    }

    /// Runs a shell script with empty standard input.
    fn run(&self, script: &str) -> Outcome {
        let (mut host, _) = self.exec(shell(script));
        host.say(&ToGuest::StdinClosed);
        host.outcome()
    }

    fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("the agent lives");
        let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the field exists");
        line.trim_start_matches(':').split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
    }

    fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).expect("the agent lives").count()
    }

    /// Waits for earlier connections to be gone, and counts what is open then.
    fn settled_descriptors(&self) -> usize {
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
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Exit,
}

impl Outcome {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }
}

/// The host's end of a connection.
struct Host {
    stream: UnixStream,
    decoder: Decoder,
}

impl Host {
    fn say(&mut self, message: &ToGuest) {
        self.say_bytes(&frame::encode(message).expect("a valid message"));
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the agent reads");
    }

    /// The next message, or `None` at the end.
    fn try_hear(&mut self) -> Option<FromGuest> {
        let mut buffer = [0; 65536];
        loop {
            if let Some(message) = self.decoder.next().expect("a valid frame") {
                return Some(message);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no answer: {error}"),
            }
        }
    }

    fn hear(&mut self) -> FromGuest {
        self.try_hear().expect("an answer")
    }

    /// Hears a failure, and then the end.
    fn hear_failure(&mut self) -> (i32, String) {
        match self.hear() {
            FromGuest::Failed { errno, what } => {
                assert_eq!(self.try_hear(), None, "the connection ends");
                (errno, what)
            }
            other => panic!("expected a failure, heard {other:?}"),
        }
    }

    /// Everything up to the program's exit, and then the end.
    fn outcome(&mut self) -> Outcome {
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

fn program(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().copied().map(String::from).collect(),
        env: Vec::new(),
        cwd: String::new(),
        timeout_ms: 0,
        terminal: None,
    }
}

fn shell(script: &str) -> Exec {
    program(&["sh", "-c", script])
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if done() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}: not within 30 s");
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Bytes that repeat nowhere within a stream.
fn pattern(count: usize) -> Vec<u8> {
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

#[test]
fn exit_codes_and_both_streams_arrive() {
    let agent = Agent::start();
    for code in [0, 1, 42, 255] {
        let outcome = agent.run(&format!("echo out; echo err >&2; exit {code}"));
        assert_eq!(outcome, Outcome { stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec(), exit: Exit::Code(code) });
    }
}

#[test]
fn a_program_that_ends_by_a_signal_says_which() {
    let agent = Agent::start();
    assert_eq!(agent.run("kill -9 $$").exit, Exit::Signal(9));
    assert_eq!(agent.run("kill -15 $$").exit, Exit::Signal(15));
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(shell("trap 'echo caught; exit 3' TERM; echo up; sleep 100 & wait"));
    assert_eq!(host.hear(), FromGuest::Stdout(b"up\n".to_vec()));
    host.say(&ToGuest::Signal { number: 15 });
    let outcome = host.outcome();
    assert_eq!((outcome.text(), outcome.exit), ("caught\n", Exit::Code(3)));
    wait_until("the group is gone", || !exists(pid));
}

#[test]
fn a_signal_that_does_not_exist_changes_nothing() {
    let agent = Agent::start();
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Signal { number: 200 });
    host.say(&ToGuest::Stdin(b"still here".to_vec()));
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().text(), "still here");
}

#[test]
fn a_time_out_kills_the_group() {
    let agent = Agent::start();
    let mut exec = shell("echo begun; sleep 100 & sleep 100");
    exec.timeout_ms = 200;
    let (mut host, pid) = agent.exec(exec);
    let outcome = host.outcome();
    assert_eq!((outcome.text(), outcome.exit), ("begun\n", Exit::TimedOut));
    wait_until("the program is gone", || !exists(pid));
}

#[test]
fn a_time_out_that_is_not_reached_says_nothing() {
    let agent = Agent::start();
    let mut exec = shell("exit 5");
    exec.timeout_ms = 20_000;
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().exit, Exit::Code(5));
}

#[test]
fn eight_mebibytes_come_back_as_they_went() {
    let agent = Agent::start();
    let sent = pattern(8 << 20);
    let (mut host, _) = agent.exec(program(&["cat"]));
    let mut to = host.stream.try_clone().expect("a second handle");
    let bytes = sent.clone();
    let writer = thread::spawn(move || {
        for chunk in bytes.chunks(STREAM_CHUNK_BYTES) {
            to.write_all(&frame::encode(&ToGuest::Stdin(chunk.to_vec())).expect("a frame")).expect("the agent reads");
        }
        to.write_all(&frame::encode(&ToGuest::StdinClosed).expect("a frame")).expect("the agent reads");
    });
    let outcome = host.outcome();
    writer.join().expect("the writer ends");
    assert_eq!(outcome.exit, Exit::Code(0));
    assert!(outcome.stdout == sent, "{} of {} bytes, or others", outcome.stdout.len(), sent.len());
}

#[test]
fn sixteen_programs_run_at_once() {
    let agent = Agent::start();
    thread::scope(|scope| {
        for number in 0..16_u8 {
            let agent = &agent;
            scope.spawn(move || {
                let sent = pattern(200_000 + usize::from(number));
                let (mut host, _) = agent.exec(shell(&format!("cat; exit {number}")));
                for chunk in sent.chunks(10_000) {
                    host.say(&ToGuest::Stdin(chunk.to_vec()));
                    // Keeps the program's output from filling the sockets while nobody reads here.
                    if chunk.len() < 10_000 {
                        break;
                    }
                }
                host.say(&ToGuest::StdinClosed);
                let outcome = host.outcome();
                assert_eq!(outcome.exit, Exit::Code(number));
                assert!(outcome.stdout == sent);
            });
        }
    });
}

#[test]
fn missing_programs_and_directories_are_named() {
    let agent = Agent::start();
    let mut elsewhere = shell("true");
    elsewhere.cwd = String::from("/no/such/place");
    let mut bad_word = shell("true");
    bad_word.env.push(String::from("NOVALUE"));
    let mut null_word = shell("true");
    null_word.argv.push(String::from("a\0b"));
    let cases = [
        (program(&["no-such-program"]), 2, "no-such-program"),
        (program(&["/no/such/program"]), 2, "/no/such/program"),
        (program(&["/etc/passwd"]), 13, "/etc/passwd"),
        (program(&["/etc"]), 13, "/etc"),
        (program(&[]), 22, "program"),
        (program(&[""]), 2, "name"),
        (elsewhere, 2, "/no/such/place"),
        (bad_word, 22, "environment"),
        (null_word, 22, "null"),
    ];
    for (exec, errno, named) in cases {
        let mut host = agent.greeted();
        host.say(&ToGuest::Exec(exec));
        let (heard, what) = host.hear_failure();
        assert_eq!(heard, errno, "{what}");
        assert!(what.contains(named), "{what}");
    }
    assert_eq!(agent.run("echo fine").text(), "fine\n");
}

#[test]
fn words_at_their_limit_are_taken_and_one_more_is_not() {
    let agent = Agent::start();
    let mut exec = shell("echo $#");
    exec.argv.push(String::from("sh"));
    let fixed = exec.argv.len();
    exec.argv.resize(EXEC_WORDS_MAX, String::from("w"));
    let (mut host, _) = agent.exec(exec.clone());
    assert_eq!(host.outcome().text(), format!("{}\n", EXEC_WORDS_MAX - fixed));

    exec.env.push(String::from("ONE=more"));
    let mut host = agent.greeted();
    host.say(&ToGuest::Exec(exec));
    assert_eq!(host.hear_failure().0, 7);
}

#[test]
fn environment_and_directory_are_those_asked_for() {
    let agent = Agent::start();
    let mut exec = shell("echo $INHERITED $GIVEN $PWD; cd /; echo \"$PATH\"");
    exec.env = vec![String::from("GIVEN=a b"), String::from("GIVEN=c"), String::from("PATH=/bin:/usr/bin")];
    exec.cwd = String::from("/proc");
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().text(), "yes c /proc\n/bin:/usr/bin\n");
}

#[test]
fn a_program_starts_with_clean_signals_and_descriptors() {
    let agent = Agent::start();
    let outcome = agent.run("grep '^SigBlk' /proc/self/status; ls /proc/$$/fd; echo $$; ps -o pgid=,sid= -p $$");
    let words: Vec<&str> = outcome.text().split_whitespace().collect();
    // The descriptors of the shell itself, while it waits for `ls`: a pipeline
    // would add its own, more or fewer with each shell.
    assert_eq!(&words[..5], &["SigBlk:", "0000000000000000", "0", "1", "2"]);
    assert_eq!((words[5], words[5]), (words[6], words[7]), "a group and a session of its own");
}

#[test]
fn a_closed_connection_kills_the_group() {
    let agent = Agent::start();
    for half in [None, Some(Half::Write)] {
        let (host, pid) = agent.exec(shell("sleep 1000 & sleep 1000"));
        match half {
            Some(half) => host.stream.shutdown(half).expect("half a close"),
            None => drop(host),
        }
        wait_until("the program is gone", || !exists(pid));
    }
}

#[test]
fn a_closed_connection_kills_even_when_input_is_stuck() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(program(&["sleep", "1000"]));
    host.stream.set_write_timeout(Some(Duration::from_millis(300))).expect("time-outs can be set");
    let frame = frame::encode(&ToGuest::Stdin(vec![7; STREAM_CHUNK_BYTES])).expect("a frame");
    // More than the pipe, the agent and the socket hold.
    let stuck = (0..1000).any(|_| host.stream.write_all(&frame).is_err());
    assert!(stuck, "the agent stops reading what its program does not take");
    drop(host);
    wait_until("the program is gone", || !exists(pid));
}

#[test]
fn a_reader_that_never_reads_costs_bounded_memory() {
    let agent = Agent::start();
    let before_kib = agent.status("VmRSS");
    let hosts: Vec<(Host, u32)> = (0..8).map(|_| agent.exec(program(&["cat", "/dev/zero"]))).collect();
    thread::sleep(Duration::from_millis(500));
    let with_kib = agent.status("VmRSS");
    assert!(with_kib < before_kib + 4096, "from {before_kib} to {with_kib} KiB");
    assert_eq!(agent.run("echo others go on").text(), "others go on\n");
    drop(hosts);
}

#[test]
fn a_slow_reader_gets_everything() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(shell("head -c 3000000 /dev/zero"));
    thread::sleep(Duration::from_millis(300));
    assert!(exists(pid), "the program waits for its reader");
    assert_eq!(host.outcome().stdout.len(), 3_000_000);
}

#[test]
fn what_a_program_left_in_its_pipes_is_delivered_late_too() {
    let agent = Agent::start();
    // The background process holds the pipes open; 60,000 bytes are in them when the program ends.
    let (mut host, _) = agent.exec(shell("head -c 60000 /dev/zero; sleep 5 & exit 4"));
    thread::sleep(Duration::from_millis(700));
    let outcome = host.outcome();
    assert_eq!((outcome.stdout.len(), outcome.exit), (60_000, Exit::Code(4)));
}

#[test]
fn a_background_process_does_not_keep_the_connection() {
    let agent = Agent::start();
    let outcome = agent.run("sleep 20 & echo $!; exit 6");
    assert_eq!(outcome.exit, Exit::Code(6));
    let background: u32 = outcome.text().trim().parse().expect("a process id");
    assert!(exists(background), "what a program leaves behind lives on");
    // Even one that never stops writing.
    let outcome = agent.run("while :; do echo x; done & echo $! >&2; exit 7");
    assert_eq!(outcome.exit, Exit::Code(7));
    let noisy: u32 = std::str::from_utf8(&outcome.stderr).expect("text").trim().parse().expect("a process id");
    wait_until("its writer ends by SIGPIPE", || !exists(noisy));
    assert_eq!(agent.run(&format!("kill {background}")).exit, Exit::Code(0));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let outcome = agent.run("for i in 1 2 3 4 5; do (sleep 0.3 </dev/null >/dev/null 2>&1 & echo $!); done");
    let orphans: Vec<u32> = outcome.text().lines().map(|line| line.parse().expect("a process id")).collect();
    assert_eq!(orphans.len(), 5);
    wait_until("no zombie is left", || !orphans.iter().any(|pid| exists(*pid)));
}

#[test]
fn a_terminal_is_one_and_follows_its_size() {
    let agent = Agent::start();
    let mut exec = shell("tty >/dev/null && echo terminal; stty size; read word; echo got $word; stty size; cat");
    exec.terminal = Some(TerminalSize { rows: 33, columns: 120 });
    let (mut host, _) = agent.exec(exec);
    let mut seen = String::new();
    let mut until = |host: &mut Host, mark: &str| {
        while !seen.contains(mark) {
            match host.hear() {
                FromGuest::Stdout(bytes) => seen.push_str(std::str::from_utf8(&bytes).expect("text")),
                other => panic!("out of place: {other:?}"),
            }
        }
    };
    until(&mut host, "33 120");
    host.say(&ToGuest::Resize { rows: 50, columns: 200 });
    host.say(&ToGuest::Stdin(b"hello\n".to_vec()));
    until(&mut host, "50 200");
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().exit, Exit::Code(0));
    assert!(seen.contains("terminal") && seen.contains("got hello"), "{seen}");
}

#[test]
fn a_terminal_that_loses_its_host_is_hung_up() {
    let agent = Agent::start();
    let mut exec = shell("trap '' HUP; sleep 1000");
    exec.terminal = Some(TerminalSize { rows: 24, columns: 80 });
    let (host, pid) = agent.exec(exec);
    drop(host);
    wait_until("the program is gone", || !exists(pid));
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let agent = Agent::start();
    let body = [0xff; 64];
    let mut garbage = 64_u32.to_le_bytes().to_vec();
    garbage.extend(body);
    let mut trailing = frame::encode(&ToGuest::Stats).expect("a frame");
    trailing.extend_from_slice(&[0]);
    trailing[0] += 1;
    let empty = 0_u32.to_le_bytes().to_vec();
    let too_long = (FRAME_BYTES_MAX + 1).to_le_bytes().to_vec();
    let before = frame::encode(&ToGuest::Stats).expect("a frame");
    for bytes in [&garbage, &trailing, &empty, &too_long] {
        let mut host = agent.greeted();
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        let mut host = agent.connect();
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        let (mut host, pid) = agent.exec(program(&["sleep", "1000"]));
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        wait_until("the program is gone", || !exists(pid));
    }
    let mut host = agent.connect();
    host.say_bytes(&before);
    let (errno, what) = host.hear_failure();
    assert_eq!((errno, what.as_str()), (71, "message out of place"));
    assert_eq!(agent.run("echo fine").text(), "fine\n");
}

#[test]
fn a_frame_at_its_limit_is_taken() {
    let agent = Agent::start();
    let mut exec = shell("echo ${#BIG}");
    // The kernel takes words of less than 128 KiB, so several fill the frame.
    for number in 0..8 {
        exec.env.push(format!("B{number}={}", "x".repeat(120_000)));
    }
    exec.env.push(format!("BIG={}", "y".repeat(20_000)));
    let short = FRAME_BYTES_MAX as usize + 4 - frame::encode(&ToGuest::Exec(exec.clone())).expect("a frame").len();
    exec.env[8] = format!("BIG={}", "y".repeat(20_000 + short));
    assert_eq!(frame::encode(&ToGuest::Exec(exec.clone())).expect("a frame").len(), FRAME_BYTES_MAX as usize + 4);
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().text(), format!("{}\n", 20_000 + short));
}

#[test]
fn input_chunks_are_bounded() {
    let agent = Agent::start();
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Stdin(vec![1; STREAM_CHUNK_BYTES]));
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().stdout.len(), STREAM_CHUNK_BYTES);
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Stdin(vec![1; STREAM_CHUNK_BYTES + 1]));
    assert_eq!(host.hear_failure().0, 71);
}

#[test]
fn frames_split_anywhere_are_understood() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let mut bytes = frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame");
    bytes.extend(frame::encode(&ToGuest::Exec(program(&["cat"]))).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Stdin(b"split".to_vec())).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::StdinClosed).expect("a frame"));
    for byte in bytes {
        host.say_bytes(&[byte]);
        thread::sleep(Duration::from_micros(200));
    }
    assert!(matches!(host.hear(), FromGuest::Hello { .. }));
    assert!(matches!(host.hear(), FromGuest::Started { .. }));
    assert_eq!(host.outcome().text(), "split");
}

#[test]
fn a_whole_conversation_may_come_at_once() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let mut bytes = frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame");
    bytes.extend(frame::encode(&ToGuest::Stats).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Quiesce { timeout_ms: 20_000 }).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Thaw).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Exec(shell("exit 9"))).expect("a frame"));
    host.say_bytes(&bytes);
    assert!(matches!(host.hear(), FromGuest::Hello { .. }));
    assert!(matches!(host.hear(), FromGuest::Stats(_)));
    assert!(matches!(host.hear(), FromGuest::Quiesced { complete: true, .. }));
    assert_eq!(host.hear(), FromGuest::Done);
    assert!(matches!(host.hear(), FromGuest::Started { .. }));
    assert_eq!(host.outcome().exit, Exit::Code(9));
}

#[test]
fn a_version_too_old_is_refused_and_a_newer_one_is_not() {
    let agent = Agent::start();
    let mut host = agent.connect();
    host.say(&ToGuest::Hello { version: 0 });
    assert_eq!(host.hear_failure().0, 71);
    let mut host = agent.connect();
    host.say(&ToGuest::Hello { version: VERSION + 1 });
    assert!(matches!(host.hear(), FromGuest::Hello { version: VERSION, .. }));
}

#[test]
fn stats_tell_of_this_machine() {
    let agent = Agent::start();
    let (_cat, _) = agent.exec(program(&["cat"]));
    let mut host = agent.greeted();
    host.say(&ToGuest::Stats);
    let FromGuest::Stats(stats) = host.hear() else { panic!("expected stats") };
    assert_eq!(stats.execs_running, 1);
    assert!(stats.processes > 1);
    assert!(stats.memory_available_bytes > 0 && stats.memory_available_bytes < stats.memory_total_bytes);
    assert!(stats.uptime_ns > 0 && stats.unix_ns > 1_600_000_000_000_000_000);
}

#[test]
fn a_sync_that_has_no_time_says_so() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    host.say(&ToGuest::Quiesce { timeout_ms: 0 });
    // Either answer is true on a fast disk; there is exactly one, and the connection goes on.
    assert!(matches!(host.hear(), FromGuest::Quiesced { .. }));
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}

#[test]
fn a_service_does_not_touch_its_machine() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    for request in [ToGuest::SetClock { unix_ns: 1 }, ToGuest::Shutdown(Shutdown::PowerOff)] {
        host.say(&request);
        let answer = host.hear();
        assert!(matches!(answer, FromGuest::Failed { errno: 1, .. }), "{answer:?}");
    }
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}

fn identity(hostname: &str, interfaces: Vec<Interface>) -> Identity {
    Identity {
        vm_id: String::from("vm-test"),
        hostname: String::from(hostname),
        generation: [1; 16],
        entropy: [[7; 32]; 2],
        // The clock is the machine's: left alone.
        unix_ns: 0,
        interfaces,
    }
}

#[test]
fn an_identity_is_applied_and_another_replaces_it() {
    let user = Command::new("id").arg("-u").output().expect("id runs");
    if user.stdout != b"0\n" {
        eprintln!("skipped: namespaces are made by root only");
        return;
    }
    // A network and a name of its own: nothing of the machine is changed.
    let agent = Agent::start_by(&["unshare", "--net", "--uts", env!("CARGO_BIN_EXE_init")], &["--guest"]);
    let made = agent.run(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far && ip link set far up \
         && ip link add eth1 address 02:00:00:00:00:02 type veth peer name away",
    );
    assert_eq!(made.exit, Exit::Code(0), "{}", String::from_utf8_lossy(&made.stderr));
    let mut host = agent.greeted();
    let first = vec![
        Interface {
            mac: [2, 0, 0, 0, 0, 1],
            addresses: vec![
                Address::V4([10, 9, 8, 7], 24),
                Address::V6([0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], 64),
            ],
            mtu: 1400,
        },
        Interface { mac: [2, 0, 0, 0, 0, 2], addresses: vec![Address::V4([10, 1, 1, 1], 32)], mtu: 0 },
    ];
    // Twice: the second time nothing is left to change.
    for _ in 0..2 {
        host.say(&ToGuest::Identity(identity("first-name", first.clone())));
        assert_eq!(host.hear(), FromGuest::Done);
        let seen = agent.run("hostname; ip -o addr show eth0; ip -o addr show eth1; ip -o link show eth0");
        let seen = seen.text();
        assert!(seen.starts_with("first-name\n"), "{seen}");
        for part in ["10.9.8.7/24 brd 10.9.8.255", "fd00:1::5/64 scope global nodad", "10.1.1.1/32", "mtu 1400", ",UP"]
        {
            assert!(seen.contains(part), "{part} in {seen}");
        }
    }

    let second =
        vec![Interface { mac: [2, 0, 0, 0, 0, 1], addresses: vec![Address::V4([10, 9, 8, 9], 24)], mtu: 1400 }];
    host.say(&ToGuest::Identity(identity("second-name", second)));
    assert_eq!(host.hear(), FromGuest::Done);
    let seen = agent.run("hostname; ip -o addr show eth0");
    let seen = seen.text();
    assert!(seen.starts_with("second-name\n") && seen.contains("10.9.8.9/24"), "{seen}");
    assert!(!seen.contains("10.9.8.7") && !seen.contains("fd00:1::5") && seen.contains("fe80:"), "{seen}");

    let unknown = vec![Interface { mac: [2, 0, 0, 0, 0, 9], addresses: Vec::new(), mtu: 0 }];
    host.say(&ToGuest::Identity(identity("third-name", unknown)));
    let answer = host.hear();
    let FromGuest::Failed { errno: 19, what } = answer else { panic!("{answer:?}") };
    assert_eq!(what, "no interface is 02:00:00:00:00:09");
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}

#[test]
fn connections_above_the_limit_are_refused_and_come_back() {
    let agent = Agent::start();
    agent.settled_descriptors();
    let held: Vec<Host> = (0..64).map(|_| agent.greeted()).collect();
    assert_eq!(agent.connect().hear_failure().0, 24);
    drop(held);
    wait_until("a place is free", || {
        let mut host = agent.connect();
        let _ = host.stream.write_all(&frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame"));
        matches!(host.try_hear(), Some(FromGuest::Hello { .. }))
    });
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let agent = Agent::start();
    agent.run("true");
    let (descriptors, before_kib) = (agent.settled_descriptors(), agent.status("VmRSS"));
    for number in 0..1000 {
        match number % 4 {
            0 => drop(agent.greeted()),
            1 => drop(agent.connect()),
            2 => drop(agent.exec(program(&["sleep", "1000"]))),
            _ => {
                let (mut host, _) = agent.exec(program(&["true"]));
                assert_eq!(host.outcome().exit, Exit::Code(0));
            }
        }
    }
    wait_until("all descriptors are closed", || agent.open_descriptors() == descriptors);
    let after_kib = agent.status("VmRSS");
    assert!(after_kib < before_kib + 512, "from {before_kib} to {after_kib} KiB");
    let children = format!("/proc/{0}/task/{0}/children", agent.process.id());
    wait_until("all children are reaped", || std::fs::read_to_string(&children).is_ok_and(|list| list.is_empty()));
}

#[test]
fn a_service_ends_when_asked() {
    let mut agent = Agent::start();
    let (_host, pid) = agent.exec(program(&["sleep", "1000"]));
    let ended = Command::new("kill").arg(agent.process.id().to_string()).status().expect("kill runs");
    assert!(ended.success());
    assert_eq!(agent.process.wait().expect("it ends").code(), Some(0));
    wait_until("its programs are gone", || !exists(pid));
}
