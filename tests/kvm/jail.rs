//! The jail of a VMM, looked at from outside.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::fixture::Agent;

pub(crate) fn holds_nothing_but_what_it_was_handed(agent: &Agent) {
    let pid = agent.vmm_pid(agent.shared());
    let process = PathBuf::from(format!("/proc/{pid}"));
    let status = std::fs::read_to_string(process.join("status")).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).expect("the field");
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs"), ["1"]);
    let ids = [field("Uid"), field("Gid")].concat();
    assert!(ids.iter().all(|id| id != "0" && *id == ids[0]), "{ids:?}");
    assert!(field("Groups").is_empty(), "{:?}", field("Groups"));

    for task in std::fs::read_dir(process.join("task")).expect("its threads") {
        let path = task.expect("a thread").path().join("status");
        let status = std::fs::read_to_string(path).expect("a thread's status");
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the field");
            line.trim().to_owned()
        };
        // 2 is a filter. Three: no clone3, what every thread starts with, what its class may.
        assert_eq!((value("Seccomp:"), value("Seccomp_filters:")), ("2".into(), "3".into()), "{status}");
        assert_eq!((value("NoNewPrivs:"), value("CapEff:")), ("1".into(), "0000000000000000".into()), "{status}");
    }
    let limits = std::fs::read_to_string(process.join("limits")).expect("its limits");
    for (name, most) in [("Max core file size", "0"), ("Max processes", "120"), ("Max locked memory", "0")] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("the limit");
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        assert_eq!(words, [most, most], "{name}");
    }
    for namespace in ["pid", "net", "mnt", "ipc", "uts"] {
        let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).expect("a namespace");
        let (its, the_agents) = (of(&process), of(Path::new(&format!("/proc/{}", agent.pid()))));
        assert_ne!(its, the_agents, "{namespace}");
    }
    assert_eq!(
        std::fs::read_dir(process.join("root")).expect("its root").count(),
        0,
        "its root directory is not empty"
    );
    let mounts = std::fs::read_to_string(process.join("mounts")).expect("its mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" ro,") || mounts.contains("ro,nosuid"), "{mounts}");
    assert_eq!(std::fs::read(process.join("environ")).expect("its environment"), b"");

    for entry in std::fs::read_dir(process.join("fd")).expect("its descriptors") {
        let path = entry.expect("a descriptor").path();
        let Ok(target) = std::fs::read_link(&path) else { continue };
        let shown = target.display().to_string();
        let is_directory = std::fs::metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        assert!(!is_directory, "it holds the directory {shown}");
        let handed = ["socket:", "anon_inode:", "pipe:", "/memfd:", "/dev/kvm", "/dev/net/tun"];
        let own = shown.starts_with(&agent.state().display().to_string());
        let images = std::env::var("HEARTH_IMAGES").expect("HEARTH_IMAGES");
        assert!(
            own || shown.starts_with(&images) || handed.iter().any(|start| shown.starts_with(start)),
            "it holds {shown}"
        );
    }
}

/// What the agent says of a jail is what can be seen of it.
pub(crate) fn is_reported_as_it_is(agent: &Agent) {
    let vm = agent.vm(agent.shared());
    let jail = &vm["jail"];
    for held in ["empty_root", "no_capabilities", "no_new_privileges", "seccomp"] {
        assert_eq!(jail[held], true, "{held} in {jail:#}");
    }
    assert_eq!(jail["namespaces"], json!(["pid", "net", "mnt", "ipc", "uts"]));
    let threads = jail["threads"].as_array().expect("threads");
    let named = |name: &str| threads.iter().any(|thread| thread["name"] == name);
    assert!(named("devices") && named("vcpu0"), "{threads:?}");
    assert!(threads.iter().all(|thread| thread["seccomp_mode"] == 2), "{threads:?}");

    let host = agent.json(&["host", "show"]);
    let isolation = &host["isolation"];
    assert_eq!(isolation["seccomp_kills"], true);
    assert_eq!(isolation["landlock_version"], jail["landlock_version"]);
    let has_io_uring = hearth::sys::uring::Ring::make(1).is_ok();
    assert_eq!(isolation["io_uring_absent"].is_null(), has_io_uring, "{isolation:#}");
    let group = std::fs::read_to_string(format!("/proc/{}/cgroup", vm["pid"])).expect("its control groups");
    let group = group.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned);
    match jail["cgroup"].as_str() {
        Some(path) => {
            assert_eq!(Some(path), group.as_deref());
            assert!(path.ends_with(vm["id"].as_str().expect("an id")), "{path}");
        }
        None => assert!(isolation["cgroup_absent"].is_string(), "a group could be made: {isolation:#}"),
    }
    // Every limit holds, or says why it does not; and the same of the host.
    for limit in jail["limits"].as_array().expect("limits") {
        assert_ne!(limit["value"] == Value::Null, limit["absent"] == Value::Null, "{limit}");
    }
    let controllers = isolation["controllers"].as_array().expect("controllers");
    let names: Vec<&Value> = controllers.iter().map(|controller| &controller["name"]).collect();
    assert_eq!(names, ["cpu", "memory", "io", "pids"]);
    for controller in controllers.iter().filter(|controller| controller["absent"] == Value::Null) {
        let prefix = format!("{}.", controller["name"].as_str().expect("a name"));
        let limits = jail["limits"].as_array().expect("limits").iter();
        let of_it = limits.filter(|limit| limit["file"].as_str().is_some_and(|file| file.starts_with(&prefix)));
        assert!(of_it.clone().count() > 0 && of_it.clone().all(|limit| limit["value"].is_string()), "{jail:#}");
    }
    assert!(agent.ok(&["vm", "show", agent.shared()]).contains("no capabilities"));
}

/// Files in VMs' directories that a process has open.
fn open_in_vms(agent: &Agent, pid: u32) -> Vec<String> {
    let vms = agent.state().join("vms");
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter_map(|target| Some(target.strip_prefix(&vms).ok()?.display().to_string())).collect()
}

pub(crate) fn holds_nothing_of_another_vm(agent: &Agent) {
    let shared = agent.shared();
    agent.launch("neighbour", &[]);
    let ids: Vec<String> =
        [shared, "neighbour"].map(|vm| agent.vm(vm)["id"].as_str().expect("an id").to_owned()).to_vec();
    for (vm, id) in [shared, "neighbour"].into_iter().zip(&ids) {
        let open = open_in_vms(agent, agent.vmm_pid(vm));
        assert!(!open.is_empty(), "{vm} has its console and its log");
        assert!(open.iter().all(|path| path.starts_with(id.as_str())), "{vm} ({id}) has {open:?}");
    }
    let uid = |vm: &str| agent.vm(vm)["jail"]["uid"].clone();
    assert_ne!(uid(shared), uid("neighbour"));
    // Neither sees a process of the other: each is alone with its threads.
    for vm in [shared, "neighbour"] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.vmm_pid(vm))).expect("its status");
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("its pids");
        assert_eq!(pids.split_whitespace().last(), Some("1"), "{vm} is the first of its own: {pids}");
    }
    agent.ok(&["vm", "rm", "neighbour"]);
}
