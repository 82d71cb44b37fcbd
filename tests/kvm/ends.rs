//! How a VM can end, told apart by its state and cause.

use std::process::Command;

use super::fixture::{Agent, descriptors};

/// Overwrites the code of PID 1: it faults, and a kernel whose init ends panics.
const OVERWRITE_INIT: &str = "a=$(grep -m 1 r-xp /proc/1/maps | cut -d- -f1); \
    dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x$a / 4096)) count=16 conv=notrunc";

pub(crate) fn are_told_apart(agent: &Agent) {
    let ends = [
        ("panics", OVERWRITE_INIT, "failed", "guest_panic"),
        ("powers-off", "poweroff -f", "stopped", "guest_powered_off"),
        ("reboots", "reboot -f", "stopped", "guest_rebooted"),
    ];
    std::thread::scope(|scope| {
        for (name, ..) in ends {
            scope.spawn(move || agent.launch(name, &[]));
        }
    });
    for (name, script, state, cause) in ends {
        agent.run(&["vm", "exec", name, "--", "sh", "-c", script]);
        let vm = agent.wait_for_state(name, state);
        assert_eq!(vm["cause"]["code"], cause, "{vm:#}");
        assert!(vm["pid"].is_null(), "{vm:#}");
        agent.ok(&["vm", "rm", name]);
    }
    let events = agent.ok(&["--json", "events"]);
    assert!(events.contains("guest_panic"), "{events}");
}

pub(crate) fn killed_vmm_is_failed_with_its_last_lines(agent: &Agent) {
    agent.launch("killed", &[]);
    agent.sh("killed", "echo these were its last words > /dev/console; sleep 1");
    let before = descriptors(agent.pid());
    let pid = agent.vmm_pid("killed");
    let status = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("run kill");
    assert!(status.success());
    let vm = agent.wait_for_state("killed", "failed");
    let cause = vm["cause"].to_string();
    assert!(cause.contains("signal") && cause.contains('9'), "{cause}");
    assert!(vm["last_console_lines"].to_string().contains("these were its last words"), "{vm:#}");
    let output = agent.run(&["vm", "exec", "killed", "--", "true"]);
    assert_eq!(output.status.code(), Some(1));
    agent.ok(&["vm", "rm", "killed"]);
    assert!(descriptors(agent.pid()) <= before, "descriptors of the killed VM are left");
}
