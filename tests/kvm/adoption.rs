//! An agent dies; the next one finds and serves what runs.

use super::fixture::Agent;

pub(crate) fn next_agent_serves_running_vms(agent: &Agent) {
    let vm = agent.shared();
    let before = agent.vm(vm);
    agent.sh(vm, "echo kept > /tmp/kept");
    agent.kill_and_restart();
    assert_eq!(agent.sh(vm, "cat /tmp/kept"), "kept");
    let after = agent.vm(vm);
    for same in ["id", "name", "pid", "generation", "created_at"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    assert_eq!(after["state"], "running");
    agent.ok(&["vm", "pause", vm]);
    agent.kill_and_restart();
    assert_eq!(agent.vm(vm)["state"], "paused");
    agent.ok(&["vm", "resume", vm]);
    assert_eq!(agent.sh(vm, "cat /tmp/kept"), "kept");
    // What the new agent did not start itself it can still end.
    agent.ok(&["vm", "rm", vm]);
    assert!(!agent.run(&["vm", "show", vm]).status.success());
}
