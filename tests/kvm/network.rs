//! Session networks with real guests on three hosts: who reaches whom, and who does not.

use std::process::{Child, Stdio};

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::{Agent, text};
use super::probe;

/// A guest: its host, its name, its session.
type Guest = (usize, &'static str, &'static str);

const X_A: Guest = (0, "xa", "x");
const X_B: Guest = (1, "xb", "x");
const Y_A: Guest = (0, "ya", "y");
const Y_B: Guest = (1, "yb", "y");
const X_C: Guest = (2, "xc", "x");

fn launch(fabric: &Fabric, guest: Guest, more: &[&str]) {
    let (host, name, session) = guest;
    let words = ["--session", session].iter().chain(more).copied().collect::<Vec<_>>();
    fabric.agent(host).launch(name, &words);
    probe::install(fabric.agent(host), name);
}

/// A guest's IPv6 and IPv4 address.
fn addresses(fabric: &Fabric, guest: Guest) -> [String; 2] {
    let vm = fabric.agent(guest.0).vm(guest.1);
    let one = |index: usize| vm["addresses"][index].as_str().expect("an address").to_owned();
    [one(0), one(1)]
}

/// Echoes in a guest until dropped.
struct Echo(Child);

impl Echo {
    fn start(agent: &Agent, vm: &str) -> Self {
        let words = ["vm", "exec", vm, "--", "/tmp/probe", "serve", "--seconds", "300"];
        let mut child = agent.command(words).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("run hearth");
        let mut line = String::new();
        let mut lines = std::io::BufReader::new(child.stdout.take().expect("its output"));
        std::io::BufRead::read_line(&mut lines, &mut line).expect("read");
        assert!(line.contains("\"listening\":true"), "{line}");
        Self(child)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many of the probes from one guest to another come back.
fn reached(fabric: &Fabric, from: Guest, to: Guest, probes: &[&str], wait_ms: u32) -> usize {
    let [v6, v4] = addresses(fabric, to);
    let lines: Vec<String> = [v6, v4]
        .iter()
        .flat_map(|address| probes.iter().map(move |words| words.replace("ADDRESS", address)))
        .map(|words| format!("/tmp/probe {words} --wait-ms {wait_ms} >/dev/null 2>&1 && echo reached"))
        .collect();
    let output = fabric.agent(from.0).run(&["vm", "exec", from.1, "--", "sh", "-c", &lines.join("\n")]);
    text(&output.stdout).lines().filter(|line| *line == "reached").count()
}

const ALL: &[&str] = &[
    "ping ADDRESS",
    "ping ADDRESS --bytes 1400",
    "ping ADDRESS --bytes 4000",
    "ask udp ADDRESS 7777 --bytes 1400",
    "ask udp ADDRESS 7777 --bytes 4000",
    "ask tcp ADDRESS 7777 --bytes 4000",
];

const SOME: &[&str] = &["ping ADDRESS", "ask udp ADDRESS 7777 --bytes 100", "ask tcp ADDRESS 7777 --bytes 100"];

pub(crate) fn sessions_reach_across_hosts_and_nothing_else(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    for host in 0..3 {
        fabric.agent(host).ok(&["session", "create", "--id", "517", "--name", "x"]);
        fabric.agent(host).ok(&["session", "create", "--id", "518", "--name", "y"]);
    }
    std::thread::scope(|scope| {
        for guest in [X_A, X_B, Y_A, Y_B] {
            let fabric = &fabric;
            scope.spawn(move || launch(fabric, guest, &[]));
        }
    });
    addresses_are_the_formulas(&fabric);
    let before = [fabric.rules_of_members(0), fabric.rules_of_members(1)];
    launch(&fabric, X_C, &["--addressing", "invariant"]);
    assert_eq!(before, [fabric.rules_of_members(0), fabric.rules_of_members(1)], "a member joined on a third host");

    let _echoes = [X_A, X_B, Y_A, Y_B, X_C].map(|(host, name, _)| Echo::start(fabric.agent(host), name));
    for (from, to) in [(X_A, X_B), (Y_B, Y_A), (X_A, X_C), (X_C, X_B)] {
        assert_eq!(reached(&fabric, from, to, ALL, 20_000), ALL.len() * 2, "{} to {}", from.1, to.1);
    }
    for (from, to) in [(X_A, Y_A), (X_A, Y_B), (X_B, Y_A), (X_B, Y_B), (Y_A, X_A), (Y_A, X_B), (Y_B, X_A), (Y_B, X_B)] {
        assert_eq!(reached(&fabric, from, to, SOME, 700), 0, "{} to {}", from.1, to.1);
    }
    a_stolen_address_is_of_no_use(&fabric);
    guests_know_who_they_are(&fabric);
    fabric.finish();
}

fn addresses_are_the_formulas(fabric: &Fabric) {
    for (guest, session) in [(X_A, 517_u32), (X_B, 517), (Y_A, 518), (Y_B, 518)] {
        let host = [3_u32, 4][guest.0];
        let v6 = format!("fd3c:91aa:7e2:{host:x}:0:{session:x}:0:1");
        let v4 = std::net::Ipv4Addr::from_bits(10 << 24 | host << 16 | session << 6 | 1);
        assert_eq!(addresses(fabric, guest), [v6, v4.to_string()], "{}", guest.1);
    }
}

/// Root in a guest takes an address of another session's: what it sends goes nowhere, and is counted.
fn a_stolen_address_is_of_no_use(fabric: &Fabric) {
    let spoofed = || fabric.agent(0).json(&["session", "show", "x"])["drops"]["spoof"].as_u64().expect("a count");
    let before = spoofed();
    let [_, stolen] = addresses(fabric, Y_A);
    let [_, victim] = addresses(fabric, Y_B);
    let script = format!(
        "ip addr add {stolen}/32 dev eth0; ping -c 2 -W 1 -I {stolen} {victim}; ip addr del {stolen}/32 dev eth0"
    );
    let output = fabric.agent(0).run(&["vm", "exec", "xa", "--", "sh", "-c", &script]);
    assert!(text(&output.stdout).contains("2 packets transmitted, 0 packets received"), "{}", text(&output.stdout));
    assert!(spoofed() >= before + 2, "{} then {}", before, spoofed());
}

/// The metadata service tells each guest of itself, and launches nothing into other sessions.
fn guests_know_who_they_are(fabric: &Fabric) {
    let ask = |guest: Guest, request: &str| {
        let script = format!("printf '{request}' | nc -w 10 169.254.169.254 80");
        fabric.agent(guest.0).sh(guest.1, &script)
    };
    for guest in [X_A, Y_A, X_C] {
        let answer = ask(guest, "GET /v1/self HTTP/1.1\\r\\nhost: m\\r\\nconnection: close\\r\\n\\r\\n");
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_else(|| panic!("{answer}"));
        let own: Value = serde_json::from_str(body.trim()).unwrap_or_else(|error| panic!("{answer}: {error}"));
        assert_eq!(own["name"], guest.1, "{answer}");
    }
    let body = r#"{"session_network_id":518}"#;
    let length = body.len();
    let request = format!(
        "POST /v1/self/launch HTTP/1.1\\r\\nhost: m\\r\\ncontent-type: application/json\\r\\ncontent-length: {length}\\r\\nconnection: close\\r\\n\\r\\n{}",
        body
    );
    let answer = ask(X_A, &request);
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("foreign_session"), "{answer}");
    let events = fabric.agent(0).ok(&["--json", "events"]);
    assert!(events.contains("launch_denied"), "{events}");
}
