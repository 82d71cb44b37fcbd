//! The traffic tool in guests.

use std::process::{Output, Stdio};

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

pub(crate) fn runs_in_a_guest(agent: &Agent) {
    let vm = agent.shared();
    install(agent, vm);
    let mut echo = agent
        .command(["vm", "exec", vm, "--", PATH, "serve", "--seconds", "30"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run hearth");
    let mut lines = std::io::BufReader::new(echo.stdout.take().expect("its output"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut lines, &mut line).expect("read");
    assert!(line.contains("\"listening\":true"), "{line}");
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
    echo.kill().expect("end the client");
    echo.wait().expect("wait");
}
