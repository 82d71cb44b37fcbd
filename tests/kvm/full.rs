//! A host whose disk is full, or becomes full while a VM is on its way there: the VM goes on where it was, or there; what
//! is refused is refused with the reason, and once there is space again it goes.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::{Fabric, Host, run};
use super::fixture::{Agent, text};
use super::hand_over::processes;

/// Longest time until one host alone has the VM.
const REST_LIMIT: Duration = Duration::from_secs(90);

/// A small file system in memory; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir(&at).expect("a directory");
        run("mount", &["-t", "tmpfs", "-o", "size=64m,mode=755", "none", at.to_str().expect("a path")]);
        Self(at)
    }

    /// Fills it, but for so many bytes.
    fn fill(&self, but: u64) {
        let mut file = OpenOptions::new().append(true).create(true).open(self.filler()).expect("a file");
        let error = loop {
            if let Err(error) = file.write_all(&[1; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        let length = file.metadata().expect("its size").len();
        file.set_len(length - but).expect("some space");
    }

    fn empty(&self) {
        // It may be empty already.
        let _ = std::fs::remove_file(self.filler());
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
        // The agent's directory could not go while this was in it.
        let _ = std::fs::remove_dir_all(self.0.parent().expect("the agent's directory"));
    }
}

pub(crate) fn a_target_that_fills_up_costs_no_vm(_shared: &Agent) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let small = Small::mount(directory.path().join("state"));
    let limits = "disk_reserve_mib = 8";
    let fabric = Fabric::start_each(
        "routed",
        [Host::default(), Host { directory: Some(directory), limits, ..Host::default() }, Host::default()],
    );
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    a.launch("mover", &["--memory", "64"]);
    a.fill_file("mover", "/tmp/kept", 6_000_000);
    let id = a.vm("mover")["id"].as_str().expect("an id").to_owned();

    small.fill(4 << 20);
    let refused = text(&a.run(&["vm", "migrate", "mover", "--to", fabric.name(1)]).stderr);
    println!("    {}", refused.trim().replace('\n', "\n    "));
    assert!(refused.contains("8 MiB are kept for the VMs that run"), "{refused}");
    assert_eq!(rests(&fabric, &id), 0);
    small.empty();

    // The last of it is gone before the first page, in the middle, and at the end.
    for sent in [0, 2 << 20, 6 << 20] {
        a.json(&["vm", "migrate", "mover", "--to", fabric.name(1), "--rate", "4M", "--no-wait"]);
        wait_until_sent(a, sent);
        small.fill(0);
        let began_again = ends_where_it_cannot_write(&fabric, &small, &id);
        let host = rests(&fabric, &id);
        small.empty();
        println!(
            "    full after {} KiB: the VM {}, the agent there {}",
            sent >> 10,
            if host == 0 { "stayed" } else { "went" },
            if began_again { "ended and began again" } else { "went on" }
        );
        let here = fabric.agent(host);
        here.sh("mover", "md5sum -c /tmp/kept.sum");
        if host == 1 {
            here.ok(&["vm", "migrate", "mover", "--to", fabric.name(0)]);
            assert_eq!(rests(&fabric, &id), 0);
        }
    }
    // There is space again.
    a.ok(&["vm", "migrate", "mover", "--to", fabric.name(1)]);
    assert_eq!(rests(&fabric, &id), 1);
    b.sh("mover", "md5sum -c /tmp/kept.sum");
    b.ok(&["vm", "rm", "mover", "--timeout", "0"]);
    fabric.finish();
    drop(small);
}

/// The newest migration.
fn newest(agent: &Agent) -> Value {
    agent.json(&["migration", "ls"])["migrations"][0].clone()
}

/// Waits until that much of the newest migration has gone over, or it is over.
fn wait_until_sent(agent: &Agent, bytes: u64) {
    let begun = Instant::now();
    loop {
        let newest = newest(agent);
        if newest["finished_at"].is_string() || newest["progress"]["sent_bytes"].as_u64().unwrap_or(0) >= bytes {
            return;
        }
        assert!(begun.elapsed() < REST_LIMIT, "{newest:#}");
    }
}

/// An agent that cannot write down what it does ends; whoever watches over it starts it again, which it does as soon as
/// there is space. Until then the VM runs where it is.
fn ends_where_it_cannot_write(fabric: &Fabric, small: &Small, id: &str) -> bool {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    let begun = Instant::now();
    while !b.has_ended() {
        if newest(a)["finished_at"].is_string() {
            return false;
        }
        assert!(begun.elapsed() < REST_LIMIT, "{:#}", newest(a));
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = b.log_tail();
    assert!(log.contains("the ledger failed") && log.contains("is full"), "{log}");
    assert!(b.refusal().contains("full"));
    if ["running", "sending"].contains(&state(a, id).as_str()) {
        assert_eq!(a.sh("mover", "echo here"), "here");
    }
    small.empty();
    b.start_again();
    true
}

/// Waits until one host alone has the VM; which one.
fn rests(fabric: &Fabric, id: &str) -> usize {
    let begun = Instant::now();
    loop {
        let states = [0, 1].map(|host| state(fabric.agent(host), id));
        let (living, states) = (processes(id).len(), states.each_ref().map(String::as_str));
        match (living, states) {
            (1, ["running", "none"]) => return 0,
            // It has no addresses, so that nothing of it stays behind.
            (1, ["none", "running"]) => return 1,
            _ if begun.elapsed() < REST_LIMIT => {}
            _ => {
                let told = [0, 1].map(|host| told(fabric.agent(host), id));
                panic!("{living} processes; {states:?}\n{told:#?}\n{:#}", newest(fabric.agent(0)))
            }
        }
    }
}

/// What an agent says of a VM, and what it last wrote of anything.
fn told(agent: &Agent, id: &str) -> (Value, String) {
    let list = agent.json(&["vm", "ls"]);
    let found = list["vms"].as_array().expect("a list").iter().find(|vm| vm["id"] == id).cloned();
    (found.unwrap_or_default(), agent.log_tail())
}

fn state(agent: &Agent, id: &str) -> String {
    let list = agent.json(&["vm", "ls"]);
    let all = list["vms"].as_array().expect("a list");
    let found = all.iter().find(|vm| vm["id"] == id);
    found.and_then(|vm| vm["state"].as_str()).unwrap_or("none").to_owned()
}
