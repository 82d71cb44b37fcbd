//! Real guests of hosts that are joined by vxlan, and who is outside of their fabric: what may be reached there, and
//! what of theirs may be reached from there. Then an agent is killed again and again.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use super::fabric::{Fabric, OUTSIDE};
use super::fixture::{Agent, need, text};
use super::network::{ALL, Guest};
use super::probe::{Echo, reached};

/// How long is waited for an answer that has to come, and for one that must not.
const PATIENCE_MS: u32 = 20_000;
const DENIAL_MS: u32 = 700;

pub(crate) fn vxlan_joins_hosts_and_outside_is_reached_by_permission(_shared: &Agent) {
    let fabric = Fabric::start("vxlan");
    let allowed = ["--nat", "--egress", "192.0.2.1/32:8080/tcp", "--egress", "fd00:f::/64:8080-8090/udp"];
    for host in 0..3 {
        let words = [&["session", "create", "--id", "600", "--name", "out"], allowed.as_slice()].concat();
        fabric.agent(host).ok(&words);
    }
    let [a, b] = thread::scope(|scope| {
        let published = ["--session", "out", "--publish", "8000:7777", "--publish", "8001:7777/udp"];
        let launch = |host, name, more: Vec<&'static str>| {
            let fabric = &fabric;
            scope.spawn(move || Guest::launch(fabric, host, name, &more))
        };
        let translated = [published.as_slice(), &["--addressing", "invariant"]].concat();
        let both = [launch(0, "oa", published.to_vec()), launch(1, "ob", translated)];
        both.map(|guest| guest.join().expect("it is launched"))
    });
    let _echoes = [a.echo(&fabric), b.echo(&fabric)];
    for (from, to) in [(&a, &b), (&b, &a)] {
        assert_eq!(from.reached(&fabric, to, &ALL, PATIENCE_MS), ALL.len() * 2, "{} to {}", from.name, to.name);
    }
    for guest in [&a, &b] {
        outside_is_reached_where_it_is_allowed(&fabric, guest);
        published_ports_lead_to_the_guest(&fabric, guest);
    }
    agents_that_are_killed_leave_nothing(&fabric);
    fabric.finish();
}

/// A guest reaches what its session allows, by the host's address, and nothing else.
fn outside_is_reached_where_it_is_allowed(fabric: &Fabric, guest: &Guest) {
    let tool = need("HEARTH_PROBE");
    let _there = ["8080", "8091"]
        .map(|port| Echo::of(fabric.outside(&tool).args(["serve", "--seconds", "300", "--port", port])));
    let ask = |questions: &[&str], wait_ms| {
        let outside = OUTSIDE.map(str::to_owned);
        let [v6, v4] = outside.map(|address| reached(guest.agent(fabric), &guest.name, &[address], questions, wait_ms));
        (v6, v4)
    };
    let not_allowed =
        || guest.agent(fabric).json(&["session", "show", "out"])["drops"]["not_allowed"].as_u64().expect("a count");
    // Nobody outside knows a way back to the guest's own addresses: an answer is an answer to the host's.
    assert_eq!(
        ask(&["ask tcp ADDRESS 8080 --bytes 4000"], PATIENCE_MS).1,
        1,
        "{}: TCP to the IPv4 address",
        guest.name
    );
    assert_eq!(
        ask(&["ask udp ADDRESS 8080 --bytes 1000"], PATIENCE_MS).0,
        1,
        "{}: UDP to the IPv6 address",
        guest.name
    );
    let before = not_allowed();
    assert_eq!(ask(&["ask tcp ADDRESS 8080"], DENIAL_MS).0, 0, "{}: TCP to the IPv6 address", guest.name);
    assert_eq!(ask(&["ask udp ADDRESS 8080"], DENIAL_MS).1, 0, "{}: UDP to the IPv4 address", guest.name);
    let others = ["ask tcp ADDRESS 8091", "ask udp ADDRESS 8091", "ping ADDRESS"];
    assert_eq!(ask(&others, DENIAL_MS), (0, 0), "{}: other ports, and ICMP", guest.name);
    assert!(not_allowed() >= before + 8, "{before} then {}", not_allowed());
}

/// Whoever is outside reaches a guest by the ports of its host that were published, and by no other way.
fn published_ports_lead_to_the_guest(fabric: &Fabric, guest: &Guest) {
    let number = [3, 4][guest.host];
    let ask = |by: &str, address: &str, port: &str, wait_ms: u32| {
        let wait = wait_ms.to_string();
        // Whole: a router fragments no IPv6, and the way into a jail is narrower than the wire.
        let words = ["ask", by, address, port, "--bytes", "1300", "--wait-ms", &wait];
        let mut command = fabric.outside(&need("HEARTH_PROBE"));
        command.args(words).stdout(Stdio::null()).stderr(Stdio::null()).status().expect("run the tool").success()
    };
    for host in [format!("fd00:f::{number}"), format!("192.0.2.{number}")] {
        assert!(ask("tcp", &host, "8000", PATIENCE_MS), "{}: TCP by {host}", guest.name);
        assert!(ask("udp", &host, "8001", PATIENCE_MS), "{}: UDP by {host}", guest.name);
        assert!(!ask("tcp", &host, "8001", DENIAL_MS), "{}: TCP where UDP is published", guest.name);
        assert!(!ask("tcp", &host, "7777", DENIAL_MS), "{}: a port of the guest's", guest.name);
    }
    let shown = guest.agent(fabric).ok(&["vm", "show", &guest.name]);
    assert!(shown.contains("8000:7777") && shown.contains("8001:7777/udp"), "{shown}");
}

/// Kills the third host's agent at many moments of launches and removals; the next one has all in hand.
fn agents_that_are_killed_leave_nothing(fabric: &Fabric) {
    let agent = fabric.agent(2);
    let in_background = |words: &[&str]| {
        let mut command: Command = agent.command(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run hearth")
    };
    for after_ms in [0, 2, 4, 7, 11, 16, 25, 40, 80, 200] {
        let mut launch = in_background(&["vm", "launch", "--session", "out", "--wait", "none"]);
        // The moment is what is tested: there is nothing to wait for.
        thread::sleep(Duration::from_millis(after_ms));
        agent.kill_and_restart();
        launch.wait().expect("wait for the client");
        let mut removal = in_background(&["vm", "rm", "--all", "--timeout", "0"]);
        thread::sleep(Duration::from_millis(after_ms));
        agent.kill_and_restart();
        removal.wait().expect("wait for the client");
        let output = agent.run(&["vm", "rm", "--all", "--timeout", "0"]);
        assert!(output.status.success(), "after {after_ms} ms: {}", text(&output.stderr));
        assert_eq!(agent.json(&["vm", "ls"])["vms"].as_array().map(Vec::len), Some(0), "after {after_ms} ms");
    }
    let route = |line: &str| line.contains("fd3c:91aa:7e2:5:0:258");
    let routes = super::fabric::run("ip", &["-n", fabric.name(2), "-6", "route"]);
    assert!(!routes.lines().any(route), "routes to VMs that are gone: {routes}");
}
