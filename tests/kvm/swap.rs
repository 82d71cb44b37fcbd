//! Idle VMs' memory moved out and back with real guests: nothing of what they hold, and nothing of what is sent to them
//! meanwhile, is lost.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::fabric::run;
use super::fixture::{Agent, status_kib, text};
use super::lab::Lab;
use super::probe::{self, Echo};

/// Holds a random word, a counter that a program of its own goes on counting, and 2 MiB to compare with their sum. They
/// are the random word again and again: an emulated kernel takes minutes for as much randomness.
pub(super) const WARM_UP: &str = "head -c 16 /dev/urandom | md5sum > /tmp/nonce; \
    yes $(cat /tmp/nonce) | head -c 2097152 > /tmp/fill; md5sum < /tmp/fill > /tmp/fill.sum; \
    i=0; echo warm; while :; do i=$((i+1)); echo $i >> /tmp/ticks; sleep 5; done";

/// Swap made for a test; gone when dropped.
pub(super) struct SwapFile(PathBuf);

impl SwapFile {
    pub(super) fn make(directory: &Path, mib: u32) -> Self {
        let path = directory.join("swap");
        let file = path.to_str().expect("a path");
        run("dd", &["if=/dev/zero", &format!("of={file}"), "bs=1M", &format!("count={mib}"), "status=none"]);
        run("chmod", &["600", file]);
        run("mkswap", &[file]);
        run("swapon", &[file]);
        Self(path)
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).output();
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What a guest holds, from which it can be told whether it is the same and has lost nothing.
pub(super) fn held(agent: &Agent, vm: &str) -> String {
    agent.sh(vm, "cat /tmp/nonce; md5sum < /tmp/fill | cmp - /tmp/fill.sum && echo whole")
}

/// The counter's last number; every number before it is there, once.
pub(super) fn ticks(agent: &Agent, vm: &str) -> u64 {
    let said = agent.sh(vm, "cat /tmp/ticks");
    let numbers: Vec<u64> = said.lines().map(|line| line.parse().expect("a number")).collect();
    let last = numbers.last().copied().unwrap_or(0);
    assert!(numbers.iter().copied().eq(1..=last), "the counter of {vm} has a gap: {said}");
    last
}

/// What of the guest's memory is in memory. The rest of the process is its program, which others run as well.
pub(super) fn guest_resident_kib(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("its memory");
    let mut of_guest = false;
    let mut sum = 0;
    for line in maps.lines() {
        // A mapping begins with its address; what is told of it begins with capital letters.
        if line.starts_with(|first: char| first.is_ascii_digit() || first.is_ascii_lowercase()) {
            of_guest = line.ends_with("memory.img") || line.contains("hearth-guest-ram");
        } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| of_guest) {
            sum += kib.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
        }
    }
    sum
}

fn address(agent: &Agent, vm: &str) -> String {
    agent.vm(vm)["addresses"][0].as_str().expect("an address").to_owned()
}

fn uptime(agent: &Agent, vm: &str) -> f64 {
    agent.sh(vm, "cut -d' ' -f1 /proc/uptime").parse().expect("a number")
}

/// What is in the VMM's descriptors: how many are of KVM.
fn kvm_descriptors() -> usize {
    let output =
        Command::new("sh").arg("-c").arg("ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c anon_inode:kvm-vm").output();
    text(&output.expect("run sh").stdout).trim().parse().unwrap_or(0)
}

pub(crate) fn out_and_back_loses_nothing(_shared: &Agent) {
    let lab = Lab::start("htest-swap", 33);
    let agent = lab.agent();
    lab.build("base", &["--warmup", WARM_UP, "--ready-marker", "warm"]);
    lab.clone_of("base", "idle");
    probe::install(agent, "idle");
    // Its pages are its own, not the bundle's: written anew.
    agent.sh("idle", "cp /tmp/fill /tmp/again; mv /tmp/again /tmp/fill");
    let before = held(agent, "idle");
    assert!(before.ends_with("whole"), "{before}");

    without_swap_it_is_refused(agent);
    let swap = SwapFile::make(&agent.state(), 256);
    // While nobody else has the bundle's pages in use: those would stay.
    paged_out_and_back(agent);
    lab.clone_of("base", "other");
    probe::install(agent, "other");
    packets_wake(agent, "page");
    drop(swap);
    hibernated_and_back(agent);
    packets_wake(agent, "hibernate");
    assert_eq!(held(agent, "idle"), before, "after all of it");
    time_and_streams_wake(agent);
    assert_eq!(held(agent, "idle"), before, "after more of it");
    the_next_agent_goes_on(agent);
    assert_eq!(held(agent, "idle"), before, "with another agent");
    agent.ok(&["vm", "swap-out", "idle", "--mode", "hibernate"]);
    // One that is out is removed like any other.
    lab.ends_with_vms();
}

fn without_swap_it_is_refused(agent: &Agent) {
    let refused = agent.run(&["vm", "swap-out", "idle", "--mode", "page"]);
    assert!(!refused.status.success());
    let said = text(&refused.stderr);
    assert!(said.contains("swap has 0 MiB free") && said.contains("hibernate"), "{said}");
    assert_eq!(agent.vm("idle")["state"], "running", "it goes on");
    assert!(ticks(agent, "idle") > 0);
}

fn paged_out_and_back(agent: &Agent) {
    let pid = agent.vmm_pid("idle");
    let (resident, counted, up) = (guest_resident_kib(pid), ticks(agent, "idle"), uptime(agent, "idle"));
    let out = agent.json(&["vm", "swap-out", "idle", "--mode", "page"]);
    assert_eq!((&out["state"], &out["swapped"]["mode"]), (&"swapped_out".into(), &"page".into()), "{out:#}");
    let (left, swapped) = (guest_resident_kib(pid), status_kib(pid, "VmSwap"));
    let process = status_kib(pid, "VmRSS");
    println!("    paged out: {resident} KiB of the guest before, {left} after, {swapped} in swap; process {process}");
    assert!(resident > 12 * 1024 && left < resident / 10, "{resident} KiB before, {left} after");
    assert!(swapped > 4 * 1024, "{swapped} in swap");
    std::thread::sleep(Duration::from_secs(3));
    let begun = Instant::now();
    agent.ok(&["vm", "wake", "idle"]);
    println!("    woken from swap within {} ms", begun.elapsed().as_millis());
    assert_eq!((agent.vmm_pid("idle"), &agent.vm("idle")["swapped"]), (pid, &serde_json::Value::Null));
    goes_on(agent, counted, up);
}

/// The guest's clock stood still, and its counter has no gap.
fn goes_on(agent: &Agent, counted: u64, up: f64) {
    let begun = Instant::now();
    while ticks(agent, "idle") <= counted {
        assert!(begun.elapsed() < Duration::from_secs(30), "the counter stands still");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(uptime(agent, "idle") > up, "time went back");
}

fn hibernated_and_back(agent: &Agent) {
    let (pid, machines) = (agent.vmm_pid("idle"), kvm_descriptors());
    let (counted, up, here) = (ticks(agent, "idle"), uptime(agent, "idle"), address(agent, "idle"));
    let out = agent.json(&["vm", "swap-out", "idle", "--mode", "hibernate"]);
    assert_eq!((&out["state"], &out["swapped"]["mode"]), (&"swapped_out".into(), &"hibernate".into()), "{out:#}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "its process is gone");
    assert_eq!(kvm_descriptors(), machines - 1, "and its machine with it");
    assert_eq!(address(agent, "idle"), here, "its addresses stay");
    let sealed = agent.state().join("vms").join(out["id"].as_str().expect("an id")).join("sealed");
    let bytes = std::fs::read(&sealed).expect("what was sealed of it");
    println!("    hibernated: a file of {} KiB", bytes.len() / 1024);
    assert!(bytes.len() > 4 << 20, "{} bytes", bytes.len());
    // Words that its memory is full of.
    for word in ["/tmp/ticks", "Linux version", "sleep 5"] {
        assert!(!bytes.windows(word.len()).any(|part| part == word.as_bytes()), "{word:?} can be read in it");
    }
    std::thread::sleep(Duration::from_secs(3));
    let begun = Instant::now();
    agent.ok(&["vm", "wake", "idle"]);
    println!("    woken from its file within {} ms", begun.elapsed().as_millis());
    assert!(!sealed.exists(), "the file is of no use any more");
    let woken = agent.vm("idle");
    assert_eq!(woken["generation"], out["generation"], "it is the same VM");
    goes_on(agent, counted, up);
}

/// A packet wakes it, and every one that came meanwhile is answered.
fn packets_wake(agent: &Agent, mode: &str) {
    let to = address(agent, "idle");
    agent.ok(&["vm", "swap-out", "idle", "--mode", mode]);
    let begun = Instant::now();
    let said = agent.sh("other", &format!("ping -c 3 -i 1 -W 30 {to}"));
    assert!(said.contains(" 0% packet loss"), "{mode}: {said}");
    println!("    {mode}: three pings answered within {} ms", begun.elapsed().as_millis());
    assert_eq!(agent.vm("idle")["state"], "running");
    let events = agent.json(&["events"]);
    let woken = events["events"].as_array().expect("events").iter().rev().find(|event| event["kind"] == "vm_waking");
    assert_eq!(woken.expect("an event")["detail"]["by"], "packet");
    // A program that answers is asked while it sleeps.
    let echo = Echo::start(agent, "idle");
    if mode == "page" {
        agent.ok(&["vm", "swap-out", "idle", "--mode", mode]);
        let asked = probe::run(agent, "other", &format!("ask udp {to} 7777 --text hello --wait-ms 30000"));
        assert!(asked.status.success(), "{}{}", text(&asked.stdout), text(&asked.stderr));
    }
    drop(echo);
}

fn time_and_streams_wake(agent: &Agent) {
    agent.ok(&["vm", "swap-out", "idle", "--mode", "hibernate", "--wake-after", "2s"]);
    agent.wait_for_state("idle", "running");
    agent.ok(&["vm", "swap-out", "idle", "--mode", "hibernate"]);
    assert_eq!(agent.sh("idle", "echo awake"), "awake", "a program to run wakes it");
}

/// A VM that is out stays out, is woken by a packet, and one that runs is not touched.
fn the_next_agent_goes_on(agent: &Agent) {
    let to = address(agent, "idle");
    agent.ok(&["vm", "swap-out", "idle", "--mode", "hibernate"]);
    agent.kill_and_restart();
    assert_eq!(agent.vm("idle")["state"], "swapped_out");
    let said = agent.sh("other", &format!("ping -c 3 -i 1 -W 30 {to}"));
    assert!(said.contains(" 0% packet loss"), "{said}");
    assert_eq!(agent.vm("idle")["state"], "running");
}
