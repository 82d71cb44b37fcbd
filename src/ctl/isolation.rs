//! What keeps VMs apart, in words.

use super::table::{pairs, plain};
use crate::api::types::{HostIsolation, VmJail};

/// A VM's jail in one line: what holds, then what does not.
pub(super) fn jail(jail: &VmJail) -> String {
    let mut holds = vec![format!("uid {}", jail.uid)];
    let mut open = Vec::new();
    let mut say = |name: &str, is: bool| if is { holds.push(name.to_owned()) } else { open.push(name.to_owned()) };
    for name in ["pid", "net", "mnt", "ipc", "uts"] {
        say(&format!("own {name}"), jail.namespaces.iter().any(|own| own == name));
    }
    say("empty root", jail.empty_root);
    say("no capabilities", jail.no_capabilities);
    say("no new privileges", jail.no_new_privileges);
    say("seccomp", jail.seccomp);
    say("landlock", jail.landlock_version.is_some());
    for limit in &jail.limits {
        say(&limit.file, limit.value.is_some());
    }
    if jail.cgroup.is_none() {
        open.push("cgroup".to_owned());
    }
    let not = if open.is_empty() { String::new() } else { format!("; not: {}", open.join(", ")) };
    plain(&format!("{}{not}", holds.join(", ")))
}

/// What a host's kernel offers.
pub(super) fn host(isolation: &HostIsolation) -> String {
    let absent = |reason: &Option<String>| plain(&format!("no: {}", reason.as_deref().unwrap_or("unknown")));
    let mut rows = vec![
        ("seccomp".to_owned(), if isolation.seccomp_kills { "yes" } else { "no: it cannot end a process" }.to_owned()),
        (
            "landlock".to_owned(),
            isolation.landlock_version.map_or_else(|| absent(&isolation.landlock_absent), |at| format!("version {at}")),
        ),
        (
            "io_uring".to_owned(),
            isolation.io_uring_absent.as_ref().map_or_else(
                || "yes".to_owned(),
                |reason| plain(&format!("no: {reason}; each disk on a file has a thread")),
            ),
        ),
        ("cgroup".to_owned(), isolation.cgroup.as_deref().map_or_else(|| absent(&isolation.cgroup_absent), plain)),
    ];
    for one in &isolation.controllers {
        let held = if one.absent.is_some() { absent(&one.absent) } else { "yes".to_owned() };
        rows.push((format!("  {}", plain(&one.name)), held));
    }
    pairs(rows.iter().map(|(name, value)| (name.as_str(), Some(value.clone()))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::VmJailLimit;

    #[test]
    fn what_does_not_hold_is_said() {
        let limit = |file: &str, value: Option<&str>| VmJailLimit {
            file: file.to_owned(),
            value: value.map(str::to_owned),
            absent: value.is_none().then(|| "not delegated".to_owned()),
        };
        let whole = VmJail {
            uid: 7,
            namespaces: ["pid", "net", "mnt", "ipc", "uts"].map(str::to_owned).to_vec(),
            empty_root: true,
            no_capabilities: true,
            no_new_privileges: true,
            seccomp: true,
            threads: Vec::new(),
            landlock_version: Some(6),
            cgroup: Some("/hearth/hth0-vm".to_owned()),
            limits: vec![limit("memory.max", Some("1"))],
        };
        let line = jail(&whole);
        assert!(line.starts_with("uid 7, own pid,") && line.ends_with("landlock, memory.max"), "{line}");
        let limits = vec![limit("memory.max", None), limit("pids.max", Some("48"))];
        let part = VmJail { seccomp: false, cgroup: None, limits, ..whole };
        assert!(jail(&part).ends_with("landlock, pids.max; not: seccomp, memory.max, cgroup"), "{}", jail(&part));
    }
}
