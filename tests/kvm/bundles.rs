//! Bundles with real guests: what clones share, what they do not, and what a snapshot holds.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::fixture::Agent;
use super::lab::Lab;

/// Holds a random word and a counter in memory; a new identity is noted by a hook. The counter is slow: each start of a
/// program takes an emulated kernel tenths of a second, and ten guests of that would fill the host.
const WARM_UP: &str = "mkdir -p /etc/hearth/identity.d; \
    printf '#!/bin/sh\\necho $HEARTH_GENERATION > /tmp/noted\\n' > /etc/hearth/identity.d/10-note; \
    chmod +x /etc/hearth/identity.d/10-note; \
    head -c 16 /dev/urandom | md5sum > /tmp/nonce; \
    i=0; echo warm; while :; do i=$((i+1)); echo $i >> /tmp/ticks; sleep 5; done";

/// Clones that are launched at once.
const CLONES: usize = 10;

/// What a clone says of itself, one line each.
const SAY: &str = "cat /tmp/nonce; tail -n 1 /tmp/ticks; hostname; cat /etc/machine-id /sys/class/net/eth0/address /tmp/noted; \
    head -c 64 /dev/urandom | md5sum";

struct Clone {
    name: String,
    vm: Value,
    said: Vec<String>,
}

fn ask(agent: &Agent, name: &str) -> Vec<String> {
    agent.sh(name, SAY).lines().map(str::to_owned).collect()
}

fn ticks(said: &[String]) -> u64 {
    said[1].parse().expect("a number")
}

pub(crate) fn ten_clones_are_ten_others(_shared: &Agent) {
    let lab = Lab::start("htest-clones", 21);
    let agent = lab.agent();
    let bundle = lab.build("warm", &["--warmup", WARM_UP, "--ready-marker", "warm"]);
    assert_eq!((&bundle["name"], &bundle["vms"]), (&"warm".into(), &0.into()), "{bundle:#}");
    let names: Vec<String> = (0..CLONES).map(|number| format!("clone-{number}")).collect();
    let vms: Vec<Value> = std::thread::scope(|scope| {
        let launches: Vec<_> = names.iter().map(|name| scope.spawn(|| lab.clone_of("warm", name))).collect();
        launches.into_iter().map(|launch| launch.join().expect("a launch")).collect()
    });
    let clones: Vec<Clone> =
        names.iter().zip(vms).map(|(name, vm)| Clone { name: name.clone(), vm, said: ask(agent, name) }).collect();

    // A restore, not a boot: all hold the same word, and the counter goes on.
    let first = &clones[0];
    for clone in &clones {
        assert_eq!(clone.said[0], first.said[0], "the word in memory of {}", clone.name);
        assert_eq!(clone.vm["bundle_id"], bundle["id"]);
        assert_eq!(clone.said[2], clone.name);
        assert_eq!(clone.vm["generation"], clone.said[3].as_str(), "the machine id is the generation");
        assert_eq!(clone.said[3], clone.said[5], "the hook ran before the VM did");
    }
    let differing = |what: &str, value: &dyn Fn(&Clone) -> String| {
        let values: BTreeSet<String> = clones.iter().map(value).collect();
        assert_eq!(values.len(), CLONES, "{what}: {values:?}");
    };
    differing("machine id", &|clone| clone.said[3].clone());
    differing("hardware address", &|clone| clone.said[4].clone());
    differing("random bytes", &|clone| clone.said[6].clone());
    differing("IPv6 address", &|clone| clone.vm["addresses"][0].as_str().expect("an address").to_owned());
    differing("IPv4 address", &|clone| clone.vm["addresses"][1].as_str().expect("an address").to_owned());
    for clone in &clones {
        clock_is_right(agent, &clone.name);
        assert!(ticks(&clone.said) >= 1, "{}: {:?}", clone.name, clone.said);
        agent.sh(&clone.name, &format!("until [ $(tail -n 1 /tmp/ticks) -gt {} ]; do sleep 1; done", clone.said[1]));
    }
    clones_share_memory(agent, &names);
    let other = clones[1].vm["addresses"][0].as_str().expect("an address");
    agent.sh(&first.name, &format!("ping -c 2 -W 10 {other}"));
    let in_use = agent.run(&["bundle", "rm", "warm"]);
    assert!(super::fixture::text(&in_use.stderr).contains("is used by 10 VMs"), "{in_use:?}");
    for name in &names {
        agent.ok(&["vm", "rm", name, "--timeout", "0"]);
    }
    lab.ends();
}

/// Within 100 ms, as far as a guest's round trip lets one see.
fn clock_is_right(agent: &Agent, vm: &str) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let before = now();
    let stats = agent.json(&["vm", "stats", vm]);
    let after = now();
    let guest = stats["guest"]["wall_clock"].as_str().expect("a time");
    let guest: jiff::Timestamp = guest.parse().expect("a time");
    let guest = Duration::from_nanos(u64::try_from(guest.as_nanosecond()).expect("after 1970"));
    let slack = Duration::from_millis(100);
    assert!(guest + slack >= before && guest <= after + slack, "{vm}: {before:?} {guest:?} {after:?}");
}

/// The sum of what clones take is far below what their memory would.
fn clones_share_memory(agent: &Agent, names: &[String]) {
    let pss: u64 = names
        .iter()
        .map(|name| {
            let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.vmm_pid(name)));
            let rollup = rollup.expect("the VMM's memory");
            let line = rollup.lines().find(|line| line.starts_with("Pss:")).expect("a line");
            line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number")
        })
        .sum();
    println!("    {} clones of 64 MiB take {} KiB together, {} each", names.len(), pss, pss / names.len() as u64);
    assert!(pss < names.len() as u64 * 64 * 1024 / 4, "{pss} KiB");
}

/// What a guest says it holds is in no bundle of it unasked: as it runs, and as it stands still.
fn no_bundle_has_secrets_unasked(agent: &Agent) {
    agent.sh("one", "mkdir -p /run/hearth/secrets.d; : > /run/hearth/secrets.d/token");
    let refused = |more: &[&str]| {
        let output = agent.run(&[&["vm", "snapshot", "one"], more].concat());
        let said = super::fixture::text(&output.stderr);
        assert!(!output.status.success() && said.contains("(token)") && said.contains("--with-secrets"), "{said}");
    };
    refused(&[]);
    refused(&["--live"]);
    assert_eq!(agent.sh("one", "cat /tmp/note"), "second", "the VM goes on");
    agent.ok(&["vm", "pause", "one"]);
    refused(&[]);
    agent.ok(&["vm", "snapshot", "one", "--bundle-name", "held", "--with-secrets"]);
    agent.ok(&["vm", "resume", "one"]);
    agent.sh("one", "rm /run/hearth/secrets.d/token");
    agent.ok(&["bundle", "rm", "held"]);
    agent.ok(&["vm", "snapshot", "one", "--bundle-name", "free"]);
    agent.ok(&["bundle", "rm", "free"]);
}

pub(crate) fn snapshots_hold_what_was_there_and_differences_build_on_them(_shared: &Agent) {
    let lab = Lab::start("htest-snaps", 22);
    let agent = lab.agent();
    lab.build("base", &["--vcpus", "2"]);
    lab.clone_of("base", "one");
    agent.sh("one", "nproc > /tmp/cpus; echo first > /tmp/note");
    let full = agent.json(&["vm", "snapshot", "one", "--bundle-name", "full"]);
    assert_eq!((&full["parent"], &full["vcpus"]), (&Value::Null, &2.into()));
    agent.sh("one", "echo second > /tmp/note");
    let one = agent.json(&["vm", "snapshot", "one", "--bundle-name", "one-diff", "--diff"]);
    let base = agent.json(&["bundle", "show", "base"]);
    assert_eq!(one["parent"], base["id"]);
    let size = |bundle: &Value| bundle["disk_bytes"].as_u64().expect("a size");
    assert!(size(&one) * 2 < size(&full), "a difference of {} to {}", size(&one), size(&full));
    // Most of it while it runs: the same guest, as a whole and as a difference.
    let live = agent.json(&["vm", "snapshot", "one", "--bundle-name", "live", "--live"]);
    let live_diff = agent.json(&["vm", "snapshot", "one", "--bundle-name", "live-diff", "--live", "--diff"]);
    assert_eq!((&live["parent"], &live_diff["parent"]), (&Value::Null, &base["id"]));
    assert!(size(&live_diff) * 2 < size(&live), "a difference of {} to {}", size(&live_diff), size(&live));
    for bundle in ["live", "live-diff"] {
        agent.ok(&["bundle", "verify", bundle]);
        lab.clone_of(bundle, "again");
        assert_eq!(agent.sh("again", "cat /tmp/note /tmp/cpus; hostname"), "second\n2\nagain", "{bundle}");
        agent.ok(&["vm", "rm", "again", "--timeout", "0"]);
        agent.ok(&["bundle", "rm", bundle]);
    }
    assert_eq!(agent.sh("one", "cat /tmp/note /tmp/cpus"), "second\n2", "the VM goes on");
    no_bundle_has_secrets_unasked(agent);

    lab.clone_of("one-diff", "two");
    assert_eq!(agent.sh("two", "cat /tmp/note /tmp/cpus; hostname"), "second\n2\ntwo");
    agent.sh("two", "echo third > /tmp/note");
    agent.ok(&["vm", "pause", "two"]);
    let two = agent.json(&["vm", "snapshot", "two", "--bundle-name", "two-diff", "--diff"]);
    assert_eq!((&two["parent"], &agent.vm("two")["state"]), (&one["id"], &"paused".into()));
    agent.ok(&["vm", "resume", "two"]);
    assert_eq!(agent.sh("two", "cat /tmp/note"), "third");
    for vm in ["one", "two"] {
        agent.ok(&["vm", "rm", vm, "--timeout", "0"]);
    }
    for (parent, child) in [("base", &one), ("one-diff", &two)] {
        let refused = super::fixture::text(&agent.run(&["bundle", "rm", parent]).stderr);
        assert!(
            refused.contains("is built on by") && refused.contains(child["id"].as_str().expect("an id")),
            "{refused}"
        );
    }
    agent.ok(&["bundle", "compact", "two-diff", "--name", "flat"]);
    for bundle in ["two-diff", "one-diff", "base"] {
        agent.ok(&["bundle", "rm", bundle]);
    }
    lab.clone_of("flat", "three");
    lab.clone_of("full", "four");
    assert_eq!(agent.sh("three", "cat /tmp/note"), "third");
    assert_eq!(agent.sh("four", "cat /tmp/note"), "first");
    agent.ok(&["bundle", "verify", "flat"]);
    lab.ends_with_vms();
}

pub(crate) fn ten_cycles_lose_nothing_under_load(_shared: &Agent) {
    let lab = Lab::start("htest-cycles", 23);
    let agent = lab.agent();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let disk = directory.path().join("disk");
    std::fs::File::create(&disk).and_then(|file| file.set_len(8 << 20)).expect("a disk file");
    let disk = disk.to_str().expect("a path").to_owned();
    let words = ["vm", "launch", "--name", "load-0", "--session", "clones", "--memory", "64", "--disk", &disk];
    agent.ok(&words);
    lab.build("peer", &[]);
    let peer = lab.clone_of("peer", "peer");
    let peer = peer["addresses"][0].as_str().expect("an address");
    agent.sh(
        "load-0",
        "mke2fs -q /dev/vda 2>/dev/null || mke2fs /dev/vda > /dev/null; mkdir -p /tmp/m; mount /dev/vda /tmp/m",
    );
    // A pattern in memory, and a disk and a network that are busy in every freeze.
    agent.fill_file("load-0", "/tmp/pattern", 1 << 20);
    let load = format!(
        "setsid sh -c 'i=0; while :; do i=$((i+1)); echo line $i >> /tmp/m/log; sync; done' < /dev/null > /dev/null 2>&1 & \
         setsid sh -c 'while :; do ping -c 20 -i 0.2 {peer} > /dev/null 2>&1 || sleep 1; done' < /dev/null > /dev/null 2>&1 &"
    );
    agent.sh("load-0", &load);
    let mut lines = 0;
    for cycle in 1..=10 {
        let (before, after) = (format!("load-{}", cycle - 1), format!("load-{cycle}"));
        let bundle = format!("cycle-{cycle}");
        // vsock under load as well: a program that talks all the time is cut off by the restore, and only it.
        let mut talk = agent.command(["vm", "exec", &before, "--", "sh", "-c", "while :; do echo; done"]);
        let mut talk =
            talk.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("run");
        // Held for all of its memory, or for what it wrote last only.
        let live: &[&str] = if cycle % 2 == 0 { &["--live"] } else { &[] };
        agent.ok(&[&["vm", "snapshot", &before, "--bundle-name", &bundle], live].concat());
        // The disk belongs to the next: two writers would spoil it.
        agent.ok(&["vm", "rm", &before, "--timeout", "0"]);
        let _ = talk.wait();
        let words = ["vm", "launch", "--bundle", &bundle, "--session", "clones", "--name", &after, "--disk", &disk];
        agent.ok(&words);
        assert_eq!(agent.sh(&after, "md5sum -c /tmp/pattern.sum"), "/tmp/pattern: OK", "cycle {cycle}");
        let now: u64 = agent.sh(&after, "wc -l < /tmp/m/log").trim().parse().expect("a number");
        assert!(now >= lines, "cycle {cycle}: {now} lines, there were {lines}");
        lines = now;
    }
    agent.sh("load-10", "ping -c 1 -W 10 169.254.1.1");
    agent.ok(&["vm", "exec", "load-10", "--", "sh", "-c", "killall sh 2>/dev/null; true"]);
    agent.ok(&["vm", "stop", "load-10"]);
    let check = std::process::Command::new("e2fsck").args(["-f", "-p", &disk]).output().expect("run e2fsck");
    // 1: what a journal-less file system has after a power cut was set right.
    assert!(check.status.code().is_some_and(|code| code <= 1), "{}", super::fixture::text(&check.stdout));
    assert!(lines > 10, "{lines} lines");
    lab.ends_with_vms();
}
