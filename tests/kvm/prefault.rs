//! What a guest reaches first is noted once and mapped ahead from then on: its processor faults less, and it is the same
//! guest. What was noted counts for nothing but speed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::Agent;
use super::lab::Lab;

/// Longest wait for a note in the background.
const LIMIT: Duration = Duration::from_secs(20);

/// How many times fewer faults a guest takes whose pages are mapped ahead.
const LESS: u64 = 5;

/// Faults that a VM's vCPU has taken so far (proc_pid_stat(5)): pages that were not mapped, whether they had to be read or
/// not.
fn faults(agent: &Agent, vm: &str) -> u64 {
    let tasks = format!("/proc/{}/task", agent.vmm_pid(vm));
    let tasks = std::fs::read_dir(tasks).expect("threads").map(|task| task.expect("a thread").path());
    let of_vcpus = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        name.contains("(vcpu")
            .then(|| fields[7].parse::<u64>().expect("a number") + fields[9].parse::<u64>().expect("a number"))
    });
    of_vcpus.sum()
}

/// Launches, gives the faults until the guest had answered, and ends it.
fn launched(lab: &Lab, name: &str) -> u64 {
    lab.clone_of("base", name);
    let faults = faults(lab.agent(), name);
    assert_eq!(lab.agent().sh(name, "cat /tmp/note; hostname"), format!("kept\n{name}"));
    lab.agent().ok(&["vm", "rm", name, "--timeout", "0"]);
    faults
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "{what}: not within {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ignored(agent: &Agent) -> usize {
    let events = agent.json(&["events"]);
    let events = events["events"].as_array().expect("events").iter();
    events.filter(|event| event["kind"] == "working_set_ignored").count()
}

pub(crate) fn what_is_reached_first_is_mapped_ahead(_shared: &Agent) {
    let lab = Lab::start("htest-ahead", 39);
    let agent = lab.agent();
    let bundle = lab.build("base", &["--warmup", "echo kept > /tmp/note"]);
    let id = bundle["id"].as_str().expect("an id");
    let set: PathBuf = agent.state().join(format!("bundles/.working-sets/{id}.json"));
    assert!(!set.exists());
    let first = launched(&lab, "first");
    wait_for("it is noted", || set.exists());
    let later: Vec<u64> = (0..3).map(|number| launched(&lab, &format!("later-{number}"))).collect();
    println!("    faults of the vCPU until the first answer: {first} at first, then {later:?}");
    assert!(later.iter().all(|faults| faults * LESS < first), "{first}, then {later:?}");
    // Of more than the first of them: one with other work reaches other pages.
    let noted = std::fs::read_to_string(&set).expect("the working set");
    let noted: Value = serde_json::from_str(noted.split_once('\n').expect("two lines").1).expect("JSON");
    assert!(noted["guests"].as_u64().is_some_and(|guests| (2..=3).contains(&guests)), "{}", noted["guests"]);

    // One that was kept ready has it mapped before its launch is asked for.
    agent.ok(&["pool", "set", "base", "1"]);
    wait_for("it is ready", || agent.json(&["pool", "ls"])["pools"][0]["ready"] == 1);
    let pooled = launched(&lab, "pooled");
    println!("    of one from the pool: {pooled}");
    assert!(pooled * LESS < first, "{first}, and {pooled} from the pool");
    agent.ok(&["pool", "rm", "base"]);

    for (number, damage) in ["", "not a digest\n{}", "\n"].into_iter().enumerate() {
        std::fs::write(&set, damage).expect("write it");
        launched(&lab, &format!("harmed-{number}"));
        assert_eq!(ignored(agent), number + 1, "{damage:?}");
        // It was forgotten, and noted anew.
        wait_for("it is noted again", || std::fs::read(&set).is_ok_and(|bytes| bytes.len() > 100));
    }
    let again = launched(&lab, "again");
    assert!(again * LESS < first, "{first}, and {again} after damage");
    assert_eq!(ignored(agent), 3);
    agent.ok(&["bundle", "rm", "base"]);
    assert!(!set.exists(), "it goes with its bundle");
    lab.ends();
}
