//! Which idle VMs are moved out when memory is short; and what killed agents, killed VMMs, full disks and damaged files
//! do to VMs whose memory is out.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::{Agent, text};
use super::lab::Lab;
use super::swap::{SwapFile, WARM_UP, held, ticks};

/// Milliseconds after a request at which the agent is killed. A swap-out takes some tens, a wake some hundreds.
const MOMENTS: [u64; 10] = [0, 5, 10, 15, 25, 40, 60, 90, 150, 250];

/// Longest wait for the look that takes idle VMs: they have to be idle, and running, for some seconds first.
const DECISION_LIMIT: Duration = Duration::from_secs(60);

fn state(agent: &Agent, vm: &str) -> String {
    agent.vm(vm)["state"].as_str().expect("a state").to_owned()
}

pub(crate) fn takes_idle_vms_and_leaves_busy_ones(_shared: &Agent) {
    // A host that is short of memory, by what its owner says: more than it has is to be free.
    let swap = "[swap]\nlow_free_mib = 9000000\ntarget_free_mib = 9000000\nidle_s = 3\nsample_s = 1\n\
                idle_cpu_percent = 25.0\n";
    let lab = Lab::start_with("htest-need", 34, swap);
    let agent = lab.agent();
    lab.build("base", &[]);
    for vm in ["idle", "kept", "busy"] {
        lab.clone_of("base", vm);
    }
    let policy = |vm: &str, mode: &str| {
        let body = format!("{{\"mode\":\"{mode}\",\"min_resident_s\":1}}");
        let words = ["-X", "PUT", "-H", "content-type: application/json", "-d", &body];
        let (status, answer) = agent.curl(&words, &format!("/v1/vms/{vm}/swap-policy"));
        assert_eq!(status, 200, "{answer}");
    };
    let mut working = agent
        .command(["vm", "exec", "busy", "--", "sh", "-c", "while :; do :; done"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("run hearth");
    policy("busy", "hibernate");
    policy("idle", "hibernate");
    let begun = Instant::now();
    while state(agent, "idle") != "swapped_out" {
        assert!(begun.elapsed() < DECISION_LIMIT, "nobody was moved out: {:#}", agent.vm("idle"));
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!((state(agent, "busy"), state(agent, "kept")), ("running".to_owned(), "running".to_owned()));
    let swapped = agent.vm("idle")["swapped"].clone();
    assert_eq!(swapped["because"], "the host is low on memory", "{swapped:#}");
    let decisions = agent.json(&["host", "swap-decisions"]);
    let of = |vm: &str, verdict: &str| {
        let id = agent.vm(vm)["id"].clone();
        let all = decisions["decisions"].as_array().expect("decisions");
        all.iter().any(|decision| {
            let weighed = decision["vms"].as_array().expect("VMs");
            let inputs = decision["available_mib"].as_u64().is_some_and(|mib| mib > 0);
            inputs
                && decision["need"] == "low_memory"
                && decision["low_free_mib"] == 9_000_000
                && weighed.iter().any(|one| one["vm"] == id && one["verdict"] == verdict)
        })
    };
    assert!(of("idle", "hibernate") && of("busy", "busy"), "{decisions:#}");
    assert!(!of("kept", "spared"), "one without a policy is not looked at: {decisions:#}");
    working.kill().expect("kill the client");
    working.wait().expect("wait");
    lab.ends_with_vms();
}

pub(crate) fn harm_costs_no_vm_that_lives(_shared: &Agent) {
    let lab = Lab::start("htest-rough", 35);
    let agent = lab.agent();
    lab.build("base", &["--warmup", WARM_UP, "--ready-marker", "warm"]);
    lab.clone_of("base", "one");
    let before = held(agent, "one");
    let swap = SwapFile::make(&agent.state(), 256);
    for mode in ["page", "hibernate"] {
        for moment in MOMENTS {
            agents_killed(agent, &["vm", "swap-out", "one", "--mode", mode], moment);
            agents_killed(agent, &["vm", "wake", "one"], moment);
        }
        ticks(agent, "one");
        assert_eq!(held(agent, "one"), before, "after {} agents", 2 * MOMENTS.len());
    }
    killed_vmms(agent, &lab);
    drop(swap);
    damaged_files(agent, &lab);
    lab.ends_with_vms();
}

/// Whatever an agent was doing when it was killed, the VM runs or is out afterwards, and wakes.
fn agents_killed(agent: &Agent, words: &[&str], moment: u64) {
    let mut client = agent.command(words);
    client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut client = client.spawn().expect("run hearth");
    std::thread::sleep(Duration::from_millis(moment));
    agent.kill_and_restart();
    let _ = client.wait();
    let begun = Instant::now();
    let (vm, sealed) = loop {
        let vm = agent.vm("one");
        let sealed = agent.state().join("vms").join(vm["id"].as_str().expect("an id")).join("sealed").exists();
        // A wake that the agent before began may go on between the two looks.
        // Of a wake that failed, what it had begun is ended while the VM is told as out again.
        let ending = vm["swapped"]["mode"] == "hibernate" && !vm["pid"].is_null();
        let at_rest = vm["state"] == "running" || vm["state"] == "swapped_out" && !ending;
        if at_rest && agent.vm("one") == vm {
            break (vm, sealed);
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{words:?} after {moment} ms: {vm:#}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let hibernated = vm["state"] == "swapped_out" && vm["swapped"]["mode"] == "hibernate";
    // Exactly one of process and file is the VM.
    assert_eq!((sealed, vm["pid"].is_null()), (hibernated, hibernated), "{vm:#}");
    if words[1] == "wake" {
        agent.ok(&["vm", "wake", "one"]);
    }
}

fn killed_vmms(agent: &Agent, lab: &Lab) {
    lab.clone_of("base", "doomed");
    agent.ok(&["vm", "swap-out", "doomed", "--mode", "page"]);
    super::fabric::run("kill", &["-9", &agent.vmm_pid("doomed").to_string()]);
    let failed = agent.wait_for_state("doomed", "failed");
    assert_eq!(failed["cause"]["code"], "vmm_killed", "{failed:#}");
    agent.ok(&["vm", "rm", "doomed"]);
    assert_eq!(state(agent, "one"), "running");
}

fn damaged_files(agent: &Agent, lab: &Lab) {
    lab.clone_of("base", "harmed");
    let out: Value = agent.json(&["vm", "swap-out", "harmed", "--mode", "hibernate"]);
    let sealed = agent.state().join("vms").join(out["id"].as_str().expect("an id")).join("sealed");
    let mut bytes = std::fs::read(&sealed).expect("what was sealed");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&sealed, &bytes).expect("damage it");
    let woken = agent.run(&["vm", "wake", "harmed"]);
    assert!(!woken.status.success() && text(&woken.stderr).contains("was changed"), "{}", text(&woken.stderr));
    let failed = agent.vm("harmed");
    assert_eq!((&failed["state"], &failed["cause"]["code"]), (&"failed".into(), &"swap_state_corrupt".into()));
    agent.ok(&["vm", "rm", "harmed"]);
    assert_eq!(agent.sh("one", "echo lives"), "lives");
}
