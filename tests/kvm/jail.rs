//! The jail of a VMM, looked at from outside.

use std::path::{Path, PathBuf};

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
