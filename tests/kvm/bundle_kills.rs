//! `kill -9` of agent and VMM in the middle of builds, snapshots and launches: what was acknowledged is there, what was
//! not is not half there, and nothing is left.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::Agent;
use super::lab::Lab;

/// Milliseconds after the request at which something is killed. A snapshot and a launch take some hundreds.
const MOMENTS: [u64; 8] = [0, 15, 40, 90, 160, 250, 400, 600];

/// A build takes as long as a boot; the last of these is near its end on a slow host, and after it on a fast one.
const BUILD_MOMENTS: [u64; 3] = [20, 2_500, 6_500];

/// Longest wait for what was interrupted to come to its end.
const SETTLED_LIMIT: Duration = Duration::from_secs(90);

fn begin(agent: &Agent, words: &[&str]) -> Child {
    agent.command(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run hearth")
}

/// All VMs, when none of them is on its way any more.
fn settled(agent: &Agent) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let list = agent.json(&["vm", "ls"]);
        let vms = list["vms"].as_array().expect("a list").clone();
        let states = ["running", "paused", "stopped", "failed"];
        if vms.iter().all(|vm| states.contains(&vm["state"].as_str().unwrap_or_default())) {
            return vms;
        }
        assert!(begun.elapsed() < SETTLED_LIMIT, "{list:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Every bundle that is listed is whole, and there is nothing beside them.
fn bundles_are_whole(agent: &Agent) {
    let list = agent.json(&["bundle", "ls"]);
    assert_eq!(list["unreadable"].as_array().map(Vec::len), Some(0), "{list:#}");
    let bundles = list["bundles"].as_array().expect("a list");
    for bundle in bundles {
        agent.ok(&["bundle", "verify", bundle["id"].as_str().expect("an id")]);
    }
    let root = std::fs::read_dir(agent.state().join("bundles")).expect("the store");
    let names = root.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    let left: Vec<String> =
        names.filter(|name| name.starts_with(".staging") || name.starts_with(".removing")).collect();
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) fn agents_killed_in_the_middle_are_made_good(_shared: &Agent) {
    let lab = Lab::start("htest-kills", 26);
    let agent = lab.agent();
    lab.build("base", &[]);
    lab.clone_of("base", "steady");
    agent.sh("steady", "echo kept > /tmp/note");
    for (number, moment) in MOMENTS.into_iter().enumerate() {
        let name = format!("snap-{number}");
        let live: &[&str] = if number % 2 == 0 { &["--live"] } else { &[] };
        let words = ["vm", "snapshot", "steady", "--bundle-name", &name, "--diff"];
        let mut client = begin(agent, &[&words, live].concat());
        std::thread::sleep(Duration::from_millis(moment));
        agent.kill_and_restart();
        let acknowledged = client.wait().expect("wait").success();
        settled(agent);
        assert_eq!(agent.sh("steady", "cat /tmp/note"), "kept", "after {moment} ms");
        let there = agent.run(&["bundle", "show", &name]).status.success();
        assert!(there || !acknowledged, "{name} was acknowledged and is not there");
        bundles_are_whole(agent);
    }
    for (number, moment) in MOMENTS.into_iter().enumerate() {
        let name = format!("kill-{number}");
        let mut client = begin(agent, &["vm", "launch", "--bundle", "base", "--session", "clones", "--name", &name]);
        std::thread::sleep(Duration::from_millis(moment));
        agent.kill_and_restart();
        let _ = client.wait();
        // Recorded means that it is finished by the next agent, or undone with a reason.
        for vm in settled(agent).iter().filter(|vm| vm["name"] == name.as_str()) {
            if vm["state"] == "running" {
                assert_eq!(agent.sh(&name, "hostname"), name);
            }
            agent.ok(&["vm", "rm", &name, "--timeout", "0"]);
        }
    }
    for (number, moment) in BUILD_MOMENTS.into_iter().enumerate() {
        let name = format!("build-{number}");
        let mut client = begin(agent, &["bundle", "build", "--name", &name, "--memory", "64"]);
        std::thread::sleep(Duration::from_millis(moment));
        agent.kill_and_restart();
        let _ = client.wait();
        let begun = Instant::now();
        // The VM of a build is forgotten, whatever came of it.
        while settled(agent).len() > 1 {
            assert!(begun.elapsed() < SETTLED_LIMIT, "{:#}", agent.json(&["vm", "ls"]));
            std::thread::sleep(Duration::from_millis(100));
        }
        bundles_are_whole(agent);
    }
    lab.ends_with_vms();
}

pub(crate) fn vmms_killed_in_the_middle_are_told_of(_shared: &Agent) {
    let lab = Lab::start("htest-killv", 27);
    let agent = lab.agent();
    lab.build("base", &[]);
    for (number, moment) in [0, 60, 200, 350].into_iter().enumerate() {
        let name = format!("victim-{number}");
        lab.clone_of("base", &name);
        let pid = agent.vmm_pid(&name);
        let bundle = format!("of-{name}");
        let live: &[&str] = if number % 2 == 0 { &["--live"] } else { &[] };
        let mut client = begin(agent, &[&["vm", "snapshot", &name, "--bundle-name", &bundle], live].concat());
        std::thread::sleep(Duration::from_millis(moment));
        let killed = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("run kill");
        assert!(killed.success());
        let acknowledged = client.wait().expect("wait").success();
        let vm = agent.wait_for_state(&name, "failed");
        assert_eq!(vm["cause"]["code"], "vmm_killed", "{vm:#}");
        let there = agent.run(&["bundle", "show", &bundle]).status.success();
        assert!(there || !acknowledged, "{bundle} was acknowledged and is not there");
        bundles_are_whole(agent);
        agent.ok(&["vm", "rm", &name]);
    }
    lab.ends_with_vms();
}
