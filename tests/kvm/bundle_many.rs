//! Many VMs from one bundle, one after the other and at once: all register with their cluster, and nothing is left.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::fixture::{Agent, descriptors, text};
use super::lab::Lab;

fn launch(agent: &Agent, name: &str) {
    let words = [
        "vm",
        "launch",
        "--bundle",
        "base",
        "--session",
        "many",
        "--cluster",
        "work",
        "--executor-id",
        name,
        "--name",
        name,
        "--wait",
        "registered",
    ];
    let vm = agent.json(&words);
    assert_eq!(vm["state"], "running", "{vm:#}");
    assert!(vm["registered_at"].is_string(), "{vm:#}");
}

/// How many descriptors it has when its jails are ready (`fabric.pool` of hearth.toml) and, within a time, no more than
/// `most`: what watched a VM's process is closed a moment after the VM is told as removed, and jails are made ahead in
/// the background.
fn at_rest(pid: u32, most: usize) -> usize {
    const JAILS: usize = 4;
    let is_namespace = |link: &Path| link.to_string_lossy().starts_with("net:[");
    let namespaces = || {
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the agent runs");
        links.flatten().filter(|link| std::fs::read_link(link.path()).is_ok_and(|link| is_namespace(&link))).count()
    };
    let begun = Instant::now();
    // Its own namespace is there too.
    while (namespaces() != JAILS + 1 || descriptors(pid) > most) && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    descriptors(pid)
}

pub(crate) fn a_hundred_in_a_row_and_thirty_at_once_leave_nothing(_shared: &Agent) {
    let lab = Lab::start("htest-many", 28);
    let agent = lab.agent();
    lab.build("base", &[]);
    agent.ok(&["cluster", "create", "--name", "work", "--deadline", "120s"]);
    // With IPv4 addresses, which rest for a while, a session has room for 62 VMs on a host.
    agent.ok(&["session", "create", "--name", "many", "--no-ipv4"]);
    launch(agent, "first");
    agent.ok(&["vm", "rm", "first", "--timeout", "0"]);
    let before = at_rest(agent.pid(), usize::MAX);
    for number in 0..100 {
        let name = format!("row-{number}");
        launch(agent, &name);
        agent.ok(&["vm", "rm", &name, "--timeout", "0"]);
    }
    let names: Vec<String> = (0..30).map(|number| format!("at-once-{number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| launch(agent, name));
        }
    });
    let members = agent.json(&["cluster", "members", "work"]);
    assert_eq!(members["members"].as_array().map(Vec::len), Some(30), "{members:#}");
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| agent.ok(&["vm", "rm", name, "--timeout", "0"]));
        }
    });
    let now = at_rest(agent.pid(), before + 4);
    let open = || Command::new("ls").arg("-l").arg(format!("/proc/{}/fd", agent.pid())).output().expect("run ls");
    assert!(now <= before + 4, "the agent has {now} descriptors, it had {before}:\n{}", text(&open().stdout));
    agent.ok(&["cluster", "rm", "work"]);
    lab.ends();
}
