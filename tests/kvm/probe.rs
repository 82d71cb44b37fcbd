//! The traffic tool in guests.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::Value;

use super::fixture::{Agent, need, text};

/// Where it is in a guest.
const PATH: &str = "/tmp/probe";

/// Copies the tool into a guest.
pub(crate) fn install(agent: &Agent, vm: &str) {
    let tool = std::fs::File::open(need("HEARTH_PROBE")).expect("the traffic tool");
    let script = format!("cat > {PATH} && chmod +x {PATH}");
    let output = agent.command(["vm", "exec", vm, "--", "sh", "-c", &script]).stdin(tool).output().expect("run hearth");
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// Runs the tool in a guest to its end.
pub(crate) fn run(agent: &Agent, vm: &str, words: &str) -> Output {
    let words: Vec<&str> = ["vm", "exec", vm, "--", PATH].into_iter().chain(words.split_whitespace()).collect();
    agent.command(words).stdin(Stdio::null()).output().expect("run hearth")
}

/// Starts the tool and waits until it says that it listens.
fn start_listening(command: &mut Command) -> (Child, BufReader<ChildStdout>) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("start the tool");
    let mut lines = BufReader::new(child.stdout.take().expect("its output"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("read");
    assert!(line.contains("\"listening\":true"), "{line}");
    (child, lines)
}

/// Answers whoever asks, until dropped.
pub(crate) struct Echo(Child);

impl Echo {
    /// In a guest.
    pub(crate) fn start(agent: &Agent, vm: &str) -> Self {
        Self::of(&mut agent.command(["vm", "exec", vm, "--", PATH, "serve", "--seconds", "600"]))
    }

    /// By a command that runs `probe serve`.
    pub(crate) fn of(command: &mut Command) -> Self {
        Self(start_listening(command).0)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Counts the frames that come to a guest with a marker, until one comes with the word for the end.
pub(crate) struct Counting(Child, BufReader<ChildStdout>);

impl Counting {
    pub(crate) fn start(agent: &Agent, vm: &str, marker: &str, until: &str) -> Self {
        let count = ["vm", "exec", vm, "--", PATH, "count", "--interface", "eth0", "--seconds", "60"];
        let words = count.into_iter().chain(["--marker", marker, "--until", until]);
        let (child, lines) = start_listening(&mut agent.command(words));
        Self(child, lines)
    }

    /// Waits for the end; how many there were.
    pub(crate) fn marked(mut self) -> u64 {
        let mut said = String::new();
        self.1.read_to_string(&mut said).expect("read");
        self.0.wait().expect("wait");
        let result: Value = serde_json::from_str(said.trim()).unwrap_or_else(|error| panic!("{said}: {error}"));
        assert_eq!(result["ended"], true, "{result}");
        result["marked"].as_u64().expect("a number")
    }
}

/// The tool at work, until it is told to end by its standard input.
pub(crate) struct Tool(Child, BufReader<ChildStdout>);

impl Tool {
    /// By a command that runs it, when it has said that it began.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start the tool");
        let lines = BufReader::new(child.stdout.take().expect("its output"));
        let mut tool = Self(child, lines);
        tool.line();
        tool
    }

    /// The next thing it says.
    pub(crate) fn line(&mut self) -> Value {
        let mut line = String::new();
        self.1.read_line(&mut line).expect("read");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Its result; it may be told to end before it does by itself.
    pub(crate) fn result(mut self, end: bool) -> Value {
        if end {
            drop(self.0.stdin.take());
        }
        let mut said = String::new();
        self.1.read_to_string(&mut said).expect("read");
        self.0.wait().expect("wait");
        parsed(&said)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last of the tool's lines.
pub(crate) fn parsed(said: &str) -> Value {
    let line = said.trim().lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{said:?}: {error}"))
}

/// A number of what the tool said.
pub(crate) fn number(said: &Value, name: &str) -> u64 {
    said[name].as_u64().unwrap_or_else(|| panic!("{name}: {said}"))
}

/// How many of these questions, each asked of every address by a guest, are answered.
pub(crate) fn reached(agent: &Agent, vm: &str, addresses: &[String], questions: &[&str], wait_ms: u32) -> usize {
    let lines: Vec<String> = addresses
        .iter()
        .flat_map(|address| questions.iter().map(move |words| words.replace("ADDRESS", address)))
        .map(|words| format!("{PATH} {words} --wait-ms {wait_ms} >/dev/null 2>&1 && echo reached"))
        .collect();
    let output = agent.run(&["vm", "exec", vm, "--", "sh", "-c", &lines.join("\n")]);
    text(&output.stdout).lines().filter(|line| *line == "reached").count()
}

pub(crate) fn runs_in_a_guest(agent: &Agent) {
    let vm = agent.shared();
    install(agent, vm);
    let echo = Echo::start(agent, vm);
    for words in [
        "ask udp 127.0.0.1 7777 --bytes 20000",
        "ask udp ::1 7777 --bytes 20000",
        "ask tcp ::1 7777 --bytes 20000 --wait-ms 20000",
        "ping ::1 --bytes 4000",
        "ping 127.0.0.1",
    ] {
        let output = run(agent, vm, words);
        assert!(output.status.success(), "{words}: {}{}", text(&output.stdout), text(&output.stderr));
    }
    let counted = run(agent, vm, "count --interface eth0 --marker none --seconds 0");
    assert!(text(&counted.stdout).contains("\"marked\":0"), "{}", text(&counted.stderr));
    drop(echo);
}
