//! VMs that go from host to host, with real guests on three hosts: what they hold, their connections and their addresses
//! go with them; whatever is killed or cut meanwhile, each runs in one place.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::{Fabric, run};
use super::fixture::{Agent, text};
use super::probe;

/// Round trips.
const ROUNDS: usize = 4;

/// Milliseconds after a migration began at which an agent is killed. All of it takes some hundreds.
const MOMENTS: [u64; 4] = [40, 120, 200, 320];

/// Something only its memory holds, a counter, and a buffer that is written and checked again and again, in memory and on
/// a disk that all hosts see.
const LOAD: &str = "cd /tmp; head -c 16 /dev/urandom | md5sum > nonce
(i=0; while :; do i=$((i+1)); echo $i > ticks; sleep 0.1; done) > /dev/null 2>&1 &
head -c 65536 /dev/urandom > seed
(while :; do pad=x$pad; (echo $pad; cat seed seed seed seed) | head -c 262144 > buffer; md5sum buffer > sum; md5sum -c sum || echo bad > bad
dd if=buffer of=/dev/vda bs=64k conv=fsync; echo 1 > /proc/sys/vm/drop_caches
head -c 262144 /dev/vda | cmp - buffer || echo bad disk > bad
sleep 0.5; done) > /dev/null 2>&1 &
until [ -s ticks ] && [ -s sum ]; do sleep 0.1; done";

fn held(agent: &Agent) -> String {
    agent.sh("mover", "cd /tmp; cat nonce; [ -e bad ] && echo bad; cat /proc/sys/kernel/random/boot_id; hostname")
}

fn ticks(agent: &Agent) -> u64 {
    agent.sh("mover", "until read ticks < /tmp/ticks; do :; done; echo $ticks").parse().expect("a number")
}

/// Bytes have gone both ways on the one connection just now.
fn still_talks(agent: &Agent) {
    assert_eq!(agent.sh("mover", "cat /tmp/talked"), "", "the connection was cut");
    let received = || agent.sh("mover", "cat /proc/net/snmp | grep '^Tcp: [0-9]' | cut -d' ' -f11");
    let before = received();
    let begun = Instant::now();
    while received() == before {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing comes on the connection any more");
    }
}

/// The last operation of a kind.
pub(super) fn last(agent: &Agent, kind: &str) -> Value {
    let operations = agent.json(&["operation", "ls"]);
    let all = operations["operations"].as_array().expect("a list");
    all.iter().find(|operation| operation["kind"] == kind).cloned().expect("one of them")
}

/// How a migration went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved {
    /// From the request to the answer.
    pub(super) took: Duration,
    /// How long no vCPU ran, in milliseconds, as the agents have it.
    pub(super) pause_ms: f64,
    /// Of that, until it stood ready on the other host.
    pub(super) held_ms: f64,
}

/// Has `mover` go from host to host.
pub(super) fn migrate(fabric: &Fabric, from: usize, to: usize) -> Moved {
    let begun = Instant::now();
    fabric.agent(from).ok(&["vm", "migrate", "mover", "--to", fabric.name(to)]);
    let took = begun.elapsed();
    let left = last(fabric.agent(from), "vm_leave");
    let (pause_ms, moved) = (left["pause_ms"].as_f64().expect("a pause"), &left["moved"]);
    let held_ms = moved["held_ms"].as_f64().expect("a time");
    println!(
        "    {} to {}: {} ms, of which it stood still for {pause_ms:.1} (held until ready {held_ms:.1}); {} rounds, {} pages",
        fabric.name(from),
        fabric.name(to),
        took.as_millis(),
        moved["rounds"],
        moved["pages"],
    );
    assert_eq!(fabric.agent(to).vm("mover")["state"], "running");
    Moved { took, pause_ms, held_ms }
}

pub(crate) fn there_and_back_loses_nothing(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    let (a, b, c) = (fabric.agent(0), fabric.agent(1), fabric.agent(2));
    for agent in [a, c] {
        agent.ok(&["session", "create", "--id", "517"]);
    }
    let disk = tempfile::NamedTempFile::new().expect("a file for the disk");
    disk.as_file().set_len(1 << 20).expect("its size");
    let shared = format!("{}:shared", disk.path().display());
    a.launch("mover", &["--session", "517", "--memory", "128", "--disk", &shared]);
    a.launch("near", &["--session", "517", "--memory", "64"]);
    c.launch("echo", &["--session", "517", "--memory", "64"]);
    for (agent, name) in [(a, "mover"), (a, "near"), (c, "echo")] {
        probe::install(agent, name);
    }
    c.sh("echo", "setsid /tmp/probe serve --seconds 3600 > /tmp/served 2>&1 < /dev/null & sleep 1");
    let to = c.vm("echo")["addresses"][0].as_str().expect("an address").to_owned();
    let talk = format!("ask stream {to} 7777 --count 3000 --every-ms 1000 --wait-ms 25000");
    a.sh("mover", &format!("setsid sh -c '/tmp/probe {talk} > /tmp/talked 2>&1; echo over >> /tmp/talked' < /dev/null > /dev/null 2>&1 & sleep 1"));
    a.sh("mover", LOAD);
    a.sh("mover", "setsid /tmp/probe serve --seconds 3600 > /tmp/served 2>&1 < /dev/null & sleep 1");
    let (before, mut counted) = (held(a), ticks(a));
    let known = a.vm("mover");
    let addresses: Vec<String> = known["addresses"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| one.as_str().expect("an address").to_owned())
        .collect();

    refused(&fabric);
    for round in 0..ROUNDS {
        let (from, to) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        migrate(&fabric, from, to);
        let here = fabric.agent(to);
        let vm = here.vm("mover");
        for same in ["id", "addresses", "generation", "created_at"] {
            assert_eq!(vm[same], known[same], "{same}");
        }
        assert_eq!(held(here), before, "round {round}");
        let now = ticks(here);
        assert!(now > counted, "it counts on: {counted}, {now}");
        counted = now;
        still_talks(here);
        // Those it was near to and those it was far from reach it.
        for (agent, name) in [(a, "near"), (c, "echo")] {
            let reached =
                probe::reached(agent, name, &addresses, &["ping ADDRESS", "ask udp ADDRESS 7777 --bytes 100"], 3000);
            assert_eq!(reached, 2 * addresses.len(), "{name} reaches it in round {round}");
        }
        if round % 2 == 0 {
            let left = a.vm("mover");
            assert_eq!((&left["state"], &left["handed_to"]), (&"handed_over".into(), &fabric.name(1).into()));
            let told = text(&a.run(&["vm", "rm", "mover"]).stderr);
            assert!(told.contains("handed_over"), "{told}");
            // What leads there is there for the next agent as well.
            a.kill_and_restart();
            still_talks(here);
        } else {
            assert!(!b.run(&["vm", "show", "mover"]).status.success(), "it was forgotten there");
        }
    }
    killed(&fabric, &before);
    // What it wrote last, wherever it was, is in the one file.
    a.sh("mover", "cd /tmp; until md5sum -c sum; do sleep 0.1; done");
    a.ok(&["vm", "rm", "mover", "--timeout", "0"]);
    let written = std::fs::read(disk.path()).expect("the disk");
    assert!(written[..262_144].iter().any(|byte| *byte != 0), "nothing was written to the disk");
    a.ok(&["vm", "launch", "--name", "tied", "--memory", "64", "--disk", &disk.path().display().to_string()]);
    let told = text(&a.run(&["vm", "migrate", "tied", "--to", fabric.name(1)]).stderr);
    assert!(told.contains("a disk that only this host sees"), "{told}");
    a.ok(&["vm", "rm", "tied", "--timeout", "0"]);
    fabric.finish();
}

/// What makes no sense, or cannot be, is refused, and it goes on.
fn refused(fabric: &Fabric) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    let cases = [(fabric.name(0), "is this host"), ("nowhere", "there is no peer")];
    for (to, wanted) in cases {
        let told = text(&a.run(&["vm", "migrate", "mover", "--to", to]).stderr);
        assert!(told.contains(wanted), "{told}");
    }
    b.launch("mover", &["--memory", "64"]);
    let told = text(&a.run(&["vm", "migrate", "mover", "--to", fabric.name(1)]).stderr);
    assert!(told.contains("mover"), "{told}");
    b.ok(&["vm", "rm", "mover", "--timeout", "0"]);
    assert_eq!(a.vm("mover")["state"], "running");
}

/// One agent after the other is killed at each moment of a migration: it runs in one place, and is brought back.
fn killed(fabric: &Fabric, before: &str) {
    for victim in [0, 1] {
        for moment in MOMENTS {
            let a = fabric.agent(0);
            let mut client = a.command(["vm", "migrate", "mover", "--to", fabric.name(1)]);
            client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut client = client.spawn().expect("run hearth");
            std::thread::sleep(Duration::from_millis(moment));
            fabric.agent(victim).kill_and_restart();
            let _ = client.wait();
            let place = one_place(fabric, &format!("agent {victim} killed after {moment} ms"));
            assert_eq!(held(fabric.agent(place)), before);
            still_talks(fabric.agent(place));
            println!("    agent {victim} killed after {moment} ms: it is on {}", fabric.name(place));
            if place == 1 {
                migrate(fabric, 1, 0);
            }
        }
    }
}

/// The host it runs on, when everything has come to rest: there is one process of it.
fn one_place(fabric: &Fabric, when: &str) -> usize {
    let begun = Instant::now();
    let state = |host: usize| {
        let list = fabric.agent(host).json(&["vm", "ls"]);
        let all = list["vms"].as_array().expect("a list").clone();
        let vm = all.into_iter().find(|vm| vm["name"] == "mover");
        vm.map_or_else(|| "none".to_owned(), |vm| vm["state"].as_str().expect("a state").to_owned())
    };
    loop {
        let states = (state(0), state(1));
        let place = match (states.0.as_str(), states.1.as_str()) {
            ("running", "none") => Some(0),
            ("handed_over", "running") => Some(1),
            _ => None,
        };
        let processes = run(
            "sh",
            &["-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o 'vmm vm-[a-z0-9]*' | sort"],
        );
        if let Some(place) = place {
            let id = fabric.agent(place).vm("mover")["id"].as_str().expect("an id").to_owned();
            if processes.lines().filter(|line| line.ends_with(&id)).count() == 1 {
                return place;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{when}: {states:?}\n{processes}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
