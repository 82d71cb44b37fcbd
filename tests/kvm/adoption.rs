//! An agent dies; the next one finds and serves what runs.

use std::time::{Duration, Instant};

use super::fixture::{Agent, need};
use super::lab::Lab;

pub(crate) fn next_agent_serves_running_vms(agent: &Agent) {
    let vm = agent.shared();
    let before = agent.vm(vm);
    agent.sh(vm, "echo kept > /tmp/kept");
    agent.kill_and_restart();
    assert_eq!(agent.sh(vm, "cat /tmp/kept"), "kept");
    let after = agent.vm(vm);
    for same in ["id", "name", "pid", "generation", "created_at"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    assert_eq!(after["state"], "running");
    agent.ok(&["vm", "pause", vm]);
    agent.kill_and_restart();
    assert_eq!(agent.vm(vm)["state"], "paused");
    agent.ok(&["vm", "resume", vm]);
    assert_eq!(agent.sh(vm, "cat /tmp/kept"), "kept");
    // What the new agent did not start itself it can still end.
    agent.ok(&["vm", "rm", vm]);
    assert!(!agent.run(&["vm", "show", vm]).status.success());
}

/// A host with a VM is upgraded: the agent is the new program, the VMM that runs is of the version before, and speaks its
/// protocol until it ends.
pub(crate) fn a_vmm_of_the_version_before_is_adopted(_shared: &Agent) {
    let agent = Agent::start_by("[uids]\nhost_number = 41\n", None, Some(need("HEARTH_PREVIOUS")));
    for name in ["old", "renewed"] {
        agent.launch(name, &["--memory", "64"]);
        agent.sh(name, "echo kept > /tmp/kept");
    }
    let pid = agent.vmm_pid("old");
    agent.upgrade();
    assert_eq!((agent.vm("old")["state"].clone(), agent.vmm_pid("old")), ("running".into(), pid));
    assert_eq!(agent.sh("old", "cat /tmp/kept"), "kept");
    agent.ok(&["vm", "pause", "old"]);
    agent.kill_and_restart();
    agent.ok(&["vm", "resume", "old"]);
    agent.ok(&["vm", "snapshot", "old", "--bundle-name", "of-old"]);
    assert_eq!((agent.sh("old", "cat /tmp/kept"), agent.vmm_pid("old")), ("kept".to_owned(), pid));
    // A process of today goes on with what one of the version before sends it, and with what it sealed.
    let earlier = agent.vmm_pid("renewed");
    agent.ok(&["vm", "hand-over", "renewed"]);
    assert_eq!(agent.sh("renewed", "cat /tmp/kept"), "kept");
    assert_ne!(agent.vmm_pid("renewed"), earlier);
    agent.ok(&["vm", "swap-out", "old", "--mode", "hibernate"]);
    assert_eq!(agent.sh("old", "cat /tmp/kept"), "kept");
    assert_ne!(agent.vmm_pid("old"), pid);
    // A VMM of today runs what one of the version before saved.
    agent.ok(&["vm", "launch", "--bundle", "of-old", "--name", "new", "--wait", "running"]);
    assert_eq!(agent.sh("new", "cat /tmp/kept"), "kept");
    agent.ok(&["vm", "swap-out", "new", "--mode", "hibernate"]);
    assert_eq!(agent.sh("new", "cat /tmp/kept"), "kept");
    agent.ok(&["vm", "rm", "new", "--timeout", "0"]);
    agent.ok(&["bundle", "rm", "of-old"]);
    agent.finish();
}

/// Fifty VMs; the next agent has looked at all of them within a second, and serves its API meanwhile.
pub(crate) fn fifty_vms_are_adopted_within_a_second(_shared: &Agent) {
    const VMS: usize = 50;
    let lab = Lab::start("htest-fifty", 38);
    let agent = lab.agent();
    lab.build("base", &[]);
    for number in 0..VMS {
        let name = format!("vm-{number}");
        lab.clone_of("base", &name);
        // Standing still they take no processor: fifty guests that wait for timers fill a small host.
        agent.ok(&["vm", "pause", &name]);
    }
    agent.kill_and_restart();
    let first = agent.json(&["vm", "ls"]);
    assert_eq!(first["vms"].as_array().map(Vec::len), Some(VMS), "the API knows them at once");
    let begun = Instant::now();
    let adopted = loop {
        let events = agent.json(&["events"]);
        let events = events["events"].as_array().expect("events");
        if let Some(event) = events.iter().rev().find(|event| event["kind"] == "vms_adopted") {
            break event["detail"].clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "they were never all looked at");
        std::thread::sleep(Duration::from_millis(20));
    };
    println!("    adopted: {adopted}");
    assert_eq!(adopted["vms"], VMS);
    let took = adopted["took_ms"].as_u64().expect("a time");
    assert!(took < 1000, "{took} ms for {VMS} VMs");
    for vm in ["vm-0", "vm-49"] {
        agent.ok(&["vm", "resume", vm]);
        assert_eq!(agent.sh(vm, "echo answers"), "answers");
    }
    lab.ends_with_vms();
}
