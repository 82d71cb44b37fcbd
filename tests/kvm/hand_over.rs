//! VMs that other VMM processes take over, with real guests: nothing they hold is lost, connections go on, and whatever
//! is killed meanwhile, there is one process afterwards, in which the guest runs.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::fixture::{Agent, text};
use super::lab::Lab;
use super::storm::{begin_talk, still_talks};
use super::swap::{WARM_UP, held, ticks};

/// Milliseconds after the request at which something is killed. All of it takes some tens.
const MOMENTS: [u64; 12] = [0, 4, 8, 12, 16, 20, 25, 30, 40, 50, 70, 100];

/// Processes that are VMMs of this VM, by their arguments.
pub(super) fn processes(id: &str) -> Vec<u32> {
    let named = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = words.split(|byte| *byte == 0).skip(1);
        (words.next() == Some(b"vmm") && words.next() == Some(id.as_bytes())).then_some(pid)
    };
    std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| named(entry.ok()?)).collect()
}

fn id(vm: &Value) -> &str {
    vm["id"].as_str().expect("an id")
}

/// Hands a VM over; gives how long it stood still, in milliseconds.
fn hand_over(agent: &Agent, name: &str) -> f64 {
    let before = agent.vmm_pid(name);
    let after = agent.json(&["vm", "hand-over", name]);
    let pid = after["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process");
    assert_ne!(pid, before);
    assert_eq!(processes(id(&after)), [pid], "the one before is gone");
    let operation = agent.json(&["operation", "show", after["operation_id"].as_str().expect("an operation")]);
    assert_eq!((&operation["kind"], &operation["state"]), (&"vm_hand_over".into(), &"succeeded".into()));
    operation["pause_ms"].as_f64().unwrap_or_default()
}

pub(crate) fn to_another_process_loses_nothing(_shared: &Agent) {
    let lab = Lab::start("htest-hand", 42);
    let agent = lab.agent();
    lab.build("base", &["--warmup", WARM_UP, "--ready-marker", "warm"]);
    for name in ["talker", "echo", "kept"] {
        lab.clone_of("base", name);
    }
    begin_talk(agent);
    // Pages of its own, and a file on a disk that only the page cache of the guest has yet.
    agent.sh("kept", "cp /tmp/fill /tmp/again; mv /tmp/again /tmp/fill");
    let before = held(agent, "kept");
    let same = |name: &str| {
        let vm = agent.vm(name);
        ["id", "addresses", "generation", "created_at", "state"].map(|field| vm[field].clone())
    };
    let known = same("kept");
    let mut pauses = Vec::new();
    for _ in 0..3 {
        for name in ["kept", "echo", "talker"] {
            pauses.push(hand_over(agent, name));
        }
        still_talks(agent);
    }
    println!("    clones stood still for {pauses:.1?} ms");
    assert_eq!((held(agent, "kept"), same("kept")), (before.clone(), known));
    let counted = ticks(agent, "kept");
    // A paused one stays paused.
    agent.ok(&["vm", "pause", "kept"]);
    hand_over(agent, "kept");
    assert_eq!(agent.vm("kept")["state"], "paused");
    agent.ok(&["vm", "resume", "kept"]);
    assert_eq!(held(agent, "kept"), before);
    assert!(ticks(agent, "kept") >= counted);
    // What can be done with any other can be done with it: it is still a clone of its bundle.
    agent.ok(&["vm", "snapshot", "kept", "--bundle-name", "of-kept", "--diff"]);
    agent.ok(&["vm", "swap-out", "kept", "--mode", "hibernate"]);
    let refused = text(&agent.run(&["vm", "hand-over", "kept"]).stderr);
    assert!(refused.contains("swapped_out"), "{refused}");
    assert_eq!(held(agent, "kept"), before, "awake again");
    hand_over(agent, "kept");
    agent.kill_and_restart();
    assert_eq!(held(agent, "kept"), before, "for the next agent as well");
    still_talks(agent);
    agent.ok(&["bundle", "rm", "of-kept"]);

    // One that booted an image: its memory is a file, which both processes map; its console goes on.
    agent.launch("booted", &["--memory", "64"]);
    agent.sh("booted", "echo kept > /tmp/kept; echo before the hand-over > /dev/console");
    let pauses = [0; 3].map(|_| hand_over(agent, "booted"));
    println!("    one that booted stood still for {pauses:.1?} ms");
    agent.sh("booted", "echo behind it > /dev/console");
    assert_eq!(agent.sh("booted", "cat /tmp/kept"), "kept");
    let console = agent.ok(&["vm", "console", "booted", "--history"]);
    for line in ["hearth-init: ready", "before the hand-over", "behind it"] {
        assert!(console.contains(line), "{line}: {console}");
    }
    let jail = agent.vm("booted")["jail"].clone();
    assert_eq!((&jail["empty_root"], &jail["no_capabilities"]), (&true.into(), &true.into()), "{jail:#}");
    lab.ends_with_vms();
}

/// Kills a process, if it is there.
fn kill_process(pid: u32) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
}

/// The VM when nothing is being done with it any more, and it is not in this process, which was killed.
fn at_rest_without(agent: &Agent, killed: u32) -> Value {
    let begun = Instant::now();
    loop {
        let vm = agent.vm("one");
        if vm["state"] == "running" && vm["pid"] != killed || vm["state"] == "failed" {
            return vm;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{vm:#}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn with_harm_costs_no_vm(_shared: &Agent) {
    let lab = Lab::start("htest-hurt", 43);
    let agent = lab.agent();
    lab.build("base", &["--warmup", WARM_UP, "--ready-marker", "warm"]);
    lab.clone_of("base", "one");
    let (mut before, mut moved, mut ended) = (held(agent, "one"), 0, 0);
    let begin = || {
        let mut client = agent.command(["vm", "hand-over", "one"]);
        client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run hearth")
    };
    for moment in MOMENTS {
        let pid = agent.vmm_pid("one");
        let mut client = begin();
        std::thread::sleep(Duration::from_millis(moment));
        agent.kill_and_restart();
        let _ = client.wait();
        let vm = at_rest_without(agent, 0);
        assert_eq!(held(agent, "one"), before, "an agent killed after {moment} ms");
        let now = agent.vmm_pid("one");
        assert_eq!(processes(id(&vm)), [now], "an agent killed after {moment} ms");
        moved += u32::from(now != pid);
    }
    println!("    {} agents killed while it was handed over; {moved} times it was in another process", MOMENTS.len());
    ticks(agent, "one");
    // The process that is to take it over is killed: it goes on where it is, or there if that was done.
    for moment in MOMENTS {
        let vm = agent.vm("one");
        let pid = agent.vmm_pid("one");
        let mut client = begin();
        let begun = Instant::now();
        let other = loop {
            let other = processes(id(&vm)).into_iter().find(|other| *other != pid);
            if other.is_some() || begun.elapsed() > Duration::from_secs(10) {
                break other.expect("another process");
            }
        };
        std::thread::sleep(Duration::from_millis(moment / 4));
        kill_process(other);
        let done = client.wait().expect("wait").success();
        let vm = at_rest_without(agent, other);
        if vm["state"] == "failed" {
            // It was the VM's own by then, and that was the VM's end.
            assert_eq!(vm["cause"]["code"], "vmm_killed", "{vm:#}");
            agent.ok(&["vm", "rm", "one"]);
            lab.clone_of("base", "one");
            before = held(agent, "one");
            ended += 1;
            continue;
        }
        assert!(!done, "{vm:#}");
        assert_eq!(held(agent, "one"), before);
        assert_eq!(processes(id(&vm)), [agent.vmm_pid("one")]);
    }
    println!("    {} processes killed that were to take it over; {ended} had", MOMENTS.len());
    assert!(ended < MOMENTS.len(), "none was killed before it had");
    // Its own process is killed in the middle: that is its end, and nothing is left.
    let (vm, pid) = (agent.vm("one"), agent.vmm_pid("one"));
    let mut client = begin();
    while processes(id(&vm)) == [pid] {}
    kill_process(pid);
    let _ = client.wait();
    let vm = at_rest_without(agent, pid);
    let left = processes(id(&vm));
    match vm["state"].as_str() {
        Some("running") => assert_eq!((held(agent, "one"), left), (before, vec![agent.vmm_pid("one")])),
        _ => {
            assert_eq!(vm["cause"]["code"], "vmm_killed", "{vm:#}");
            let begun = Instant::now();
            while !processes(id(&vm)).is_empty() {
                assert!(begun.elapsed() < Duration::from_secs(30), "its other process is left: {left:?}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    lab.ends_with_vms();
}
