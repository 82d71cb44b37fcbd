//! Volumes: disks that outlive their guests, the daemon that serves them and the agent that knows of them; and that have
//! one who writes, whoever claims to be it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::{Agent, text, volume_daemon};
use super::lab::Lab;

/// Writes numbered lines to a file of the volume, each with a checksum of all before it, and flushes each. Without a
/// program for it: in a guest whose kernel is emulated one takes tenths of a second.
pub(super) const LOG: &str = "cd /tmp/m; (p=0; n=0; while :; do n=$((n+1)); p=$(((p*1103515245+n)%2147483648)); echo $n $p >> log; sync log 2>/dev/null || sync; done) >/dev/null 2>/tmp/complaints &
echo $! > /tmp/writer
until [ -s log ]; do sleep 0.1; done";

/// Whether such a file is whole; gives its last number.
fn check(log: &str) -> u64 {
    let mut sum: u64 = 0;
    for (line, number) in log.lines().zip(1_u64..) {
        sum = (sum * 1_103_515_245 + number) % (1 << 31);
        assert_eq!(line, format!("{number} {sum}"), "line {number}");
    }
    log.lines().count() as u64
}

/// The volume daemon's process.
pub(super) fn daemon(agent: &Agent) -> u32 {
    volume_daemon(&agent.state()).expect("a volume daemon of this agent")
}

pub(super) fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("run kill");
    assert!(sent.success(), "kill {name} {pid}");
}

/// Waits until something is so.
pub(super) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(super) fn mounted(agent: &Agent, vm: &str, disk: &str, options: &str) {
    agent.sh(vm, &format!("mkdir -p /tmp/m && mount {options} /dev/{disk} /tmp/m"));
}

pub(super) fn volume(agent: &Agent, word: &str) -> Value {
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
    let bundle = lab.build("disks", &["--spare-disks", "2"]);
    assert_eq!(bundle["spare_disks"], 2, "{bundle:#}");
    launched(agent, "one", &["--volume", "data"]);
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

    launched(agent, "two", &[]);
    attached_and_taken_while_it_runs(agent, written);
    another_owner_shuts_the_guest_out(agent);
    agent.ok(&["vm", "rm", "two", "three", "--timeout", "0"]);
    let leases = agent.json(&["volume", "leases", "data"]);
    assert!(leases["history"].as_array().is_some_and(|all| all.len() >= 4), "{leases:#}");
    lab.ends();
}

/// A VM of the bundle whose disks are empty.
fn launched(agent: &Agent, name: &str, more: &[&str]) {
    let words = ["vm", "launch", "--bundle", "disks", "--name", name, "--wait", "running"];
    agent.ok(&[words.as_slice(), more].concat());
}

/// How many lines the file has that the guest reads from its volume; all of them are as they were written.
fn whole_lines(agent: &Agent, vm: &str) -> u64 {
    check(&agent.sh(vm, "echo 3 > /proc/sys/vm/drop_caches; cat /tmp/m/log"))
}

/// Ends the guest's writer; checks its file, and gives the number of lines.
pub(super) fn stop_log(agent: &Agent, vm: &str) -> u64 {
    agent.sh(vm, "kill -9 $(cat /tmp/writer); sync");
    let lines = whole_lines(agent, vm);
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

/// Waits until the guest has written more; gives the number of its last line.
pub(super) fn goes_on(agent: &Agent, vm: &str) -> u64 {
    let before = last_line(agent, vm);
    let mut last = before;
    until("written more", || {
        last = last_line(agent, vm);
        last > before
    });
    last
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
    assert_eq!(whole_lines(agent, "two"), written, "what the other guest wrote");
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

/// Two VMMs, one volume: after the conversion the guest that had it sees errors and nothing of it arrives any more, and
/// what is there is exactly what the next owner writes.
fn another_owner_shuts_the_guest_out(agent: &Agent) {
    agent.ok(&["volume", "attach", "data", "two"]);
    agent.sh("two", "dd if=/dev/zero of=/dev/vda bs=1M count=1 2>/dev/null; sync");
    let lease_of = |words: &str| words.trim().split(':').nth(1).expect("a lease").to_owned();
    let standby = lease_of(&agent.ok(&["volume", "lease", "data", "--holder", "another", "--mode", "standby"]));
    agent.sh("two", "dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null");
    let active = volume(agent, "data")["active"].clone();
    let (id, epoch) = (active["id"].as_str().expect("a lease"), active["epoch"].to_string());
    agent.ok(&["volume", "convert", "data", "--from", id, "--to", &standby, "--epoch", &epoch]);
    let before = agent.json(&["volume", "digest", "data"]);
    writes_are_refused(agent, "two");
    assert_eq!(agent.json(&["volume", "digest", "data"]), before, "nothing of it arrived");
    let volumes: Value = serde_json::from_str(&agent.curl(&[], "/v1/vms/two/volumes").1).expect("JSON");
    assert_eq!(volumes["stats"][0]["fenced"], true, "{volumes:#}");
    agent.ok(&["volume", "release", "data", &standby]);

    launched(agent, "three", &["--volume", "data"]);
    agent.sh("three", "yes three | head -c 1048576 | dd of=/dev/vda bs=64k conv=fsync 2>/dev/null");
    writes_are_refused(agent, "two");
    let found = agent.sh("three", "echo 3 > /proc/sys/vm/drop_caches; head -c 1048576 /dev/vda | md5sum");
    assert_eq!(found, agent.sh("three", "yes three | head -c 1048576 | md5sum"), "the next owner's, all of it");
}

fn writes_are_refused(agent: &Agent, vm: &str) {
    let wrote = agent.sh(vm, "dd if=/dev/urandom of=/dev/vda bs=4k count=16 conv=fsync 2>&1; true");
    assert!(wrote.contains("rror"), "the guest is told: {wrote}");
}
