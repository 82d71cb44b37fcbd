//! The agent killed a hundred times while it is made to work, and a long time of work without that: what was
//! acknowledged holds, what was removed is gone, connections into VMs are never cut, and nothing grows.

use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::{Agent, descriptors, status_kib};
use super::lab::Lab;
use super::probe;

/// Times the agent is killed.
const KILLS: u64 = 100;

/// Longest time between a start of the agent and its end, in milliseconds.
const LIFE_MS_MAX: u64 = 900;

/// Of so many lives one goes on until something was done in it, however slow the host is.
const LIVES_TO_A_DEED: u64 = 4;

/// Longest wait for that.
const DEED_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait for what was interrupted to come to its end.
const SETTLED_LIMIT: Duration = Duration::from_secs(90);

/// Minutes of work without kills when nothing is said; `HEARTH_SOAK_MINUTES` says.
const SOAK_MINUTES: u64 = 2;

/// What the clients know was acknowledged.
#[derive(Default)]
struct Known {
    /// Names of VMs whose removal was acknowledged.
    removed: Mutex<Vec<String>>,
    /// Requests that were answered well, and those that were not.
    done: AtomicU64,
    failed: AtomicU64,
    over: AtomicBool,
}

impl Known {
    fn ask(&self, agent: &Agent, words: &[&str]) -> bool {
        let mut client = agent.command(words);
        let output = client.stdin(Stdio::null()).output().expect("run hearth");
        let count = if output.status.success() { &self.done } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
        output.status.success()
    }

    /// Waits until one more request was answered well.
    fn wait_for_a_deed(&self) {
        let before = self.done.load(Ordering::Relaxed);
        let begun = Instant::now();
        while self.done.load(Ordering::Relaxed) == before {
            assert!(begun.elapsed() < DEED_LIMIT, "nothing was done for {DEED_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn go_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }
}

/// Launches a VM, runs a program in it, removes it, again and again. In no session: addresses rest for two minutes, and a
/// session has 62 of IPv4 on a host.
fn launches(agent: &Agent, known: &Known, who: &str) {
    for number in 0.. {
        if !known.go_on() {
            return;
        }
        let name = format!("{who}-{number}");
        known.ask(agent, &["vm", "launch", "--bundle", "base", "--name", &name]);
        known.ask(agent, &["vm", "exec", &name, "--no-stdin", "--timeout", "20s", "--", "true"]);
        if known.ask(agent, &["vm", "rm", &name, "--timeout", "0"]) {
            known.removed.lock().expect("the list").push(name);
        }
    }
}

/// Snapshots of one that goes on, and programs in it.
fn snapshots(agent: &Agent, known: &Known) {
    for number in 0.. {
        if !known.go_on() {
            return;
        }
        let name = format!("snap-{number}");
        known.ask(agent, &["vm", "snapshot", "steady", "--bundle-name", &name, "--diff"]);
        known.ask(agent, &["vm", "exec", "steady", "--no-stdin", "--timeout", "20s", "--", "true"]);
        known.ask(agent, &["bundle", "rm", &name]);
    }
}

/// One that is moved out and woken.
fn swaps(agent: &Agent, known: &Known) {
    while known.go_on() {
        known.ask(agent, &["vm", "swap-out", "sleepy", "--mode", "hibernate"]);
        known.ask(agent, &["vm", "wake", "sleepy"]);
    }
}

/// A host with a bundle, two VMs that stay, and a connection between two others that goes on whatever the agent does.
fn set_up(lab: &Lab) {
    let agent = lab.agent();
    lab.build("base", &[]);
    for name in ["steady", "sleepy", "talker", "echo"] {
        lab.clone_of("base", name);
    }
    begin_talk(agent);
    for name in ["steady", "sleepy"] {
        agent.sh(name, &format!("echo {name} > /tmp/kept"));
    }
}

/// Has `talker` talk to `echo`, on one connection, for a long time.
pub(super) fn begin_talk(agent: &Agent) {
    for name in ["talker", "echo"] {
        probe::install(agent, name);
    }
    let to = agent.vm("echo")["addresses"][0].as_str().expect("an address").to_owned();
    // In sessions of their own: a program that is run by exec ends with the agent that runs it.
    agent.sh("echo", "setsid /tmp/probe serve --seconds 3600 > /tmp/served 2>&1 < /dev/null & sleep 1");
    let talk = format!("ask stream {to} 7777 --count 3000 --every-ms 1000 --wait-ms 25000");
    agent.sh("talker", &format!("setsid sh -c '/tmp/probe {talk} > /tmp/talked 2>&1; echo over >> /tmp/talked' < /dev/null > /dev/null 2>&1 & sleep 1"));
}

/// The connection is there, and bytes have gone both ways on it just now.
pub(super) fn still_talks(agent: &Agent) {
    assert_eq!(agent.sh("talker", "cat /tmp/talked"), "", "the connection was cut");
    let received = || agent.sh("talker", "cat /proc/net/snmp | grep '^Tcp: [0-9]' | cut -d' ' -f11");
    let before = received();
    let begun = Instant::now();
    while received() == before {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing comes on the connection any more");
    }
}

/// All VMs, when none of them is on its way any more.
fn settled(agent: &Agent) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let list = agent.json(&["vm", "ls"]);
        let vms = list["vms"].as_array().expect("a list").clone();
        let states = ["running", "paused", "swapped_out", "stopped", "failed"];
        if vms.iter().all(|vm| states.contains(&vm["state"].as_str().unwrap_or_default())) {
            return vms;
        }
        assert!(begun.elapsed() < SETTLED_LIMIT, "{list:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What was acknowledged holds.
fn all_is_as_was_told(agent: &Agent, known: &Known) {
    for vm in settled(agent) {
        let name = vm["name"].as_str().expect("a name");
        assert!(!known.removed.lock().expect("the list").iter().any(|gone| gone == name), "{name} was removed: {vm:#}");
        if vm["state"] == "running" || vm["state"] == "swapped_out" {
            assert_eq!(agent.sh(name, "echo answers"), "answers", "{name}");
        }
        assert_eq!(vm["quarantine"], Value::Null, "{vm:#}");
    }
    for name in ["steady", "sleepy"] {
        assert_eq!(agent.sh(name, "cat /tmp/kept"), name);
    }
    still_talks(agent);
    let list = agent.json(&["bundle", "ls"]);
    assert_eq!(list["unreadable"].as_array().map(Vec::len), Some(0), "{list:#}");
    for bundle in list["bundles"].as_array().expect("a list") {
        agent.ok(&["bundle", "verify", bundle["id"].as_str().expect("an id")]);
    }
    let operations = agent.json(&["operation", "ls"]);
    let running: Vec<&Value> = operations["operations"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|operation| operation["state"] == "running")
        .collect();
    assert!(running.is_empty(), "{running:#?}");
}

/// Ends the work when dropped.
struct Over<'a>(&'a Known);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Work, for as long as `while_working` takes.
fn work(agent: &Agent, known: &Known, while_working: impl FnOnce()) {
    std::thread::scope(|scope| {
        scope.spawn(|| launches(agent, known, "one"));
        scope.spawn(|| snapshots(agent, known));
        scope.spawn(|| swaps(agent, known));
        // Also when it fails: the clients would work on, and the scope wait for them.
        let _over = Over(known);
        while_working();
    });
}

pub(crate) fn a_hundred_dead_agents_lose_nothing(_shared: &Agent) {
    let lab = Lab::start("htest-storm", 36);
    let agent = lab.agent();
    set_up(&lab);
    let known = Known::default();
    // Moments that differ from life to life, and are the same in every run.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    work(agent, &known, || {
        for life in 0..KILLS {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if life % LIVES_TO_A_DEED == 0 {
                known.wait_for_a_deed();
            }
            std::thread::sleep(Duration::from_millis(random % LIFE_MS_MAX));
            agent.kill_and_restart();
        }
    });
    let (done, failed) = (known.done.load(Ordering::Relaxed), known.failed.load(Ordering::Relaxed));
    println!("    {KILLS} agents killed; {done} requests done, {failed} broken off or refused");
    assert!(done >= KILLS / LIVES_TO_A_DEED, "the agents lived too short to do anything: {done} requests");
    all_is_as_was_told(agent, &known);
    lab.ends_with_vms();
}

/// What the agent has of what must not grow.
#[derive(Debug, Clone, Copy)]
struct Load {
    resident_kib: u64,
    descriptors: usize,
    threads: u64,
}

impl Load {
    fn of(pid: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:")).expect("a line");
        Self {
            resident_kib: status_kib(pid, "VmRSS"),
            descriptors: descriptors(pid),
            threads: threads.trim().parse().expect("a number"),
        }
    }
}

pub(crate) fn a_long_time_of_work_leaves_the_agent_as_it_was(_shared: &Agent) {
    let minutes = std::env::var("HEARTH_SOAK_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(SOAK_MINUTES);
    let lab = Lab::start("htest-soak", 37);
    let agent = lab.agent();
    set_up(&lab);
    let known = Known::default();
    let pid = agent.pid();
    let mut loads = Vec::new();
    work(agent, &known, || {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(minutes * 60) {
            std::thread::sleep(Duration::from_secs(1));
            loads.push(Load::of(pid));
        }
    });
    let (done, failed) = (known.done.load(Ordering::Relaxed), known.failed.load(Ordering::Relaxed));
    // The first third is warming up. Of each half of the rest the middle value: what leaks is in every sample from then
    // on, while a sample in the midst of six requests has what those six hold open.
    let warm = &loads[loads.len() / 3..];
    let (first, second) = warm.split_at(warm.len() / 2);
    let usual = |part: &[Load], of: fn(&Load) -> u64| {
        let mut values: Vec<u64> = part.iter().map(of).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    println!(
        "    {minutes} minutes, {done} requests done, {failed} not; the agent: {:?} ... {:?}",
        warm[0],
        warm[warm.len() - 1]
    );
    // A busy host may refuse one for a moment; work that is refused would be no work.
    assert!(failed * 10 <= done, "{failed} requests were refused; the agent's log ends with:\n{}", agent.log_tail());
    for (what, slack, of) in [
        ("KiB of memory", 4096, (|load| load.resident_kib) as fn(&Load) -> u64),
        ("descriptors", 8, |load| load.descriptors as u64),
        ("threads", 4, |load| load.threads),
    ] {
        let (before, after) = (usual(first, of), usual(second, of));
        assert!(after <= before + slack, "{what} grew from {before} to {after}: {loads:?}");
    }
    all_is_as_was_told(agent, &known);
    lab.ends_with_vms();
}
