//! Clusters with real guests: members that register, here and with a registrar elsewhere, and what they are given to do.

use std::process::Stdio;

use serde_json::Value;

use super::fixture::text;
use super::lab::Lab;

pub(crate) fn members_register_and_calculate(_shared: &super::fixture::Agent) {
    let lab = Lab::start("htest-clusters", 29);
    let agent = lab.agent();
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

    // A registrar that is none of ours: a program in another VM of the session.
    let driver = lab.clone_of("worker", "driver");
    let endpoint = format!("[{}]:7070", driver["addresses"][0].as_str().expect("an address"));
    let listen = ["vm", "exec", "driver", "--", "sh", "-c", "echo 'ACK {\"epoch\":7}' | nc -l -p 7070"];
    let asked = agent.command(listen).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("run hearth");
    agent.ok(&["cluster", "create", "--name", "there", "--endpoint", &endpoint]);
    let words = ["vm", "launch", "--bundle", "worker", "--session", "clones", "--cluster", "there"];
    let vm = agent.json(&[&words[..], &["--executor-id", "far", "--name", "far", "--wait", "registered"]].concat());
    let line = text(&asked.wait_with_output().expect("a registration").stdout);
    let said: Value =
        serde_json::from_str(line.trim().strip_prefix("REGISTER ").expect("a registration")).expect("JSON");
    assert_eq!((&said["executor_id"], &said["vm"], &said["generation"]), (&"far".into(), &vm["id"], &vm["generation"]));
    let members = agent.json(&["cluster", "members", "there"]);
    assert_eq!(members["members"][0]["epoch"], 7, "{members:#}");
    for cluster in ["here", "there"] {
        agent.ok(&["cluster", "rm", cluster, "--drain"]);
    }
    lab.ends_with_vms();
}
