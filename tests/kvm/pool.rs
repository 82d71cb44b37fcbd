//! Machines that are kept ready: launches take them over and are somebody else each, whoever is killed meanwhile.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::run;
use super::fixture::{Agent, text};
use super::lab::Lab;

/// Longest wait for machines to be made, or to be gone.
const LIMIT: Duration = Duration::from_secs(60);

fn pool(agent: &Agent) -> Value {
    agent.json(&["pool", "ls"])["pools"][0].clone()
}

/// Waits until all are ready.
fn filled(agent: &Agent) -> Value {
    let begun = Instant::now();
    loop {
        let now = pool(agent);
        if now["ready"] == now["size"] {
            return now;
        }
        assert!(begun.elapsed() < LIMIT, "{now:#}\n{}", agent.log_tail());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// VMMs that are there, by the ids they were started with, of directories of this agent.
fn vmms(agent: &Agent) -> BTreeSet<(String, u32)> {
    let entries = std::fs::read_dir(agent.state().join("vms")).expect("the VMs' directories");
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let pid = |id: &str| {
        let processes = std::fs::read_dir("/proc").expect("processes");
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        pids.into_iter().find(|pid| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = words.split(|byte| *byte == 0);
            words.nth(1) == Some(b"vmm") && words.next() == Some(id.as_bytes())
        })
    };
    ids.filter_map(|id| pid(&id).map(|pid| (id, pid))).collect()
}

fn launch(agent: &Agent, name: &str) -> Value {
    agent.json(&["vm", "launch", "--bundle", "base", "--session", "clones", "--name", name])
}

/// What tells one guest from another, and what they have in common: the token that was in memory before it was frozen.
fn identity(agent: &Agent, name: &str) -> (String, [String; 5]) {
    let script = "cat /tmp/token; hostname; cat /etc/machine-id /sys/class/net/eth0/address; ip -o -6 address show \
                  dev eth0 scope global | head -n 1; head -c 16 /dev/urandom | md5sum";
    let said = agent.sh(name, script);
    let mut lines = said.lines().map(str::to_owned);
    let token = lines.next().expect("the token");
    (token, std::array::from_fn(|_| lines.next().unwrap_or_else(|| panic!("six lines: {said}"))))
}

pub(crate) fn launches_take_what_is_ready_and_are_others(_shared: &Agent) {
    let lab = Lab::start("htest-pool", 38);
    let agent = lab.agent();
    lab.build("base", &["--warmup", "head -c 16 /dev/urandom | md5sum > /tmp/token"]);
    for (words, wanted) in [
        (&["pool", "set", "nobody", "1"][..], "no bundle"),
        (&["pool", "set", "base", "0"], "not in 1..=256"),
        (&["pool", "rm", "base"], "no machines of"),
    ] {
        let output = agent.run(words);
        assert!(!output.status.success() && text(&output.stderr).contains(wanted), "{words:?}: {output:?}");
    }
    let (status, answer) = agent.curl(&["-X", "PUT", "--json", "{\"size\":1,\"more\":1}"], "/v1/pools/base");
    assert_eq!(status, 400, "{answer}");
    println!("    {}", agent.ok(&["pool", "set", "base", "4"]).trim());
    filled(agent);
    let ready = vmms(agent);
    assert_eq!(ready.len(), 4);
    assert_eq!(agent.json(&["vm", "ls"])["vms"], serde_json::json!([]), "what is ready is no VM");
    let jails: BTreeSet<String> = ready.iter().map(|(_, pid)| jail_of(*pid)).collect();
    assert_eq!(jails.len(), 4, "each has a jail of its own: {jails:?}");
    assert!(jails.iter().all(|jail| is_closed(jail)), "none of them lets anything through");
    six_at_once(agent, &ready);
    killed_ones_are_replaced(agent);
    agents_that_die_leave_none(agent);
    let refused = text(&agent.run(&["bundle", "rm", "base"]).stderr);
    assert!(refused.contains("bundle"), "{refused}");
    for vm in agent.json(&["vm", "ls"])["vms"].as_array().expect("VMs") {
        agent.ok(&["vm", "rm", vm["id"].as_str().expect("an id"), "--timeout", "0"]);
    }
    let refused = text(&agent.run(&["bundle", "rm", "base"]).stderr);
    assert!(refused.contains("are kept ready") && refused.contains("hearth pool rm"), "{refused}");
    filled(agent);
    agent.ok(&["pool", "rm", "base"]);
    assert_eq!(vmms(agent), BTreeSet::new());
    // An agent that ends ends what only it has a use for.
    agent.ok(&["pool", "set", "base", "3"]);
    filled(agent);
    agent.kill_and_restart();
    filled(agent);
    lab.ends_with_a_pool();
}

/// The named network namespace that a VMM is in.
fn jail_of(pid: u32) -> String {
    let inode = |path: &Path| std::fs::metadata(path).ok().map(|found| found.ino());
    let own = inode(Path::new(&format!("/proc/{pid}/ns/net"))).expect("a network namespace");
    let named = std::fs::read_dir("/run/netns").expect("named namespaces").map(|entry| entry.expect("an entry"));
    let mut mine = named.filter(|entry| inode(&entry.path()) == Some(own));
    mine.next().expect("a name for it").file_name().into_string().expect("text")
}

/// Whether a jail knows of nobody: it has its rules and its tap, and each of its sets is empty.
fn is_closed(jail: &str) -> bool {
    let rules = run("ip", &["netns", "exec", jail, "nft", "list", "ruleset"]);
    let links = run("ip", &["-n", jail, "-o", "link"]);
    assert!(rules.contains("set ") && links.contains("tap0"), "{rules}\n{links}");
    !rules.contains("elements = ")
}

/// Four are taken over and two are made, and all six are somebody else.
fn six_at_once(agent: &Agent, ready: &BTreeSet<(String, u32)>) {
    let names: Vec<String> = (0..6).map(|number| format!("vm-{number}")).collect();
    let launched: Vec<Value> = std::thread::scope(|scope| {
        let threads: Vec<_> = names.iter().map(|name| scope.spawn(|| launch(agent, name))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a launch")).collect()
    });
    let taken = launched.iter().filter(|vm| ready.iter().any(|(id, _)| vm["id"] == **id)).count();
    let now = filled(agent);
    assert_eq!((taken, &now["claimed"], &now["missed"]), (4, &4.into(), &2.into()), "{now:#}");
    for vm in &launched {
        assert!(!is_closed(&jail_of(agent.vmm_pid(vm["name"].as_str().expect("a name")))), "a VM's is open");
        let pid = agent.vmm_pid(vm["name"].as_str().expect("a name"));
        let was = ready.iter().find(|(id, _)| vm["id"] == **id);
        assert!(was.is_none_or(|(_, ready)| *ready == pid), "the process that was ready is the VM's");
    }
    let fast = |vm: &&Value| ready.iter().any(|(id, _)| vm["id"] == **id);
    let resumed = |vm: &Value| vm["timings"]["resumed_ms"].as_f64().expect("a time");
    let taken: Vec<f64> = launched.iter().filter(fast).map(resumed).collect();
    println!("    resumed, of six at once: {taken:.1?} ms after the call");
    let all: Vec<_> = names.iter().map(|name| identity(agent, name)).collect();
    assert_eq!(all.iter().map(|(token, _)| token).collect::<BTreeSet<_>>().len(), 1, "of one memory: {all:#?}");
    for which in 0..5 {
        let different: BTreeSet<_> = all.iter().map(|(_, of)| &of[which]).collect();
        assert_eq!(different.len(), all.len(), "{all:#?}");
    }
    let generations: BTreeSet<_> = names.iter().map(|name| agent.vm(name)["generation"].to_string()).collect();
    assert_eq!(generations.len(), names.len());
}

fn killed_ones_are_replaced(agent: &Agent) {
    let vms: BTreeSet<String> = (0..6).map(|number| agent.vm(&format!("vm-{number}"))["id"].to_string()).collect();
    let ready = || -> Vec<(String, u32)> {
        vmms(agent).into_iter().filter(|(id, _)| !vms.contains(&format!("\"{id}\""))).collect()
    };
    let before = ready();
    assert_eq!(before.len(), 4);
    for (_, pid) in &before[..2] {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(*pid).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is killed");
    }
    // Dead as soon as their parent, which watches them, knows it.
    while before[..2].iter().any(|(_, pid)| Path::new(&format!("/proc/{pid}")).exists()) {
        std::thread::yield_now();
    }
    // A launch at this moment gets none of the two.
    let vm = launch(agent, "beside");
    assert!(before[..2].iter().all(|(id, _)| vm["id"] != *id.as_str()), "{vm:#}");
    agent.ok(&["vm", "rm", "beside", "--timeout", "0"]);
    filled(agent);
    let begun = Instant::now();
    while before[..2].iter().any(|(id, _)| agent.state().join("vms").join(id).exists()) {
        assert!(begun.elapsed() < LIMIT, "what was killed is left");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ready().len(), 4);
}

/// What is ready is of use to the agent that made it; the next one makes its own, and the VMs go on.
fn agents_that_die_leave_none(agent: &Agent) {
    let before = vmms(agent);
    agent.kill_and_restart();
    filled(agent);
    let begun = Instant::now();
    loop {
        let now = vmms(agent);
        // Six VMs that are the same processes as before, and four others.
        if now.len() == 10 && now.intersection(&before).count() == 6 {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "{now:?}, before {before:?}\n{}", agent.log_tail());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(before.iter().filter(|one| !vmms(agent).contains(one)).all(|(_, pid)| !runs(*pid)));
    for number in 0..6 {
        assert_eq!(agent.sh(&format!("vm-{number}"), "hostname"), format!("vm-{number}"));
    }
    launch(agent, "after");
    assert_eq!(agent.sh("after", "hostname"), "after");
}

/// Whether it is more than what its parent has not waited for yet.
fn runs(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| !words.is_empty())
}
