//! What a guest sees of being moved: how long it stood still by its own time stamp counter, whether its clock ever went
//! back, and which packets of a numbered stream reached it, in which order.

use std::io::Read as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::Agent;
use super::probe;

/// Datagrams a second, and how many seconds of them there are: what a guest can send on hosts that emulate its kernel.
const RATE: u32 = 120;
const SECONDS: u32 = 8;

/// Ways during the stream.
const WAYS: usize = 8;

/// A program that runs beside a test, and what it says in the end.
struct Beside(Child);

impl Beside {
    /// In a guest, cut off from whoever started it: who starts it is on one host only.
    fn in_guest(agent: &Agent, vm: &str, words: &str, file: &str) {
        let script = format!("setsid /tmp/probe {words} > /tmp/{file} 2>&1 < /dev/null & sleep 1; cat /tmp/{file}");
        let said = agent.sh(vm, &script);
        assert!(said.contains("true"), "{words}: {said}");
    }

    fn start(agent: &Agent, vm: &str, words: &str) -> Self {
        let mut command = agent.command(["vm", "exec", vm, "--", "sh", "-c", &format!("/tmp/probe {words}")]);
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("run hearth"))
    }

    /// The last line of what it says.
    fn result(mut self) -> Value {
        let mut said = String::new();
        self.0.stdout.take().expect("its output").read_to_string(&mut said).expect("read");
        self.0.wait().expect("wait");
        last_line(&said)
    }
}

fn last_line(said: &str) -> Value {
    let line = said.trim().lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{said}: {error}"))
}

/// What a program in a guest says in the end: when it has ended.
fn said_in_guest(agent: &Agent, vm: &str, file: &str, verb: &str) -> Value {
    let begun = Instant::now();
    loop {
        let said = agent.sh(vm, &format!("pidof probe > /dev/null; cat /tmp/{file}"));
        let last = said.trim().lines().last().unwrap_or_default().to_owned();
        let is_result = !last.contains("\"listening\"") && !last.contains("\"watching\"");
        if is_result && last.contains(verb) {
            return last_line(&said);
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{said}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("no {name} in {value}"))
}

/// The last way's pause, and what of it was until it stood ready, in milliseconds.
fn pause(agent: &Agent) -> (f64, f64) {
    let list = agent.json(&["migration", "ls"]);
    let last = &list["migrations"][0];
    (number(last, "pause_ms"), number(&last["moved"], "held_ms"))
}

/// With a VM on the first host, and another one of its session on the third, of a bundle that is there.
pub(crate) fn of_moves_in_the_guest(fabric: &Fabric, mover: &str) {
    let (a, c) = (fabric.agent(0), fabric.agent(2));
    c.ok(&["session", "create", "--id", "517"]);
    c.ok(&["vm", "launch", "--bundle", "base", "--name", "far", "--session", "517"]);
    probe::install(a, mover);
    probe::install(c, "far");
    no_packet_is_lost(fabric, mover);
    it_stood_still_as_long_as_is_told(fabric, mover);
    c.ok(&["vm", "rm", "far", "--timeout", "0"]);
}

/// Every numbered datagram reaches the guest once and in order, wherever it is at the moment.
fn no_packet_is_lost(fabric: &Fabric, mover: &str) {
    let (a, c) = (fabric.agent(0), fabric.agent(2));
    let address = a.vm(mover)["addresses"][0].as_str().expect("an address").to_owned();
    // Received by the kernel as they come, read afterwards: on these hosts a program needs a guest's processor for longer
    // than the kernel does.
    Beside::in_guest(a, mover, "count udp 7000 --seconds 90", "counted");
    let send = format!("send udp {address} 7000 --rate {RATE} --seconds {SECONDS}");
    let sending = Beside::start(c, "far", &send);
    let begun = Instant::now();
    let mut place = 0;
    for _ in 0..WAYS {
        let to = 1 - place;
        fabric.agent(place).ok(&["vm", "migrate", mover, "--to", fabric.name(to)]);
        place = to;
    }
    println!("    {WAYS} ways in {:.1} s", begun.elapsed().as_secs_f64());
    let sent = sending.result();
    let counted = said_in_guest(fabric.agent(place), mover, "counted", "count");
    println!("    sent {sent}\n    seen {counted}");
    assert_eq!(number(&sent, "unsent"), 0.0, "{sent}");
    assert!(begun.elapsed() < Duration::from_secs(SECONDS.into()) || number(&sent, "sent") > 0.0);
    for what in ["lost", "duplicates", "out_of_order"] {
        assert_eq!(number(&counted, what), 0.0, "{counted}");
    }
    if place == 1 {
        fabric.agent(1).ok(&["vm", "migrate", mover, "--to", fabric.name(0)]);
    }
}

/// Its own counter shows each pause, and no clock of it ever goes back or jumps.
fn it_stood_still_as_long_as_is_told(fabric: &Fabric, mover: &str) {
    let a = fabric.agent(0);
    // Without a move: what the host itself takes away.
    Beside::in_guest(a, mover, "stall --seconds 4", "floor");
    let floor = said_in_guest(a, mover, "floor", "looks");
    Beside::in_guest(a, mover, "stall --seconds 12", "stalls");
    let (mut place, mut pauses) = (0, Vec::new());
    for _ in 0..WAYS {
        let to = 1 - place;
        fabric.agent(place).ok(&["vm", "migrate", mover, "--to", fabric.name(to)]);
        pauses.push(pause(fabric.agent(place)));
        place = to;
    }
    let seen = said_in_guest(fabric.agent(place), mover, "stalls", "looks");
    println!("    pauses (until ready) as told: {pauses:.1?}\n    floor {floor}\n    seen {seen}");
    for clock in ["backwards", "clock_backwards"] {
        assert_eq!(number(&seen, clock), 0.0, "{seen}");
    }
    // Its two clocks agree on how long all of it took.
    let apart = number(&seen, "elapsed_ms") - number(&seen, "clock_elapsed_ms");
    assert!(apart.abs() < 50.0, "{seen}");
    let told: f64 = pauses.iter().map(|(_, held)| held).sum();
    assert!(number(&seen, "gaps_ms") >= 0.8 * told, "it saw less than was told ({told:.1} ms): {seen}");
}
