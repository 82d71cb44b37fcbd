//! The program between two network namespaces with nothing but a wire between them: what is asked is answered, and
//! every kind of forged frame goes out as it is.
#![expect(clippy::disallowed_methods, reason = "a test that bounds its waiting")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use hearth_guest_probe::forge::Kind;

/// A network namespace, which lasts as long as a program that waits in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let mut program = Command::new("unshare");
        program.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = Self(program.spawn().expect("unshare runs"));
        // Its answer shows that it is where it belongs.
        child.0.stdin.as_mut().expect("a pipe").write_all(b"there\n").expect("it reads");
        let mut line = String::new();
        BufReader::new(child.0.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("it answers");
        assert_eq!(line, "there\n", "namespaces are made by root only");
        child
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.0.id())).args(words);
        command
    }

    fn ip(&self, script: &str) {
        let output = self.command(&["sh", "-e", "-c", script]).output().expect("nsenter runs");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn probe(&self, words: &str) -> Command {
        // The one for guests, if it was built.
        let program = std::env::var("HEARTH_PROBE").unwrap_or_else(|_| env!("CARGO_BIN_EXE_probe").to_owned());
        let words: Vec<&str> = words.split_whitespace().collect();
        self.command(&[&[program.as_str()], &words[..]].concat())
    }

    /// Runs the program to its end.
    fn run(&self, words: &str) -> Outcome {
        Outcome::of(&self.probe(words).output().expect("nsenter runs"))
    }

    /// The same, on the host's first processor.
    fn run_on_first_processor(&self, words: &str) -> Outcome {
        let probe = self.probe(words);
        let mut pinned = Command::new("taskset");
        pinned.args(["--cpu-list", "0"]).arg(probe.get_program()).args(probe.get_args());
        Outcome::of(&pinned.output().expect("taskset runs"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Outcome {
    code: Option<i32>,
    line: String,
}

impl Outcome {
    fn of(output: &Output) -> Self {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { code: output.status.code(), line: text.lines().last().unwrap_or_default().to_owned() }
    }

    fn number(&self, name: &str) -> u64 {
        let (_, rest) =
            self.line.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("{name}: {}", self.line));
        rest.split([',', '}'])
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or_else(|| panic!("{name}: {}", self.line))
    }
}

/// A program that has said that it listens. Killed when dropped.
struct Listening(Child, BufReader<std::process::ChildStdout>);

impl Listening {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("nsenter runs");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut listening = Self(child, stdout);
        assert!(listening.line().contains("\"listening\":true"));
        listening
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).expect("it writes");
        line
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const NEAR_MAC: &str = "02:00:00:00:00:01";
const FAR_MAC: &str = "02:00:00:00:00:02";

/// Two namespaces with a wire between them.
fn two() -> (Namespace, Namespace) {
    let (near, far) = (Namespace::new(), Namespace::new());
    near.ip(&format!(
        "ip link set lo up; ip link add eth0 address {NEAR_MAC} type veth peer name far address {FAR_MAC}
         ip link set far netns {}; ip link set eth0 up
         ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad",
        far.0.id()
    ));
    far.ip("ip link set far name eth0; ip link set lo up; ip link set eth0 up
         ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad");
    (near, far)
}

#[test]
fn what_is_asked_is_answered() {
    let (near, far) = two();
    let _echo = Listening::start(far.probe("serve --seconds 60"));
    for address in ["192.0.2.2", "2001:db8::2"] {
        for question in [
            "ask udp A 7777 --bytes 1400 --count 5",
            "ask udp A 7777 --bytes 60000 --count 3",
            "ask tcp A 7777 --bytes 1 --count 2",
            "ask tcp A 7777 --bytes 1000000",
            "ping A --count 3",
            "ping A --bytes 60000 --count 2",
        ] {
            let outcome = near.run(&question.replace('A', address));
            assert_eq!(outcome.code, Some(0), "{question}: {}", outcome.line);
            assert!(outcome.number("answered") > 0 && outcome.number("wrong") == 0, "{}", outcome.line);
        }
    }
}

#[test]
fn silence_and_refusal_are_failures() {
    let (near, far) = two();
    // Nobody listens; nobody is there; nobody says.
    far.ip("ip route add blackhole 192.0.2.1/32; ip -6 route add blackhole 2001:db8::1/128");
    for question in [
        "ask udp 192.0.2.2 7777 --wait-ms 50",
        "ask tcp 2001:db8::2 7777 --wait-ms 50",
        "ping 192.0.2.2 --wait-ms 50 --count 2",
        "ping 2001:db8::2 --wait-ms 50",
    ] {
        let outcome = near.run(question);
        assert_eq!((outcome.code, outcome.number("answered")), (Some(1), 0), "{question}: {}", outcome.line);
        assert!(outcome.line.contains("\"error\":"), "{}", outcome.line);
    }
    for words in ["", "ask", "ask udp nowhere 7", "ping 192.0.2.2 --bytes many", "ping 192.0.2.2 --what x", "forge all"]
    {
        let output = near.probe(words).output().expect("nsenter runs");
        assert_eq!(output.status.code(), Some(2), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_kind_goes_out_as_it_is() {
    let (near, far) = two();
    let _echo = Listening::start(far.probe("serve --seconds 60"));
    let mut count = Listening::start(far.probe("count --interface eth0 --marker mark9 --seconds 30 --until the-end"));
    // All on one processor: the kernel hands frames over a wire on by the processor they were sent on, and what ends the
    // count must not come before what is counted.
    let forged = near.run_on_first_processor(&format!(
        "forge --interface eth0 --gateway-mac {FAR_MAC} --marker mark9 --own4 192.0.2.1 --own6 2001:db8::1 \
         --as4 192.0.2.3 --as6 2001:db8::3 --to4 192.0.2.2 --to6 2001:db8::2 honest all"
    ));
    assert_eq!(forged.code, Some(0), "{}", forged.line);
    assert_eq!(near.run_on_first_processor("ask udp 2001:db8::2 7777 --text the-end").code, Some(0));
    let counted = Outcome { code: None, line: count.line() };
    assert!(counted.line.contains("\"ended\":true"), "{}", counted.line);
    for kind in [Kind::Honest].into_iter().chain(Kind::FORGED) {
        let (sent, seen) = (forged.number(kind.name()), counted.number(kind.name()));
        // Frames too short for a marker are not known again.
        let short = if kind == Kind::Runt { 5 } else { 0 };
        assert!(seen + short >= sent && seen > 0, "{}: {seen} of {sent}\n{}", kind.name(), counted.line);
    }
}

#[test]
fn a_numbered_stream_is_counted_where_it_leaves_and_where_it_comes() {
    let (near, far) = two();
    let mut count = Listening::start(far.probe("count udp 7778 --first 0 --stream 9 --seconds 30"));
    let mut watch = Listening::start(near.probe("watch --interface eth0 --stream 9 --seconds 30"));
    // Another one's are none of it.
    assert_eq!(near.run("send udp 192.0.2.2 7778 --rate 1000 --seconds 1 --stream 8").code, Some(0));
    let sent = near.run("send udp 2001:db8::2 7778 --rate 1000 --seconds 1 --stream 9 --bytes 1400");
    assert_eq!((sent.code, sent.number("sent"), sent.number("unsent")), (Some(0), 1003, 0), "{}", sent.line);
    let counted = Outcome { code: count.0.wait().expect("it ends").code(), line: count.line() };
    let told =
        ["received", "lost", "duplicates", "out_of_order", "corrupt", "foreign"].map(|name| counted.number(name));
    assert_eq!((counted.code, told), (Some(0), [1003, 0, 0, 0, 0, 1003]), "{}", counted.line);
    near.ip("ip link delete eth0");
    let watched = Outcome { code: watch.0.wait().expect("it ends with the interface").code(), line: watch.line() };
    assert_eq!((watched.number("received"), watched.number("foreign")), (1003, 1003), "{}", watched.line);
    assert!(watched.number("frames") >= 2006, "{}", watched.line);
}

#[test]
fn what_is_lost_on_the_way_is_counted() {
    let (near, far) = two();
    far.ip("nft add table inet lossy
         nft 'add chain inet lossy input { type filter hook input priority 0; }'
         nft add rule inet lossy input udp dport 7778 numgen inc mod 10 7 drop");
    let mut count = Listening::start(far.probe("count udp 7778 --first 0 --seconds 30"));
    let sent = near.run("send udp 192.0.2.2 7778 --rate 500 --seconds 1");
    assert_eq!(sent.number("sent"), 503, "{}", sent.line);
    let counted = Outcome { code: count.0.wait().expect("it ends").code(), line: count.line() };
    // Numbers 7, 17, ... 497: fifty, one at a time.
    let told = ["received", "lost", "longest_hole", "duplicates"].map(|name| counted.number(name));
    assert_eq!((counted.code, told), (Some(1), [453, 50, 1, 0]), "{}", counted.line);
}

#[test]
fn one_who_is_stopped_sees_how_long() {
    let near = Namespace::new();
    let mut command = near.probe("stall --seconds 3");
    let child = command.stdout(Stdio::piped()).spawn().expect("nsenter runs");
    let mut stall = Stalling(child);
    let mut lines = BufReader::new(stall.0.stdout.take().expect("a pipe"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("it writes");
    assert!(line.contains("\"watching\":true"), "{line}");
    // nsenter has become the program: its id is the same.
    let pid = stall.0.id().to_string();
    let signal = |name: &str| Command::new("kill").args([name, &pid]).status().expect("kill runs").success();
    let begun = std::time::Instant::now();
    assert!(signal("-STOP"));
    std::thread::sleep(std::time::Duration::from_millis(400));
    let stopped_ms = begun.elapsed().as_secs_f64() * 1000.0;
    assert!(signal("-CONT"));
    line.clear();
    lines.read_line(&mut line).expect("it writes");
    let outcome = Outcome { code: stall.0.wait().expect("it ends").code(), line };
    let longest = outcome.line.split_once("\"ms\":").and_then(|(_, rest)| rest.split(',').next());
    let longest: f64 = longest.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{}", outcome.line));
    // It was let go on after that, and ran up to when it was stopped.
    assert!(longest > stopped_ms - 50.0, "{longest} of {stopped_ms}: {}", outcome.line);
    assert_eq!((outcome.code, outcome.number("backwards")), (Some(0), 0), "{}", outcome.line);
}

/// Killed when dropped.
struct Stalling(Child);

impl Drop for Stalling {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
