//! Volumes: disks that outlive their guests, the daemon that serves them and the agent that knows of them; and that have
//! one who writes, whoever claims to be it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::{Agent, text, volume_daemon};
use super::lab::Lab;

/// Writes numbered lines to a file of the volume, each with a digest of the one before, and flushes each.
const LOG: &str = "cd /tmp/m; (p=0; n=0; while :; do n=$((n+1)); p=$(echo $p $n | md5sum | cut -c1-32); echo $n $p >> log; sync log 2>/dev/null || sync; done) >/dev/null 2>/tmp/complaints &
echo $! > /tmp/writer
until [ -s log ]; do sleep 0.1; done";

/// Whether that file is whole: prints its last number.
const CHECK: &str = "p=0; n=0; while read -r m q; do n=$((n+1)); [ $n = $m ] || { echo line $n says $m; exit 1; }; p=$(echo $p $n | md5sum | cut -c1-32); [ $p = $q ] || { echo line $n is not what it was; exit 1; }; done < /tmp/m/log; echo $n";

/// The volume daemon's process.
fn daemon(agent: &Agent) -> u32 {
    volume_daemon(&agent.state()).expect("a volume daemon of this agent")
}

pub(super) fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("run kill");
    assert!(sent.success(), "kill {name} {pid}");
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn mounted(agent: &Agent, vm: &str, disk: &str, options: &str) {
    agent.sh(vm, &format!("mkdir -p /tmp/m && mount {options} /dev/{disk} /tmp/m"));
}

fn volume(agent: &Agent, word: &str) -> Value {
    agent.json(&["volume", "show", word])
}

fn refused(agent: &Agent, words: &[&str], with: &str) {
    let output = agent.run(words);
    assert!(!output.status.success(), "{words:?} was done");
    let said = text(&output.stderr);
    assert!(said.contains(with), "{words:?}: {said}");
}

pub(crate) fn outlive_guests_daemons_and_agents(_shared: &Agent) {
    let lab = Lab::start_with("hthv1", 151, "[volumes]\nquota_mib = 4096\nreconnect_s = 20\n");
    let agent = lab.agent();
    agent.ok(&["volume", "create", "--name", "data", "--size", "64"]);
    agent.launch("one", &["--volume", "data", "--spare-disks", "1"]);
    assert_eq!(agent.sh("one", "cat /sys/block/vda/size /sys/block/vdb/size"), "131072\n0");
    agent.sh("one", "mke2fs -q /dev/vda 2>/dev/null || mke2fs /dev/vda >/dev/null");
    mounted(agent, "one", "vda", "");
    agent.sh("one", LOG);
    refusals(agent);
    daemon_killed_while_a_guest_writes(agent);
    agent_killed_while_a_guest_writes(agent);
    handed_over_while_a_guest_writes(agent);
    let written: u64 = stop_log(agent, "one");
    agent.ok(&["vm", "rm", "one"]);
    assert_eq!(volume(agent, "data")["active"], Value::Null, "its lease was given back");

    agent.launch("two", &["--spare-disks", "2"]);
    attached_and_taken_while_it_runs(agent, written);
    another_owner_shuts_the_guest_out(agent);
    agent.ok(&["vm", "rm", "two", "--timeout", "0"]);
    let leases = agent.json(&["volume", "leases", "data"]);
    assert!(leases["history"].as_array().is_some_and(|all| all.len() >= 4), "{leases:#}");
    lab.ends();
}

/// Ends the guest's writer; checks its file, and gives the number of lines.
fn stop_log(agent: &Agent, vm: &str) -> u64 {
    agent.sh(vm, "kill -9 $(cat /tmp/writer); sync");
    let lines = agent.sh(vm, CHECK).parse().expect("a number of lines");
    agent.sh(vm, "umount /tmp/m");
    lines
}

fn refusals(agent: &Agent) {
    refused(agent, &["volume", "create", "--name", "huge", "--size", "1000000000"], "");
    refused(agent, &["volume", "create", "--name", "data", "--size", "1"], "data");
    refused(agent, &["volume", "resize", "data", "--size", "1"], "cannot shrink");
    refused(agent, &["volume", "rm", "data"], "lease");
    refused(agent, &["volume", "attach", "data", "one"], "lease");
    refused(agent, &["vm", "launch", "--volume", "nothing"], "there is no volume");
    refused(agent, &["vm", "launch", "--volume", "data"], "lease");
    refused(agent, &["vm", "snapshot", "one"], "volumes");
    let (status, answer) =
        agent.curl(&["-H", "content-type: application/json", "-d", r#"{"size_mib":0}"#], "/v1/volumes");
    assert_eq!(status, 400, "{answer}");
    let list = agent.json(&["volume", "ls"]);
    assert_eq!(list["volumes"].as_array().map(Vec::len), Some(1), "{list:#}");
}

fn last_line(agent: &Agent, vm: &str) -> u64 {
    let line = agent.sh(vm, "tail -n 1 /tmp/m/log");
    line.split(' ').next().and_then(|number| number.parse().ok()).expect("a line")
}

/// Waits until the guest has written more.
fn goes_on(agent: &Agent, vm: &str) {
    let before = last_line(agent, vm);
    until("written more", || last_line(agent, vm) > before);
}

fn daemon_killed_while_a_guest_writes(agent: &Agent) {
    for _ in 0..5 {
        let before = daemon(agent);
        signal(before, "-KILL");
        goes_on(agent, "one");
        assert_ne!(daemon(agent), before);
    }
    let volumes = agent.curl(&[], "/v1/vms/one/volumes").1;
    let volumes: Value = serde_json::from_str(&volumes).expect("JSON");
    let stats = &volumes["stats"][0];
    assert!(stats["reconnects"].as_u64().is_some_and(|times| times >= 5), "{volumes:#}");
    assert_eq!(stats["errors"], 0, "{volumes:#}");
}

fn agent_killed_while_a_guest_writes(agent: &Agent) {
    let before = daemon(agent);
    agent.kill();
    // The guest writes on meanwhile, by the daemon that nobody looks after.
    agent.start_again();
    goes_on(agent, "one");
    assert_eq!(daemon(agent), before);
}

fn handed_over_while_a_guest_writes(agent: &Agent) {
    agent.ok(&["vm", "hand-over", "one"]);
    goes_on(agent, "one");
    agent.ok(&["vm", "pause", "one"]);
    agent.ok(&["vm", "resume", "one"]);
    goes_on(agent, "one");
}

fn attached_and_taken_while_it_runs(agent: &Agent, written: u64) {
    agent.ok(&["volume", "attach", "data", "two"]);
    assert_eq!(agent.sh("two", "cat /sys/block/vda/size"), "131072");
    mounted(agent, "two", "vda", "");
    assert_eq!(agent.sh("two", CHECK), written.to_string(), "what the other guest wrote");
    agent.ok(&["volume", "resize", "data", "--size", "96"]);
    until("larger", || agent.sh("two", "cat /sys/block/vda/size") == "196608");
    let snapshot = agent.ok(&["volume", "snapshot", "data", "--name", "before"]);
    let since = volume(agent, "data")["generation"].as_u64().expect("a generation") - 1;
    agent.sh("two", "dd if=/dev/urandom of=/tmp/m/more bs=64k count=4 2>/dev/null; sync");
    let changes = agent.json(&["volume", "changes", "data", "--since", &since.to_string()]);
    let changed: u64 =
        changes["runs"].as_array().expect("runs").iter().map(|run| run["bytes"].as_u64().expect("bytes")).sum();
    assert!((256 << 10..16 << 20).contains(&changed), "{changes:#}");
    agent.sh("two", "umount /tmp/m");
    agent.ok(&["volume", "detach", "data", "two"]);
    assert_eq!(agent.sh("two", "cat /sys/block/vda/size"), "0");
    refused(agent, &["volume", "detach", "data", "two"], "does not have");
    // What was kept is as it was; two may read it, none may write then.
    agent.ok(&["volume", "create", "--name", "old", "--from-snapshot", snapshot.trim()]);
    agent.ok(&["volume", "attach", "old", "two", "--read-only"]);
    mounted(agent, "two", "vda", "-o ro");
    assert_eq!(agent.sh("two", "ls /tmp/m/more 2>/dev/null; echo none"), "none");
    refused(agent, &["volume", "lease", "old"], "shared");
    agent.ok(&["volume", "lease", "old", "--mode", "shared"]);
    agent.sh("two", "umount /tmp/m");
    agent.ok(&["volume", "detach", "old", "two"]);
}

/// Whoever has the next epoch has the volume; the guest sees errors, and nothing of it arrives any more.
fn another_owner_shuts_the_guest_out(agent: &Agent) {
    agent.ok(&["volume", "attach", "data", "two"]);
    agent.sh("two", "dd if=/dev/zero of=/dev/vda bs=1M count=1 2>/dev/null; sync");
    let taken = agent.ok(&["volume", "lease", "data", "--holder", "another", "--break"]);
    let before = agent.json(&["volume", "digest", "data"]);
    let wrote = agent.sh("two", "dd if=/dev/urandom of=/dev/vda bs=4k count=16 conv=fsync 2>&1; true");
    assert!(wrote.contains("rror"), "the guest is told: {wrote}");
    assert_eq!(agent.json(&["volume", "digest", "data"]), before, "nothing of it arrived");
    let volumes: Value = serde_json::from_str(&agent.curl(&[], "/v1/vms/two/volumes").1).expect("JSON");
    assert_eq!(volumes["stats"][0]["fenced"], true, "{volumes:#}");
    let lease = taken.trim().split(':').nth(1).expect("a lease").to_owned();
    agent.ok(&["volume", "release", "data", &lease]);
}

/// A guest that writes goes to another host and back, whatever becomes of the lease service meanwhile.
pub(crate) fn go_along_when_their_guests_move(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    a.ok(&["volume", "create", "--name", "data", "--size", "64"]);
    a.ok(&["session", "create", "--id", "517"]);
    a.ok(&["vm", "launch", "--name", "one", "--session", "517", "--volume", "data"]);
    a.sh("one", "mke2fs -q /dev/vda 2>/dev/null || mke2fs /dev/vda >/dev/null");
    mounted(a, "one", "vda", "");
    a.sh("one", LOG);
    for round in 0..3 {
        a.ok(&["vm", "migrate", "one", "--to", fabric.name(1)]);
        goes_on(b, "one");
        let leases = a.json(&["volume", "leases", "data"]);
        assert_eq!(leases["leases"][0]["host"], 4, "{leases:#}");
        if round == 1 {
            // The daemon that has the volume, and the one between it and the guest.
            for agent in [a, b] {
                signal(daemon(agent), "-KILL");
                goes_on(b, "one");
            }
        }
        b.ok(&["vm", "migrate", "one", "--to", fabric.name(0)]);
        goes_on(a, "one");
    }
    frozen_while_it_moves(&fabric);
    without_a_standby(&fabric);
    let epoch = a.json(&["volume", "leases", "data"])["epoch"].as_u64().expect("an epoch");
    assert!(epoch >= 7, "{epoch} epochs");
    let lines = stop_log(a, "one");
    println!("    {lines} lines, {epoch} epochs");
    a.ok(&["vm", "rm", "one"]);
    fabric.finish();
}

fn is_over(migration: &Value) -> bool {
    ["completed", "failed", "cancelled"].iter().any(|state| migration["state"] == *state)
}

/// The lease service answers nothing at the moment of decision: the guest stands still until it does, and then runs once.
fn frozen_while_it_moves(fabric: &Fabric) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    let frozen = daemon(a);
    let begun = a.json(&["vm", "migrate", "one", "--to", fabric.name(1), "--no-wait"]);
    let id = begun["migration_id"].as_str().expect("an id").to_owned();
    // Once the target stands by there is nothing else to ask before the decision.
    until("standing by", || volume(a, "data")["standby"] != Value::Null);
    signal(frozen, "-STOP");
    std::thread::sleep(Duration::from_secs(12));
    let states = (a.vm("one")["state"].clone(), b.vm("one")["state"].clone());
    signal(frozen, "-CONT");
    println!("    while it is frozen: {states:?}");
    let runs = |agent: &Agent| {
        let shown = agent.run(&["--json", "vm", "show", "one"]);
        serde_json::from_slice::<Value>(&shown.stdout).is_ok_and(|vm| vm["state"] == "running")
    };
    until("at rest", || {
        let migration = a.json(&["migration", "show", &id]);
        is_over(&migration) && runs(a) != runs(b)
    });
    let (here, there) = if runs(a) { (a, b) } else { (b, a) };
    goes_on(here, "one");
    assert!(!runs(there));
    if runs(b) {
        b.ok(&["vm", "migrate", "one", "--to", fabric.name(0)]);
    }
    goes_on(a, "one");
}

/// Whoever takes the standby lease away has the VM stay.
fn without_a_standby(fabric: &Fabric) {
    let a = fabric.agent(0);
    let slow = ["vm", "migrate", "one", "--to", fabric.name(1), "--rate", "4M", "--no-wait"];
    let begun = a.json(&slow);
    let id = begun["migration_id"].as_str().expect("an id").to_owned();
    until("standing by", || volume(a, "data")["standby"] != Value::Null);
    let standby = volume(a, "data")["standby"]["id"].as_str().expect("a lease").to_owned();
    a.ok(&["volume", "release", "data", &standby]);
    until("over", || is_over(&a.json(&["migration", "show", &id])));
    assert_eq!(a.wait_for_state("one", "running")["state"], "running");
    goes_on(a, "one");
    assert_eq!(volume(a, "data")["standby"], Value::Null);
}
