//! `vm exec`: exit codes, streams that are long or stuck, signals.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use hearth::api::stream::Frame;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::run::{at, code, output, piped, signal, text, wait_until};

fn exec(fake: &Fake, words: &[&str]) -> std::process::Command {
    at(&fake.socket(), &[&["vm", "exec", "web"], words].concat())
}

#[test]
fn exit_codes_are_the_commands() {
    let fake = Fake::start();
    for (words, wanted) in [
        (&["--", "exit", "0"][..], 0),
        (&["--", "exit", "1"], 1),
        (&["--", "exit", "255"], 255),
        (&["--", "die", "9"], 137),
        (&["--", "die", "15"], 143),
        (&["--", "late"], 124),
    ] {
        let output = output(exec(&fake, words));
        assert_eq!(output.status.code(), Some(wanted), "{words:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{words:?}: {}", text(&output.stderr));
    }
}

#[test]
fn the_request_is_what_was_said() {
    let fake = Fake::start();
    let words = ["-e", "A=b", "--env", "C=", "--cwd", "/srv", "--timeout", "1.5s", "--", "request", "--json", "x y"];
    let output = output(exec(&fake, &words));
    let request: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let wanted = json!({"argv": ["request", "--json", "x y"], "env": ["A=b", "C="], "cwd": "/srv", "timeout_ms": 1500});
    assert_eq!(request, wanted);
}

#[test]
fn streams_stay_apart() {
    let fake = Fake::start();
    let run = output(exec(&fake, &["--", "both"]));
    assert_eq!(
        (run.status.code(), text(&run.stdout), text(&run.stderr)),
        (Some(3), "to stdout".into(), "to stderr".into())
    );
    let run = output(at(&fake.socket(), &["--json", "vm", "exec", "web", "--", "both"]));
    let result: Value = serde_json::from_slice(&run.stdout).expect("JSON");
    assert_eq!(run.status.code(), Some(3));
    assert_eq!((&result["exit_code"], &result["timed_out"]), (&json!(3), &json!(false)));
    assert_eq!((&result["stdout"]["text"], &result["stderr"]["text"]), (&json!("to stdout"), &json!("to stderr")));
}

#[test]
fn eight_mib_come_back_as_they_went() {
    let fake = Fake::start();
    let sent: Vec<u8> = (0..8_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child = piped(exec(&fake, &["--", "cat"]));
    let (mut stdin, mut stdout) = (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        let sent = &sent;
        scope.spawn(move || stdin.write_all(sent).expect("write"));
        stdout.read_to_end(&mut received).expect("read");
    });
    assert_eq!(code(&mut child), 0);
    assert_eq!(blake3::hash(&received), blake3::hash(&sent), "{} bytes came back", received.len());
}

#[test]
fn input_can_be_left_alone() {
    let fake = Fake::start();
    let mut child = piped(exec(&fake, &["--no-stdin", "--", "cat"]));
    assert_eq!(code(&mut child), 0, "cat ends although our standard input does not");
    assert!(fake.noted(|notes| notes.input.is_empty()));
}

#[test]
fn a_command_may_end_before_its_input() {
    let fake = Fake::start();
    let mut child = piped(exec(&fake, &["--", "exit", "5"]));
    assert_eq!(code(&mut child), 5);
}

#[test]
fn a_reader_that_never_reads_stops_the_writer() {
    let fake = Fake::start();
    let mut child = piped(exec(&fake, &["--", "flood"]));
    let mut last = 0;
    wait_until("the flood stands still", || {
        std::thread::sleep(Duration::from_millis(300));
        let now = fake.noted(|notes| notes.flooded);
        std::mem::replace(&mut last, now) == now && now > 0
    });
    assert!(last < 16 << 20, "{last} bytes went into buffers");
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("its status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its memory");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 64 * 1024, "{kib} KiB");
    signal(&child, "INT");
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, "INT");
    assert_eq!(code(&mut child), 130);
    wait_until("the agent sees it go", || fake.noted(|notes| notes.hung_up == 1));
}

#[test]
fn a_reader_that_goes_away_ends_it() {
    let fake = Fake::start();
    let mut child = piped(exec(&fake, &["--", "flood"]));
    let mut some = [0; 1000];
    let mut stdout = child.stdout.take().expect("stdout");
    stdout.read_exact(&mut some).expect("read");
    drop(stdout);
    assert_eq!(code(&mut child), 141);
    wait_until("the agent sees it go", || fake.noted(|notes| notes.hung_up == 1));
}

#[test]
fn signals_are_passed_on() {
    let fake = Fake::start();
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        let mut child = piped(exec(&fake, &["--", "hang"]));
        let mut word = [0; 5];
        child.stdout.as_mut().expect("stdout").read_exact(&mut word).expect("read");
        signal(&child, name);
        assert_eq!(code(&mut child), 7, "the command's own exit code");
        assert!(fake.noted(|notes| notes.frames.contains(&Frame::Signal(number))), "{name}");
    }
}

#[test]
fn a_second_ctrl_c_leaves() {
    let fake = Fake::start();
    let mut child = piped(exec(&fake, &["--", "mute"]));
    wait_until("it begins", || fake.noted(|notes| !notes.calls.is_empty()));
    // Twice at least: the first may come before the signals are caught and asked for.
    wait_until("it leaves", || {
        if child.try_wait().expect("wait").is_none() {
            signal(&child, "INT");
        }
        std::thread::sleep(Duration::from_millis(50));
        child.try_wait().expect("wait").is_some()
    });
    assert_eq!(code(&mut child), 130);
}

#[test]
fn a_broken_stream_is_an_error() {
    let fake = Fake::start();
    // An agent that goes with words of the client unread resets the connection; otherwise it hangs up.
    let broken = ["the agent hung up", "reset by peer"];
    for (command, stdout, wanted) in [
        ("break", "half a ", broken.as_slice()),
        ("refuse", "", &["the guest is gone"]),
        ("garbage", "", &["frame of unknown kind 72"]),
    ] {
        let output = output(exec(&fake, &["--", command]));
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert_eq!(text(&output.stdout), stdout, "{command}");
        let said = text(&output.stderr);
        assert!(wanted.iter().any(|wanted| said.contains(wanted)), "{command}: {said}");
    }
}

#[test]
fn too_much_output_is_cut_in_json() {
    let fake = Fake::start();
    let mut command = at(&fake.socket(), &["--json", "vm", "exec", "web", "--", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("run hearth");
    let (mut stdin, mut stdout) = (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
    let mut printed = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(&vec![b'y'; 17 << 20]).expect("write"));
        stdout.read_to_end(&mut printed).expect("read");
    });
    assert_eq!(code(&mut child), 0);
    let result: Value = serde_json::from_slice(&printed).expect("JSON");
    assert_eq!(result["stdout"]["truncated"], true);
    assert_eq!(result["stdout"]["text"].as_str().map(str::len), Some(16 << 20));
}
