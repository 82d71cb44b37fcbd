//! Clusters with real guests: members that register, here and with a registrar elsewhere, and what they are given to do.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use super::fabric::run;
use super::fixture::text;
use super::lab::Lab;

const NAMESPACE: &str = "htest-clusters";

/// Where the registrar elsewhere listens: outside of the fabric.
const ELSEWHERE: &str = "192.0.2.9";

/// Takes one registration, on a host's address; gives what the guest said.
fn registrar(port: u16) -> JoinHandle<String> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let registrar = std::thread::spawn(move || {
        // This thread ends with its namespace.
        let namespace = std::fs::File::open(format!("/run/netns/{NAMESPACE}")).expect("the namespace");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
        let listener = TcpListener::bind((ELSEWHERE, port)).expect("listen");
        ready.send(()).expect("the test waits");
        let (mut stream, _) = listener.accept().expect("a guest");
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).expect("a line");
        stream.write_all(b"ACK {\"epoch\":7}\n").expect("answer");
        line
    });
    is_ready.recv().expect("the registrar listens");
    registrar
}

pub(crate) fn members_register_and_calculate(_shared: &super::fixture::Agent) {
    let lab = Lab::start(NAMESPACE, 29);
    let agent = lab.agent();
    run("ip", &["-n", NAMESPACE, "address", "add", &format!("{ELSEWHERE}/32"), "dev", "lo"]);
    lab.build("worker", &[]);
    agent.ok(&["cluster", "create", "--name", "here"]);
    let launch = |executor: &str, name: &str| {
        let words =
            ["vm", "launch", "--bundle", "worker", "--cluster", "here", "--executor-id", executor, "--name", name];
        agent.run(&[&words[..], &["--wait", "registered"]].concat())
    };
    for (executor, name) in [("e-1", "one"), ("e-2", "two")] {
        assert!(launch(executor, name).status.success());
    }
    let taken = launch("e-1", "three");
    assert!(text(&taken.stderr).contains("e-1") && !taken.status.success(), "{}", text(&taken.stderr));
    let events = agent.json(&["events"]);
    let kinds: Vec<&str> =
        events["events"].as_array().expect("a list").iter().filter_map(|event| event["kind"].as_str()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "member_registered").count(), 2, "{kinds:?}");

    assert_eq!(agent.ok(&["cluster", "run", "here", "--executor", "e-2", "--", "hostname"]).trim(), "two");
    let failing = agent.run(&["cluster", "run", "here", "--", "sh", "-c", "echo said; echo wrong >&2; exit 3"]);
    assert_eq!((failing.status.code(), text(&failing.stdout)), (Some(3), "said\n".to_owned()), "{failing:?}");
    assert!(text(&failing.stderr).contains("wrong"));
    let list = agent.json(&["cluster", "calculations", "here"]);
    assert_eq!(list["calculations"].as_array().map(Vec::len), Some(2), "{list:#}");

    // A registrar that is none of ours, reached over the network once that is open.
    let asked = registrar(7070);
    agent.ok(&["session", "create", "--name", "out", "--egress", &format!("{ELSEWHERE}/32:7070")]);
    agent.ok(&["cluster", "create", "--name", "there", "--endpoint", &format!("{ELSEWHERE}:7070")]);
    let words =
        ["vm", "launch", "--bundle", "worker", "--session", "out", "--cluster", "there", "--executor-id", "far"];
    let vm = agent.json(&[&words[..], &["--name", "far", "--wait", "registered"]].concat());
    let line = asked.join().expect("a registration");
    let said: Value =
        serde_json::from_str(line.trim().strip_prefix("REGISTER ").expect("a registration")).expect("JSON");
    assert_eq!((&said["executor_id"], &said["vm"], &said["generation"]), (&"far".into(), &vm["id"], &vm["generation"]));
    let members = agent.json(&["cluster", "members", "there"]);
    assert_eq!(members["members"][0]["epoch"], 7, "{members:#}");
    for cluster in ["here", "there"] {
        agent.ok(&["cluster", "rm", cluster, "--drain"]);
    }
    lab.ends();
}
