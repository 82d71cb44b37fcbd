//! Many VMs, one after the other and at once: nothing is left of them, seen from outside.

use super::fixture::{Agent, Host, descriptors};

fn leave_nothing(agent: &Agent, work: impl FnOnce()) {
    let before = (Host::look(), descriptors(agent.pid()), agent.json(&["vm", "ls"]));
    work();
    assert_eq!(agent.json(&["vm", "ls"]), before.2);
    before.0.assert_same_as_now();
    let now = descriptors(agent.pid());
    assert!(now <= before.1 + 1, "the agent has {now} descriptors, it had {}", before.1);
}

pub(crate) fn twelve_in_a_loop_leave_nothing(agent: &Agent) {
    leave_nothing(agent, || {
        for number in 0..12 {
            let name = format!("loop-{number}");
            agent.launch(&name, &[]);
            assert_eq!(agent.sh(&name, "hostname"), name);
            agent.ok(&["vm", "rm", &name]);
        }
    });
}

pub(crate) fn six_at_once_leave_nothing(agent: &Agent) {
    leave_nothing(agent, || {
        std::thread::scope(|scope| {
            for number in 0..6 {
                scope.spawn(move || {
                    let name = format!("six-{number}");
                    let vcpus = if number % 2 == 0 { "1" } else { "2" };
                    agent.launch(&name, &["--vcpus", vcpus]);
                    assert_eq!(agent.sh(&name, "nproc 2>/dev/null || grep -c processor /proc/cpuinfo"), vcpus);
                    agent.ok(&["vm", "rm", &name]);
                });
            }
        });
    });
}
